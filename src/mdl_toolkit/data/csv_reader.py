"""A file of rows as a stream of lines of cells, and where it is wrong.

What its bytes are is found out in `csv_format`; what the columns mean is said in `manifest`, and in
`evaluation.csv_table` for CSVs without recordings.
"""

import csv
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

from mdl_toolkit.data.csv_format import (
    BAD_BYTE,
    KALDI,
    PARQUET,
    WORKBOOK,
    CsvFormat,
    csv_error,
    detect_format,
)
from mdl_toolkit.data.json_reader import read_json_rows
from mdl_toolkit.data.kaldi import lists_beside, read_kaldi_rows
from mdl_toolkit.data.listing import rows_file
from mdl_toolkit.data.parquet_reader import read_parquet_rows, shards_beside
from mdl_toolkit.errors import InputError, RowProblem, breakdown
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.utils.console import say

# Of rows that name their cells; JSON's where none is named.
READERS = {KALDI: read_kaldi_rows, PARQUET: read_parquet_rows}
FILES_BESIDE = {KALDI: lists_beside, PARQUET: shards_beside}
NUL_BYTE = Localized("holds a NUL byte; remove it")
NOT_UTF8 = Localized("not UTF-8 text; save the file as UTF-8")
# The most that csv.field_size_limit takes where a C long has 32 bits; its default is 131,072.
LONGEST_CELL = 2**31 - 1


class Line(NamedTuple):
    """Hold a row's cells, and the line of the file where it starts, counted from 1."""

    number: int
    cells: list[str]


@dataclass(frozen=True)
class CsvFile:
    """Read a file of rows; each iteration reads it as a stream, anew.

    Attributes:
        path: the file.
        format: how it is written.
        columns: the column names as they are written, without empty columns at the end.
        header: the line of the column names.
        rows: how many there are, usable or not.
        stamps: size (bytes) and time of change (ns), when it was opened first, of it and of those beside it.
        beside: other files that its rows are read from.
    """

    path: Path
    format: CsvFormat
    columns: tuple[str, ...]
    header: int
    rows: int
    stamps: tuple[tuple[int, int], ...]
    beside: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[Line]:
        """Yield the rows that hold something, without the column names and empty cells beyond them.

        Bytes that are not of the encoding are lone surrogates in the cells, as `BAD_BYTE` finds them.

        Raises:
            InputError: no valid CSV, with the first place; or it was changed in the meantime.
        """
        width = len(self.columns)
        with open_csv(self.path) as file:
            self.check_unchanged(os.fstat(file.fileno()))
            for number, cells in read_lines(self.path, file, self.format):
                if number > self.header and _is_row(cells):
                    is_wide = any(cells[width:])
                    yield Line(number, cells if is_wide else cells[:width])

    @property
    def files(self) -> tuple[Path, ...]:
        """Return all files that the rows are read from."""
        return self.path, *self.beside

    def check_unchanged(self, status: os.stat_result) -> None:
        """Raise InputError if the file is not any more what it was when it was opened first."""
        if _stamps(status, self.beside) != self.stamps:
            raise csv_error(
                self.path,
                Localized("the file was changed while it was being read; start again when it is complete"),
            )

    def copy_rows(self, target: BinaryIO, is_wanted: Callable[[int], bool]) -> None:
        """Copy the file without the rows that are not wanted, by the lines where they start, byte for byte.

        Rows of a workbook, of JSON or of a list are written as a CSV.

        Raises:
            InputError: it is no valid CSV any more, or it was changed in the meantime.
        """
        if not self.format.is_csv:
            with write_csv(target, self.format) as writer:
                writer.writerow(self.columns)
                writer.writerows(line.cells for line in self if is_wanted(line.number))
            return
        # Bytes one by one, as not every encoding comes back as it was; in UTF-16 a line end has two.
        encoding = self.format.encoding if self.format.encoding.startswith("utf-16") else "latin-1"
        starts, is_kept = iter(self), True
        start = next(starts, None)
        with self.path.open(encoding=encoding, newline=self.format.newline) as physical:
            for number, line in enumerate(physical, 1):
                if start is not None and number == start.number:
                    is_kept, start = is_wanted(number), next(starts, None)
                if is_kept:
                    target.write(line.encode(encoding))
        self.check_unchanged(self.path.stat())


