"""Write the answers of an inference as the output's name says: as a CSV, a workbook, or subtitles."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from mdl_toolkit.audio.segments import Segment
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.csv_reader import write_csv, write_rows
from mdl_toolkit.data.manifest import Manifest, Row
from mdl_toolkit.data.segment_columns import TimeColumns
from mdl_toolkit.errors import InputError, UsageError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.journal import AnswerJournal
from mdl_toolkit.inference.requests import KEEP, Inputs
from mdl_toolkit.inference.windows import LIST, check_windows, join_transcript
from mdl_toolkit.model.constants import SAMPLE_RATE
from mdl_toolkit.utils.files import replace_file, report_write_errors
from mdl_toolkit.weights.resolve import require_package

# Subtitles and workbooks, by how names of files end.
SRT, VTT, XLSX = ".srt", ".vtt", ".xlsx"
# Characters of a cell of a workbook; openpyxl would cut longer ones off without a word.
LONGEST_CELL = 32_767
# Rows of a sheet, with its header.
MOST_ROWS = 1_048_576
# Of a cell that stays text when somebody edits it.
TEXT_FORMAT = "@"


@dataclass(frozen=True)
class Piece:
    """Hold an answer, and the part of the recording that it is about.

    Attributes:
        start: seconds, where the part begins.
        end: seconds, where it ends.
        cells: the answer, and what else there is of it.
    """

    start: float
    end: float
    cells: list[str]


def is_subtitles(options: InferenceOptions) -> bool:
    """Tell whether the output is a file of subtitles."""
    return Path(options.output).suffix.lower() in (SRT, VTT)


def is_workbook(output: str | Path) -> bool:
    """Tell whether the output is a workbook."""
    return Path(output).suffix.lower() == XLSX


def check_output(options: InferenceOptions) -> None:
    """Refuse options of windows that have no meaning, and those whose outcome subtitles have no place for.

    Raises:
        UsageError: naming them.
        ModelError: a workbook is asked for, and openpyxl is not installed.
    """
    check_windows(options)
    if is_workbook(options.output):
        require_package("openpyxl", "xlsx", f"--output {options.output}")
    given = (
        ("--report", options.report is not None),
        ("--keep-reference", options.keep_reference),
        ("--on-error keep", options.on_error == KEEP),
        ("--top-k", options.top_k > 1),
    )
    for other, is_given in given:
        if is_given and is_subtitles(options):
            raise UsageError(
                "{one} and {other} do not go together; give one of them",
                one=f"--output {options.output}",
                other=other,
            )


def check_single_recording(options: InferenceOptions, manifest: Manifest) -> None:
    """Refuse subtitles of several recordings.

    Raises:
        InputError: saying how many there are.
    """
    if is_subtitles(options) and (count := len({row.audio for row in manifest.rows_unchecked()})) > 1:
        raise InputError(
            "--output {output}: subtitles are of one recording, and {input} names {count}; give them one by "
            "one, or an --output that ends in .csv",
            output=options.output,
            input=manifest.source,
            count=count,
        )


def check_rows(options: InferenceOptions, manifest: Manifest) -> None:
    """Refuse a workbook of more rows than its sheet holds.

    Raises:
        InputError: saying how many there are.
    """
    if is_workbook(options.output) and manifest.file.rows >= MOST_ROWS:
        raise InputError(
            "--output {output}: {input} has {rows:,} {rows:row|rows}, and a sheet of a workbook holds "
            "{most:,} with its header; give an --output that ends in .csv",
            output=options.output,
            input=manifest.source,
            rows=manifest.file.rows,
            most=MOST_ROWS,
        )


def answered_rows(
    inputs: Inputs,
    parts: Mapping[int, Sequence[Segment]],
    answers: Mapping[int, list[str] | Localized | None],
    options: InferenceOptions,
) -> Iterator[tuple[Row, list[Piece]]]:
    """Yield every row of the CSV with the pieces of its answer: none, one, or one for each window.

    Pieces of a transcript have each word once, and meet in the middle of the windows' overlaps.

    Args:
        inputs: the rows.
        parts: by line, the windows in which its row was answered.
        answers: the cells of each example's answer.
        options: the inference's.
    """
    for row, indices in inputs:
        segments = parts.get(row.line, [row.segment])
        pieces = []
        for index, segment in zip(indices, segments if indices else (), strict=True):
            end = segment.start + inputs.dataset.audio_lengths[index] / SAMPLE_RATE
            if isinstance(cells := answers[index], list):
                pieces.append(Piece(segment.start, segment.end or end, cells))
        if len(pieces) > 1 and options.join != LIST:
            half, last = options.overlap / 2, len(pieces) - 1
            texts = join_transcript([piece.cells[0] for piece in pieces], options.overlap)
            pieces = [
                Piece(piece.start + half * (number > 0), piece.end - half * (number < last), [text])
                for number, (piece, text) in enumerate(zip(pieces, texts, strict=True))
            ]
        yield row, pieces


def lines_of(
    pieces: Sequence[Piece], names: Sequence[str], manifest: Manifest, options: InferenceOptions
) -> list[dict[str, str]]:
    """Return the new cells, by column, of the lines that a row becomes: more than one for listed windows.

    Args:
        pieces: of the row's answer.
        names: columns of an answer.
        manifest: the input.
        options: the inference's.
    """
    if len(pieces) > 1 and options.join != LIST:
        return [{names[0]: "".join(piece.cells[0] for piece in pieces).strip()}]
    columns = TimeColumns.of(manifest.file.columns, manifest.columns)
    if len(pieces) > 1:
        return [
            {**dict(zip(names, piece.cells, strict=True)), **columns.cells(piece.start, piece.end)}
            for piece in pieces
        ]
    cells = pieces[0].cells if pieces else [""] * len(names)
    return [{**dict(zip(names, cells, strict=True)), **(columns.whole if options.join == LIST else {})}]


def write_table(
    output: Path, manifest: Manifest, new: Iterable[str], rows: Iterable[tuple[Row, Mapping[str, str]]]
) -> None:
    """Write the input's cells as they are and new ones to a CSV or workbook, as a whole or not at all.

    Args:
        output: the file; an existing one is replaced.
        manifest: the input, whose columns a file has, and a CSV its byte order mark and line ends.
        new: names of the new columns, which come last; one that the input has is replaced where it is.
        rows: the input's rows, each with its new cells by column.

    Raises:
        InputError: it cannot be written.
    """
    with (
        report_write_errors(f"--output {output}", InputError),
        replace_file(output, "predictions") as work,
        work.open("wb") as file,
        write_workbook(file, output)
        if is_workbook(output)
        else write_csv(file, manifest.file.format) as writer,
    ):
        write_rows(writer, manifest.file.columns, new, ((row.cells, cells) for row, cells in rows))


@contextmanager
def write_workbook(target: BinaryIO, output: Path) -> Iterator[Any]:
    """Yield a writer of rows to a workbook, all of whose cells are text, also those that begin with `=`.

    Args:
        target: the open file.
        output: its name, for messages.

    Raises:
        InputError: a cell is too long for a workbook, or there are too many rows.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book, written = Workbook(write_only=True), count(1)
    sheet = book.create_sheet("predictions")

    def text_cell(text: str) -> Any:
        if len(text) > LONGEST_CELL:
            raise InputError(
                "--output {output}: a text of {count:,} characters, and a cell of a workbook holds {most:,}; "
                "give an --output that ends in .csv, and rename {kept} in the same way to keep its answers",
                output=output,
                count=len(text),
                most=LONGEST_CELL,
                kept=AnswerJournal(output).path,
            )
        cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("\N{REPLACEMENT CHARACTER}", text))
        cell.data_type, cell.number_format = "s", TEXT_FORMAT
        return cell

    def write(cells: Iterable[str]) -> None:
        # Windows that are listed are more than the input's rows.
        if next(written) > MOST_ROWS:
            raise InputError(
                "--output {output}: more rows than the {most:,} of a workbook's sheet; give an --output that "
                "ends in .csv, and rename {kept} in the same way to keep its answers",
                output=output,
                most=MOST_ROWS,
                kept=AnswerJournal(output).path,
            )
        sheet.append([text_cell(each) if each else None for each in cells])

    try:
        yield SimpleNamespace(writerow=write)
        book.save(target)
    finally:
        if not sheet.closed:
            sheet.close()


