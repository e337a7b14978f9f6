"""Names of what lies in a run's folder, and the reader of its log."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
PLOT = "loss.png"
REPORT = "report.html"
SMOOTHING = 0.9  # weight of the past in the loss that is shown


class Smooth:
    """The mean of all losses so far, each with less weight the longer ago it was."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def add(self, loss: float) -> float:
        """Take one in; the mean with it."""
        self._sum = SMOOTHING * self._sum + loss
        self._weight = SMOOTHING * self._weight + 1
        return self._sum / self._weight


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut off, by a kill or a full disk, is left out."""
    whole, _, _ = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    return [line for line in map(_parsed, whole.splitlines()) if line is not None]


def series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps at which a figure was logged, and its values."""
    found = [line for line in lines if name in line]
    return [line["step"] for line in found], [line[name] for line in found]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None
