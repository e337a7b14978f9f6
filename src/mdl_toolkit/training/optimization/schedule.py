"""Schedule a run: its optimizer steps, their learning rates, when to save and when to evaluate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mdl_toolkit.config.options import spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import UsageError
from mdl_toolkit.utils.console import warn


@dataclass(frozen=True)
class Schedule:
    """Hold the optimizer steps of a run.

    Attributes:
        per_epoch: steps in a whole epoch; a partial last one counts.
        total: steps of the run; at least 1.
        warmup: steps over which the learning rate rises; none where it is constant.
        saving: steps after which a checkpoint is due.
        evaluating: steps after which an evaluation is due.
        rate: gives the share of the learning rate at a step, from 0.
    """

    per_epoch: int
    total: int
    warmup: int
    saving: frozenset[int]
    evaluating: frozenset[int]
    rate: Callable[[int], float]

    @staticmethod
    def of(per_epoch: int, options: TrainOptions) -> "Schedule":
        """Schedule a run of `per_epoch` steps in an epoch; the learning rate is that of transformers."""
        from transformers import get_scheduler

        total = options.max_steps or max(1, math.ceil(options.num_epochs * per_epoch - 1e-9))
        warmup = options.warmup_steps or math.ceil(options.warmup_ratio * total)
        warmup = 0 if options.lr_scheduler == "constant" else warmup
        evaluating = due_steps(options.eval_steps, per_epoch, total) if options.eval_dataset else frozenset()
        saving = due_steps(options.save_steps, per_epoch, total)
        # Any optimizer will do: what is wanted is the function of the step.
        scheduler = get_scheduler(options.lr_scheduler, torch.optim.SGD([torch.zeros(1)]), warmup, total)
        return Schedule(per_epoch, total, warmup, saving, evaluating, scheduler.lr_lambdas[0])


def check_warmup(options: TrainOptions) -> None:
    """Refuse two lengths of the warm-up, and warn of one that the schedule does not have.

    Raises:
        UsageError: both `--warmup-steps` and `--warmup-ratio` were given.
    """
    if options.warmup_steps and options.warmup_ratio:
        raise UsageError("--warmup-steps and --warmup-ratio: give one of the two")
    if options.lr_scheduler == "constant" and (options.warmup_steps or options.warmup_ratio):
        warn("--lr-scheduler constant has no warm-up; constant_with_warmup has")


def warn_of_every_step(options: TrainOptions) -> None:
    """Warn where 1.0 was given for a cadence, which is a step, by those who may have meant an epoch."""
    for name in ("save_steps", "eval_steps"):
        value = getattr(options, name)
        if isinstance(value, float) and value == 1 and (name == "save_steps" or options.eval_dataset):
            warn("{option} 1.0 is every step; once per epoch is {option} epoch", option=spelling(name))


def due_steps(cadence: int | float | str, steps_per_epoch: int, total: int) -> frozenset[int]:
    """Return the optimizer steps after which something is due; the last step is always one of them.

    Args:
        cadence: every so many steps, or a fraction of an epoch, or `epoch`, or 0 for the end alone.
        steps_per_epoch: optimizer steps in an epoch.
        total: optimizer steps of the run.
    """
    if isinstance(cadence, str):
        every: int | float = steps_per_epoch
    else:
        every = cadence * steps_per_epoch if 0 < cadence < 1 else cadence
    if every == 0:
        return frozenset({total})
    if every <= 1:
        return frozenset(range(1, total + 1))
    count = int(total / every + 1e-9)
    return frozenset({max(1, round(k * every)) for k in range(1, count + 1)} | {total})
