"""Name the files of a run's folder, and read its log."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdl_toolkit.utils.files import parse_json

LOG = "log.jsonl"
PLOT = "loss.png"
REPORT = "report.html"
# The weight of the past in the loss that is shown.
SMOOTHING = 0.9


class SmoothedLoss:
    """Average all losses so far, each with less weight the longer ago it was."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def add(self, loss: float) -> float:
        """Add a loss, and return the average with it."""
        self._sum = SMOOTHING * self._sum + loss
        self._weight = SMOOTHING * self._weight + 1
        return self._sum / self._weight


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without those that a kill or a full disk cut off."""
    whole, _, _ = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = []
    for line in whole.splitlines():
        with suppress(ValueError):
            values = parse_json(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                lines.append(values)
    return lines


def series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a figure was logged, and its values."""
    logged = [line for line in lines if name in line]
    return [line["step"] for line in logged], [line[name] for line in logged]
