"""CSV to rows with their line numbers; base-dir, default prompts; every problem at once.

Everything is text and stays as it was written. The file is read as a stream, so that memory does not grow
with it. Recordings are looked for, never opened; nothing is fetched.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from mdl_toolkit.audio.embedded import embedded_stamp, split_reference
from mdl_toolkit.audio.segments import WHOLE_RECORDING, Segment
from mdl_toolkit.audio.urls import is_url, without_credentials
from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.data.column_names import AUDIO, PREDICTION, SYSTEM, USER, understand
from mdl_toolkit.data.csv_reader import (
    NUL_BYTE,
    CsvFile,
    Line,
    cell_problems,
    file_stamp,
    no_rows_error,
    open_rows,
)
from mdl_toolkit.data.missing import explain_missing
from mdl_toolkit.data.segment_columns import (
    DURATION,
    END,
    SEGMENT_COLUMNS,
    check_segment_columns,
    read_segment,
    segment_cells,
)
from mdl_toolkit.errors import AudioError, InputError, Problems, RowProblem, UnavailableError
from mdl_toolkit.i18n import Localized

# The columns that are read.
KNOWN = (AUDIO, SYSTEM, USER, PREDICTION)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

EMPTY_PREDICTION = Localized("empty; fill it in, or accept empty ones with --allow-empty-prediction")


@dataclass(frozen=True)
class Row:
    """Hold one row of a CSV.

    Attributes:
        line: line of the file where the row starts, counted from 1; the header is on line 1.
        audio: a URL as written, or a path that is absolute or starts from the current directory.
        audio_text: the cell `audio` as written.
        system_prompt: the row's own, else the option's, else None.
        user_prompt: likewise.
        prediction: the cell as written; None if the CSV has no such column.
        cells: the text of every cell, as many as there are columns.
        stamp: size (bytes) and time of change (ns) of the recording when the row was read; zeros for a URL.
        segment: the part of the recording that the row is about.
        segment_cells: the column and the cell that say its start, end and channel, by these.
    """

    line: int
    audio: str
    audio_text: str
    system_prompt: str | None
    user_prompt: str | None
    prediction: str | None
    cells: tuple[str, ...]
    stamp: tuple[int, int] = (0, 0)
    segment: Segment = WHOLE_RECORDING
    segment_cells: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """Return the cell `audio` as messages may show it: an address without its password."""
        return without_credentials(self.audio_text)

    def segment_problem(self, field: str, reason: Localized) -> RowProblem:
        """Return the problem for a segment whose start, end, duration or channel is wrong."""
        cells = self.segment_cells
        column, cell = cells.get(field) or (field == END and cells.get(DURATION)) or (AUDIO, self.shown)
        return RowProblem(self.line, column, cell, reason)

    def audio_problem(self, error: AudioError) -> RowProblem:
        """Return the problem for a recording that cannot be used."""
        return RowProblem(
            self.line, AUDIO, self.shown, error.message, may_pass=isinstance(error, UnavailableError)
        )


@dataclass(frozen=True)
class Manifest:
    """Read a CSV whose columns have been checked; each iteration reads it as a stream, anew.

    Attributes:
        file: the file and how it is written.
        columns: its columns, in order, by the names that are understood.
        base_dir: where relative audio paths start; None is the current directory.
        system_prompt: for rows whose own is empty or `null`.
        user_prompt: likewise.
        requires_prediction: an empty prediction is a problem.
        listed: the folder or pattern of recordings that the file is a list of, if it was made of one.
        parts: by line, the segments that its row is cut into, each of which is iterated over as a row.
        refused: by line, the problem of a row that is not to be used.
    """

    file: CsvFile
    columns: tuple[str, ...]
    base_dir: str | None
    system_prompt: str | None
    user_prompt: str | None
    requires_prediction: bool
    listed: str | None = None
    parts: Mapping[int, Sequence[Segment]] = field(default_factory=dict)
    refused: Mapping[int, RowProblem] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row | RowProblem]:
        """Yield each usable row, and each problem of the others, in the file's order.

        Raises:
            InputError: from some line on it is no CSV, or it was changed in the meantime.
        """
        for item in self._read(lambda row: find_recording(row, self.file.path.parent)):
            if isinstance(item, Row) and item.line in self.refused:
                yield self.refused[item.line]
            elif isinstance(item, Row) and item.line in self.parts:
                yield from (replace(item, segment=segment) for segment in self.parts[item.line])
            else:
                yield item

    def rows(self) -> Iterator[Row]:
        """Yield the usable rows, for callers that know of the problems already."""
        return (item for item in self if isinstance(item, Row))

    def rows_unchecked(self) -> Iterator[Row]:
        """Yield the rows without a look at their recordings, which may be gone; they have no stamps."""
        return (item for item in self._read(lambda _: (0, 0)) if isinstance(item, Row))

    def _read(self, find: Callable[[Row], tuple[int, int] | Localized]) -> Iterator[Row | RowProblem]:
        return (item for line in self.file for item in self._parse(line, find))

    def _parse(
        self, line: Line, find: Callable[[Row], tuple[int, int] | Localized]
    ) -> Sequence[Row | RowProblem]:
        """Return the line's row, or its problems."""
        cells = line.cells + [""] * (len(self.columns) - len(line.cells))
        named = dict(zip(self.columns, cells, strict=False))
        found = segment_cells(named)
        segment, audio = read_segment(found), named[AUDIO]
        if audio and not _SCHEME.match(audio):
            folder = os.path.expanduser(self.base_dir or "")  # noqa: PTH111
            audio = os.path.join(folder, os.path.expanduser(audio))  # noqa: PTH111, PTH118
        row = Row(
            line=line.number,
            audio=audio,
            audio_text=named[AUDIO],
            system_prompt=_prompt_or(self.system_prompt, named.get(SYSTEM)),
            user_prompt=_prompt_or(self.user_prompt, named.get(USER)),
            prediction=named.get(PREDICTION),
            cells=tuple(cells),
            segment=segment if isinstance(segment, Segment) else WHOLE_RECORDING,
            segment_cells=found,
        )
        problems = [*cell_problems(self.columns, line)]
        problems += [RowProblem(line.number, *cell, NUL_BYTE) for cell in named.items() if "\0" in cell[1]]
        if not isinstance(segment, Segment):
            problems.append(row.segment_problem(*segment))
        stamp = find(row)
        if isinstance(stamp, Localized):
            problems.append(RowProblem(line.number, AUDIO, row.shown, stamp))
        if self.requires_prediction and not row.prediction:
            problems.append(RowProblem(line.number, PREDICTION, "", EMPTY_PREDICTION))
        return problems if problems or isinstance(stamp, Localized) else [replace(row, stamp=stamp)]

    @property
    def source(self) -> str:
        """Return the path or pattern that the user has given."""
        return str(self.file.path) if self.listed is None else self.listed

    def check(self, problems: Problems) -> None:
        """Raise RowsError if there is any problem with the rows."""
        problems.check(self.source, is_list=self.listed is not None)

    def no_rows(self) -> InputError:
        """Return the error for a CSV of column names alone."""
        return no_rows_error(self.file.path)


