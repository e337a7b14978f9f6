"""A CSV file to lines of cells, as a stream: encoding, line ends, quotes, and where they are wrong.

What the columns mean is said in `manifest`, and in `evaluation.csv_table` for CSVs without recordings.
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

# Stands for NUL while the CSV is read, as Python 3.10's csv refuses NUL itself.
NUL_MARK = "\udc00"
# What `surrogateescape` makes of bytes that are not UTF-8.
BAD_BYTE = re.compile("[\udc80-\udcff]")
# The most that csv.field_size_limit takes where a C long has 32 bits; its default is 131,072.
LONGEST_CELL = 2**31 - 1
# What spreadsheets write when they do not write UTF-8.
OTHER_ENCODINGS = ("gb18030", "cp1252")
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


class _TextLines:
    """Iterate over lines of text, with bytes that are not UTF-8 as lone surrogates and NUL as `NUL_MARK`.

    Attributes:
        is_bad: a byte that is not UTF-8 has come by.
    """

    def __init__(self, file: BinaryIO) -> None:
        ending = _line_ending(file)
        self._lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=ending)
        self.is_bad = False

    def __iter__(self) -> "_TextLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if not line.isascii():
            self.is_bad = self.is_bad or BAD_BYTE.search(line) is not None
        return line.replace("\0", NUL_MARK)

    def detach(self) -> None:
        """Leave the file open for its owner."""
        self._lines.detach()


def _line_ending(file: BinaryIO) -> str:
    r"""Return `\n` if a line ends with it or with \r\n, else `\r`, which old spreadsheets wrote."""
    has_newline = any(b"\n" in block for block in iter(lambda: file.read(BLOCK_BYTES), b""))
    file.seek(0)
    return "\n" if has_newline else "\r"


def read_lines(path: Path, file: BinaryIO) -> Generator[Line, None, None]:
    r"""Yield the rows that are not blank, the column names first; a \r inside a row must be quoted.

    Raises:
        InputError: no valid CSV, or not UTF-8, with the first place.
    """
    csv.field_size_limit(LONGEST_CELL)
    text = _TextLines(file)
    reader = csv.reader(text, strict=True)
    columns: list[str] = []
    number = 1
    try:
        for cells in reader:
            columns = columns or cells
            if text.is_bad:
                # Name the column of the first bad byte, if that is known.
                index = next((i for i, cell in enumerate(cells) if BAD_BYTE.search(cell)), len(columns))
                is_known = index < len(columns) and number > 1 and not BAD_BYTE.search(columns[index])
                raise _not_utf8(path, number, columns[index] if is_known else "")
            if cells:
                yield Line(number, cells)
            number = reader.line_num + 1
    except csv.Error as problem:
        if text.is_bad:
            raise _not_utf8(path, number, "") from problem
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


def _not_utf8(path: Path, line: int, column: str) -> InputError:
    """Return the error for text that is not UTF-8, naming the first place and the likely encoding."""
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
    """Tell whether a whole file is text of an encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(BLOCK_BYTES), b""):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, OSError):
        return False
    return True


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
    if any(NUL_MARK in name for name in columns):
        complaints.append(Localized("line 1 holds a NUL byte; remove it"))
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


def width_problems(columns: Sequence[str], line: Line) -> Iterator[RowProblem]:
    """Yield a problem if a row has more cells than there are columns, with the first cell too many."""
    width, cells = len(columns), len(line.cells)
    if cells > width:
        reason = Localized(
            "the row has {cells} cells, the header {columns}; put text that holds a comma in double quotes",
            cells=cells,
            columns=width,
        )
        yield RowProblem(line.number, str(width + 1), line.cells[width], reason)
