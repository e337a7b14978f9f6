"""A whole CSV in memory, and which row of one CSV belongs to which row of another; recordings are not needed.

Rows are joined by `audio` where that names each of them, else by their number; a mismatch is one sentence.
"""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mdl_toolkit.audio.urls import without_credentials
from mdl_toolkit.data.csv_reader import (
    NUL_MARK,
    check_columns,
    excess,
    no_rows_error,
    open_csv,
    read_header,
    read_lines,
)
from mdl_toolkit.data.manifest import AUDIO
from mdl_toolkit.errors import InputError, Problems
from mdl_toolkit.i18n import Localized, join_messages

EXAMPLES = 3  # so many rows are named in a message


@dataclass(frozen=True)
class Table:
    """The rows of a CSV.

    Attributes:
        path: the file.
        columns: their names.
        lines: where each row starts, counted from 1, `[rows]`.
        cells: the rows, each with as many cells as there are columns.
    """

    path: Path
    columns: tuple[str, ...]
    lines: tuple[int, ...]
    cells: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.cells)

    def column(self, name: str) -> list[str]:
        """The cells of one column, as they were written."""
        place = self.columns.index(name)
        return [row[place] for row in self.cells]

    def need(self, name: str) -> None:
        """Raise InputError if there is no such column."""
        check_columns(self.path, self.columns, [name])


def read_table(path: str | Path, needed: Sequence[str] = ()) -> Table:
    """Read a CSV; rows with too few cells are filled up with empty ones. A model may have written NUL bytes.

    Raises:
        InputError: the file cannot be read, is no CSV, has no row, or lacks a column.
        RowsError: rows with too many cells, all of them.
    """
    path, problems = Path(path), Problems()
    numbers: list[int] = []
    cells: list[tuple[str, ...]] = []
    with open_csv(path) as file, closing(read_lines(path, file)) as lines:
        columns = read_header(path, lines)
        check_columns(path, columns, needed)
        for line in lines:
            for problem in excess(columns, line):
                problems.add(problem)
            numbers.append(line.number)
            missing = [""] * (len(columns) - len(line.cells))
            cells.append((*(cell.replace(NUL_MARK, "\0") for cell in line.cells), *missing))
    problems.check(str(path))
    if not cells:
        raise no_rows_error(path)
    return Table(path, columns, tuple(numbers), tuple(cells))


# --- joining -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Join:
    """Which row of another table belongs to each row of a table.

    Attributes:
        rows: numbers of the other's rows, counted from 0.
        by: how they were found.
    """

    rows: tuple[int, ...]
    by: Localized


def join_tables(left: Table, right: Table) -> Join:
    """Find the row of `right` for each row of `left`; all of both are used.

    By `audio`, if both have it, no two rows of either have the same, and at least one is written alike in
    both. Else by number; then recordings, where both name them, must have the same file name in each row.

    Raises:
        InputError: rows without a counterpart, or another number of rows.
    """
    if AUDIO in left.columns and AUDIO in right.columns:
        names = left.column(AUDIO), right.column(AUDIO)
        is_unique = all(len(set(column)) == len(column) for column in names)
        if is_unique and set(names[0]) & set(names[1]):
            return _by_audio(left, right)
    return _by_number(left, right)


def _by_audio(left: Table, right: Table) -> Join:
    places = {name: row for row, name in enumerate(right.column(AUDIO))}
    _check_known(left, right)
    _check_known(right, left)
    by = Localized("joined by the column audio")
    return Join(tuple(places[name] for name in left.column(AUDIO)), by)


def _check_known(table: Table, other: Table) -> None:
    known = set(other.column(AUDIO))
    lost = [row for row, name in enumerate(table.column(AUDIO)) if name not in known]
    if lost:
        raise InputError(
            "{path}: {lost} of {rows} recordings are not in {other} ({examples}); give files with the same "
            "rows.",
            path=table.path,
            lost=len(lost),
            rows=len(table),
            other=other.path,
            examples=_listed([_shown(table, row) for row in lost]),
        )


def _by_number(left: Table, right: Table) -> Join:
    if len(left) != len(right):
        why = _no_audio(left, right)
        raise InputError(
            "{left} has {count} rows and {right} {right_rows}, and they cannot be joined by audio "
            "({why}); give files with the same rows.",
            left=left.path,
            count=len(left),
            right=right.path,
            right_rows=len(right),
            why=why,
        )
    if AUDIO in left.columns and AUDIO in right.columns:
        _check_file_names(left, right)
    return Join(tuple(range(len(left))), Localized("joined by row number"))


def _no_audio(left: Table, right: Table) -> Localized:
    """Why the column `audio` does not join two tables."""
    for table in (left, right):
        if AUDIO not in table.columns:
            return Localized("{path} has no such column", path=table.path)
        seen: dict[str, int] = {}
        for line, name in zip(table.lines, table.column(AUDIO), strict=True):
            if name in seen:
                shown, first = without_credentials(name), seen[name]
                return Localized(
                    "{path} has {shown!r} on lines {first} and {line}",
                    path=table.path,
                    shown=shown,
                    first=first,
                    line=line,
                )
            seen[name] = line
    return Localized(
        "none is written alike in both: {left}, {right}", left=_shown(left, 0), right=_shown(right, 0)
    )


def _check_file_names(left: Table, right: Table) -> None:
    pairs = enumerate(zip(left.column(AUDIO), right.column(AUDIO), strict=True))
    wrong = [row for row, (one, other) in pairs if _file_name(one) != _file_name(other)]
    if wrong:
        shown = [
            Localized("{left} is beside {right}", left=_shown(left, row), right=_shown(right, row))
            for row in wrong
        ]
        raise InputError(
            "{left} and {right} name different recordings in {wrong} of {rows} rows ({examples}); give files "
            "with the same rows in the same order.",
            left=left.path,
            right=right.path,
            wrong=len(wrong),
            rows=len(left),
            examples=_listed(shown),
        )


def _file_name(audio: str) -> str:
    return re.split(r"[/\\]", audio)[-1]


def _shown(table: Table, row: int) -> Localized:
    line, name = table.lines[row], without_credentials(table.column(AUDIO)[row])
    return Localized("{name!r} on line {line}", name=name, line=line)


def _listed(shown: Sequence[Localized]) -> Localized:
    parts = [*shown[:EXAMPLES]]
    if len(shown) > EXAMPLES:
        parts.append(Localized("..."))
    return join_messages(parts, "{left}, {right}")
