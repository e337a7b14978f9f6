"""Which rows make an optimizer step, and which process computes which of them.

A step's rows depend on the seed, the lengths and the effective batch alone, not on how that is split into
batches, accumulation and processes: so 1 x 8, 8 x 1 and two processes x 4 train on the same rows, and a run
goes on at step N without counting its way there.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

GROUPED = 1024  # rows that are drawn at random and then sorted by length; at least one effective batch
JITTER = 0.05  # by so much lengths are blurred before sorting, so that no two epochs group alike

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BatchSampler:
    """The order of a run.

    Attributes:
        lengths: decoder positions of every row, `[rows]`.
        supervised: supervised positions of every row, `[rows]`.
        batch_size: rows that a process computes at once.
        accumulation: batches of a process in a step.
        processes: how many work together.
        seed: of the order, and of what dropout drops.
    """

    lengths: Rows
    supervised: Rows
    batch_size: int
    accumulation: int
    processes: int
    seed: int

    @property
    def effective(self) -> int:
        """Rows of a whole step."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every row comes once; the last one may be partial."""
        return math.ceil(len(self.lengths) / self.effective)

    def rows(self, step: int) -> Rows:
        """Rows of a step (from 0, over all epochs), the longest first."""
        epoch, number = divmod(step, self.steps_per_epoch)
        mine = self._order(epoch)[number * self.effective : (number + 1) * self.effective]
        return mine[np.argsort(-self.lengths[mine], kind="stable")]

    def batches(self, step: int, process: int) -> list[Rows]:
        """What a process computes in a step: at most `accumulation` batches, of rows of similar length."""
        rows = self.rows(step)
        starts = range(0, len(rows), self.batch_size)
        return [rows[start : start + self.batch_size] for start in starts[process :: self.processes]]

    def tokens(self, step: int) -> int:
        """Supervised positions of a step, in all processes together."""
        return int(self.supervised[self.rows(step)].sum())

    def dropout_seed(self, step: int, number: int, process: int) -> int:
        """Of a process's batch: the same for the same rows, however many processes share the step."""
        name = f"{self.seed} {step} {number * self.processes + process}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")

    @lru_cache(maxsize=2)  # noqa: B019 - a run has one sampler
    def _order(self, epoch: int) -> Rows:
        """All rows, step by step; a partial step stands at the end."""
        random = np.random.default_rng([self.seed, epoch])
        drawn = random.permutation(len(self.lengths))
        if epoch == 0:  # the longest row is never left over for a partial step; see below
            longest = int(self.lengths[drawn].argmax())
            drawn[[0, longest]] = drawn[[longest, 0]]
        whole = len(drawn) - len(drawn) % self.effective
        blurred = self.lengths * random.uniform(1 - JITTER, 1 + JITTER, len(drawn))
        chunk = self.effective * max(1, GROUPED // self.effective)
        for start in range(0, whole, chunk):
            part = drawn[start : min(start + chunk, whole)]
            part[:] = part[np.argsort(blurred[part], kind="stable")]
        steps = drawn[:whole].reshape(-1, self.effective)
        order = random.permutation(len(steps))
        if epoch == 0 and len(order):  # if memory does not suffice, that is seen at once
            longest = self.lengths[steps[order]].max(axis=1).argmax()
            order[[0, longest]] = order[[longest, 0]]
        return np.concatenate([steps[order].ravel(), drawn[whole:]])
