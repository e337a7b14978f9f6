"""What to expect of so little data: said before the first step, and not where something can be learnt."""

from dataclasses import replace

import pytest
import torch
from transformers import get_scheduler

from mdl_toolkit.training import summary
from mdl_toolkit.training.optimization import expectation
from mdl_toolkit.training.optimization.expectation import (
    HIGHEST,
    MOST,
    MOST_EPOCHS,
    is_too_short,
    longer_run,
    rate_sum,
    what_to_expect,
)
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.run import train
from tests.support.paths import MODEL
from tests.support.runs import make_csv, train_options


def options_of(**changes):
    return train_options("d", MODEL, "o", **{"lr": 1e-4, "num_epochs": 1, **changes})


@pytest.mark.parametrize(
    "scheduler", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
)
@pytest.mark.parametrize("steps", [1, 25, 3000])
def test_the_sum_is_that_of_the_steps(scheduler, steps):
    options = options_of(lr_scheduler=scheduler, warmup_ratio=0.1, lr=("encoder=0.01", "0.1"))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    theirs = get_scheduler(scheduler, optimizer, 0 if scheduler == "constant" else -(-steps // 10), steps)
    total = 0.0
    for _ in range(steps):
        total += optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()
    assert rate_sum(options, Schedule.of(steps, options)) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "per_epoch", "remedy"),
    [
        ({}, 25, "--num-epochs 10 --lr 0.0002"),
        ({"num_epochs": 2}, 25, "--num-epochs 10 --lr 0.0002"),
        ({}, 90, "--num-epochs 6"),
        ({}, 1, "--num-epochs 10 --lr 0.0005"),
        ({"max_steps": 50}, 25, "--max-steps 250 --lr 0.0002"),
        ({"max_steps": 50}, 1000, "--max-steps 491"),
        ({"lr": 1e-6, "num_epochs": 20}, 25, "--lr 0.0001"),
        ({"lr": ("encoder=1e-5", "1e-4")}, 25, "--num-epochs 10"),
        ({"lr": ("encoder=1e-7", "1e-6"), "num_epochs": 20}, 25, "a higher --lr"),
        ({}, 100, None),
        ({"lr": 5e-4}, 25, None),
    ],
)
def test_what_is_too_little_is_told_with_what_would_do(changes, per_epoch, remedy):
    options = options_of(**changes)
    schedule = Schedule.of(per_epoch, options)
    assert is_too_short(options, schedule) == (remedy is not None)
    if remedy is not None:
        assert what_to_expect(options, schedule, 200, 5).en.endswith(f"; try {remedy}")
        other = longer_run(options, per_epoch)
        there = Schedule.of(per_epoch, other)
        is_most = there.total >= MOST_EPOCHS * per_epoch and other.lr in (HIGHEST, options.lr)
        assert is_most or rate_sum(other, there) >= 0.9 * MOST


def test_answers_are_counted_up_to_a_bound(tmp_path, capsys, monkeypatch):
    for module in (expectation, summary):
        monkeypatch.setattr(module, "MANY_ANSWERS", 3)
    train(train_options(make_csv(tmp_path, 8), MODEL, tmp_path / "run", lr=1e-4, num_epochs=1))
    assert "8 rows, at least 3 different answers: too little" in capsys.readouterr().err


def test_a_run_says_so_before_its_first_step(tmp_path, capsys):
    csv = make_csv(tmp_path, 8)
    options = train_options(csv, MODEL, tmp_path / "run", lr=1e-4, num_epochs=1)
    train(options)
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if "too little" in line]
    assert line.startswith(
        "warning: 2 steps at a learning rate of 0.0001, 8 rows, 6 different answers: too little"
    )
    assert said.index(line) < next(n for n, each in enumerate(said) if each.startswith("loading weights"))
    other = longer_run(options, 2)
    train(replace(other, output=str(tmp_path / "other"), lr=1e-2))
    assert "too little" not in capsys.readouterr().err
