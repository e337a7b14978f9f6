"""What an evaluation came to, as values, as a table for the terminal, and as the content of JSON and CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mdl_toolkit.evaluation.metrics import SCORES
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import width_of

MOST_LABELS = 30  # of a confusion table in the terminal
MOST_GROUPS = 40  # of one column in the terminal; files have all
WIDEST = 40  # columns of the terminal that one cell may take
OTHER = Localized("others")
EMPTY = Localized("(empty)")
INTERVAL = Localized("95 % interval")


@dataclass(frozen=True)
class Figure:
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

    other: Figure
    difference: Figure
    p_value: float | None
    mcnemar: float | None


@dataclass(frozen=True)
class Group:
    """The figures of the rows with one value in a column."""

    column: str
    name: str
    rows: int
    figures: tuple[Figure, ...]


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
        figures: of all rows, one for each metric.
        comparisons: with `--compare`, one for each metric; else none.
        groups: column by column.
        confusion: None where the references are no labels.
        settings: how it was computed: normalisation, units, seed, versions of the libraries.
        notes: what the user should know.
    """

    rows: tuple[RowResult, ...]
    figures: tuple[Figure, ...]
    comparisons: tuple[Comparison, ...]
    groups: tuple[Group, ...]
    confusion: Confusion | None
    settings: Mapping[str, Any]
    notes: tuple[Localized, ...]

    def value(self, metric: str) -> float | None:
        """The figure of one of the metrics over all rows."""
        return next(figure.value for figure in self.figures if figure.metric == metric)


# --- the terminal --------------------------------------------------------------------------------------


def as_text(evaluation: Evaluation) -> str:
    """All tables, aligned, in the user's language."""
    parts = [_figures(evaluation)]
    columns = dict.fromkeys(group.column for group in evaluation.groups)
    parts += [_groups([group for group in evaluation.groups if group.column == column]) for column in columns]
    if evaluation.confusion and len(evaluation.confusion.labels) <= MOST_LABELS:
        parts.append(_confusion(evaluation.confusion))
    return "\n\n".join(parts)


def _figures(evaluation: Evaluation) -> str:
    rows = len(evaluation.rows)
    head = [str(Localized("{rows} rows", rows=rows)), str(Localized("value")), str(INTERVAL)]
    lines = [[*_named(figure), _span(figure)] for figure in evaluation.figures]
    if evaluation.comparisons:
        head += [str(Localized("other")), str(Localized("difference")), str(INTERVAL), "p", "McNemar p"]
        lines = [[*line, *_compared(pair)] for line, pair in zip(lines, evaluation.comparisons, strict=True)]
        if all(pair.mcnemar is None for pair in evaluation.comparisons):
            head, lines = head[:-1], [line[:-1] for line in lines]
    return aligned([head, *lines])


def _named(figure: Figure) -> list[str]:
    return [SCORES[figure.metric].title, _number(figure.metric, figure.value)]


def _compared(pair: Comparison) -> list[str]:
    metric, difference = pair.other.metric, pair.difference
    return [
        _number(metric, pair.other.value), _number(metric, difference.value, "+"), _span(difference, "+"),
        _p_value(pair.p_value), _p_value(pair.mcnemar),
    ]  # fmt: skip


def _number(metric: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.2%}" if SCORES[metric].is_share else f"{value:{sign}.2f}"


def _span(figure: Figure, sign: str = "") -> str:
    low, high = (_number(figure.metric, bound, sign) for bound in (figure.low, figure.high))
    return "–" if figure.low is None else str(Localized("{low} to {high}", low=low, high=high))


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if value >= 1e-3 else "<0.001"


def _groups(groups: Sequence[Group]) -> str:
    shown = sorted(groups, key=lambda group: -group.rows)[:MOST_GROUPS]
    head = [groups[0].column, str(Localized("rows"))]
    for figure in groups[0].figures:
        head += [SCORES[figure.metric].title, str(INTERVAL)]
    rows = [
        [
            group.name or str(EMPTY),
            str(group.rows),
            *(cell for figure in group.figures for cell in (_named(figure)[1], _span(figure))),
        ]
        for group in groups
        if group in shown
    ]
    left_out = len(groups) - len(rows)
    more = str(Localized("\n... and {left_out} smaller groups", left_out=left_out))
    return aligned([head, *rows]) + (more if left_out else "")


def _confusion(confusion: Confusion) -> str:
    names = [*(label or str(EMPTY) for label in confusion.labels), f"({OTHER})"]
    used = len(names) if any(row[-1] for row in confusion.counts) else len(names) - 1
    title = str(Localized("answers (columns) to each reference (rows)"))
    rows = [
        [label, *(str(count or "·") for count in row[:used])]
        for label, row in zip(names[:-1], confusion.counts, strict=True)
    ]
    return f"{title}\n{aligned([['', *names[:used]], *rows])}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines whose cells stand below each other, the first of each to the left and all others to the right.

    What would disturb a terminal is shown as a dot; long cells are cut.
    """
    clean = [[_clean(cell) for cell in row] for row in rows]
    widths = [max(map(width_of, column)) for column in zip(*clean, strict=True)]
    lines = []
    for row in clean:
        blanks = [" " * (width - width_of(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + blanks[0], *(blank + cell for blank, cell in zip(blanks[1:], row[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _clean(cell: str) -> str:
    shown = "".join(letter if letter.isprintable() else "·" for letter in cell)
    if width_of(shown) <= WIDEST:
        return shown
    while width_of(shown) >= WIDEST:
        shown = shown[:-1]
    return f"{shown}…"


# --- files ---------------------------------------------------------------------------------------------


def as_json(evaluation: Evaluation) -> str:
    """Everything but the rows' other cells."""
    values = {
        "settings": evaluation.settings,
        "notes": [note.en for note in evaluation.notes],
        "metrics": {figure.metric: _figure(figure) for figure in evaluation.figures},
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
                "metrics": {figure.metric: _figure(figure) for figure in group.figures},
            }
            for group in evaluation.groups
        ],
        "confusion": asdict(evaluation.confusion) if evaluation.confusion else None,
        "rows": [_row(row) for row in evaluation.rows],
    }
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"


def _figure(figure: Figure) -> dict[str, float | None]:
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
    for figure in evaluation.figures:
        whole = {"rows": len(evaluation.rows), **vars(figure), **compared.get(figure.metric, {})}
        writer.writerow({**whole, **how})
    for group in evaluation.groups:
        for figure in group.figures:
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
