"""What a conversion counts: per shard, added up, told to the user, and kept in the dataset's record.

Nothing here grows with the number of rows.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mdl_toolkit import __version__
from mdl_toolkit.audio.loading import SAMPLE_RATE, Clip
from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.data.dataset import Record
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import Problems, RowProblem
from mdl_toolkit.i18n import Localized
from mdl_toolkit.model.constants import MEASURED_SECONDS
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.weights.provenance import Prompts
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles

PCM_BYTES = 2  # a 16-bit sample
MOST_LONG = 10  # long clips that are named
DIFFERENT = 2  # prompts: as many as it takes to know that they are not all the same
LISTS = ("truncated", "long", "problems")


@dataclass
class ConversionStats:
    """Count what some rows came to.

    Attributes:
        rows: rows that are stored.
        samples: of audio at 16 kHz.
        shortest: samples of the shortest clip.
        longest: samples of the longest clip.
        audio_tokens: tokens that are audio.
        positions: number of tokens of a row, to how many rows have so many.
        system_prompts: those of the rows, the first two different ones; empty and none are one.
        user_prompts: likewise.
        padded: clips padded to one audio token.
        silent: clips with nothing to hear.
        clipped: clips that were recorded too loud.
        cancelled: clips that are silent because their channels cancel each other out.
        truncated: clips that are shorter than their files promise.
        long: clips that are longer than the authors of the model measured with.
        problems: rows that cannot be used.
        bytes: on disk.
        crc32: checksum of one shard; not for several.
    """

    rows: int = 0
    samples: int = 0
    shortest: int = 0
    longest: int = 0
    audio_tokens: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    system_prompts: list[str | None] = field(default_factory=list)
    user_prompts: list[str | None] = field(default_factory=list)
    padded: int = 0
    silent: int = 0
    clipped: int = 0
    cancelled: int = 0
    truncated: Problems = field(default_factory=Problems)
    long: Problems = field(default_factory=lambda: Problems(most=MOST_LONG))
    problems: Problems = field(default_factory=Problems)
    bytes: int = 0
    crc32: int = 0

    def add(self, row: Row, clip: Clip, positions: int, audio_tokens: int) -> None:
        """Count one row."""
        length = len(clip.samples)
        one = ConversionStats(
            1, length, length, length, audio_tokens, {positions: 1}, [row.system_prompt or None],
            [row.user_prompt or None], clip.padded, clip.silent, clip.clipped, clip.cancelled,
        )  # fmt: skip
        if clip.truncated is not None:
            one.truncated.add(RowProblem(row.line, "audio", row.shown, clip.truncated))
        if length > MEASURED_SECONDS * SAMPLE_RATE:
            seconds = Localized("{seconds:.0f} s", seconds=length / SAMPLE_RATE)
            one.long.add(RowProblem(row.line, "audio", row.shown, seconds))
        self.merge(one)

    def merge(self, other: "ConversionStats") -> None:
        """Add the counts of other rows."""
        self.shortest = min(self.shortest or other.shortest, other.shortest or self.shortest)
        self.longest = max(self.longest, other.longest)
        for name in ("rows", "samples", "audio_tokens", "padded", "silent", "clipped", "cancelled", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for length, rows in other.positions.items():
            self.positions[length] = self.positions.get(length, 0) + rows
        for name in ("system_prompts", "user_prompts"):
            both = dict.fromkeys([*getattr(self, name), *getattr(other, name)])
            setattr(self, name, [*both][:DIFFERENT])
        self.truncated.merge(other.truncated)
        self.long.merge(other.long)
        self.problems.merge(other.problems)

    def record(self, files: TokenizerFiles, options: ConversionOptions) -> Record:
        """Return the dataset's record."""
        return Record(
            tokenizer=files.tokenizer_fingerprint,
            chat_template=files.template_fingerprint,
            system_prompt=options.system_prompt,
            user_prompt=options.user_prompt,
            prompts=Prompts(
                _only(self.system_prompts),
                _only(self.user_prompts),
                len(self.system_prompts) == DIFFERENT,
                len(self.user_prompts) == DIFFERENT,
            ),
            rows=self.rows,
            seconds=self.samples / SAMPLE_RATE,
            shortest_seconds=self.shortest / SAMPLE_RATE,
            longest_seconds=self.longest / SAMPLE_RATE,
            text_tokens=sum(length * rows for length, rows in self.positions.items()) - self.audio_tokens,
            audio_tokens=self.audio_tokens,
            median_tokens=self._not_exceeded_by(50),
            p95_tokens=self._not_exceeded_by(95),
            most_tokens=self._not_exceeded_by(100),
            padded=self.padded,
            silent=self.silent,
            clipped=self.clipped,
            truncated=self.truncated.count,
            bytes=self.bytes,
            toolkit=__version__,
        )

    def _not_exceeded_by(self, percent: int) -> int:
        """Return the length that `percent` of the rows do not exceed (nearest rank)."""
        seen = 0
        for length in sorted(self.positions):
            seen += self.positions[length]
            if seen * 100 >= percent * self.rows:
                return length
        return 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` understands."""
        return {**asdict(self), **{name: getattr(self, name).to_json() for name in LISTS}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ConversionStats":
        """Restore what `to_json` made.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: these are other values.
        """
        positions = {int(length): int(rows) for length, rows in values["positions"].items()}
        lists = {
            name: Problems(**{**each, "first": [*map(RowProblem.from_json, each["first"])]})
            for name in LISTS
            for each in (values[name],)
        }
        return cls(**{**values, "positions": positions, **lists})


def _only(prompts: list[str | None]) -> str | None:
    """Return the prompt of all rows, if it is one."""
    return prompts[0] if len(prompts) == 1 else None


# --- told to the user ----------------------------------------------------------------------------------


def warn_of_clips(stats: ConversionStats, *, is_list: bool = False) -> None:
    """Say what a user should know of the recordings; of a list of files nobody has seen the lines."""
    for each in stats.truncated.first:
        if is_list:
            warn("{recording}: {reason}", recording=each.value, reason=each.reason)
        else:
            warn(
                "line {line}: {recording}: {reason}",
                line=each.line,
                recording=each.value,
                reason=each.reason,
            )
    more = stats.truncated.count - len(stats.truncated.first)
    if more:
        warn("{more} more {more:recording was|recordings were} cut off", more=more)
    if stats.padded:
        warn(
            "{padded} {padded:clip is|clips are} shorter than 0.2 s and {padded:was|were} padded to one "
            "audio token",
            padded=stats.padded,
        )
    if stats.silent:
        warn("{silent} {silent:clip is|clips are} silent", silent=stats.silent)
    if stats.cancelled:
        warn(
            "{cancelled} of them {cancelled:has|have} sound, but {cancelled:its|their} channels cancel each "
            "other out (opposite phase); choose one in a column `channel`: 1, 2, left or right",
            cancelled=stats.cancelled,
        )
    if stats.clipped:
        warn("{clipped} {clipped:clip is|clips are} clipped (recorded too loud)", clipped=stats.clipped)


def warn_of_long_clips(stats: ConversionStats) -> None:
    """Say which clips are longer than those that the authors of the model measured with."""
    if count := stats.long.count:
        lines = [f"{each.line} ({each.reason})" for each in stats.long.first]
        warn(
            "{count:,} {count:row is|rows are} longer than {seconds} s, the longest that the model's authors "
            "give figures for: line {lines}; `check --cut` cuts them where a label holds for each part",
            count=count,
            seconds=MEASURED_SECONDS,
            lines=", ".join(lines) + ", ..." * (count > len(lines)),
        )


def say_summary(output: Path, record: Record) -> None:
    """Say what was converted."""
    say(
        "{output}: {rows:,} {rows:row|rows}, {hours:,.2f} hours, {tokens:,} tokens",
        output=output,
        rows=record.rows,
        hours=record.seconds / 3600,
        tokens=record.audio_tokens + record.text_tokens,
    )
    say(
        "  tokens per row: median {median:,}, 95 % up to {p95_tokens:,}, longest {most:,}",
        median=record.median_tokens,
        p95_tokens=record.p95_tokens,
        most=record.most_tokens,
    )
    say(
        "  clips: {shortest:.2f} s to {longest:.2f} s; padded {padded:,}, silent {silent:,}, clipped "
        "{clipped:,}",
        shortest=record.shortest_seconds,
        longest=record.longest_seconds,
        padded=record.padded,
        silent=record.silent,
        clipped=record.clipped,
    )
    share = record.bytes / (PCM_BYTES * SAMPLE_RATE * record.seconds)
    say(
        "  on disk: {megabytes:,.1f} MB, {share:.2f} times the audio as 16-bit PCM",
        megabytes=record.bytes / 1000000.0,
        share=share,
    )
