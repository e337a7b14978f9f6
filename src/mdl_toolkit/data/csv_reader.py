"""A CSV file to lines of cells, as a stream: encoding, line ends, quotes, and where they are wrong.

What the columns mean is said in `manifest`, and in `tables` for CSVs without recordings.
"""

import codecs
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

NUL_MARK = "\udc00"  # stands for NUL while the CSV is read, as Python 3.10's csv refuses NUL itself
BAD_BYTE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8
LONGEST_CELL = 2**31 - 1  # the most csv.field_size_limit takes where a C long has 32 bits; default 131,072
OTHER_ENCODINGS = ("gb18030", "cp1252")  # what spreadsheets write when they do not write UTF-8
PIECE = 1 << 20  # bytes read at once


class Line(NamedTuple):
    """One row of cells, and the line of the file where it starts, counted from 1."""

    number: int
    cells: list[str]


def csv_error(path: Path, message: Localized) -> InputError:
    """An error that names the file."""
    return InputError("{path}: {message}.", path=path, message=message)


# --- lines to rows -----------------------------------------------------------------------------------


def file_stamp(status: os.stat_result) -> tuple[int, int]:
    """Size (bytes) and time of change (ns), by which a file that was changed is recognised."""
    return status.st_size, status.st_mtime_ns


@contextmanager
def open_csv(path: Path) -> Iterator[BinaryIO]:
    """The file, open and at its start.

    Raises:
        InputError: it cannot be read, is no regular file, or UTF-16.
    """
    try:
        with _open(path) as file:
            yield file
    except FileNotFoundError:
        raise csv_error(path, Localized("there is no such file; correct the path")) from None
    except IsADirectoryError:
        raise csv_error(path, Localized("this is a folder; give a CSV file")) from None
    except OSError as problem:
        reason = problem.strerror or problem
        raise csv_error(path, Localized("cannot be read ({reason})", reason=reason)) from problem


def _open(path: Path) -> BinaryIO:
    try:
        status = path.stat()
    except ValueError as problem:
        raise csv_error(path, Localized("cannot be read ({reason})", reason=problem)) from problem
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise csv_error(
            path, Localized("this is a device or pipe, and it is read more than once; give a file")
        )
    file = path.open("rb")
    if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise csv_error(path, Localized("this is UTF-16; save it as UTF-8"))
    file.seek(0)
    return file


class _Text:
    """Lines of text, with bytes that are not UTF-8 as lone surrogates and NUL as `NUL_MARK`.

    Attributes:
        is_bad: a byte that is not UTF-8 has come by.
    """

    def __init__(self, file: BinaryIO) -> None:
        ending = _ending(file)
        self._lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=ending)
        self.is_bad = False

    def __iter__(self) -> "_Text":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if not line.isascii():
            self.is_bad = self.is_bad or BAD_BYTE.search(line) is not None
        return line.replace("\0", NUL_MARK)

    def detach(self) -> None:
        """Leave the file open for its owner."""
        self._lines.detach()


def _ending(file: BinaryIO) -> str:
    r"""How lines end: with \n or \r\n, or all with \r as old spreadsheets wrote them."""
    found = any(b"\n" in piece for piece in iter(lambda: file.read(PIECE), b""))
    file.seek(0)
    return "\n" if found else "\r"


def read_lines(path: Path, file: BinaryIO) -> Generator[Line, None, None]:
    r"""The rows that are not blank, the column names first; a \r inside a row must be quoted.

    Raises:
        InputError: no valid CSV, or not UTF-8, with the first place.
    """
    csv.field_size_limit(LONGEST_CELL)
    text = _Text(file)
    reader = csv.reader(text, strict=True)
    columns: list[str] = []
    try:
        while True:
            number = reader.line_num + 1
            cells = _cells(path, reader, text, number)
            if cells is None:
                return
            columns = columns or cells
            if text.is_bad:
                raise _not_utf8(path, number, _bad_column(cells, columns, number))
            if cells:
                yield Line(number, cells)
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
        io.TextIOWrapper(raw, "latin-1", newline=_ending(raw)) as physical,
    ):
        next(lines)
        keeps, start = True, next(lines, None)
        for number, line in enumerate(physical, 1):
            if start is not None and number == start.number:
                keeps, start = is_wanted(number), next(lines, None)
            if keeps:
                target.write(line.encode("latin-1"))


