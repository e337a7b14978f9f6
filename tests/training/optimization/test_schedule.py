"""The steps of a run, and those after which something is due."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import LR_SCHEDULERS
from mdl_toolkit.errors import UsageError
from mdl_toolkit.training.checkpoints import checkpoints
from mdl_toolkit.training.optimization.schedule import Schedule, check_warmup, due_steps, warn_of_every_step
from mdl_toolkit.training.run import train
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.utils.run_folder import read_log
from tests.support.paths import MODEL
from tests.support.runs import evaluations, make_csv, train_options


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
        ("epoch", 3, 8, {3, 6, 8}),
        ("epoch", 1, 3, {1, 2, 3}),
        ("epoch", 5, 3, {3}),
        # Not an epoch: by the contract a whole number is steps.
        (1.0, 4, 4, {1, 2, 3, 4}),
    ],
)
def test_due_steps(cadence, per_epoch, total, due):
    assert due_steps(cadence, per_epoch, total) == due


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "processes", "epochs"),
    [(11, 2, 2, 1, 3), (11, 2, 1, 2, 2.5), (7, 3, 4, 1, 2), (12, 4, 1, 1, 2), (5, 8, 1, 2, 1)],
)
def test_epoch_is_the_step_after_which_every_row_came_as_often(rows, batch, accumulation, processes, epochs):
    """Counted row by row, with partial batches and windows at the end of an epoch."""
    lengths = np.arange(1, rows + 1)
    sampler = BatchSampler(lengths, lengths, batch, accumulation, processes, 3)
    options = TrainOptions(train_dataset="d", output="o", save_steps="epoch", num_epochs=epochs)
    schedule, counts, ends = Schedule.of(sampler.steps_per_epoch, options), np.zeros(rows, int), set()
    for step in range(schedule.total):
        for process in range(processes):
            for indices in sampler.batches(step, process):
                counts[indices] += 1
        if len({*counts}) == 1:
            ends.add(step + 1)
    assert len(ends) == int(epochs)
    assert schedule.saving == ends | {schedule.total}


def test_epoch_outlives_a_resumption(tmp_path):
    """Checkpoints and evaluations of 2.4 epochs of 4 rows a step, 11 rows; stopped after the first epoch."""
    csv = make_csv(tmp_path, 11)
    options = train_options(
        csv, MODEL, tmp_path / "run", save_steps="epoch", eval_steps="epoch", eval_dataset=str(csv),
        batch_size=2, gradient_accumulation_steps=2, num_epochs=2.4, merge_lora=False,
    )  # fmt: skip
    train(options)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"checkpoint-{n}" for n in (3, 6, 8)]
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [3, 6, 8]
    assert [line["epoch"] for line in evaluations(tmp_path / "run")][:2] == [1.0, 2.0]
    first = str(tmp_path / "run/checkpoint-3")
    train(replace(options, output=str(tmp_path / "again"), resume_from_checkpoint=first))
    assert [path.name for path in checkpoints(tmp_path / "again")] == [f"checkpoint-{n}" for n in (3, 6, 8)]
    assert [line["step"] for line in evaluations(tmp_path / "again")] == [6, 8]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"save_steps": "1.0"}, ["save"]),
        ({"save_steps": "1.0", "eval_steps": 1.0}, ["save"]),
        ({"eval_steps": 1.0, "eval_dataset": "e"}, ["eval"]),
        ({"save_steps": 1, "eval_steps": "1", "eval_dataset": "e"}, []),
        ({"save_steps": "epoch", "eval_steps": 2.0, "eval_dataset": "e"}, []),
    ],
)
def test_1_0_is_said_to_be_no_epoch(capsys, changes, told):
    warn_of_every_step(TrainOptions(train_dataset="d", output="o", **changes))
    expected = [
        f"warning: --{name}-steps 1.0 is every step; once per epoch is --{name}-steps epoch" for name in told
    ]
    assert capsys.readouterr().err.splitlines() == expected


EXPLICIT = {
    "linear": lambda o, *steps: transformers.get_linear_schedule_with_warmup(o, *steps),
    "cosine": lambda o, *steps: transformers.get_cosine_schedule_with_warmup(o, *steps),
    "constant": lambda o, *_: transformers.get_constant_schedule(o),
    "constant_with_warmup": lambda o, w, _: transformers.get_constant_schedule_with_warmup(o, w),
    "inverse_sqrt": lambda o, w, _: transformers.get_inverse_sqrt_schedule(o, w),
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize(
    ("changes", "warmup"), [({}, 0), ({"warmup_steps": 3}, 3), ({"warmup_ratio": 0.21}, 5)]
)
def test_learning_rates_are_those_of_transformers(name, changes, warmup):
    """Step by step, as its own scheduler sets them; without options, what they were before there were any."""
    options = TrainOptions(train_dataset="d", output="o", lr_scheduler=name, max_steps=20, lr=3e-4, **changes)
    schedule = Schedule.of(7, options)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    assert schedule.warmup == (0 if name == "constant" else warmup)
    scheduler, expected = EXPLICIT[name](optimizer, warmup, 20), []
    for _ in range(20):
        expected += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert [options.lr * schedule.rate(step) for step in range(20)] == expected
    assert len({*expected}) > 1 or name.startswith("constant")
    if name == "linear":
        before = [
            step / warmup if step < warmup else max(0.0, (20 - step) / max(1, 20 - warmup))
            for step in range(20)
        ]
        assert [schedule.rate(step) for step in range(20)] == before


def test_the_log_has_these_learning_rates(tmp_path):
    """20 rows, 4 a step: the 5 steps of an epoch, and 8 by --max-steps."""
    options = train_options(
        make_csv(tmp_path, 20), MODEL, tmp_path / "run", lr_scheduler="cosine", warmup_ratio=0.2, max_steps=8,
        merge_lora=False, save_steps="epoch",
    )  # fmt: skip
    assert train(options).steps == 8
    rates = [line["learning_rate"] for line in read_log(tmp_path / "run/log.jsonl")]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([1e-2 * share for share in (0, 0.5, *cosine)])
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-5", "checkpoint-8"]


def test_one_length_of_the_warm_up(capsys):
    both = TrainOptions(train_dataset="d", output="o", warmup_steps=3, warmup_ratio=0.1)
    with pytest.raises(UsageError, match="--warmup-steps and --warmup-ratio: give one"):
        check_warmup(both)
    check_warmup(replace(both, warmup_ratio=0, lr_scheduler="constant_with_warmup"))
    assert capsys.readouterr().err == ""
    check_warmup(replace(both, warmup_ratio=0, lr_scheduler="constant"))
    told = "warning: --lr-scheduler constant has no warm-up; constant_with_warmup has\n"
    assert capsys.readouterr().err == told
