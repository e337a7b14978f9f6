"""Choose the examples of each optimizer step, and which process computes which of them.

A step's examples depend on the seed, the lengths and the effective batch alone, not on how that is split into
batches, accumulation and processes: so 1 x 8, 8 x 1 and two processes x 4 train on the same examples, and a
run goes on at step N without counting its way there.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Examples that are drawn at random and then sorted by length; at least one effective batch.
GROUPED = 1024
# Lengths are blurred by up to this share before sorting, so that no two epochs group alike.
JITTER = 0.05

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """Share the examples of an epoch among datasets by their weights.

    Each dataset's examples come in random order, again and again, whatever the epochs: none comes a second
    time before all have come once.

    Attributes:
        sizes: examples of each dataset, which follow one another.
        weights: of each.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the examples of each dataset in an epoch, one at least; together as many as there are."""
        total, weights = sum(self.sizes), np.array(self.weights)
        counts = np.maximum(1, np.floor(total * weights / weights.sum())).astype(int)
        counts[weights.argmax()] += total - counts.sum()
        return tuple(counts.tolist())

    def draw(self, epoch: int, seed: int, lengths: Indices) -> Indices:
        """Return the indices of an epoch's examples, dataset by dataset.

        Args:
            epoch: counted from 0.
            seed: of the order.
            lengths: tokens of every example; each dataset's longest comes first of all.
        """
        drawn, first = [], 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            places = np.arange(epoch * count, (epoch + 1) * count)
            orders = []
            for turn in range(places[0] // size, places[-1] // size + 1):
                # The last number keeps these seeds apart from those of epochs.
                order = np.random.default_rng([seed, number, turn, 1]).permutation(size)
                if turn == 0:
                    longest = int(lengths[first + order].argmax())
                    order[[0, longest]] = order[[longest, 0]]
                orders.append(order)
            drawn.append(first + np.concatenate(orders)[places - places[0] // size * size])
            first += size
        return np.concatenate(drawn)


@dataclass(frozen=True, eq=False)
class BatchSampler:
    """Draw the examples of every step of a run, in random order, grouped by length.

    Attributes:
        lengths: decoder tokens of every example, `[examples]`.
        supervised: supervised tokens of every example, `[examples]`.
        batch_size: examples that a process computes at once.
        accumulation: batches of a process in a step.
        processes: number of processes that work together.
        seed: of the order, and of dropout.
        mixture: how an epoch is shared among datasets; without it every example comes once.
    """

    lengths: Indices
    supervised: Indices
    batch_size: int
    accumulation: int
    processes: int
    seed: int
    mixture: Mixture | None = None

    @property
    def effective(self) -> int:
        """Return the number of examples in a whole step."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps of an epoch; the last one may be partial."""
        return math.ceil(len(self.lengths) / self.effective)

    def examples(self, step: int) -> Indices:
        """Return the indices of a step's examples, the longest first; steps count from 0 over all epochs."""
        epoch, number = divmod(step, self.steps_per_epoch)
        indices = self.epoch(epoch)[number * self.effective : (number + 1) * self.effective]
        return indices[np.argsort(-self.lengths[indices], kind="stable")]

    def batches(self, step: int, process: int) -> list[Indices]:
        """Return a process's share of a step: at most `accumulation` batches of similar lengths."""
        indices = self.examples(step)
        starts = range(0, len(indices), self.batch_size)
        return [indices[start : start + self.batch_size] for start in starts[process :: self.processes]]

    def even_batches(self, step: int, process: int) -> list[Indices]:
        """Return a process's share of a step and, to have as many batches as any other, some of one example.

        The first process has the most; the batches after `batches` count for nothing.
        """
        own, most = self.batches(step, process), self.batches(step, 0)
        return [*own, *(batch[-1:] for batch in most[len(own) :])]

    def tokens(self, step: int) -> int:
        """Return the number of supervised tokens of a step, in all processes together."""
        return int(self.supervised[self.examples(step)].sum())

    def dropout_seed(self, step: int, number: int, process: int) -> int:
        """Return the seed of a process's batch, the same however many processes share the step."""
        name = f"{self.seed} {step} {number * self.processes + process}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")

    @lru_cache(maxsize=2)  # noqa: B019 - a run has one sampler
    def epoch(self, epoch: int) -> Indices:
        """Return the indices of an epoch's examples in its order; a partial step stands at the end."""
        random = np.random.default_rng([self.seed, epoch])
        drawn = random.permutation(len(self.lengths))
        if self.mixture is not None:
            drawn = self.mixture.draw(epoch, self.seed, self.lengths)[drawn]
        # The longest example is never left over for a partial step; see below.
        if epoch == 0:
            longest = int(self.lengths[drawn].argmax())
            drawn[[0, longest]] = drawn[[longest, 0]]
        whole = len(drawn) - len(drawn) % self.effective
        blurred = self.lengths * random.uniform(1 - JITTER, 1 + JITTER, len(drawn))
        size = self.effective * max(1, GROUPED // self.effective)
        for start in range(0, whole, size):
            group = drawn[start : min(start + size, whole)]
            group[:] = group[np.argsort(blurred[group], kind="stable")]
        steps = drawn[:whole].reshape(-1, self.effective)
        order = random.permutation(len(steps))
        # The longest step comes first: if memory does not suffice, that is seen at once.
        if epoch == 0 and len(order):
            longest = self.lengths[steps[order]].max(axis=1).argmax()
            order[[0, longest]] = order[[longest, 0]]
        return np.concatenate([steps[order].ravel(), drawn[whole:]])