def _is_row(cells: Sequence[str]) -> bool:
    """Tell whether a line is a row: not blank, and no row of commas alone."""
    return len(cells) == 1 or any(cells)


def open_rows(path: Path, wanted: Sequence[str]) -> CsvFile:
    """Open a file of rows and read it once, to say what it was taken for and what of it is left out.

    Args:
        path: the file, or a data folder of Kaldi's.
        wanted: column names, one of which tells what separates cells.

    Raises:
        InputError: it cannot be read, or is no valid CSV.
    """
    columns: tuple[str, ...] = ()
    header, rows, empty, widest = 0, 0, 0, 0
    path = rows_file(path)
    with open_csv(path) as file:
        form = detect_format(path, file, wanted)
        beside = FILES_BESIDE[form.records](path) if form.records in FILES_BESIDE else ()
        stamps = _stamps(os.fstat(file.fileno()), beside)
        for number, cells in read_lines(path, file, form):
            if not _is_row(cells):
                empty += 1
            elif not columns:
                header, columns = number, tuple(cells)
            else:
                rows += 1
            if len(cells) > widest and any(cells[widest:]):
                widest = max(index for index, cell in enumerate(cells, 1) if cell)
    if not columns:
        raise csv_error(path, Localized("the file is empty; a CSV starts with a line of column names"))
    nameless = next((index for index, name in enumerate(reversed(columns)) if name.strip()), 0)
    width = max(len(columns) - nameless, min(widest, len(columns)))
    if not form.is_usual:
        say("{path}: taken for {what}", path=path, what=form.describe())
    left_out = []
    if width < len(columns):
        left_out.append(
            Localized("{count} empty {count:column|columns} at the end", count=len(columns) - width)
        )
    if empty:
        left_out.append(Localized("{count} {count:row|rows} of empty cells", count=empty))
    if left_out:
        say("{path}: left out: {what}", path=path, what=join_messages(left_out, "{left}, {right}"))
    return CsvFile(path, form, columns[:width], header, rows, stamps, beside)


# --- reading and writing -----------------------------------------------------------------------------


def file_stamp(status: os.stat_result) -> tuple[int, int]:
    """Return a file's size (bytes) and time of change (ns), by which a change is recognised."""
    return status.st_size, status.st_mtime_ns


def _stamps(status: os.stat_result, beside: Sequence[Path]) -> tuple[tuple[int, int], ...]:
    return file_stamp(status), *(file_stamp(each.stat()) for each in beside)


@contextmanager
def open_csv(path: Path) -> Iterator[BinaryIO]:
    """Open a file.

    Raises:
        InputError: it cannot be read, or is no regular file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            reason = Localized("this is a device or pipe, and it is read more than once; give a file")
            raise csv_error(path, reason)
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise csv_error(path, Localized("there is no such file; correct the path")) from None
    except IsADirectoryError:
        raise csv_error(path, Localized("this is a folder; give a CSV file")) from None
    except MemoryError as problem:
        reason = Localized("cannot be read ({reason})", reason=breakdown(problem))
        raise csv_error(path, reason) from problem
    except (OSError, ValueError) as problem:
        raise csv_error(path, Localized("cannot be read ({reason})", reason=problem)) from problem


def read_lines(path: Path, file: BinaryIO, form: CsvFormat) -> Iterator[Line]:
    r"""Yield the lines that are not blank, the column names among them; a \r inside a row must be quoted.

    Raises:
        InputError: no valid CSV, with the first place.
    """
    if form.encoding == WORKBOOK:
        yield from _read_workbook(path, file)
        return
    if form.records:
        read = READERS.get(form.records, read_json_rows)
        # The names of all rows' cells are the columns, before the first line.
        columns = [*dict.fromkeys(name for _, cells in read(path, file, form) for name in cells)]
        yield Line(0, columns)
        for number, named in read(path, file, form):
            yield Line(number, [named.get(name, "") for name in columns])
        return
    csv.field_size_limit(LONGEST_CELL)
    text = form.text(file)
    before = 1 if form.is_named and text.readline() else 0
    reader, number = csv.reader(text, delimiter=form.delimiter, strict=True), before + 1
    try:
        for cells in reader:
            if cells:
                yield Line(number, cells)
            number = before + reader.line_num + 1
    except csv.Error as problem:
        reason = Localized(
            "the row that starts on line {number} is no valid CSV ({reason}); check its quotes",
            number=number,
            reason=problem,
        )
        raise csv_error(path, reason) from problem
    finally:
        text.detach()


def _read_workbook(path: Path, file: BinaryIO) -> Iterator[Line]:
    """Yield the rows of a workbook's active sheet that hold something."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        reason = Localized("this is an Excel workbook; install the extra `xlsx`, or save it as CSV UTF-8")
        raise csv_error(path, reason) from None
    try:
        sheet = load_workbook(file, read_only=True, data_only=True).active
        # What a file says of a sheet's size may be of another time.
        sheet.reset_dimensions()
        for number, row in enumerate(sheet.iter_rows(), 1):
            cells = [*map(_cell_text, row)]
            if any(cells):
                yield Line(number, cells)
    except MemoryError:
        raise
    # What it raises for a damaged workbook is not documented.
    except Exception as problem:
        reason = Localized("cannot be read as a workbook ({reason}); save it as CSV UTF-8", reason=problem)
        raise csv_error(path, reason) from problem


