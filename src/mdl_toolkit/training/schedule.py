"""When what is due in a run: optimizer steps, the learning rate of each, checkpoints, evaluations."""

import math
from dataclasses import dataclass

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.training.checkpoints import due_steps


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a run.

    Attributes:
        per_epoch: in a whole epoch; partial batches and windows count.
        total: of the run; at least 1.
        warmup: over which the learning rate rises.
        saving: after which a checkpoint is due.
        evaluating: after which an evaluation is due.
    """

    per_epoch: int
    total: int
    warmup: int
    saving: frozenset[int]
    evaluating: frozenset[int]

    @staticmethod
    def of(per_epoch: int, options: TrainOptions) -> "Schedule":
        """Plan a run with so many steps per epoch."""
        total = max(1, math.ceil(options.num_epochs * per_epoch - 1e-9))
        evaluating = due_steps(options.eval_steps, per_epoch, total) if options.eval_dataset else frozenset()
        saving = due_steps(options.save_steps, per_epoch, total)
        return Schedule(per_epoch, total, options.warmup_steps, saving, evaluating)

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step, from 0: up over the warm-up, then down to 0 at the end."""
        if step < self.warmup:
            return step / self.warmup
        return max(0.0, (self.total - step) / max(1, self.total - self.warmup))
