"""Confidence intervals of metrics, and paired tests of two systems on the same rows.

Each metric is a function of a weight for each row. A bootstrap sample is then how often each row was drawn,
and a permutation of two systems is which of a row's two answers counts for which system.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

CONFIDENCE = 0.95
# Weights that are in memory at once: 32 MiB.
MOST_WEIGHTS = 1 << 22


class Statistic(Protocol):
    """Compute a metric over weighted rows."""

    def values(self, weights: np.ndarray) -> np.ndarray:
        """Return the metric by columns of weights, `[rows, samples]` to `[samples]`; NaN if undefined."""

    def subset(self, rows: np.ndarray) -> "Statistic":
        """Return the metric over some of the rows, given their ascending indices."""


@dataclass(frozen=True)
class SumBasedMetric:
    """Compute a metric that is a formula of sums over rows.

    Attributes:
        statistics: `[rows, sums]` each row's part of the sums; a sparse array where most are 0.
        formula: maps sums to the metric, `[samples, sums]` to `[samples]`.
    """

    statistics: Any
    formula: Callable[[np.ndarray], np.ndarray]

    def values(self, weights: np.ndarray) -> np.ndarray:
        """Return the metric by columns of weights, `[rows, samples]` to `[samples]`."""
        return self.formula(weights.T @ self.statistics)

    def subset(self, rows: np.ndarray) -> "SumBasedMetric":
        """Return the metric over some of the rows."""
        return replace(self, statistics=self.statistics[rows])


class Interval(NamedTuple):
    """Hold the bounds of a 95 % confidence interval."""

    low: float
    high: float


def point_estimate(statistic: Statistic, rows: int) -> float:
    """Return the metric with each row counted once."""
    return float(statistic.values(np.ones((rows, 1)))[0])


def bootstrap_distribution(
    statistics: Sequence[Statistic], rows: int, resamples: int, seed: int
) -> np.ndarray:
    """Compute metrics of bootstrap samples, each of as many rows as there are, drawn with replacement.

    All metrics see the same samples, so that those of two systems can be subtracted.

    Returns:
        `[statistics, resamples]`; NaN where a sample leaves a metric undefined.
    """
    if not resamples:
        return np.empty((len(statistics), 0))
    generator = np.random.default_rng(seed)
    most = max(1, MOST_WEIGHTS // rows)
    parts = []
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        # A row that is drawn for a sample counts one more in its column.
        draws = generator.integers(rows, size=(rows, count)) * count + np.arange(count)
        weights = np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        parts.append(np.stack([each.values(weights) for each in statistics]))
    return np.concatenate(parts, axis=1)


def percentile_interval(distribution: np.ndarray, rows: int) -> Interval | None:
    """Return the expanded percentile interval of a bootstrap distribution `[resamples]`.

    It lies between two values of the distribution, so it never leaves the metric's range. Plain percentiles
    give intervals that are too short by a factor of `sqrt((rows - 1) / rows)` and by the difference between
    the normal and the t distribution; the percentiles are moved out by as much (Hesterberg 2015, "What
    Teachers Should Know About the Bootstrap"). From some hundred rows on the two are the same.

    Returns:
        None for a single row, and where all values are undefined.
    """
    # The quantile of Student's t and the normal distribution; scipy.stats takes long to import.
    from scipy.special import ndtr, stdtrit

    known = distribution[np.isfinite(distribution)]
    if rows < 2 or not len(known):
        return None
    quantile = stdtrit(rows - 1, (1 + CONFIDENCE) / 2) * np.sqrt(rows / (rows - 1))
    low, high = np.quantile(known, ndtr([-quantile, quantile]))
    return Interval(float(low), float(high))


def wilson_interval(successes: int, rows: int) -> Interval:
    """Return Wilson's score interval of a proportion; it has a width even where all rows are right."""
    from scipy.stats import binomtest

    interval = binomtest(successes, rows).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def permutation_test(statistics: Sequence[Statistic], rows: int, resamples: int, seed: int) -> np.ndarray:
    """Return two-sided p-values of two systems being equal, from swapping their answers in random rows.

    It is the paired permutation test of scipy, which the evaluation of translation calls approximate
    randomisation. Where there are no more than `resamples` ways to swap, each is counted once.

    Args:
        statistics: metrics over `2 * rows` rows: the first system's, then the second's in the same order.
        rows: of each system.
        resamples: random permutations, at least one.
        seed: of their generator.

    Returns:
        `[statistics]`; NaN where the metric is undefined, and where there are fewer than two rows.
    """
    from scipy import stats

    if rows < 2:
        return np.full(len(statistics), np.nan)

    def differences(first: np.ndarray, _second: np.ndarray, axis: int) -> np.ndarray:
        """Subtract metrics, `[..., statistics]`, given the rows that count for the first, `[..., rows]`."""
        assert axis == -1
        is_own = (first.reshape(-1, rows) < rows).T
        weights = np.concatenate([is_own, ~is_own]).astype(np.float64)
        by_metric = [each.values(weights) - each.values(1 - weights) for each in statistics]
        return np.stack(by_metric, axis=-1).reshape(*first.shape[:-1], len(statistics))

    test = stats.permutation_test(
        (np.arange(rows), np.arange(rows, 2 * rows)),
        differences,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, MOST_WEIGHTS // (2 * rows)),
        rng=np.random.default_rng(seed),
    )
    return np.where(np.isfinite(test.statistic), test.pvalue, np.nan)


def mcnemar_test(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Args:
        only_first: rows that only the first system has right.
        only_second: rows that only the second has right.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
