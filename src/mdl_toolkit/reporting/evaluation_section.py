"""The values that the page shows of an evaluation, or of predictions without references."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdl_toolkit.data.column_names import PREDICTION, find_column
from mdl_toolkit.evaluation.csv_table import ERROR, SCORE, Table
from mdl_toolkit.evaluation.metrics import CORPUS_METRICS
from mdl_toolkit.evaluation.results import Confusion, Evaluation, MetricValue, RowResult
from mdl_toolkit.evaluation.text_metrics import CHARACTER
from mdl_toolkit.i18n import Localized
from mdl_toolkit.reporting.audio_links import audio_values

WRONG, RIGHT, FAILED = range(3)


def evaluation_values(
    evaluation: Evaluation, base_dir: str | None, page: Path, *, score_column: str | None, embedded: int
) -> dict[str, Any]:
    """Return the parts `evaluation` and `rows` of an evaluation's page, the worst rows first.

    Failed rows come first, then wrong ones, by share of errors and by the score of the answer.

    Args:
        evaluation: rows, metrics and comparisons.
        base_dir: folder that recordings' relative paths start from.
        page: the HTML file.
        score_column: the column with scores, `score` if None.
        embedded: so many recordings of the first rows are put into the page.
    """
    scores = find_column(score_column or SCORE, [*evaluation.rows[0].cells])

    def badness(row: RowResult) -> tuple[bool, bool, float, float, int]:
        score, share = _read_number(row.cells.get(scores, "")), row.errors / max(row.length, 1)
        return row.is_right, not row.failed, -share, math.inf if score is None else -score, row.line

    rows = sorted(evaluation.rows, key=badness)
    groups = []
    for title in rows[0].groups:
        names = [group.name for group in evaluation.groups if group.column == title]
        code_of = {name: code for code, name in enumerate(names)}
        groups.append({"title": title, "names": names, "codes": [code_of[row.groups[title]] for row in rows]})
    values = {
        "line": [row.line for row in rows],
        "reference": [row.reference for row in rows],
        "prediction": [row.prediction for row in rows],
        "error": _unless_empty([row.cells.get(ERROR, "") if row.failed else "" for row in rows]),
        "state": [FAILED if row.failed else RIGHT if row.is_right else WRONG for row in rows],
        "errors": [row.errors for row in rows],
        "length": [row.length for row in rows],
        "score": _unless_empty([_read_number(row.cells.get(scores, "")) for row in rows]),
        "by_character": evaluation.settings["errors_in"] == CHARACTER,
        "normalize": evaluation.settings["normalize"],
        "groups": groups,
        "audio": audio_values([row.cells for row in rows], base_dir, page, embedded),
        **_label_codes(rows, evaluation.confusion),
    }
    return {"evaluation": _metrics_section(evaluation), "rows": values}


def table_values(
    table: Table, base_dir: str | None, page: Path, *, score_column: str | None, embedded: int
) -> dict[str, Any]:
    """Return the parts of the page of predictions alone, rows in the file's order."""
    scores = find_column(score_column or SCORE, table.columns)

    def column(name: str) -> list[str]:
        return table.column(name) if name in table.columns else [""] * len(table)

    rows = [dict(zip(table.columns, cells, strict=True)) for cells in table.cells]
    values = {
        "line": list(table.lines),
        "reference": None,
        "prediction": table.column(PREDICTION),
        "error": _unless_empty(column(ERROR)),
        "score": _unless_empty([*map(_read_number, column(scores))]),
        "groups": [],
        "audio": audio_values(rows, base_dir, page, embedded),
        **dict.fromkeys(("state", "errors", "length", "labels", "expected", "given")),
    }
    return {"evaluation": None, "rows": values}


def _unless_empty(cells: list[Any]) -> list[Any] | None:
    return None if all(cell in ("", None) for cell in cells) else cells


def _read_number(cell: str) -> float | None:
    """Read a finite number; None for anything else, such as the scores of several labels."""
    with suppress(ValueError):
        return number if math.isfinite(number := float(cell)) else None
    return None


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
    rule = {
        "accuracy": Localized("the answer is the reference to the letter"),
        "exact-match": Localized("answer and reference are the same as compared"),
        "same labels": Localized("the answer has the reference's labels"),
    }[evaluation.settings["right_by"]]
    is_character = evaluation.settings["errors_in"] == CHARACTER
    unit = Localized("characters") if is_character else Localized("words")
    note = Localized("a row is right if {rule}; errors are counted in {unit}", rule=rule, unit=unit)
    confusion = evaluation.confusion
    return {
        "figures": _metric_values(evaluation.metrics),
        "groups": [
            {
                "column": each.column,
                "name": each.name,
                "rows": each.rows,
                "figures": _metric_values(each.metrics),
            }
            for each in evaluation.groups
        ],
        "confusion": confusion and {"labels": confusion.labels, "counts": confusion.counts},
        "notes": [each.to_json() for each in (evaluation.baseline, *evaluation.notes, note) if each],
    }


def _metric_values(metrics: Sequence[MetricValue]) -> list[dict[str, Any]]:
    """Return metrics with their intervals, and how they compare with another system's."""
    figures = []
    for each in metrics:
        metric, pair = CORPUS_METRICS[each.metric], vars(each.comparison) if each.comparison else {}
        about = {"title": metric.title, "is_share": metric.is_share}
        figures.append({**about, "value": each.value, "low": each.low, "high": each.high, **pair})
    return figures
