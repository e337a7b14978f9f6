"""Text tables of an evaluation for the terminal."""

from collections.abc import Sequence

from mdl_toolkit.evaluation.metrics import CORPUS_METRICS
from mdl_toolkit.evaluation.results import Comparison, Confusion, Evaluation, Group, MetricValue
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import width_of

MOST_LABELS = 30
MOST_GROUPS = 40
WIDEST = 40
OTHER = Localized("others")
EMPTY = Localized("(empty)")
INTERVAL = Localized("95 % interval")


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
    lines = [[*_named(figure), _span(figure)] for figure in evaluation.metrics]
    if evaluation.comparisons:
        head += [str(Localized("other")), str(Localized("difference")), str(INTERVAL), "p", "McNemar p"]
        lines = [[*line, *_compared(pair)] for line, pair in zip(lines, evaluation.comparisons, strict=True)]
        if all(pair.mcnemar is None for pair in evaluation.comparisons):
            head, lines = head[:-1], [line[:-1] for line in lines]
    return aligned([head, *lines])


def _named(figure: MetricValue) -> list[str]:
    return [CORPUS_METRICS[figure.metric].title, _number(figure.metric, figure.value)]


def _compared(pair: Comparison) -> list[str]:
    metric, difference = pair.other.metric, pair.difference
    return [
        _number(metric, pair.other.value), _number(metric, difference.value, "+"), _span(difference, "+"),
        _p_value(pair.p_value), _p_value(pair.mcnemar),
    ]  # fmt: skip


def _number(metric: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.2%}" if CORPUS_METRICS[metric].is_share else f"{value:{sign}.2f}"


def _span(figure: MetricValue, sign: str = "") -> str:
    low, high = (_number(figure.metric, bound, sign) for bound in (figure.low, figure.high))
    return "–" if figure.low is None else str(Localized("{low} to {high}", low=low, high=high))


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if value >= 1e-3 else "<0.001"


def _groups(groups: Sequence[Group]) -> str:
    shown = sorted(groups, key=lambda group: -group.rows)[:MOST_GROUPS]
    head = [groups[0].column, str(Localized("rows"))]
    for figure in groups[0].metrics:
        head += [CORPUS_METRICS[figure.metric].title, str(INTERVAL)]
    rows = [
        [
            group.name or str(EMPTY),
            str(group.rows),
            *(cell for figure in group.metrics for cell in (_named(figure)[1], _span(figure))),
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
