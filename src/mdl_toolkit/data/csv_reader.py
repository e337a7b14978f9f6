"""A CSV file to lines of cells, as a stream: encoding, line ends, quotes, and where they are wrong.

What the columns mean is said in `manifest`, and in `evaluation.csv_table` for CSVs without recordings.
"""

import csv
import difflib
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mdl_toolkit.errors import InputError, RowProblem
from mdl_toolkit.i18n import Localized, join_messages

# What `surrogateescape` makes of bytes that are not UTF-8.
BAD_BYTE = re.compile("[\udc80-\udcff]")
NUL_BYTE = Localized("holds a NUL byte; remove it")
NOT_UTF8 = Localized("not UTF-8 text; save the file as UTF-8")
# The most that csv.field_size_limit takes where a C long has 32 bits; its default is 131,072.
LONGEST_CELL = 2**31 - 1
# Bytes read at once.
BLOCK_BYTES = 1 << 20


class Line(NamedTuple):
    """Hold a row's cells, and the line of the file where it starts, counted from 1."""

    number: int
    cells: list[str]


def csv_error(path: Path, message: Localized) -> InputError:
    """Return an error that names the file."""
    return InputError("{path}: {message}.", path=path, message=message)


# --- reading -----------------------------------------------------------------------------------------


def file_stamp(status: os.stat_result) -> tuple[int, int]:
    """Return a file's size (bytes) and time of change (ns), by which a change is recognised."""
    return status.st_size, status.st_mtime_ns


@contextmanager
def open_csv(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is not UTF-16.

    Raises:
        InputError: it cannot be read, is no regular file, or UTF-16.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            reason = Localized("this is a device or pipe, and it is read more than once; give a file")
            raise csv_error(path, reason)
        file = path.open("rb")
    except FileNotFoundError:
        raise csv_error(path, Localized("there is no such file; correct the path")) from None
    except IsADirectoryError:
        raise csv_error(path, Localized("this is a folder; give a CSV file")) from None
    except (OSError, ValueError) as problem:
        raise _unreadable(path, problem) from problem
    with file:
        try:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise csv_error(path, Localized("this is UTF-16; save it as UTF-8"))
            file.seek(0)
            yield file
        except OSError as problem:
            raise _unreadable(path, problem) from problem


def _unreadable(path: Path, problem: OSError | ValueError) -> InputError:
    reason = getattr(problem, "strerror", None) or problem
    return csv_error(path, Localized("cannot be read ({reason})", reason=reason))


def _line_ending(file: BinaryIO) -> str:
    r"""Return `\n` if a line ends with it or with \r\n, else `\r`, which old spreadsheets wrote."""
    has_newline = any(b"\n" in block for block in iter(lambda: file.read(BLOCK_BYTES), b""))
    file.seek(0)
    return "\n" if has_newline else "\r"


def read_lines(path: Path, file: BinaryIO) -> Generator[Line, None, None]:
    r"""Yield the rows that are not blank, the column names first; a \r inside a row must be quoted.

    Bytes that are not UTF-8 are lone surrogates in the cells, as `BAD_BYTE` finds them.

    Raises:
        InputError: no valid CSV, with the first place.
    """
    csv.field_size_limit(LONGEST_CELL)
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=_line_ending(file))
    reader = csv.reader(text, strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield Line(number, cells)
            number = reader.line_num + 1
    except csv.Error as problem:
        reason = Localized(
            "the row that starts on line {number} is no valid CSV ({reason}); check its quotes",
            number=number,
            reason=problem,
        )
        raise csv_error(path, reason) from problem
    finally:
        text.detach()


def copy_rows(path: Path, target: BinaryIO, is_wanted: Callable[[int], bool]) -> None:
    """Copy the column names and the rows that are wanted, by the lines where they start, byte for byte.

    Raises:
        InputError: see `read_lines`.
    """
    with (
        open_csv(path) as file,
        closing(read_lines(path, file)) as lines,
        open_csv(path) as raw,
        io.TextIOWrapper(raw, "latin-1", newline=_line_ending(raw)) as physical,
    ):
        next(lines)
        is_kept, start = True, next(lines, None)
        for number, line in enumerate(physical, 1):
            if start is not None and number == start.number:
                is_kept, start = is_wanted(number), next(lines, None)
            if is_kept:
                target.write(line.encode("latin-1"))


# --- columns and cells ---------------------------------------------------------------------------------


def read_header(path: Path, lines: Iterator[Line]) -> tuple[str, ...]:
    """Return the column names, which are the first of the lines.

    Raises:
        InputError: there is no line.
    """
    header = next(lines, None)
    if header is None:
        raise csv_error(path, Localized("the file is empty; a CSV starts with a line of column names"))
    return tuple(header.cells)


def no_rows_error(path: Path) -> InputError:
    """Return the error for a CSV of column names alone."""
    return csv_error(path, Localized("there is no row below the column names; add one"))


def check_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse column names that cannot be used.

    Raises:
        InputError: a needed column is missing, or any column is there twice.
    """
    complaints = [_missing_column(name, columns) for name in needed if name not in columns]
    complaints += [
        Localized("there are {count} columns {name!r}; rename or remove one", count=count, name=name)
        for name, count in Counter(columns).items()
        if count > 1
    ]
    if any("\0" in name for name in columns):
        complaints.append(Localized("line 1: {reason}", reason=NUL_BYTE))
    if any(map(BAD_BYTE.search, columns)):
        complaints.append(Localized("line 1: {reason}", reason=NOT_UTF8))
    if complaints:
        raise csv_error(path, join_messages(complaints, "{left}; {right}"))


def _missing_column(name: str, columns: Sequence[str]) -> Localized:
    normalized = {column.strip().lower().replace("-", "_").replace(" ", "_"): column for column in columns}
    alike = difflib.get_close_matches(name, normalized, 1, 0.8)
    listed = ", ".join(repr(column) for column in columns)
    if alike:
        hint = Localized("rename {column!r}", column=normalized[alike[0]])
    elif len(columns) == 1 and re.search("[;\t|]", columns[0]):
        hint = Localized("separate cells by commas")
    else:
        hint = Localized("add it")
    return Localized(
        "the column {name!r} is missing, the columns are {listed}; {hint}",
        name=name,
        listed=listed,
        hint=hint,
    )


def cell_problems(columns: Sequence[str], line: Line) -> Iterator[RowProblem]:
    """Yield a problem for the first cell too many, and for each that is not UTF-8."""
    width, cells = len(columns), len(line.cells)
    if cells > width:
        reason = Localized(
            "the row has {cells} cells, the header {columns}; put text that holds a comma in double quotes",
            cells=cells,
            columns=width,
        )
        yield RowProblem(line.number, str(width + 1), line.cells[width], reason)
    for name, cell in zip(columns, line.cells, strict=False):
        if not cell.isascii() and BAD_BYTE.search(cell):
            yield RowProblem(line.number, name, cell, NOT_UTF8)
