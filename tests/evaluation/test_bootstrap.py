"""Intervals and tests: against sums by hand, enumeration, and what repeated sampling shows."""

import itertools
import math

import numpy as np
import pytest

from mdl_toolkit.evaluation.bootstrap import (
    SumBasedMetric,
    bootstrap_distribution,
    mcnemar_test,
    percentile_interval,
    permutation_test,
    point_estimate,
    wilson_interval,
)
from mdl_toolkit.evaluation.label_metrics import MeanAveragePrecision, macro_f1
from tests.support.scoring import PLAIN, answers


def mean_of(rows):
    """The mean of some numbers, as a figure over rows."""
    statistics = np.stack([rows, np.ones(len(rows))], axis=1)
    return SumBasedMetric(statistics, lambda sums: sums[:, 0] / sums[:, 1])


def test_wilsons_interval_by_its_formula():
    z, right, rows = 1.959964, 45, 60
    share = right / rows
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2)) / (1 + z**2 / rows)
    assert wilson_interval(right, rows) == pytest.approx((middle - half, middle + half), abs=1e-6)


@pytest.mark.parametrize("rows", [1, 30])
def test_all_right_and_none_right_have_an_interval_with_a_width(rows):
    for successes in (0, rows):
        low, high = wilson_interval(successes, rows)
        assert 0 <= low <= successes / rows <= high <= 1
        assert high - low > 0.1


def proportions(generator, rows):
    """Rows of which 80 % are right."""
    return mean_of(generator.random(rows) < 0.8), 0.8


def word_errors(generator, rows):
    """Rows of 1 and more words, of which some have many errors and most have none: a fifth of all words."""
    lengths = 1 + generator.poisson(9, rows)
    errors = generator.binomial(lengths, generator.beta(0.5, 2.0, rows))
    return SumBasedMetric(np.stack([errors, lengths], axis=1), lambda sums: sums[:, 0] / sums[:, 1]), 0.2


def macro_f1_of(references, predictions):
    return macro_f1(answers([*zip(map(str, references), map(str, predictions), strict=True)]), PLAIN)


def labels(generator, rows):
    """Three labels, 80 % answered right and the others at random."""
    shares = np.array([0.4, 0.3, 0.3])
    references, guesses = (generator.choice(3, rows, p=shares) for _ in range(2))
    predictions = np.where(generator.random(rows) < 0.8, references, guesses)
    f1 = (0.8 * shares + 0.2 * shares**2) / shares
    return macro_f1_of(references, predictions), float(f1.mean())


@pytest.mark.parametrize("kind", [proportions, word_errors, labels])
def test_intervals_hold_the_truth_as_often_as_they_say(kind):
    """Of 1000 samples of 100 rows, 93 to 97 % give intervals with the value that they were drawn from."""
    generator, held = np.random.default_rng(4), 0
    for seed in range(1000):
        statistic, truth = kind(generator, 100)
        if kind is proportions:
            low, high = wilson_interval(int(statistic.statistics[:, 0].sum()), 100)
        else:
            low, high = percentile_interval(bootstrap_distribution([statistic], 100, 300, seed)[0], 100)
        held += low <= truth <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_percentiles_move_out_where_rows_are_few():
    distribution = np.linspace(0, 1, 100_001)
    # Of two rows t is 12.7, so that the interval holds everything; of many, it is 2.5 to 97.5 %.
    assert percentile_interval(distribution, 2) == pytest.approx((0, 1), abs=1e-6)
    assert percentile_interval(distribution, 30) == pytest.approx((0.01876, 0.98124), abs=1e-4)
    assert percentile_interval(distribution, 100_000) == pytest.approx((0.025, 0.975), abs=1e-4)
    assert percentile_interval(distribution, 1) is None


def test_an_interval_never_leaves_the_range_of_the_metric():
    """A macro F1 of nearly everything right, where an interval that is moved ends beyond 100 %."""
    references = np.repeat(np.arange(8), 3)
    predictions = np.where(np.arange(24) == 5, 0, references)
    statistic = macro_f1_of(references, predictions)
    low, high = percentile_interval(bootstrap_distribution([statistic], 24, 2000, 1)[0], 24)
    assert 0 <= low < point_estimate(statistic, 24) <= high <= 1


def test_samples_are_those_of_a_plain_loop():
    """Each sample has as many rows as there are, and its figure is the one of these rows."""
    rows = np.array([3.0, 1.0, 4.0, 1.0, 5.0])

    class Seen:
        def values(self, weights):
            assert weights.sum(axis=0).tolist() == [5.0] * weights.shape[1]
            drawn = [np.repeat(rows, column.astype(int)).mean() for column in weights.T]
            return np.array(drawn)

    samples = bootstrap_distribution([mean_of(rows), Seen()], 5, 300, seed=4)
    assert samples.shape == (2, 300)
    assert np.allclose(samples[0], samples[1])
    assert len(np.unique(samples[0])) > 15


