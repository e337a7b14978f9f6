"""The columns that name a part of a recording: when it starts and ends, and on which channel it is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdl_toolkit.audio.segments import WHOLE_RECORDING, Segment, SegmentError, read_channel
from mdl_toolkit.data.csv_format import csv_error
from mdl_toolkit.i18n import Localized

START, END, DURATION, CHANNEL = "start", "end", "duration", "channel"
# Columns by what they mean; a duration means the segment's beside a start only, else the recording's.
SEGMENT_COLUMNS = {
    "start": START, "begin": START, "offset": START, "end": END, "duration": DURATION, "channel": CHANNEL
}  # fmt: skip
TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(-?\d*\.?\d+(?:[eE][+-]?\d+)?|\d+\.)")
# Seconds by which a duration may differ from what start and end say: each may be rounded.
ROUNDING = 0.05

NO_TIME = Localized(
    "no time; write seconds (62.5) or minutes and seconds (1:02.5), or rename the column if it is no time in "
    "the recording"
)


def check_segment_columns(path: Path, columns: Sequence[str]) -> None:
    """Raise InputError if two columns say the same."""
    first: dict[str, str] = {}
    for name in columns:
        if name in SEGMENT_COLUMNS and first.setdefault(SEGMENT_COLUMNS[name], name) != name:
            one = first[SEGMENT_COLUMNS[name]]
            reason = Localized(
                "the columns {one!r} and {other!r} mean the same; remove one", one=one, other=name
            )
            raise csv_error(path, reason)


def segment_cells(cells: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the column and the cell of a row that say its start, end, duration and channel, by these."""
    found = {SEGMENT_COLUMNS[name]: (name, cell) for name, cell in cells.items() if name in SEGMENT_COLUMNS}
    if START not in found:
        found.pop(DURATION, None)
    return found


def read_segment(found: Mapping[str, tuple[str, str]]) -> Segment | tuple[str, Localized]:
    """Return the part of the recording that a row is about, or what is wrong: which cell, and what with it.

    Args:
        found: the cells that say so, as of `segment_cells`; empty ones and `null` say nothing.
    """
    times: dict[str, float | None] = dict.fromkeys((START, END, DURATION))
    for name in times.keys() & found.keys():
        cell = found[name][1].strip()
        if cell in ("", "null"):
            continue
        if (match := TIME.fullmatch(cell)) is None:
            return name, NO_TIME
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        times[name] = 3600 * hours + 60 * minutes + seconds
    start, end, duration = times[START] or 0.0, times[END], times[DURATION]
    if duration is not None:
        if end is not None and abs(end - start - duration) > ROUNDING:
            return DURATION, Localized(
                "start and end are {seconds:g} s apart; correct or remove one of the three columns",
                seconds=end - start,
            )
        end = start + duration if end is None else end
    try:
        return Segment(start, end, read_channel(found.get(CHANNEL, ("", ""))[1].strip()))
    except SegmentError as problem:
        return problem.field, problem.message


def segment_or_whole(cells: Mapping[str, str]) -> Segment:
    """Return the part of the recording that a row's cells name, by columns; all of it if they name none."""
    segment = read_segment(segment_cells(cells))
    return segment if isinstance(segment, Segment) else WHOLE_RECORDING


@dataclass(frozen=True)
class TimeColumns:
    """Name the columns of a file for the times of segments.

    Attributes:
        names: by what they mean: the file's own, else `start` and `end`.
        whole: new cells, by column, of a row that is not cut: beside a start, the length of a whole recording
            would be taken for a segment's.
    """

    names: Mapping[str, str]
    whole: Mapping[str, str]

    @classmethod
    def of(cls, written: Sequence[str], columns: Sequence[str]) -> "TimeColumns":
        """Find the columns of a file, by their names as written and as understood."""
        names = zip(written, columns, strict=True)
        own = {SEGMENT_COLUMNS[name]: column for column, name in names if name in SEGMENT_COLUMNS}
        own.pop(CHANNEL, None)
        whole = {own[DURATION]: ""} if DURATION in own and START not in own else {}
        return cls({START: START, END: END, **own}, whole)

    def cells(self, start: float, end: float) -> dict[str, str]:
        """Return the cells of a segment, in seconds to a millisecond without needless zeros: 62.5."""
        times = {START: start, END: end, DURATION: end - start}
        return {
            column: f"{times[name]:.3f}".rstrip("0").removesuffix(".") for name, column in self.names.items()
        }
