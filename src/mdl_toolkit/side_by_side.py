"""A batch to its gradients: whole, or on a CPU in lanes, side by side, each with a share of the threads.

Gradients of lanes are added up in the order of the lanes, so that a step is the same whenever it is made.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

from mdl_toolkit.batching import Batch, part_of
from mdl_toolkit.dealing import Dealing
from mdl_toolkit.forward import Forward
from mdl_toolkit.trained import Trained

Given = TypeVar("Given")
Found = TypeVar("Found")


class SideBySide:
    """What computes the gradients of a run.

    Args:
        forward: batches to losses.
        trained: what gradients are of.
        dealing: which rows go to which lane.
    """

    def __init__(self, forward: Forward, trained: Trained, dealing: Dealing) -> None:
        self._forward, self._trained, self._dealing = forward, trained, dealing
        self._threads = torch.get_num_threads()
        self._others = ThreadPoolExecutor(max(1, dealing.lanes - 1), "lanes")

    def close(self) -> None:
        """End the threads."""
        self._others.shutdown()

    def backward(self, batch: Batch, tokens: int) -> Tensor:
        """Add the gradients of a batch's losses, divided by a number of supervised tokens.

        Returns:
            The sum of these losses, a scalar.
        """
        parts = self.dealt(batch)
        if len(parts) == 1:
            loss = self._forward.loss(batch, tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        def compute(part: Batch) -> tuple[Tensor, Sequence[Tensor | None]]:
            loss = self._forward.loss(part, tokens)
            return loss.detach(), self._trained.gradients(loss)

        losses, gradients = zip(*self._each(parts, compute), strict=True)
        for found in gradients:
            self._trained.add(found)
        return torch.stack(losses).sum()

    def dealt(self, batch: Batch) -> list[Batch]:
        """The parts of a batch that are computed side by side, or the batch alone."""
        if self._dealing.lanes == 1:
            return [batch]
        positions, samples = batch["attention_mask"].sum(1), batch["audio_length"]
        lanes = self._dealing.deal(positions.numpy(), samples.numpy())
        return [batch] if len(lanes) == 1 else [part_of(batch, torch.from_numpy(rows)) for rows in lanes]

    def _each(self, parts: Sequence[Given], compute: Callable[[Given], Found]) -> list[Found]:
        """The first part in this thread; none is under way any more when it returns or fails."""

        def alone(part: Given) -> Found:
            torch.get_num_threads()  # a thread's first look takes the process's number
            torch.set_num_threads(max(1, self._threads // len(parts)))  # of this thread's operations
            return compute(part)

        others = [self._others.submit(alone, part) for part in parts[1:]]
        try:
            first = alone(parts[0])
        finally:
            try:
                wait(others)
            finally:
                torch.set_num_threads(self._threads)
        return [first, *(other.result() for other in others)]
