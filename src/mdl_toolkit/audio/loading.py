"""Load a file as mono float32 samples at the model's rate, or raise an error naming format and remedy.

Nothing is cut, padded or clipped without being marked. Addresses are not followed; `http` fetches them.
"""

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mdl_toolkit.audio.decoders import Decoded, decode
from mdl_toolkit.audio.embedded import open_recording
from mdl_toolkit.audio.file_parts import Blocks, Splice
from mdl_toolkit.audio.integrity import check_integrity
from mdl_toolkit.audio.mpeg import after_id3
from mdl_toolkit.audio.resample import SILENCE, Floats, to_model_rate
from mdl_toolkit.audio.segments import OVERSHOOT, Cut, Cutter, Segment, SegmentError, read_channel
from mdl_toolkit.errors import AudioError, CutOffError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.model.constants import SAMPLE_RATE as SAMPLE_RATE
from mdl_toolkit.model.lengths import MIN_SAMPLES


@dataclass(frozen=True, eq=False)
class Clip:
    """Hold a recording, or a segment of one, as the model takes it.

    Attributes:
        format: name of the source's format.
        stored: float32 `[m]`, the mono mix that a dataset stores: at the source's rate if that is up to
            16 kHz, or up to 24 kHz and 16 bits are exact; else at 16 kHz.
        stored_rate: Hz, of these.
        source_seconds: length of the source, or of the segment.
        source_rate: Hz.
        channels: of the source; all were averaged unless the segment names one.
        padded: zeros are added at the end, up to 3,200 samples.
        silent: no sample of the mono mix reaches -80 dBFS.
        clipped: three samples of the mono mix in a row are at full scale: it was recorded too loud.
        full_scale: share of the mono mix's samples that are at full scale, 0 to 1.
        truncated: what the file promised and what came; None if all of it, or of the segment, came.
        cancelled: it is silent only because its channels cancel each other out.
        has_length: the file says how long it is, so that a cut is noticed wherever it is.
    """

    format: str
    stored: Floats
    stored_rate: int
    source_seconds: float
    source_rate: int
    channels: int
    padded: bool
    silent: bool
    clipped: bool
    full_scale: float
    truncated: Localized | None
    cancelled: bool = False
    has_length: bool = True

    @cached_property
    def samples(self) -> Floats:
        """Return float32 `[n]`, mono, at 16 kHz.

        n is the source's length * 16000 / rate, rounded, but at least 3,200.
        """
        return to_model_rate(self.stored, self.stored_rate)


def load(
    path: str | Path,
    *,
    start: float = 0.0,
    end: float | None = None,
    channel: int | str | None = None,
    allow_truncated: bool = False,
    max_hours: float = math.inf,
) -> Clip:
    """Decode a local file, mix it down to mono, resample it to 16 kHz and check it.

    Args:
        path: the file; its extension means nothing.
        start: seconds, where the segment that is wanted begins.
        end: seconds, where it ends; None at the end of the recording.
        channel: counted from 1, or `left` or `right`; None or `mean` averages all.
        allow_truncated: accept a file that was cut off, with what is left of it.
        max_hours: refuse what is longer, as memory grows with it: 0.23 GB an hour.

    Raises:
        AudioError: the file cannot be opened, is empty, is no recording, is damaged, too long or cut off, or
            holds NaN, infinity or no samples at all, or not the segment. The
            message does not name the file.

    Example:
        ```python
        from mdl_toolkit.audio.loading import load

        clip = load("recordings/0001.flac")
        print(clip.samples.shape, clip.source_seconds, clip.source_rate)
        # A second of a call, in which each speaker has a channel.
        print(load("recordings/0001.flac", start=0.5, end=1.5, channel="left").source_seconds)
        ```
    """
    segment = Segment(start, end, read_channel(channel))
    (clip,) = load_segments(path, [segment], allow_truncated, max_hours)
    if isinstance(clip, AudioError):
        raise clip
    return clip


