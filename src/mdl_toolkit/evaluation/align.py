"""Predictions aligned with their references, row by row, from one to three CSVs; and groups of these rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.data.column_names import PREDICTION, check_columns, find_column
from mdl_toolkit.errors import InputError
from mdl_toolkit.evaluation.answers import Answers
from mdl_toolkit.evaluation.csv_table import (
    ERROR,
    LENGTH,
    REFERENCE,
    SCORE,
    SECONDS,
    Table,
    join_tables,
    read_table,
)
from mdl_toolkit.evaluation.label_metrics import natural_order
from mdl_toolkit.evaluation.text_metrics import normalized
from mdl_toolkit.i18n import Localized

# Quantiles that separate the groups of `length`.
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class AlignedAnswers:
    """Hold predictions aligned with their references.

    Attributes:
        table: the predictions' file.
        columns: its columns, and those of the references' file that it does not have, `[rows]` cells each.
        answers: references and predictions.
        other: the same references, and the predictions of `--compare`.
        notes: messages on the files' join and on empty or failed rows.
    """

    table: Table
    columns: dict[str, list[str]]
    answers: Answers
    other: Answers | None
    notes: tuple[Localized, ...]


def align_answers(options: EvaluateOptions) -> AlignedAnswers:
    """Read and join the files.

    Raises:
        InputError: a file or column is missing, or rows do not match.
    """
    table = read_table(options.input, [PREDICTION])
    columns, references, notes = _read_references(table, options)
    answers = _answers(table, references, options.score_column)
    if empty := _count_empty(references):
        notes.append(
            Localized("empty references, where every predicted word is an error: {empty}", empty=empty)
        )
    notes = [*table.notes, *notes, *_notes_on(answers)]
    other = None
    if options.compare is not None:
        source = read_table(options.compare, [PREDICTION])
        source, by = join_tables(table, source)
        other = _answers(source, references, options.score_column)
        notes += [*source.notes, Localized("compared with: {path}, {by}", path=source.path, by=by)]
        notes += [Localized("{path}: {note}", path=source.path, note=note) for note in _notes_on(other)]
    return AlignedAnswers(table, columns, answers, other, tuple(notes))


def _read_references(
    table: Table, options: EvaluateOptions
) -> tuple[dict[str, list[str]], list[str], list[Localized]]:
    """Return all columns and the references in the predictions' order, and a message on the join."""
    source = table if options.reference is None else read_table(options.reference)
    name = options.reference_column or REFERENCE
    if options.reference is not None and options.reference_column is None and name not in source.columns:
        name = PREDICTION if PREDICTION in source.columns else REFERENCE
    name = find_column(name, source.columns)
    if options.reference is None and name not in table.columns:
        raise InputError(
            "{path}: there is no column {name!r} with references; name it with --reference-column, or "
            "give the file that has them with --reference.",
            path=table.path,
            name=name,
        )
    check_columns(source.path, source.columns, [name])
    if name == PREDICTION and source.path.resolve() == table.path.resolve():
        raise InputError(
            "{path}: the column {name!r} would be compared with itself; name another one.",
            path=source.path,
            name=name,
        )
    columns = {name: table.column(name) for name in table.columns}
    if options.reference is None:
        return columns, columns[name], []
    source, by = join_tables(table, source)
    theirs = {name: source.column(name) for name in source.columns}
    note = Localized("references: {path}, {by}", path=source.path, by=by)
    return {**theirs, **columns}, theirs[name], [*source.notes, note]


def _answers(table: Table, references: Sequence[str], score_column: str | None) -> Answers:
    """Take the predictions of one file, whose rows are in the references' order."""
    scores = SCORE if score_column is None else table.find_column(score_column)
    errors = table.column(ERROR) if ERROR in table.columns else [""] * len(references)
    failed = np.array([bool(error.strip()) for error in errors])
    predictions = table.column(PREDICTION)
    return Answers(
        references=tuple(references),
        predictions=tuple("" if lost else text for lost, text in zip(failed, predictions, strict=True)),
        lines=table.lines,
        failed=failed,
        scores=tuple(table.column(scores)) if scores in table.columns else None,
    )


def _notes_on(answers: Answers) -> list[Localized]:
    """Tell of failed rows and empty predictions of one file."""
    failed = int(answers.failed.sum())
    empty = _count_empty(answers.predictions) - failed
    notes = []
    if failed:
        notes.append(
            Localized("rows with an error instead of an answer, counted as wrong: {failed}", failed=failed)
        )
    if empty:
        notes.append(Localized("empty predictions: {empty}", empty=empty))
    return notes


def _count_empty(texts: Sequence[str]) -> int:
    return sum(not text.strip() for text in texts)


# --- groups --------------------------------------------------------------------------------------------


def group_rows(aligned: AlignedAnswers, name: str) -> tuple[str, Mapping[str, np.ndarray]]:
    """Divide the rows by a column, or by their length.

    If there is no column `length`, groups are the quarters of the column `seconds` or `duration`, or of the
    number of characters in the normalized references.

    Returns:
        The column, with its unit if groups are ranges of numbers; and by name of each group, in order, the
        ascending indices of its rows.

    Raises:
        InputError: there is no such column.
    """
    columns = aligned.columns
    name = find_column(name, [*columns])
    if name in columns:
        cells = [cell.strip() for cell in columns[name]]
        return name, _rows_by_name(cells, natural_order(cells))
    if name != LENGTH:
        raise InputError(
            "--group-by {name}: there is no such column; there are {listed}, and length.",
            name=name,
            listed=", ".join(repr(column) for column in columns),
        )
    for seconds in SECONDS:
        try:
            lengths = np.array([float(cell) for cell in columns.get(seconds, ())])
        except ValueError:
            continue
        if len(lengths) and np.isfinite(lengths).all():
            return f"{LENGTH} ({seconds})", _quarters(lengths)
    characters = np.array([len(normalized(text)) for text in aligned.answers.references])
    return f"{LENGTH} (characters)", _quarters(characters)


def _quarters(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Divide rows into up to four groups of about the same size, named by their shortest and longest row."""
    edges = np.unique(np.quantile(lengths, QUARTILES, method="lower"))
    quarters, codes = np.unique(np.searchsorted(edges, lengths), return_inverse=True)
    members = [lengths[codes == code] for code in range(len(quarters))]
    names = [f"{each.min():g}-{each.max():g}" for each in members]
    return _rows_by_name([names[code] for code in codes], names)


def _rows_by_name(cells: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, cell in enumerate(cells):
        rows[cell].append(row)
    return {name: np.array(members) for name, members in rows.items()}