def _cell_text(cell: Any) -> str:
    """Return a workbook's cell as text: a number without needless digits, a day as ISO 8601 has it."""
    value = cell.value
    if isinstance(value, time):
        # What was typed as 1:02 is shown as that, and is two minutes after one.
        has_seconds = "s" in cell.number_format.lower()
        return value.isoformat() if has_seconds else f"{value.hour}:{value:%M}"
    if isinstance(value, datetime) and value.time() == time():
        return value.date().isoformat()
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}"
    return "" if value is None else str(value)


@contextmanager
def write_csv(target: BinaryIO, form: CsvFormat) -> Iterator[Any]:
    """Yield a `csv.writer` of UTF-8 with commas, with the byte order mark and line ends of a format."""
    text = io.TextIOWrapper(target, "utf-8", newline="")
    text.write("\ufeff" if form.has_bom else "")

    # csv quotes each kind of line end in a cell only if lines end with both characters.
    def write(line: str) -> int:
        return text.write(line.removesuffix("\r\n") + form.line_end)

    yield csv.writer(SimpleNamespace(write=write))
    text.flush()
    text.detach()


def write_rows(
    writer: Any,
    columns: Sequence[str],
    new: Iterable[str],
    rows: Iterable[tuple[Sequence[str], Mapping[str, str]]],
) -> None:
    """Write rows of a file under its column names and new ones, which come last.

    Args:
        writer: writes a row.
        columns: of the file.
        new: names of new columns; one that the file has stays where it is.
        rows: the cells of each, and by column those that replace them.
    """
    names = [*dict.fromkeys([*columns, *new])]
    indices = {name: index for index, name in enumerate(names)}
    writer.writerow(names)
    for cells, others in rows:
        line = [*cells, *[""] * (len(names) - len(columns))]
        for name, cell in others.items():
            line[indices[name]] = cell
        writer.writerow(line)


# --- cells ---------------------------------------------------------------------------------------------


def no_rows_error(path: Path) -> InputError:
    """Return the error for a CSV of column names alone."""
    return csv_error(path, Localized("there is no row below the column names; add one"))


def cell_problems(columns: Sequence[str], line: Line) -> Iterator[RowProblem]:
    """Yield a problem for the first cell too many, and for each that is not UTF-8."""
    width, cells = len(columns), len(line.cells)
    if cells > width:
        reason = Localized(
            "the row has {cells} {cells:cell|cells}, the header {columns}; put text that holds a comma in "
            "double quotes",
            cells=cells,
            columns=width,
        )
        yield RowProblem(line.number, str(width + 1), line.cells[width], reason)
    for name, cell in zip(columns, line.cells, strict=False):
        if not cell.isascii() and BAD_BYTE.search(cell):
            yield RowProblem(line.number, name, cell, NOT_UTF8)
