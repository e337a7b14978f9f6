"""Values of an evaluation, and their JSON and CSV."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mdl_toolkit.i18n import Localized


@dataclass(frozen=True)
class MetricValue:
    """One metric over some rows.

    Attributes:
        metric: its name.
        value: a share, or for bleu and chrf a number up to 100; None if undefined.
        low: lower end of the 95 % interval, None without one.
        high: upper end.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One metric of both prediction files.

    Attributes:
        other: the figure of `--compare`.
        difference: ours minus the other's; its interval is that of the paired bootstrap.
        p_value: of the paired permutation test, None without one.
        mcnemar: p-value of McNemar's exact test, None where rows are not right or wrong.
    """

    other: MetricValue
    difference: MetricValue
    p_value: float | None
    mcnemar: float | None


@dataclass(frozen=True)
class Group:
    """The figures of the rows with one value in a column."""

    column: str
    name: str
    rows: int
    metrics: tuple[MetricValue, ...]


@dataclass(frozen=True)
class Confusion:
    """How often rows of each label were answered with each label.

    Attributes:
        labels: those of the references, sorted.
        counts: `[labels, labels + 1]`, references first; the last column is for what is no such label.
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RowResult:
    """One row.

    Attributes:
        line: where it starts in the predictions' file.
        cells: its cells by column, of both files.
        reference: as written.
        prediction: as written; empty if the row failed.
        failed: there is an error in place of an answer.
        is_right: the answer is right, by what `Evaluation.settings` names.
        errors: edits between reference and prediction, in the unit that `Evaluation.settings` names.
        length: units of the reference.
        groups: the row's group by column of `--group-by`.
    """

    line: int
    cells: Mapping[str, str]
    reference: str
    prediction: str
    failed: bool
    is_right: bool
    errors: int
    length: int
    groups: Mapping[str, str]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        rows: each row, in the order of the predictions' file.
        metrics: one value for each metric, over all rows.
        comparisons: with `--compare`, one for each metric; else none.
        groups: column by column.
        confusion: None where the references are no labels.
        settings: how it was computed: normalisation, units, seed, versions of the libraries.
        notes: what the user should know.
    """

    rows: tuple[RowResult, ...]
    metrics: tuple[MetricValue, ...]
    comparisons: tuple[Comparison, ...]
    groups: tuple[Group, ...]
    confusion: Confusion | None
    settings: Mapping[str, Any]
    notes: tuple[Localized, ...]

    def value(self, metric: str) -> float | None:
        """The figure of one of the metrics over all rows."""
        return next(figure.value for figure in self.metrics if figure.metric == metric)


def as_json(evaluation: Evaluation) -> str:
    """Everything but the rows' other cells."""
    values = {
        "settings": evaluation.settings,
        "notes": [note.en for note in evaluation.notes],
        "metrics": {figure.metric: _figure(figure) for figure in evaluation.metrics},
        "comparison": {
            pair.other.metric: {
                "other": pair.other.value,
                "difference": _figure(pair.difference),
                "p_value": pair.p_value,
                "mcnemar_p_value": pair.mcnemar,
            }
            for pair in evaluation.comparisons
        },
        "groups": [
            {
                "column": group.column,
                "group": group.name,
                "rows": group.rows,
                "metrics": {figure.metric: _figure(figure) for figure in group.metrics},
            }
            for group in evaluation.groups
        ],
        "confusion": asdict(evaluation.confusion) if evaluation.confusion else None,
        "rows": [_row(row) for row in evaluation.rows],
    }
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"


def _figure(figure: MetricValue) -> dict[str, float | None]:
    return {"value": figure.value, "low": figure.low, "high": figure.high}


def _row(row: RowResult) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name != "cells"}


def as_csv(evaluation: Evaluation) -> str:
    """A line for each metric over all rows and over each group; how it was computed stands in every line."""
    text = io.StringIO()
    settings = evaluation.settings
    how = {name: _plain(settings[name]) for name in ("normalize", "bootstrap", "seed", "versions")}
    names = ["column", "group", "rows", "metric", "value", "low", "high"]
    names += ["other", "difference", "difference_low", "difference_high", "p_value", "mcnemar_p_value", *how]
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    compared = {pair.other.metric: _comparison(pair) for pair in evaluation.comparisons}
    for figure in evaluation.metrics:
        whole = {"rows": len(evaluation.rows), **vars(figure), **compared.get(figure.metric, {})}
        writer.writerow({**whole, **how})
    for group in evaluation.groups:
        for figure in group.metrics:
            part = {"column": group.column, "group": group.name, "rows": group.rows}
            writer.writerow({**part, **vars(figure), **how})
    return text.getvalue()


def _comparison(pair: Comparison) -> dict[str, float | None]:
    difference = pair.difference
    return {
        "other": pair.other.value, "difference": difference.value, "difference_low": difference.low,
        "difference_high": difference.high, "p_value": pair.p_value, "mcnemar_p_value": pair.mcnemar,
    }  # fmt: skip


def _plain(value: Any) -> str:
    """A setting as one cell."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)
