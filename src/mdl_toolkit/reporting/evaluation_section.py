"""The values that the page shows of an evaluation, or of predictions without references."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdl_toolkit.data.manifest import AUDIO, PREDICTION
from mdl_toolkit.evaluation.align import ERROR, SCORE
from mdl_toolkit.evaluation.csv_table import Table
from mdl_toolkit.evaluation.label_metrics import natural_order
from mdl_toolkit.evaluation.metrics import CORPUS_METRICS
from mdl_toolkit.evaluation.results import Comparison, Confusion, Evaluation, MetricValue, RowResult
from mdl_toolkit.evaluation.text_metrics import CHARACTER
from mdl_toolkit.i18n import Localized
from mdl_toolkit.reporting.audio_links import audio_values

WRONG, RIGHT, FAILED = range(3)


def worst_first(rows: Sequence[RowResult], scores: Sequence[float | None]) -> list[int]:
    """Order the rows: failed ones, then wrong ones, by share of errors and by the score of the answer."""

    def key(row: int) -> tuple[bool, bool, float, float, int]:
        result, score = rows[row], scores[row]
        share = result.errors / max(result.length, 1)
        return result.is_right, not result.failed, -share, math.inf if score is None else -score, result.line

    return sorted(range(len(rows)), key=key)


def evaluation_values(
    evaluation: Evaluation, base_dir: str | None, page: Path, *, score_column: str | None, embedded: int
) -> dict[str, Any]:
    """Return the parts `evaluation` and `rows` of an evaluation's page, the worst rows first.

    Args:
        evaluation: rows, metrics and comparisons.
        base_dir: folder that recordings' relative paths start from.
        page: the HTML file.
        score_column: the column with scores, `score` if None.
        embedded: so many recordings of the first rows are put into the page.
    """
    scores = _scores([row.cells.get(score_column or SCORE, "") for row in evaluation.rows])
    order = worst_first(evaluation.rows, scores)
    rows = [evaluation.rows[row] for row in order]
    settings = evaluation.settings
    groups = []
    for title in rows[0].groups:
        names = natural_order([row.groups[title] for row in rows])
        code_of = {name: code for code, name in enumerate(names)}
        codes = [code_of[row.groups[title]] for row in rows]
        groups.append({"title": title, "names": names, "codes": codes})
    values = {
        "line": [row.line for row in rows],
        "reference": encode_column([row.reference for row in rows]),
        "prediction": encode_column([row.prediction for row in rows]),
        "error": _error_column([row.cells.get(ERROR, "") if row.failed else "" for row in rows]),
        "state": [FAILED if row.failed else RIGHT if row.is_right else WRONG for row in rows],
        "errors": [row.errors for row in rows],
        "length": [row.length for row in rows],
        "score": _scores_if_any([scores[row] for row in order]),
        "by_character": settings["errors_in"] == CHARACTER,
        "normalize": settings["normalize"],
        "groups": groups,
        "audio": _audio([row.cells.get(AUDIO) for row in rows], base_dir, page, embedded),
        **_label_codes(rows, evaluation.confusion),
    }
    return {"evaluation": _metrics_section(evaluation), "rows": values}


def table_values(
    table: Table, base_dir: str | None, page: Path, *, score_column: str | None, embedded: int
) -> dict[str, Any]:
    """Return the parts of the page of predictions alone, rows in the file's order."""
    count = len(table)

    def column(name: str) -> list[str] | None:
        return table.column(name) if name in table.columns else None

    values = {
        "line": list(table.lines),
        "reference": None,
        "prediction": encode_column(table.column(PREDICTION)),
        "error": _error_column(column(ERROR) or [""] * count),
        "score": _scores_if_any(_scores(column(score_column or SCORE) or [""] * count)),
        "groups": [],
        "audio": _audio(column(AUDIO) or [None] * count, base_dir, page, embedded),
        **dict.fromkeys(("state", "errors", "length", "labels", "expected", "given")),
    }
    return {"evaluation": None, "rows": values}


def encode_column(cells: Sequence[str]) -> Any:
    """Return the cells, or a dictionary encoding (`values`, and `codes` into them) where that is shorter."""
    different = list(dict.fromkeys(cells))
    if 2 * len(different) > len(cells):
        return list(cells)
    number = {cell: code for code, cell in enumerate(different)}
    return {"values": different, "codes": [number[cell] for cell in cells]}


def _error_column(cells: Sequence[str]) -> Any:
    return encode_column(cells) if any(cells) else None


def _scores(cells: Sequence[str]) -> list[float | None]:
    """Read finite numbers; None for anything else, such as the scores of several labels."""
    scores: list[float | None] = []
    for cell in cells:
        try:
            score = float(cell)
        except ValueError:
            score = math.nan
        scores.append(score if math.isfinite(score) else None)
    return scores


def _scores_if_any(scores: list[float | None]) -> list[float | None] | None:
    return scores if any(score is not None for score in scores) else None


def _audio(cells: Sequence[str | None], base_dir: str | None, page: Path, embedded: int) -> Any:
    named = [cell or "" for cell in cells]
    return audio_values(named, base_dir, page, embedded) if any(named) else None


def _label_codes(rows: Sequence[RowResult], confusion: Confusion | None) -> dict[str, Any]:
    """Encode both sides as indices of the confusion's labels; None where the references are no labels."""
    if confusion is None:
        return dict.fromkeys(("labels", "expected", "given"))
    number = {label: code for code, label in enumerate(confusion.labels)}
    other = len(number)
    given = [other if row.failed else number.get(row.prediction.strip(), other) for row in rows]
    expected = [number[row.reference.strip()] for row in rows]
    return {"labels": list(confusion.labels), "expected": expected, "given": given}


def _metrics_section(evaluation: Evaluation) -> dict[str, Any]:
    """Return metrics, groups, confusion matrix and notes."""
    settings = evaluation.settings
    rule = {
        "accuracy": Localized("the answer is the reference to the letter"),
        "exact-match": Localized("answer and reference are the same as compared"),
        "same labels": Localized("the answer has the reference's labels"),
    }[settings["right_by"]]
    is_character = settings["errors_in"] == CHARACTER
    unit = Localized("characters") if is_character else Localized("words")
    note = Localized("a row is right if {rule}; errors are counted in {unit}", rule=rule, unit=unit)
    compared = {pair.other.metric: pair for pair in evaluation.comparisons}
    confusion = evaluation.confusion
    return {
        "figures": [_metric_values(figure, compared.get(figure.metric)) for figure in evaluation.metrics],
        "groups": [
            {
                "column": group.column,
                "name": group.name,
                "rows": group.rows,
                "figures": [_metric_values(figure) for figure in group.metrics],
            }
            for group in evaluation.groups
        ],
        "confusion": confusion and {"labels": confusion.labels, "counts": confusion.counts},
        "notes": [note.to_json() for note in (*evaluation.notes, note)],
    }


def _metric_values(figure: MetricValue, comparison: Comparison | None = None) -> dict[str, Any]:
    score = CORPUS_METRICS[figure.metric]
    values = {"title": score.title, "is_share": score.is_share, "value": figure.value}
    values |= {"low": figure.low, "high": figure.high}
    if comparison is not None:
        values |= {"other": comparison.other.value, "difference": comparison.difference.value}
    return values
