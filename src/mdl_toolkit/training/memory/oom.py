"""Go on after an out-of-memory error: compute in micro-batches of half the size."""

from collections.abc import Callable
from typing import TypeVar

import torch

from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.device import empty_cache
from mdl_toolkit.utils.machine import OOM_ERRORS, describe_oom

Computed = TypeVar("Computed")


class MicroBatcher:
    """Run computations in micro-batches, halving their size after each out-of-memory error.

    Args:
        most: examples in a micro-batch, to begin with.
        device: where they are computed.
        purpose: ends the warning that micro-batches are smaller from now on.
        is_fixed: whether the size stays, as other processes take part in each computation.

    Attributes:
        most: examples in a micro-batch from now on.
    """

    def __init__(
        self, most: int, device: torch.device, purpose: Localized, *, is_fixed: bool = False
    ) -> None:
        self.most, self._is_fixed = most, is_fixed
        self._device, self._purpose = device, purpose

    def run(
        self,
        examples: int,
        compute: Callable[[int], Computed],
        before_retry: Callable[[], object] | None = None,
        has_reserve: Callable[[], bool] = lambda: False,
    ) -> Computed:
        """Return what is computed with as many examples at once as memory does for.

        Args:
            examples: number of examples; more at once are never computed.
            compute: called with the most examples of a micro-batch.
            before_retry: called before `compute` is called again.
            has_reserve: tells whether `before_retry` is going to make room; then the size stays for once.

        Raises:
            RuntimeError, MemoryError: memory is not why, or not even one example fits.
        """
        while True:
            try:
                return compute(self.most)
            except OOM_ERRORS as problem:
                lack = describe_oom(problem)
                is_spared = has_reserve()
                if lack is None or self._is_fixed or (min(self.most, examples) <= 1 and not is_spared):
                    raise
            # Not in the handler: what had been computed is freed only here.
            if before_retry is not None:
                before_retry()
            empty_cache(self._device)
            if is_spared:
                warn("{lack}: gradient checkpointing computes all activations again from now on", lack=lack)
                continue
            self.most = (min(self.most, examples) + 1) // 2
            warn(
                "{lack}: {most} {most:row|rows} at once from now on, {what}",
                lack=lack,
                most=self.most,
                what=self._purpose,
            )
