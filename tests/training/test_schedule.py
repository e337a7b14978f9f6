"""The steps of a run, and those after which something is due."""

import math

import numpy as np
import pytest

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.schedule import Schedule, due_steps


@pytest.mark.parametrize(
    ("rows", "processes", "changes", "per_epoch", "total"),
    [
        (180, 1, {"batch_size": 8}, 23, 23),
        (180, 1, {"batch_size": 8, "num_epochs": 0.1}, 23, 3),
        (10, 1, {"batch_size": 8, "num_epochs": 0.001}, 2, 1),
        (180, 2, {"batch_size": 4, "num_epochs": 2}, 23, 46),
        (20, 1, {"batch_size": 3, "gradient_accumulation_steps": 4}, 2, 2),
        (20, 1, {"batch_size": 8, "num_epochs": 1.5}, 3, 5),
    ],
)
def test_steps_of_a_run(rows, processes, changes, per_epoch, total):
    options = TrainOptions(train_dataset="d", output="o", **changes)
    nothing = np.zeros(rows, np.int64)
    split = options.batch_size, options.gradient_accumulation_steps, processes
    schedule = Schedule.of(BatchSampler(nothing, nothing, *split, 0).steps_per_epoch, options)
    assert (schedule.per_epoch, schedule.total) == (per_epoch, total)
    assert math.ceil(rows / (changes["batch_size"] * processes)) >= per_epoch


def test_a_tiny_fraction_of_an_epoch_is_every_step():
    """At once: there were billions of them to go through."""
    assert due_steps(1e-12, 12, 12) == frozenset(range(1, 13))


@pytest.mark.parametrize(
    ("cadence", "per_epoch", "total", "due"),
    [
        (1, 4, 4, {1, 2, 3, 4}),
        (3, 4, 8, {3, 6, 8}),
        (500, 4, 8, {8}),
        (0, 4, 8, {8}),
        (0.5, 4, 12, {2, 4, 6, 8, 10, 12}),  # twice an epoch over three epochs: six times
        (0.5, 5, 15, {2, 5, 8, 10, 12, 15}),
        (0.1, 4, 4, {1, 2, 3, 4}),  # more often than there are steps: every step
        (0.25, 100, 30, {25, 30}),
    ],
)
def test_due_steps(cadence, per_epoch, total, due):
    assert due_steps(cadence, per_epoch, total) == due
