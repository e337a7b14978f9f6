"""Pictures for a paper: a run's curves as `loss.png`, and a confusion matrix."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import shorten
from mdl_toolkit.evaluation.text_metrics import TEXT_METRICS
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.files import replace_file
from mdl_toolkit.utils.run_folder import LOG, PLOT, SmoothedLoss, read_log, series

# Inches, and dots per inch.
SIZE, DOTS = (9.0, 5.0), 120
LIGHT, DARK, EVALUATION, RATE = "#b5cde3", "#1f4e79", "#d95f02", "#999999"
# One for each metric.
STYLES = ("o-", "s--", "^:")
# Inches of a cell of the confusion matrix, and of the labels around them.
CELL, MARGIN = 0.42, 2.4
# Characters that a message names.
MOST_LETTERS = 10
# Characters of a label in the confusion matrix.
LONGEST_LABEL = 24
# Of the font that matplotlib brings along; and a font that has a box for every character.
FONT, BOXES = "DejaVu Sans", "LastResort"


def plot(output: Path) -> None:
    """Draw `loss.png` into a run's folder, whole or not at all; a failure is only warned of."""
    try:
        draw_run(output, output / PLOT)
    # Whatever the library for pictures raises, no run ends of it.
    except Exception as problem:  # noqa: BLE001
        warn("{plot} cannot be drawn: {reason}", plot=PLOT, reason=problem)


def draw_run(run: Path, path: Path) -> Path | None:
    """Draw a run's curves into a file, whole or not at all.

    Returns:
        The file; None if no loss was logged.

    Raises:
        OSError: it cannot be written.
    """
    lines = read_log(run / LOG) if (run / LOG).exists() else []
    return _saved(_run_figure(lines), path) if any("loss" in line for line in lines) else None


def _saved(figure: Any, path: Path) -> Path:
    with replace_file(path, "picture") as work:
        figure.savefig(work, format="png")
    return path


def _empty_figure(width: float, height: float) -> Any:
    """Return a figure of Agg, without a window or any state of matplotlib's that others would share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _run_figure(lines: list[dict[str, Any]]) -> Any:
    """Draw losses over the learning rate, and next to them the metrics, if there are any."""
    metrics = [name for name in TEXT_METRICS if any(f"eval_{name}" in line for line in lines)]
    figure = _empty_figure(SIZE[0] * (1.6 if metrics else 1), SIZE[1])
    panels = figure.subplots(1, 2, width_ratios=(5, 3)) if metrics else [figure.add_subplot()]
    axes = panels[0]
    rates = axes.twinx()
    steps, losses = series(lines, "loss")
    # One point makes no line.
    mark = "." if len(steps) == 1 else None
    axes.plot(steps, losses, color=LIGHT, linewidth=1, marker=mark, label="training loss, each step")
    smooth = SmoothedLoss()
    means = [smooth.add(loss) for loss in losses]
    axes.plot(steps, means, color=DARK, linewidth=2, marker=mark, label="training loss, smoothed")
    at, evaluations = series(lines, "eval_loss")
    if at:
        axes.plot(at, evaluations, "o", color=EVALUATION, label="evaluation loss")
    rates.plot(*series(lines, "learning_rate"), "--", color=RATE, linewidth=1, label="learning rate")
    axes.set(title="Training", xlabel="optimizer step", ylabel="loss")
    # Losses lie over the learning rate.
    axes.set_zorder(rates.get_zorder() + 1)
    axes.patch.set_visible(False)
    rates.set(ylabel="learning rate")
    rates.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(handles=[*axes.get_lines(), *rates.get_lines()], loc="upper right")
    if metrics:
        for name, style in zip(metrics, STYLES, strict=False):
            panels[1].plot(*series(lines, f"eval_{name}"), style, color=EVALUATION, label=name)
        panels[1].set(title="Evaluation", xlabel="optimizer step", ylabel=", ".join(metrics))
        panels[1].grid(alpha=0.3)
        panels[1].legend()
    return figure


def fonts_for(text: str) -> list[str]:
    """Find installed fonts that have the characters of a text, and warn of those that none has.

    Returns:
        Names of font families, the first to be tried first.
    """
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    def lacking(path: str, letters: set[str]) -> set[str]:
        font = FT2Font(path)
        return {each for each in letters if each.isprintable() and not font.get_char_index(ord(each))}

    families, missing = [FONT], lacking(font_manager.findfont(FONT), {*text})
    for path in sorted(font_manager.findSystemFonts(), key=lambda path: ("Regular" not in path, path)):
        # It may be damaged, or of a kind that matplotlib does not read.
        with suppress(RuntimeError, OSError):
            if missing and BOXES not in path and (left := lacking(path, missing)) < missing:
                font_manager.fontManager.addfont(path)
                families.append(FT2Font(path).family_name)
                missing = left
    if missing:
        warn(
            "no installed font has {letters}: the picture shows boxes; install one (for Chinese, Noto Sans "
            "CJK) and draw it again",
            letters=" ".join(sorted(missing)[:MOST_LETTERS]),
        )
    return families


def draw_confusion(labels: Sequence[str], counts: Sequence[Sequence[int]], path: Path) -> Path:
    """Draw how often each label was answered with each, coloured by its share of the row.

    Args:
        labels: `[labels]`.
        counts: `[labels, labels + 1]`, the last column for other answers; it is left out if it is empty.
        path: the PNG file.

    Raises:
        OSError: it cannot be written.
    """
    has_other = any(row[-1] for row in counts)
    shown = [list(row) if has_other else list(row[:-1]) for row in counts]
    names = [*(shorten(label, LONGEST_LABEL) or "(empty)" for label in labels), "(other)"][
        : len(labels) + has_other
    ]
    shares = [[count / max(sum(row), 1) for count in row] for row in shown]
    figure = _empty_figure(MARGIN + CELL * len(names), MARGIN + CELL * len(labels))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    style = {"fontfamily": fonts_for("".join(names)), "parse_math": False}
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", **style)
    axes.set_yticks(range(len(labels)), names[: len(labels)], **style)
    axes.set(xlabel="answer", ylabel="reference")
    for row, line in enumerate(shown):
        for column, count in enumerate(line):
            ink = "white" if shares[row][column] > 0.5 else "black"
            axes.text(column, row, count or "", ha="center", va="center", color=ink, fontsize=9)
    with warnings.catch_warnings():
        # A box stands for a character that no font here has.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return _saved(figure, path)
