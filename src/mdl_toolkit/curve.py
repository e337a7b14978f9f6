"""`log.jsonl` to `loss.png`: the losses and the learning rate of a run, resumed or not, in one picture."""

import shutil
from pathlib import Path
from typing import Any

from mdl_toolkit.checkpoints import LOG, PLOT, WORK
from mdl_toolkit.console import warn
from mdl_toolkit.runlog import Smooth, read_log

SIZE, DOTS = (9.0, 5.0), 120  # inches, and dots in an inch
LIGHT, DARK, EVALUATION, RATE = "#b5cde3", "#1f4e79", "#d95f02", "#999999"


def plot(output: Path) -> None:
    """Draw `loss.png` into a run's folder, whole or not at all; why it cannot be drawn is only warned of."""
    try:
        lines = read_log(output / LOG) if (output / LOG).exists() else []
        if any("loss" in line for line in lines):
            _put_in_place(_figure(lines), output)
    except Exception as problem:  # noqa: BLE001 - a library for pictures ends no run, whatever it raises
        warn(f"{PLOT} cannot be drawn: {problem}", f"无法绘制 {PLOT}：{problem}")


def _put_in_place(figure: Any, output: Path) -> None:
    work = output / WORK / PLOT
    try:
        work.parent.mkdir(exist_ok=True)
        figure.savefig(work, format="png")
        work.replace(output / PLOT)
    finally:
        shutil.rmtree(work.parent, ignore_errors=True)


def _figure(lines: list[dict[str, Any]]) -> Any:
    """The picture; made with Agg, without a window or any state of matplotlib's that others would share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = axes.twinx()
    _draw(axes, rates, lines)
    axes.set(title="Training", xlabel="optimizer step", ylabel="loss")
    axes.set_zorder(rates.get_zorder() + 1)  # losses lie over the learning rate
    axes.patch.set_visible(False)
    rates.set(ylabel="learning rate")
    rates.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(handles=[*axes.get_lines(), *rates.get_lines()], loc="upper right")
    return figure


def _draw(axes: Any, rates: Any, lines: list[dict[str, Any]]) -> None:
    steps, losses = _series(lines, "loss")
    mark = "." if len(steps) == 1 else None  # one point makes no line
    axes.plot(steps, losses, color=LIGHT, linewidth=1, marker=mark, label="training loss, each step")
    smooth = Smooth()
    means = [smooth.add(loss) for loss in losses]
    axes.plot(steps, means, color=DARK, linewidth=2, marker=mark, label="training loss, smoothed")
    at, evaluations = _series(lines, "eval_loss")
    if at:
        axes.plot(at, evaluations, "o", color=EVALUATION, label="evaluation loss")
    rates.plot(*_series(lines, "learning_rate"), "--", color=RATE, linewidth=1, label="learning rate")


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [line for line in lines if name in line]
    return [line["step"] for line in found], [line[name] for line in found]
