"""What our choices cost or save, each against the other way of doing it, within one run.

A ratio within one run says something on any machine; the seconds beside it are this machine's alone.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would speak of itself


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what: what is measured, and of how many runs the numbers are medians.
        ours: how long it takes here, or how much it needs.
        other: the same for the other way.
        ratio: other / ours; above 1 is in our favour.
    """

    what: str
    ours: str
    other: str
    ratio: float


def alternate(ours: Callable[[], object], other: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median seconds of both, run in turns so that a busy moment hits both; the first turn is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(runs + 1):
        for work, kept in zip((ours, other), times, strict=True):
            started = time.perf_counter()
            work()
            if turn:
                kept.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def timed(what: str, ours: Callable[[], object], other: Callable[[], object], runs: int) -> Figure:
    """The line for two pieces of work that are compared by time."""
    here, there = alternate(ours, other, runs)
    return Figure(f"{what} (median of {runs})", _seconds(here), _seconds(there), there / here)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
