"""Predictions beside their references, row by row, from one to three CSVs; and the groups of these rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.data.manifest import PREDICTION
from mdl_toolkit.errors import InputError
from mdl_toolkit.evaluation.csv_table import Join, Table, join_tables, read_table
from mdl_toolkit.evaluation.metrics import Answers, natural_order
from mdl_toolkit.evaluation.text_metrics import normalized
from mdl_toolkit.i18n import Localized

REFERENCE, ERROR, SCORE, LENGTH = "reference", "error", "score", "length"
SECONDS = ("seconds", "duration")  # columns that say how long a recording is
BANDS = (0.25, 0.5, 0.75)  # quantiles between the bands of `length`


@dataclass(frozen=True)
class Pairs:
    """What is compared.

    Attributes:
        table: the predictions' file.
        columns: all columns of it, and those of the references' file that it does not have, `[rows]` each.
        answers: references and predictions.
        other: the same references, and the predictions of `--compare`.
        notes: what the user should know of how they were found.
    """

    table: Table
    columns: dict[str, list[str]]
    answers: Answers
    other: Answers | None
    notes: tuple[Localized, ...]


@dataclass(frozen=True)
class Grouping:
    """How a column divides the rows.

    Attributes:
        title: the column, with its unit where bands were made.
        names: of the groups, in order.
        codes: `[rows]` the group of each row.
    """

    title: str
    names: tuple[str, ...]
    codes: np.ndarray


def read_pairs(options: EvaluateOptions) -> Pairs:
    """Read and join the files.

    Raises:
        InputError: a file or column is missing, or rows do not match.
    """
    table = read_table(options.input, [PREDICTION])
    columns = {name: table.column(name) for name in table.columns}
    notes: list[Localized] = []
    if options.reference is None:
        references = columns[_own_column(table, options.reference_column or REFERENCE)]
    else:
        source = read_table(options.reference)
        name = _their_column(table, source, options.reference_column)
        found = join_tables(table, source)
        notes.append(Localized("references: {path}, {by}", path=source.path, by=found.by))
        theirs = {name: _ordered(source, name, found) for name in source.columns}
        references, columns = theirs[name], {**theirs, **columns}
    answers = _answers(table, references, None, options.score_column)
    notes += [*_about_references(references), *_oddities(answers)]
    other = _other(table, references, options, notes) if options.compare else None
    return Pairs(table, columns, answers, other, tuple(notes))


def _own_column(table: Table, name: str) -> str:
    if name not in table.columns:
        raise InputError(
            "{path}: there is no column {name!r} with references; name it with --reference-column, or "
            "give the file that has them with --reference.",
            path=table.path,
            name=name,
        )
    return _not_itself(table, table, name)


def _their_column(table: Table, source: Table, name: str | None) -> str:
    name = name or (
        PREDICTION if REFERENCE not in source.columns and PREDICTION in source.columns else REFERENCE
    )
    source.need(name)
    return _not_itself(table, source, name)


def _not_itself(table: Table, source: Table, name: str) -> str:
    """Refuse to compare the predictions with themselves."""
    if name == PREDICTION and source.path.resolve() == table.path.resolve():
        raise InputError(
            "{path}: the column {name!r} would be compared with itself; name another one.",
            path=source.path,
            name=name,
        )
    return name


def _ordered(table: Table, name: str, found: Join) -> list[str]:
    cells = table.column(name)
    return [cells[row] for row in found.rows]


def _other(
    table: Table, references: Sequence[str], options: EvaluateOptions, notes: list[Localized]
) -> Answers:
    assert options.compare is not None
    source = read_table(options.compare, [PREDICTION])
    found = join_tables(table, source)
    notes.append(Localized("compared with: {path}, {by}", path=source.path, by=found.by))
    answers = _answers(source, references, found, options.score_column)
    notes += [Localized("{path}: {note}", path=source.path, note=note) for note in _oddities(answers)]
    return answers


def _answers(table: Table, references: Sequence[str], found: Join | None, scores: str | None) -> Answers:
    """The predictions of one file, in the references' order."""
    join = found or Join(tuple(range(len(table))), Localized("joined by row number"))
    if scores is not None:
        table.need(scores)
    errors = _ordered(table, ERROR, join) if ERROR in table.columns else [""] * len(references)
    failed = np.array([bool(error.strip()) for error in errors])
    given = _ordered(table, PREDICTION, join)
    predictions = ["" if lost else text for lost, text in zip(failed, given, strict=True)]
    lines = tuple(table.lines[row] for row in join.rows)
    name = scores or SCORE
    cells = tuple(_ordered(table, name, join)) if name in table.columns else None
    return Answers(tuple(references), tuple(predictions), lines, failed, cells)


def _oddities(answers: Answers) -> list[Localized]:
    """What is worth a word about one file's predictions."""
    failed = int(answers.failed.sum())
    empty = _empty(answers.predictions) - failed
    notes = []
    if failed:
        notes.append(
            Localized("rows with an error instead of an answer, counted as wrong: {failed}", failed=failed)
        )
    if empty:
        notes.append(Localized("empty predictions: {empty}", empty=empty))
    return notes


def _about_references(references: Sequence[str]) -> list[Localized]:
    empty = _empty(references)
    return (
        [Localized("empty references, where every predicted word is an error: {empty}", empty=empty)]
        if empty
        else []
    )


def _empty(texts: Sequence[str]) -> int:
    return sum(not text.strip() for text in texts)


# --- groups --------------------------------------------------------------------------------------------


def grouped(pairs: Pairs, name: str) -> Grouping:
    """Divide the rows by a column, or by their length.

    `length` is a column where there is one; else bands between quartiles of the column `seconds` or
    `duration`, or of the characters in each normalised reference.

    Raises:
        InputError: there is no such column.
    """
    if name in pairs.columns:
        cells = [cell.strip() for cell in pairs.columns[name]]
        names = natural_order(cells)
        number = {cell: place for place, cell in enumerate(names)}
        return Grouping(name, tuple(names), np.array([number[cell] for cell in cells]))
    if name == LENGTH:
        return _by_length(pairs)
    listed = ", ".join(repr(column) for column in pairs.columns)
    raise InputError(
        "--group-by {name}: there is no such column; there are {listed}, and length.",
        name=name,
        listed=listed,
    )


def _by_length(pairs: Pairs) -> Grouping:
    for name in SECONDS:
        lengths = _numbers(pairs.columns.get(name, ()))
        if lengths is not None:
            return _bands(f"{LENGTH} ({name})", lengths)
    return _bands(
        f"{LENGTH} (characters)", np.array([len(normalized(text)) for text in pairs.answers.references])
    )


def _numbers(cells: Sequence[str]) -> np.ndarray | None:
    """The cells as finite numbers, or None if there are none or any is something else."""
    try:
        numbers = np.array([float(cell) for cell in cells])
    except ValueError:
        return None
    return numbers if len(numbers) and np.isfinite(numbers).all() else None


def _bands(title: str, lengths: np.ndarray) -> Grouping:
    """Up to four bands with about as many rows in each, named by their shortest and longest row."""
    edges = np.unique(np.quantile(lengths, BANDS, method="lower"))
    bands, codes = np.unique(np.searchsorted(edges, lengths), return_inverse=True)
    inside = [lengths[codes == band] for band in range(len(bands))]
    return Grouping(title, tuple(f"{band.min():g}-{band.max():g}" for band in inside), codes)