def read_manifest(
    path: str | Path, options: ConversionOptions, *, needs_prediction: bool, also: Sequence[str] = ()
) -> Manifest:
    """Open a CSV under the options' prompts and base folder, and check its columns.

    A row with fewer cells than the header is filled up with empty ones; blank lines are skipped.

    Args:
        path: the CSV file, or another that rows are read from; or a data folder of Kaldi's.
        options: base folder, prompts for rows without their own, and whether an empty prediction is one.
        needs_prediction: the column `prediction` must be there and filled in (training).
        also: further columns that the caller reads, as they may be written.

    Raises:
        InputError: the file cannot be read, its first line is no CSV; a column is missing or there twice.
    """
    file = open_rows(Path(path), KNOWN[:1])
    # In inference, what is called like a prediction may be somebody's reference, and stays.
    known, needed = (KNOWN, (AUDIO, PREDICTION)) if needs_prediction else (KNOWN[:-1], (AUDIO,))
    columns = understand(file.path, file.columns, (*known, *SEGMENT_COLUMNS), needed, also)
    check_segment_columns(file.path, columns)
    return Manifest(
        file,
        columns,
        options.base_dir,
        options.system_prompt,
        options.user_prompt,
        requires_prediction=needs_prediction and not options.allow_empty_prediction,
    )


def _prompt_or(default: str | None, cell: str | None) -> str | None:
    """Return the cell, or the default if the cell is empty or `null`."""
    return default if cell in (None, "", "null") else cell


def find_recording(row: Row, folder: Path) -> tuple[int, int] | Localized:
    """Return the recording's stamp, or what is wrong with the cell; nothing is opened or fetched.

    Args:
        row: the row.
        folder: where the CSV is.
    """
    if not row.audio_text:
        return Localized("empty; give a path or an http(s) address")
    if _SCHEME.match(row.audio):
        return _address_problem(row.audio) or (0, 0)
    try:
        reference = split_reference(row.audio)
        status = os.stat(reference[0] if reference else row.audio)  # noqa: PTH116
        if stat.S_ISDIR(status.st_mode):
            return Localized("this is a folder; give a file")
        if not stat.S_ISREG(status.st_mode):
            return Localized("this is a device or pipe; give a file")
        if not status.st_size:
            return Localized("the file is empty (0 bytes); get it again")
        return embedded_stamp(*reference) if reference else file_stamp(status)
    except ValueError:
        # A NUL byte has its own message.
        return 0, 0
    except (FileNotFoundError, NotADirectoryError):
        return explain_missing(row.audio, row.audio_text, folder)
    except OSError as problem:
        return Localized("cannot be used ({reason}); correct it", reason=problem)


def _address_problem(url: str) -> Localized | None:
    if not is_url(url):
        return Localized("this kind of address cannot be fetched; give a path or an http(s) address")
    try:
        parts = urlsplit(url)
        is_valid = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        is_valid = False
    return None if is_valid else Localized("this is no valid address; correct it")
