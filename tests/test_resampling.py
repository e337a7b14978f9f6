"""Intervals and tests: against the binomial distribution, sums by hand, and what repeated sampling shows."""

import math

import numpy as np
import pytest

from mdl_toolkit.resampling import difference_of, interval_of, mcnemar, resampled, value_of
from mdl_toolkit.scores import MeanAveragePrecision, Sums


def mean_of(rows):
    """The mean of some numbers, as a figure over rows."""
    statistics = np.stack([rows, np.ones(len(rows))], axis=1)
    return Sums(statistics, lambda sums: sums[:, 0] / sums[:, 1])


def binomial_interval(share, rows):
    """Where 95 % of the shares of that many draws lie, from the probabilities themselves."""
    odds = [math.comb(rows, k) * share**k * (1 - share) ** (rows - k) for k in range(rows + 1)]
    sums = np.cumsum(odds)
    return int(np.searchsorted(sums, 0.025)) / rows, int(np.searchsorted(sums, 0.975)) / rows


@pytest.mark.parametrize(("right", "rows"), [(50, 100), (160, 200), (285, 300), (1, 40)])
def test_the_interval_of_an_accuracy_is_the_binomial_one(right, rows):
    measure = mean_of(np.arange(rows) < right)
    found = interval_of(resampled([measure], rows, 20_000, seed=1)[0], value_of(measure, rows))
    assert found == pytest.approx(binomial_interval(right / rows, rows), abs=1 / rows + 1e-9)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    generator, truth, held = np.random.default_rng(0), 0.7, 0
    for seed in range(400):
        measure = mean_of(generator.random(200) < truth)
        low, high = interval_of(resampled([measure], 200, 400, seed)[0], value_of(measure, 200))
        held += low <= truth <= high
    assert 0.91 <= held / 400 <= 0.975  # 0.95 give or take three standard errors, a little less for few rows


def test_samples_are_those_of_a_plain_loop():
    """Each sample has as many rows as there are, and its figure is the one of these rows."""
    rows = np.array([3.0, 1.0, 4.0, 1.0, 5.0])

    class Seen:
        def values(self, weights):
            assert weights.sum(axis=0).tolist() == [5.0] * weights.shape[1]
            drawn = [np.repeat(rows, column.astype(int)).mean() for column in weights.T]
            return np.array(drawn)

    samples = resampled([mean_of(rows), Seen()], 5, 300, seed=4)
    assert samples.shape == (2, 300)
    assert np.allclose(samples[0], samples[1])
    assert len(np.unique(samples[0])) > 15


def test_the_same_seed_gives_the_same_interval_and_another_another():
    measure = mean_of(np.arange(50) % 3)
    one, same, other = (resampled([measure], 50, 100, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_more_rows_than_are_drawn_at_once(monkeypatch):
    monkeypatch.setattr("mdl_toolkit.resampling.MOST_WEIGHTS", 70)
    samples = resampled([mean_of(np.arange(30.0))], 30, 501, seed=1)[0]
    assert samples.shape == (501,)
    assert samples.mean() == pytest.approx(14.5, abs=4 * np.arange(30.0).std() / np.sqrt(30 * 501))


def test_no_samples_no_interval():
    samples = resampled([mean_of(np.ones(3))], 3, 0, seed=1)
    assert samples.shape == (1, 0)
    assert interval_of(samples[0], 1.0) is None
    assert difference_of(samples[0], samples[0]) is None


def test_an_interval_stands_around_the_value_even_where_drawing_rows_twice_moves_the_figure():
    generator = np.random.default_rng(3)
    rows, scores = 300, np.sort(generator.random(300))[::-1]
    positive = np.flatnonzero(generator.random(300) < 0.1)
    measure = MeanAveragePrecision(
        np.stack([np.zeros_like(positive), positive], axis=1),
        np.stack([np.zeros(rows, dtype=int), np.arange(rows)], axis=1),
        scores,
        1,
    )
    value = value_of(measure, rows)
    samples = resampled([measure], rows, 1000, seed=1)[0]
    low, high = interval_of(samples, value)
    assert samples.mean() > value + 0.01
    assert low < value < high
    assert high - low == pytest.approx(np.subtract(*np.percentile(samples, [97.5, 2.5])))


# --- pairs -----------------------------------------------------------------------------------------------


def test_a_difference_is_surer_on_the_same_rows_than_on_any():
    """Rows of very different difficulty, the second system a little worse on each."""
    generator = np.random.default_rng(1)
    hard = generator.random(400) * 10
    ours, others = mean_of(hard), mean_of(hard + 0.1 + 0.1 * generator.standard_normal(400))
    samples = resampled([ours, others], 400, 1000, seed=1)
    found = difference_of(*samples)
    assert found.interval.low < -0.1 < found.interval.high < 0
    assert found.p_value == pytest.approx(2 / 1001)
    alone = interval_of(samples[0], value_of(ours, 400))
    assert alone.high - alone.low > 10 * (found.interval.high - found.interval.low)


def test_p_values_of_equal_systems_are_spread_evenly():
    generator, small = np.random.default_rng(2), []
    for seed in range(400):
        measures = [mean_of(generator.standard_normal(60)) for _ in range(2)]
        small.append(difference_of(*resampled(measures, 60, 300, seed)).p_value)
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(small) <= level) == pytest.approx(level, abs=0.065)


def test_two_equal_files_do_not_differ():
    values = resampled([mean_of(np.arange(9.0))], 9, 100, seed=1)[0]
    assert difference_of(values, values) == ((0.0, 0.0), 1.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * (1/2)
        (0, 6, 2 / 64),
        (5, 1, 2 * (1 + 6) / 64),
        (3, 3, 1.0),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_by_hand(first, second, expected):
    assert mcnemar(first, second) == pytest.approx(expected)
    assert mcnemar(second, first) == pytest.approx(expected)


def test_mcnemar_of_many_rows():
    assert mcnemar(5100, 4900) == pytest.approx(0.0466, abs=1e-3)  # chi-square 3.9601, with correction
    assert mcnemar(10_000, 0) == 0  # less than a float can say
