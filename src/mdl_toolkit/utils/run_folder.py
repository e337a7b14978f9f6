"""Name the files of a run's folder, and read its log."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import InputError
from mdl_toolkit.utils.files import parse_json
from mdl_toolkit.utils.schema import FIGURE, find_fault, integer, mapping_of, required

LOG = "log.jsonl"
PLOT = "loss.png"
REPORT = "report.html"
# The weight of the past in the loss that is shown.
SMOOTHING = 0.9
# Of the log: names of figures, each with its value.
LINE = mapping_of(FIGURE)


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
    """Return the lines of a log, without those that a kill or a full disk cut off, which are no JSON.

    Raises:
        InputError: a line holds something else than figures.
    """
    whole, _, _ = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = parse_json(line)
        except ValueError:
            continue
        if fault := LINE.fault("line", values) or find_fault(values, {"step": required(integer())}):
            raise InputError(
                "{file}, line {number}: {reason}; correct or delete the line",
                file=file,
                number=number,
                reason=fault,
            )
        lines.append(values)
    return lines


def series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a figure was logged, and its values."""
    logged = [line for line in lines if name in line]
    return [line["step"] for line in logged], [line[name] for line in logged]
