"""Segments of a recording: which seconds and which channel, and how they are cut from decoded sound.

A segment is cut at the source's rate, from the sample nearest to its start up to the one nearest to its end,
and mixed down and resampled by itself: it gives what a file with just these samples would give.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from mdl_toolkit.audio.resample import CONVERT, RATES, Floats, Mixdown
from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Localized

# Channels by their names in a recording of two.
CHANNELS = {"left": 1, "right": 2}
# Seconds by which an end may lie beyond the recording's: annotations are rounded.
OVERSHOOT = 0.1


class SegmentError(AudioError):
    """Refuse a segment that its recording does not have.

    Attributes:
        field: what is wrong: `start`, `end` or `channel`.
    """

    def __init__(self, field: str, message: Localized) -> None:
        self.field = field
        super().__init__(message)


@dataclass(frozen=True)
class Segment:
    """Name a part of a recording.

    Attributes:
        start: seconds, where it begins.
        end: seconds, where it ends; None at the end of the recording.
        channel: counted from 1; None is the average of all.

    Raises:
        SegmentError: no recording has such a part.
    """

    start: float = 0.0
    end: float | None = None
    channel: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < math.inf:
            raise SegmentError("start", Localized("before the recording begins; count seconds from 0"))
        if self.end is not None and not self.start < self.end < math.inf:
            raise SegmentError(
                "end", Localized("not after the start, {start:g} s; correct one of them", start=self.start)
            )
        if self.channel is not None and self.channel < 1:
            raise SegmentError("channel", Localized("channels are counted from 1; correct it"))

    @property
    def length(self) -> float:
        """Return the seconds that it names, infinity if it ends with the recording."""
        return math.inf if self.end is None else self.end - self.start

    @property
    def is_whole(self) -> bool:
        """Tell whether it is all of the recording, with its channels averaged."""
        return self == WHOLE_RECORDING


WHOLE_RECORDING = Segment()


def read_channel(channel: int | str | None) -> int | None:
    """Return a channel's number, counted from 1, or None for the average of all.

    Raises:
        SegmentError: it is neither a number nor a name.
    """
    if channel in (None, "", "null", "mean"):
        return None
    try:
        # Where cells are missing, pandas writes numbers with a fraction.
        number = CHANNELS.get(str(channel)) or float(channel)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise SegmentError(
        "channel",
        Localized(
            "no channel; give 1, 2, left, right or mean, or rename the column if it means something else"
        ),
    )


@dataclass
class Cut:
    """Hold what has been cut of a segment.

    Attributes:
        segment: which.
        mixdown: of its samples.
        first: its first sample at the source's rate.
        last: the sample after its last one; infinite at the recording's end.
        problem: why it cannot be cut.
    """

    segment: Segment
    mixdown: Mixdown = field(default_factory=Mixdown)
    first: int = 0
    last: float = math.inf
    problem: AudioError | None = None

    def add(self, name: str, block: Floats, rate: int, begin: int) -> None:
        """Add what lies in the segment of a block that begins at a sample."""
        channel = self.segment.channel
        part = block[:, max(self.first - begin, 0) : int(min(self.last - begin, block.shape[1]))]
        if channel is not None:
            part = part[channel - 1 : channel]
            if not len(part):
                self.problem = SegmentError(
                    "channel",
                    Localized(
                        "the recording has {channels} {channels:channel|channels}; correct it",
                        channels=len(block),
                    ),
                )
                return
        try:
            self.mixdown.add(name, part, rate, max(self.first, begin))
        except AudioError as problem:
            # Another segment may be sound.
            self.problem = problem


class Cutter:
    """Take blocks of decoded sound, and cut segments from them.

    Attributes:
        cuts: of the segments, in their order.
        rate: Hz, of the source; 0 before the first block.
        channels: of the source's last block.
        length: samples per channel so far.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.rate = self.channels = self.length = 0
        self.cuts = [Cut(segment) for segment in segments]
        # Backwards, so that the next one to begin is the last.
        self._waiting = sorted(self.cuts, key=lambda cut: -cut.segment.start)
        self._open: list[Cut] = []

    def add(self, name: str, block: Floats, rate: int) -> None:
        """Add decoded samples, `[channels, n]` float32.

        Raises:
            AudioError: the rate is impossible or changes; with the format's name.
        """
        if rate not in RATES:
            raise AudioError(
                "{name}: {rate} Hz is no possible sampling rate; the header is damaged, get the file again",
                name=name,
                rate=rate,
            )
        if self.rate not in (0, rate):
            raise AudioError(
                "{name}: the sampling rate changes in the middle; {convert}", name=name, convert=CONVERT
            )
        self.rate, self.channels = rate, len(block)
        begin, self.length = self.length, self.length + block.shape[1]
        while self._waiting and round(self._waiting[-1].segment.start * rate) < self.length:
            cut = self._waiting.pop()
            cut.first = round(cut.segment.start * rate)
            cut.last = math.inf if cut.segment.end is None else round(cut.segment.end * rate)
            self._open.append(cut)
        for cut in self._open:
            cut.add(name, block, rate, begin)
        self._open = [cut for cut in self._open if cut.last > self.length and cut.problem is None]