def _cells(path: Path, reader: Iterator[list[str]], text: _Text, number: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as problem:
        if text.is_bad:
            raise _not_utf8(path, number, "") from problem
        raise csv_error(
            path,
            Localized(
                "the row that starts on line {number} is no valid CSV ({reason}); check its quotes",
                number=number,
                reason=problem,
            ),
        ) from problem


def _bad_column(cells: list[str], columns: list[str], number: int) -> str:
    """The name of the first column with a bad byte, as far as it is known."""
    index = next((i for i, cell in enumerate(cells) if BAD_BYTE.search(cell)), len(columns))
    known = index < len(columns) and number > 1 and not BAD_BYTE.search(columns[index])
    return columns[index] if known else ""


def _not_utf8(path: Path, line: int, column: str) -> InputError:
    """The error for text that is not UTF-8, naming the first place and the likely encoding."""
    guess = next((name for name in OTHER_ENCODINGS if _decodes(path, name)), None)
    where = (
        Localized("line {line}, column {column}", line=line, column=column)
        if column
        else Localized("line {line}", line=line)
    )
    if guess:
        reason = Localized(
            "{where}: not UTF-8 text (it may be {guess}); save the file as UTF-8", where=where, guess=guess
        )
    else:
        reason = Localized("{where}: not UTF-8 text; save the file as UTF-8", where=where)
    return csv_error(path, reason)


def _decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with path.open("rb") as file:
            for piece in iter(lambda: file.read(PIECE), b""):
                decoder.decode(piece)
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, OSError):
        return False
    return True


# --- columns and cells ---------------------------------------------------------------------------------


def read_header(path: Path, lines: Iterator[Line]) -> tuple[str, ...]:
    """The column names, which are the first of the lines.

    Raises:
        InputError: there is no line.
    """
    header = next(lines, None)
    if header is None:
        raise csv_error(path, Localized("the file is empty; a CSV starts with a line of column names"))
    return tuple(header.cells)


def no_rows_error(path: Path) -> InputError:
    """The error for a CSV of column names alone."""
    return csv_error(path, Localized("there is no row below the column names; add one"))


def check_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse column names that cannot be used.

    Raises:
        InputError: a needed column is missing, or any column is there twice.
    """
    complaints = [_missing(name, columns) for name in needed if name not in columns]
    complaints += [
        Localized("there are {count} columns {name!r}; rename or remove one", count=count, name=name)
        for name, count in Counter(columns).items()
        if count > 1
    ]
    if any(NUL_MARK in name for name in columns):
        complaints.append(Localized("line 1 holds a NUL byte; remove it"))
    if complaints:
        raise csv_error(path, join_messages(complaints, "{left}; {right}"))


def _missing(name: str, columns: Sequence[str]) -> Localized:
    tidy = {column.strip().lower().replace("-", "_").replace(" ", "_"): column for column in columns}
    alike = difflib.get_close_matches(name, tidy, 1, 0.8)
    listed = ", ".join(repr(column) for column in columns)
    if alike:
        hint = Localized("rename {column!r}", column=tidy[alike[0]])
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


def excess(columns: Sequence[str], line: Line) -> Iterator[RowProblem]:
    """The first cell beyond the last column, if a row has one."""
    width = len(columns)
    if len(line.cells) > width:
        value, reason = line.cells[width], _too_many(len(line.cells), width)
        yield RowProblem(line.number, str(width + 1), value, reason)


def _too_many(cells: int, columns: int) -> Localized:
    return Localized(
        "the row has {cells} cells, the header {columns}; put text that holds a comma in double quotes",
        cells=cells,
        columns=columns,
    )
