"""Which rows make a step: every row once an epoch, the same ones however a step is split, little padding."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.training.sampler import BatchSampler

SPLITS = ((1, 8, 1), (8, 1, 1), (2, 4, 1), (2, 1, 4), (1, 2, 4), (4, 1, 2))  # all make steps of 8 rows


def make(lengths, batch=8, accumulation=1, processes=1, seed=0):
    lengths = np.asarray(lengths, dtype=np.int64)
    return BatchSampler(lengths, lengths % 7 + 1, batch, accumulation, processes, seed)


def ragged(rows, seed=0):
    return np.random.default_rng(seed).integers(20, 200, rows)


@st.composite
def samplings(draw):
    rows = draw(st.integers(1, 300))
    spread = draw(st.sampled_from([1, 3, 500]))
    lengths = np.random.default_rng(draw(st.integers(0, 999))).integers(1, spread + 1, rows)
    small = st.integers(1, 6)
    return make(lengths, draw(small), draw(small), draw(small), draw(st.integers(0, 2**32 - 1)))


def steps(sampler, epoch):
    first = epoch * sampler.steps_per_epoch
    return [sampler.examples(first + number) for number in range(sampler.steps_per_epoch)]


# --- every row, and the same ones ---------------------------------------------------------------------------


@given(samplings(), st.integers(0, 3))
@settings(deadline=None)
def test_every_row_comes_once_in_an_epoch(sampler, epoch):
    seen = np.concatenate(steps(sampler, epoch))
    assert sorted(seen) == [*range(len(sampler.lengths))]


@given(samplings(), st.integers(0, 2))
@settings(deadline=None)
def test_steps_have_the_size_asked_for_but_the_last_of_an_epoch(sampler, epoch):
    sizes = [len(rows) for rows in steps(sampler, epoch)]
    rows, effective = len(sampler.lengths), sampler.effective
    assert sizes[:-1] == [effective] * (math.ceil(rows / effective) - 1)
    assert sizes[-1] == rows - effective * (len(sizes) - 1) > 0


@given(samplings(), st.integers(0, 5))
@settings(deadline=None)
def test_the_batches_of_all_processes_are_the_step(sampler, number):
    step = number % (2 * sampler.steps_per_epoch)
    shares = [sampler.batches(step, process) for process in range(sampler.processes)]
    assert sorted(row for share in shares for batch in share for row in batch) == sorted(
        sampler.examples(step)
    )
    sizes = [len(batch) for share in shares for batch in share]
    assert all(len(share) <= sampler.accumulation for share in shares)
    assert min(sizes) > 0
    assert max(sizes) <= sampler.batch_size
    assert sum(size < sampler.batch_size for size in sizes) <= 1  # only the last batch of a step


@given(samplings())
@settings(deadline=None)
def test_the_first_step_of_a_run_has_the_longest_row(sampler):
    assert sampler.lengths[sampler.examples(0)[0]] == sampler.lengths.max()


@pytest.mark.parametrize("rows", [5, 8, 83, 2500])
def test_a_step_has_the_same_rows_however_it_is_split(rows):
    lengths = ragged(rows)
    orders = [[*map(list, steps(make(lengths, *split), 1))] for split in SPLITS]
    assert all(order == orders[0] for order in orders)


def test_the_batches_of_a_split_step_are_the_same_rows_in_the_same_order():
    """One process with 4 batches and two with 2 compute the very same batches, so that dropout agrees."""
    lengths = ragged(83)
    alone, first = make(lengths, 2, 4, 1), make(lengths, 2, 2, 2)
    for step in range(alone.steps_per_epoch):
        shares = [first.batches(step, process) for process in range(2)]
        together = [
            list(share[number]) for number in range(2) for share in shares if number < len(share)
        ]  # fmt: skip
        assert together == [*map(list, alone.batches(step, 0))]


def test_tokens_are_those_of_the_whole_step():
    sampler = make(ragged(83), 2, 2, 2)
    for step in (0, 3, sampler.steps_per_epoch - 1, sampler.steps_per_epoch):
        assert sampler.tokens(step) == sum(int(n) % 7 + 1 for n in sampler.lengths[sampler.examples(step)])


# --- random, and repeatable ---------------------------------------------------------------------------------


def test_the_order_is_the_same_every_time():
    ask = [7, 0, 25, 3]  # not in sequence: step N does not depend on the steps before it
    first, second = make(ragged(100)), make(ragged(100))
    asked = [list(first.examples(step)) for step in ask]
    assert asked == [list(second.examples(step)) for step in reversed(ask)][::-1]


def test_epochs_and_seeds_differ():
    lengths = ragged(200)
    orders = [
        np.concatenate(steps(make(lengths, seed=seed), epoch)).tolist()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 6
    groups = [{frozenset(rows.tolist()) for rows in steps(make(lengths), epoch)} for epoch in (0, 1, 2)]
    # Neighbours differ as well, but for the shortest and the longest rows, which have no choice.
    assert max(len(a & b) for a in groups for b in groups if a is not b) <= 4


def test_a_row_may_stand_anywhere():
    """Over many seeds each row comes early and late, and the lengths of the steps do not rise or fall."""
    lengths = ragged(80)
    places = np.zeros((300, 80))
    trend = []
    for seed in range(300):
        order = steps(make(lengths, seed=seed), 1)
        places[seed, np.concatenate(order)] = np.repeat(np.arange(10), 8)
        trend.append(np.corrcoef(np.arange(10), [lengths[rows].mean() for rows in order])[0, 1])
    assert (np.abs(places.mean(axis=0) - 4.5) < 1.2).all()  # 7 standard errors
    assert abs(np.mean(trend)) < 0.1


def test_a_partial_step_is_as_random_as_the_others():
    """Which rows are left over for the end of an epoch is drawn: not always the shortest or the longest."""
    lengths = ragged(83)
    left = np.concatenate([steps(make(lengths, seed=seed), 1)[-1] for seed in range(300)])
    counts = np.bincount(left, minlength=83)
    assert counts.min() > 0
    assert counts.max() < 4 * counts.mean()


# --- padding ------------------------------------------------------------------------------------------------


def share_of_padding(lengths, batches):
    computed = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 1 - sum(int(lengths[rows].sum()) for rows in batches) / computed


@pytest.mark.parametrize(("rows", "split"), [(2000, (8, 1, 1)), (2000, (8, 4, 1)), (2003, (8, 1, 2))])
def test_padding_of_clips_of_1_to_12_seconds_stays_below_8_percent(rows, split):
    """Positions as in the model: 5 audio tokens a second, a prompt, and answers of 1 to 60 tokens."""
    random = np.random.default_rng(5)
    lengths = 20 + (5 * random.uniform(1, 12, rows)).astype(np.int64) + random.integers(1, 61, rows)
    for seed in range(3):
        sampler = make(lengths, *split, seed=seed)
        batches = [
            batch
            for step in range(2 * sampler.steps_per_epoch)
            for process in range(sampler.processes)
            for batch in sampler.batches(step, process)
        ]
        drawn = random.permutation(rows)
        plain = share_of_padding(lengths, [drawn[start : start + 8] for start in range(0, rows, 8)])
        assert plain > 0.2
        assert share_of_padding(lengths, batches) < 0.08


def test_a_million_rows_are_ordered_without_a_loop_over_rows():
    """Counted, not timed: numpy sorts a thousand rows at a time."""
    sampler = make(ragged(1_000_000))
    assert sampler.steps_per_epoch == 125_000
    assert len(sampler.examples(100_000)) == 8
    assert np.array_equal(np.sort(sampler.epoch(0)), np.arange(1_000_000))
