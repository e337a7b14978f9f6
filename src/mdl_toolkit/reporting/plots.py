"""A run's curves to `loss.png`, and a confusion matrix to a picture, for a paper; neither ends a training."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import InputError
from mdl_toolkit.evaluation.text_metrics import TEXT_METRICS
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.files import replace_file, report_write_errors
from mdl_toolkit.utils.run_folder import LOG, PLOT, SmoothedLoss, read_log, series

SIZE, DOTS = (9.0, 5.0), 120  # inches, and dots in an inch
LIGHT, DARK, EVALUATION, RATE = "#b5cde3", "#1f4e79", "#d95f02", "#999999"
STYLES = ("o-", "s--", "^:")  # of the metrics
CELL, MARGIN = 0.42, 2.4  # inches of a cell of the confusion matrix, and of what is around them
FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "SimHei")


def plot(output: Path) -> None:
    """Draw `loss.png` into a run's folder, whole or not at all; why it cannot be drawn is only warned of."""
    try:
        if (lines := _lines(output)) is not None:
            _save(_figure(lines), output / PLOT)
    except Exception as problem:  # noqa: BLE001 - a library for pictures ends no run, whatever it raises
        warn("{plot} cannot be drawn: {reason}", plot=PLOT, reason=problem)


def draw_run(run: Path, path: Path) -> Path | None:
    """Draw the same picture anywhere; None if nothing was logged.

    Raises:
        InputError: it cannot be written.
    """
    lines = _lines(run)
    return None if lines is None else _saved(_figure(lines), path)


def _lines(run: Path) -> list[dict[str, Any]] | None:
    """The log of a run with losses in it."""
    lines = read_log(run / LOG) if (run / LOG).exists() else []
    return lines if any("loss" in line for line in lines) else None


def _saved(figure: Any, path: Path) -> Path:
    with report_write_errors(f"--png {path}", InputError):
        _save(figure, path)
    return path


def _save(figure: Any, path: Path) -> None:
    with replace_file(path) as work:
        figure.savefig(work, format="png")


def _empty_figure(width: float, height: float) -> Any:
    """A figure of Agg, without a window or any state of matplotlib's that others would share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# --- curves --------------------------------------------------------------------------------------------


def _figure(lines: list[dict[str, Any]]) -> Any:
    """Losses over the learning rate, and beside them the metrics, if there are any."""
    metrics = [name for name in TEXT_METRICS if any(f"eval_{name}" in line for line in lines)]
    figure = _empty_figure(SIZE[0] * (1.6 if metrics else 1), SIZE[1])
    panels = figure.subplots(1, 2, width_ratios=(5, 3)) if metrics else [figure.add_subplot()]
    axes = panels[0]
    rates = axes.twinx()
    _draw(axes, rates, lines)
    axes.set(title="Training", xlabel="optimizer step", ylabel="loss")
    axes.set_zorder(rates.get_zorder() + 1)  # losses lie over the learning rate
    axes.patch.set_visible(False)
    rates.set(ylabel="learning rate")
    rates.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(handles=[*axes.get_lines(), *rates.get_lines()], loc="upper right")
    if metrics:
        _draw_metrics(panels[1], lines, metrics)
    return figure


def _draw(axes: Any, rates: Any, lines: list[dict[str, Any]]) -> None:
    steps, losses = series(lines, "loss")
    mark = "." if len(steps) == 1 else None  # one point makes no line
    axes.plot(steps, losses, color=LIGHT, linewidth=1, marker=mark, label="training loss, each step")
    smooth = SmoothedLoss()
    means = [smooth.add(loss) for loss in losses]
    axes.plot(steps, means, color=DARK, linewidth=2, marker=mark, label="training loss, smoothed")
    at, evaluations = series(lines, "eval_loss")
    if at:
        axes.plot(at, evaluations, "o", color=EVALUATION, label="evaluation loss")
    rates.plot(*series(lines, "learning_rate"), "--", color=RATE, linewidth=1, label="learning rate")


def _draw_metrics(axes: Any, lines: list[dict[str, Any]], metrics: Sequence[str]) -> None:
    for name, style in zip(metrics, STYLES, strict=False):
        axes.plot(*series(lines, f"eval_{name}"), style, color=EVALUATION, label=name)
    axes.set(title="Evaluation", xlabel="optimizer step", ylabel=", ".join(metrics))
    axes.grid(alpha=0.3)
    axes.legend()


# --- the confusion matrix --------------------------------------------------------------------------------


def draw_confusion(labels: Sequence[str], counts: Sequence[Sequence[int]], path: Path) -> Path:
    """Draw how often each label was answered with each, coloured by its share of the row.

    Args:
        labels: `[labels]`.
        counts: `[labels, labels + 1]`, the last column for what is no such label; left out if it is empty.
        path: the PNG file.

    Raises:
        InputError: it cannot be written.
    """
    has_other = any(row[-1] for row in counts)
    shown = [list(row) if has_other else list(row[:-1]) for row in counts]
    names = [*(label or "(empty)" for label in labels), "(other)"][: len(labels) + has_other]
    shares = [[count / max(sum(row), 1) for count in row] for row in shown]
    figure = _empty_figure(MARGIN + CELL * len(names), MARGIN + CELL * len(labels))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = {"fontfamily": _families()}
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", **font)
    axes.set_yticks(range(len(labels)), names[: len(labels)], **font)
    axes.set(xlabel="answer", ylabel="reference")
    for row, line in enumerate(shown):
        for column, count in enumerate(line):
            ink = "white" if shares[row][column] > 0.5 else "black"
            axes.text(column, row, count or "", ha="center", va="center", color=ink, fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # no font here has it: a box stands for it
        return _saved(figure, path)


def _families() -> list[str]:
    """Fonts for labels: matplotlib's own, and one with Chinese characters where there is one."""
    from matplotlib import font_manager

    there = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[name for name in FONTS if name in there][:1]]