def test_the_same_seed_gives_the_same_interval_and_another_another():
    measure = mean_of(np.arange(50) % 3)
    one, same, other = (bootstrap_distribution([measure], 50, 100, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_more_rows_than_are_drawn_at_once(monkeypatch):
    monkeypatch.setattr("mdl_toolkit.evaluation.bootstrap.MOST_WEIGHTS", 70)
    samples = bootstrap_distribution([mean_of(np.arange(30.0))], 30, 501, seed=1)[0]
    assert samples.shape == (501,)
    assert samples.mean() == pytest.approx(14.5, abs=4 * np.arange(30.0).std() / np.sqrt(30 * 501))


def test_no_samples_no_interval():
    samples = bootstrap_distribution([mean_of(np.ones(3))], 3, 0, seed=1)
    assert samples.shape == (1, 0)
    assert percentile_interval(samples[0], 3) is None


def test_an_interval_holds_the_value_even_where_drawing_rows_twice_moves_the_metric():
    generator = np.random.default_rng(3)
    rows, scores = 300, np.sort(generator.random(300))[::-1]
    positive = np.flatnonzero(generator.random(300) < 0.1)
    statistic = MeanAveragePrecision(
        np.stack([np.zeros_like(positive), positive], axis=1),
        np.stack([np.zeros(rows, dtype=int), np.arange(rows)], axis=1),
        scores,
        1,
    )
    value = point_estimate(statistic, rows)
    distribution = bootstrap_distribution([statistic], rows, 1000, seed=1)[0]
    low, high = percentile_interval(distribution, rows)
    assert distribution.mean() > value + 0.01
    assert low < value < high


# --- pairs -----------------------------------------------------------------------------------------------


def test_a_difference_is_surer_on_the_same_rows_than_on_any():
    """Rows of very different difficulty, the second system a little worse on each."""
    generator = np.random.default_rng(1)
    hard = generator.random(400) * 10
    worse = hard + 0.1 + 0.1 * generator.standard_normal(400)
    ours, others = bootstrap_distribution([mean_of(hard), mean_of(worse)], 400, 1000, seed=1)
    low, high = percentile_interval(ours - others, 400)
    assert low < -0.1 < high < 0
    alone = percentile_interval(ours, 400)
    assert alone.high - alone.low > 10 * (high - low)
    assert permutation_test([mean_of(np.append(hard, worse))], 400, 1000, 1) == pytest.approx([2 / 1001])


def test_p_values_of_equal_systems_are_spread_evenly():
    generator = np.random.default_rng(2)
    p_values = [
        permutation_test([mean_of(generator.standard_normal(120))], 60, 200, seed)[0] for seed in range(300)
    ]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.07)


def test_all_permutations_of_few_rows_are_counted():
    """Against each of 2^6 ways to swap, written out; two metrics at once."""
    ours, others = np.array([3.0, 1, 4, 1, 5, 9]), np.array([2.0, 0, 1, 2, 3, 4])
    differences = ours - others
    sums = [np.dot(signs, differences) for signs in itertools.product([1, -1], repeat=6)]
    expected = min(1, 2 * np.mean([total >= differences.sum() for total in sums]))
    both = np.append(ours, others)
    found = permutation_test([mean_of(both), mean_of(-both)], 6, 1000, seed=1)
    assert found == pytest.approx([expected, expected])


def test_two_equal_files_do_not_differ():
    undefined = SumBasedMetric(np.zeros((18, 1)), lambda sums: np.full(len(sums), np.nan))
    p_values = permutation_test([mean_of(np.tile(np.arange(9.0), 2)), undefined], 9, 100, seed=1)
    assert p_values[0] == 1
    assert np.isnan(p_values[1])


def test_one_row_tells_no_difference():
    assert np.isnan(permutation_test([mean_of(np.array([0.0, 1.0]))], 1, 100, seed=1)).all()


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
    assert mcnemar_test(first, second) == pytest.approx(expected)
    assert mcnemar_test(second, first) == pytest.approx(expected)


def test_mcnemar_of_many_rows():
    # Chi-square with continuity correction is 3.9601.
    assert mcnemar_test(5100, 4900) == pytest.approx(0.0466, abs=1e-3)
    # Less than a float can say.
    assert mcnemar_test(10_000, 0) == 0