def write_subtitles(output: Path, pieces: Iterable[Piece]) -> None:
    """Write pieces as subtitles, as a whole or not at all; those without a text are left out.

    Args:
        output: the file; its name tells SubRip (.srt) from WebVTT (.vtt).
        pieces: of one recording.

    Raises:
        InputError: it cannot be written.
    """
    is_vtt = output.suffix.lower() == VTT
    blocks = ["WEBVTT"] if is_vtt else []
    for piece in sorted(pieces, key=lambda each: each.start):
        # An empty line would end the subtitle.
        text = "\n".join(filter(None, map(str.strip, piece.cells[0].splitlines())))
        start, end = (timestamp(time, "." if is_vtt else ",") for time in (piece.start, piece.end))
        if text and is_vtt:
            blocks.append(f"{start} --> {end}\n{html.escape(text, quote=False)}")
        elif text:
            blocks.append(f"{len(blocks) + 1}\n{start} --> {end}\n{text}")
    with (
        report_write_errors(f"--output {output}", InputError),
        replace_file(output, "predictions") as work,
    ):
        work.write_text("".join(f"{block}\n\n" for block in blocks), encoding="utf-8", newline="\n")


def timestamp(time: float, point: str) -> str:
    """Format seconds as subtitles have them: 01:02:03.500."""
    whole, thousandths = divmod(round(time * 1000), 1000)
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}{point}{thousandths:03}"