def load_segments(
    path: str | Path, segments: Sequence[Segment], allow_truncated: bool = False, max_hours: float = math.inf
) -> list[Clip | AudioError]:
    """Decode a local file once, and return segments of it, or why they cannot be had.

    Memory is that of the segments. The whole file is decoded and checked, whatever the segments are.

    Args:
        path: the file.
        segments: any number, in any order.
        allow_truncated: accept a file that was cut off, and segments as far as they are there.
        max_hours: refuse a file that is longer.

    Raises:
        AudioError: see `load`; of the file as a whole.
    """
    cutter = Cutter(segments)
    decoded = decode_whole(path, cutter, allow_truncated, max_hours)
    return [_clip(decoded.format, cutter, cut, decoded.missing, decoded.has_length) for cut in cutter.cuts]


def load_length(path: str | Path, allow_truncated: bool = False, max_hours: float = math.inf) -> float:
    """Decode a local file, and return its length in seconds; memory does not grow with that.

    Raises:
        AudioError: see `load`; of the file as a whole.
    """
    cutter = Cutter(())
    decode_whole(path, cutter, allow_truncated, max_hours)
    return cutter.length / cutter.rate


def decode_whole(path: str | Path, cutter: Cutter, allow_truncated: bool, max_hours: float) -> Decoded:
    """Decode a local file to its end for a cutter, and check that all of it came.

    Raises:
        AudioError: see `load`; of the file as a whole.
    """
    try:
        plain = open_recording(path)
    except (OSError, ValueError) as problem:
        raise AudioError(
            "the file cannot be opened ({reason}); correct the path or its permissions", reason=problem
        ) from problem
    with _File(plain) as whole:
        size = whole.seek(0, 2)
        if not size:
            raise AudioError("the file is empty (0 bytes); get it again")
        file = _File(Splice(whole, (range(after_id3(Blocks(whole)), size),)))
        integrity = check_integrity(file)
        _check_complete(integrity.missing, allow_truncated)
        if integrity.parts:
            file = _File(Splice(file, integrity.parts))
        decoded = decode(file, integrity, cutter, max_hours)
    missing = integrity.missing or decoded.missing
    _check_complete(missing, allow_truncated)
    if not cutter.length:
        raise AudioError("{name}: there are no samples in it; get it again", name=decoded.format)
    return replace(decoded, missing=missing, has_length=integrity.has_length or decoded.has_length)


def _clip(
    name: str, cutter: Cutter, cut: Cut, missing: Localized | None, has_length: bool
) -> Clip | AudioError:
    """Return a segment of a recording that was decoded to its end, or what is wrong with the segment."""
    mixdown, rate, seconds = cut.mixdown, cutter.rate, cutter.length / cutter.rate
    if cut.problem is not None:
        return cut.problem
    if round(cut.segment.start * rate) >= cutter.length:
        return SegmentError(
            "start", Localized("the recording ends after {seconds:.3f} s; correct it", seconds=seconds)
        )
    if cut.last > cutter.length + OVERSHOOT * rate and cut.segment.end is not None and not missing:
        return SegmentError(
            "end", Localized("the recording ends after {seconds:.3f} s; correct it", seconds=seconds)
        )
    if not mixdown.length:
        return SegmentError("end", Localized("no sample lies between start and end; correct one of them"))
    stored, stored_rate = mixdown.finish()
    return Clip(
        format=name,
        stored=stored,
        stored_rate=stored_rate,
        source_seconds=mixdown.length / rate,
        source_rate=rate,
        channels=cutter.channels,
        padded=mixdown.length * SAMPLE_RATE < (MIN_SAMPLES - 0.5) * rate,
        silent=mixdown.peak < SILENCE,
        clipped=mixdown.clipped,
        full_scale=mixdown.loud / mixdown.length,
        truncated=missing if cut.last > cutter.length else None,
        cancelled=mixdown.peak < SILENCE <= mixdown.channel_peak,
        has_length=has_length,
    )


class _File(io.BufferedReader):
    """Read a file, returning -1 from a `seek` to an impossible position, as C does.

    Decoders try such positions in damaged files, and an exception there would be printed with a traceback.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError):
            return -1


def _check_complete(missing: Localized | None, allow_truncated: bool) -> None:
    if missing and not allow_truncated:
        raise CutOffError(
            "the file was cut off: {missing}; get all of it, or accept it with --allow-truncated",
            missing=missing,
        )
