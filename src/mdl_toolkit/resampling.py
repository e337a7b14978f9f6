"""How sure a figure is: bootstrap intervals, and paired tests of two systems on the same rows.

A figure is anything that can be computed from a weight for each row. A bootstrap sample is then nothing but
how often each row was drawn.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

LEVEL = 0.95  # share of the bootstrap's values that an interval holds
SURE = 3.0  # standard errors that chance does not explain
MOST_WEIGHTS = 1 << 22  # that are in memory at once: 32 MiB


class Measure(Protocol):
    """A figure over rows."""

    def values(self, weights: np.ndarray) -> np.ndarray:
        """The figure, each row counted so many times: `[rows, samples]` to `[samples]`; NaN if undefined."""

    def of(self, rows: np.ndarray) -> "Measure":
        """The same figure over some of the rows, which are given by ascending numbers."""


class Interval(NamedTuple):
    """The bounds of a 95 % interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """What the bootstrap says of a difference: a 95 % interval, and the p-value of there being none."""

    interval: Interval
    p_value: float


def value_of(measure: Measure, rows: int) -> float:
    """The figure itself, each row counted once."""
    return float(measure.values(np.ones((rows, 1)))[0])


def resampled(measures: Sequence[Measure], rows: int, samples: int, seed: int) -> np.ndarray:
    """The figures of many bootstrap samples, each of as many rows as there are, drawn with replacement.

    All figures see the same samples, so that those of two systems can be subtracted.

    Returns:
        `[measures, samples]`; NaN where a sample leaves a figure undefined.
    """
    if not samples:
        return np.empty((len(measures), 0))
    parts = [[measure.values(weights) for measure in measures] for weights in _drawn(rows, samples, seed)]
    return np.concatenate([np.stack(part) for part in parts], axis=1)


def _drawn(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row was drawn, `[rows, some of the samples]`."""
    generator = np.random.default_rng(seed)
    width = max(1, MOST_WEIGHTS // rows)
    for start in range(0, samples, width):
        count = min(width, samples - start)
        draws = generator.integers(rows, size=(rows, count)) * count + np.arange(count)
        drawn = np.bincount(draws.ravel(), minlength=rows * count)
        yield drawn.reshape(rows, count).astype(np.float64)


def interval_of(values: np.ndarray, value: float) -> Interval | None:
    """The interval between percentiles of a bootstrap's values `[samples]`; None if all are undefined.

    Drawing rows twice moves some figures, mAP most, off the value itself. Where the samples' mean is further
    from it than chance explains, they are moved back, so that the interval is around the value.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = _percentiles(known)
    off = float(known.mean()) - value
    is_moved = abs(off) > SURE * known.std() / np.sqrt(len(known))
    return Interval(low - off, high - off) if is_moved else Interval(low, high)


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(low), float(high))


def difference_of(values: np.ndarray, others: np.ndarray) -> Difference | None:
    """The paired bootstrap of two systems: `[samples]` figures of each, over the same samples.

    The p-value is two-sided: twice the share of samples that contradict the difference's sign, counting one
    sample more on each side, so that it is never 0.
    """
    known = (values - others)[np.isfinite(values - others)]
    if not len(known):
        return None
    tail = min(int((known <= 0).sum()), int((known >= 0).sum())) + 1
    return Difference(_percentiles(known), min(1.0, 2 * tail / (len(known) + 1)))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test.

    Args:
        only_first: rows that only the first system has right.
        only_second: rows that only the second has right.
    """
    count = only_first + only_second
    term = total = 1  # binomial coefficients are whole numbers of any size, so nothing is rounded
    for k in range(min(only_first, only_second)):
        term = term * (count - k) // (k + 1)
        total += term
    p_value: float = 2 * total / 2**count
    return min(1.0, p_value)
