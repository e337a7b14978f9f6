"""CSVs that are read whole, and the join of two of them; recordings are not needed.

Rows are joined by `audio`, and its segment, where these are unique, else by their number.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mdl_toolkit.audio.segments import WHOLE_RECORDING, Segment
from mdl_toolkit.audio.urls import without_credentials
from mdl_toolkit.data.column_names import AUDIO, PREDICTION, check_columns, find_column, forgive
from mdl_toolkit.data.csv_reader import cell_problems, no_rows_error, open_rows
from mdl_toolkit.data.segment_columns import SEGMENT_COLUMNS, segment_or_whole
from mdl_toolkit.errors import InputError, Problems, shorten
from mdl_toolkit.i18n import Localized, join_messages

REFERENCE, ERROR, SCORE, LENGTH = "reference", "error", "score", "length"
# Columns with the length of a recording.
SECONDS = ("seconds", "duration")
# The columns that are read by their names.
READ = (AUDIO, PREDICTION, REFERENCE, ERROR, SCORE, LENGTH, *SECONDS, *SEGMENT_COLUMNS)
# A cell of `audio` and a part of it.
Recording = tuple[str, Segment]
# Number of rows that a message names.
MOST_EXAMPLES = 3


@dataclass(frozen=True)
class Table:
    """Hold the rows of a CSV.

    Attributes:
        path: the file.
        columns: names of the columns.
        lines: `[rows]` line on which each row starts, counted from 1.
        cells: `[rows]` the row's cells, one for each column.
        notes: messages on columns that are read under another name than their own.
    """

    path: Path
    columns: tuple[str, ...]
    lines: tuple[int, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[Localized, ...] = ()

    def __len__(self) -> int:
        return len(self.cells)

    def column(self, name: str) -> list[str]:
        """Return the cells of one column as they were written, `[rows]`."""
        index = self.columns.index(name)
        return [row[index] for row in self.cells]

    def recordings(self, *, by_segment: bool) -> list[Recording]:
        """Return the cells of `audio`, `[rows]`, and the segments that other columns name, if asked for."""
        names = self.column(AUDIO)
        if not by_segment:
            return [(name, WHOLE_RECORDING) for name in names]
        cells = (dict(zip(self.columns, row, strict=True)) for row in self.cells)
        return [(name, segment_or_whole(row)) for name, row in zip(names, cells, strict=True)]

    def find_column(self, name: str) -> str:
        """Return a column as the file spells it, case and spacing forgiven.

        Raises:
            InputError: there is no such column.
        """
        found = find_column(name, self.columns)
        check_columns(self.path, self.columns, [found])
        return found


def read_table(path: str | Path, needed: Sequence[str] = ()) -> Table:
    """Read a CSV; rows with too few cells are filled up with empty ones.

    Raises:
        InputError: the file cannot be read, is no CSV, has no row, or lacks a column.
        RowsError: rows with too many cells, or bytes that are no text, all of them.
    """
    path, problems = Path(path), Problems()
    numbers: list[int] = []
    cells: list[tuple[str, ...]] = []
    file = open_rows(path, needed or (AUDIO, PREDICTION))
    columns, notes = forgive(path, file.columns, READ)
    check_columns(path, columns, needed)
    for line in file:
        for problem in cell_problems(columns, line):
            problems.add(problem)
        numbers.append(line.number)
        missing = [""] * (len(columns) - len(line.cells))
        cells.append((*line.cells, *missing))
    problems.check(str(path))
    if not cells:
        raise no_rows_error(path)
    return Table(path, columns, tuple(numbers), tuple(cells), tuple(notes))


def join_tables(left: Table, right: Table) -> tuple[Table, Localized]:
    """Bring the rows of `right` into the order of those of `left`; each row of both has one counterpart.

    The key is `audio` if both tables have it, its values are unique in both, and at least one is in both; or
    likewise `audio` with the segment that other columns name. Otherwise it is the row number; then recordings
    must have the same file name in each row of both.

    Returns:
        The other table in its new order, and a message that names the key.

    Raises:
        InputError: rows without a counterpart, or another number of rows.
    """
    if AUDIO in left.columns and AUDIO in right.columns:
        for is_by_segment in (False, True):
            ours, theirs = (table.recordings(by_segment=is_by_segment) for table in (left, right))
            is_unique = all(len(set(keys)) == len(keys) for keys in (ours, theirs))
            if not is_unique or not set(ours) & set(theirs):
                continue
            _check_known(left, right, {*theirs}, ours)
            _check_known(right, left, {*ours}, theirs)
            row_of = {key: row for row, key in enumerate(theirs)}
            rows = [row_of[key] for key in ours]
            lines = tuple(right.lines[row] for row in rows)
            cells = tuple(right.cells[row] for row in rows)
            by = Localized("joined by the column audio")
            if is_by_segment:
                by = Localized("joined by recording and segment")
            return replace(right, lines=lines, cells=cells), by
        if len(left) == len(right):
            _check_file_names(left, right)
    if len(left) != len(right):
        raise InputError(
            "{left} has {count} {count:row|rows} and {right} {right_rows}, and they cannot be joined by "
            "audio ({why}); give files with the same rows.",
            left=left.path,
            count=len(left),
            right=right.path,
            right_rows=len(right),
            why=_why_not_by_audio(left, right),
        )
    return right, Localized("joined by row number")


def _check_known(table: Table, other: Table, known: Container[Recording], keys: Sequence[Recording]) -> None:
    """Raise InputError if recordings of a table are not in another one, which has the known ones."""
    lost = [row for row, key in enumerate(keys) if key not in known]
    if lost:
        raise InputError(
            "{path}: {lost} of {rows} recordings {lost:is|are} not in {other} ({examples}); give files with "
            "the same rows.",
            path=table.path,
            lost=len(lost),
            rows=len(table),
            other=other.path,
            examples=_examples([_recording(table, row) for row in lost]),
        )


def _why_not_by_audio(left: Table, right: Table) -> Localized:
    """Explain why the column `audio` is no key for two tables."""
    for table in (left, right):
        if AUDIO not in table.columns:
            return Localized("{path} has no such column", path=table.path)
        first_of: dict[str, int] = {}
        for row, name in enumerate(table.column(AUDIO)):
            if first_of.setdefault(name, row) != row:
                return Localized(
                    "{path} has {shown!r} on lines {first} and {line}",
                    path=table.path,
                    shown=shorten(without_credentials(name)),
                    first=table.lines[first_of[name]],
                    line=table.lines[row],
                )
    ours, theirs = _recording(left, 0), _recording(right, 0)
    return Localized("none is written alike in both: {left}, {right}", left=ours, right=theirs)


def _check_file_names(left: Table, right: Table) -> None:
    """Raise InputError if recordings of rows with the same number have different file names."""
    pairs = enumerate(zip(left.column(AUDIO), right.column(AUDIO), strict=True))
    wrong = [row for row, paths in pairs if len({re.split(r"[/\\]", path)[-1] for path in paths}) > 1]
    if wrong:
        shown = [
            Localized("{left} is beside {right}", left=_recording(left, row), right=_recording(right, row))
            for row in wrong
        ]
        raise InputError(
            "{left} and {right} name different recordings in {wrong} of {rows} rows ({examples}); give files "
            "with the same rows in the same order.",
            left=left.path,
            right=right.path,
            wrong=len(wrong),
            rows=len(left),
            examples=_examples(shown),
        )


def _recording(table: Table, row: int) -> Localized:
    """Name a row's recording and line in a message."""
    line, name = table.lines[row], shorten(without_credentials(table.column(AUDIO)[row]))
    return Localized("{name!r} on line {line}", name=name, line=line)


def _examples(messages: Sequence[Localized]) -> Localized:
    """Join the first of some messages."""
    parts = [*messages[:MOST_EXAMPLES]]
    if len(messages) > MOST_EXAMPLES:
        parts.append(Localized("..."))
    return join_messages(parts, "{left}, {right}")
