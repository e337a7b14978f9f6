"""Text tables of an evaluation for the terminal, in the user's language."""

from collections.abc import Sequence

from mdl_toolkit.evaluation.metrics import CORPUS_METRICS
from mdl_toolkit.evaluation.results import Confusion, Evaluation, Group, MetricValue
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import width_of

# Labels beyond which the confusion table is left out.
MOST_SHOWN_LABELS = 30
# Groups of one column that are shown; files have all.
MOST_SHOWN_GROUPS = 40
# Columns of the terminal that a cell may take.
WIDEST_CELL = 40
OTHER = Localized("others")
EMPTY = Localized("(empty)")
INTERVAL = Localized("95 % interval")
COMPARED = (Localized("other"), Localized("difference"), INTERVAL)
UNDEFINED = "–"


def as_text(evaluation: Evaluation) -> str:
    """Return all tables: metrics, groups of each column, confused labels."""
    columns = dict.fromkeys(group.column for group in evaluation.groups)
    tables = [
        _metrics_table(evaluation),
        *(_groups_table([group for group in evaluation.groups if group.column == name]) for name in columns),
    ]
    if evaluation.confusion and len(evaluation.confusion.labels) <= MOST_SHOWN_LABELS:
        tables.append(_confusion_table(evaluation.confusion))
    return "\n\n".join(tables)


def _metrics_table(evaluation: Evaluation) -> str:
    """Lay out the metrics of all rows, with `--compare` those of the other file and their differences."""
    head = [
        str(Localized("{rows} {rows:row|rows}", rows=len(evaluation.rows))),
        str(Localized("value")),
        str(INTERVAL),
    ]
    lines = [[_title(each), *_cells(each)] for each in evaluation.metrics]
    pairs = [each.comparison for each in evaluation.metrics if each.comparison]
    tests = {"p": "p_value"} if pairs else {}
    if any(pair.mcnemar_p_value is not None for pair in pairs):
        tests["McNemar p"] = "mcnemar_p_value"
    head += [*(map(str, COMPARED) if pairs else ()), *tests]
    for line, pair in zip(lines, pairs, strict=False):
        line += [_p_value(getattr(pair, name)) for name in tests.values()]
    table = align_columns([head, *lines])
    return table if evaluation.baseline is None else f"{table}\n{evaluation.baseline}"


def _groups_table(groups: Sequence[Group]) -> str:
    """Lay out the largest groups of a column in their order."""
    largest = sorted(groups, key=lambda group: -group.rows)[:MOST_SHOWN_GROUPS]
    head = [groups[0].column, str(Localized("rows"))]
    for each in groups[0].metrics:
        head += [_title(each), str(INTERVAL), *(map(str, COMPARED) if each.comparison else ())]
    lines = []
    for group in (group for group in groups if group in largest):
        cells = [cell for each in group.metrics for cell in _cells(each)]
        lines.append([group.name or str(EMPTY), str(group.rows), *cells])
    left_out = len(groups) - len(lines)
    more = (
        str(Localized("\n... and {left_out} smaller {left_out:group|groups}", left_out=left_out))
        if left_out
        else ""
    )
    return align_columns([head, *lines]) + more


def _confusion_table(confusion: Confusion) -> str:
    """Lay out the counts of labels; the column of other predictions is left out if it is empty."""
    names = [*(label or str(EMPTY) for label in confusion.labels), f"({OTHER})"]
    width = len(names) if any(row[-1] for row in confusion.counts) else len(names) - 1
    lines = [
        [label, *(str(count or "·") for count in row[:width])]
        for label, row in zip(names[:-1], confusion.counts, strict=True)
    ]
    title = str(Localized("answers (columns) to each reference (rows)"))
    return f"{title}\n{align_columns([['', *names[:width]], *lines])}"


# --- cells ---------------------------------------------------------------------------------------------


def _title(each: MetricValue) -> str:
    return CORPUS_METRICS[each.metric].title


def _cells(each: MetricValue) -> list[str]:
    """Return a metric and its interval; with a comparison the other's value, the difference, its interval."""
    form = ".2%" if CORPUS_METRICS[each.metric].is_share else ".2f"

    def figure(value: float | None, low: float | None, high: float | None, form: str = form) -> list[str]:
        shown, *bounds = [UNDEFINED if each is None else f"{each:{form}}" for each in (value, low, high)]
        interval = Localized("{low} to {high}", low=bounds[0], high=bounds[1])
        return [shown, UNDEFINED if low is None else str(interval)]

    cells = figure(each.value, each.low, each.high)
    if pair := each.comparison:
        cells += figure(pair.other, None, None)[:1]
        cells += figure(pair.difference, pair.difference_low, pair.difference_high, f"+{form}")
    return cells


def _p_value(value: float | None) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:.2g}" if value >= 1e-3 else "<0.001"


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Join cells to lines of equal columns, the first one aligned left and all others right.

    Unprintable characters are shown as dots, and long cells are cut.
    """
    shown = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(width_of, column)) for column in zip(*shown, strict=True)]
    lines = []
    for first, *others in shown:
        right = [
            " " * (width - width_of(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join([first + " " * (widths[0] - width_of(first)), *right]).rstrip())
    return "\n".join(lines)


def _printable(cell: str) -> str:
    """Replace unprintable characters, and cut a cell that is too wide."""
    shown = "".join(letter if letter.isprintable() else "·" for letter in cell[: WIDEST_CELL + 1])
    if width_of(shown) <= WIDEST_CELL:
        return shown
    while width_of(shown) >= WIDEST_CELL:
        shown = shown[:-1]
    return f"{shown}…"
