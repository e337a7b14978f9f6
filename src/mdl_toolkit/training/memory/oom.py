"""How many rows are computed at once: half as many after each lack of memory."""

from collections.abc import Callable
from typing import TypeVar

import torch

from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.machine import OOM_ERRORS, describe_oom

Computed = TypeVar("Computed")


class MicroBatcher:
    """A number of rows that a device's memory does for, found out as it is used.

    Args:
        most: rows to begin with.
        device: where they are computed.
        what: is said of, when there are less from now on.
    """

    def __init__(self, most: int, device: torch.device, what: Localized) -> None:
        self.most = most
        self._device, self._what = device, what

    def run(
        self, rows: int, compute: Callable[[int], Computed], before_again: Callable[[], object] | None = None
    ) -> Computed:
        """What is computed, with as many rows at once as memory does for.

        Args:
            rows: that there are; more at once are never computed.
            compute: called with the most rows at once.
            before_again: called before it is computed again.

        Raises:
            RuntimeError, MemoryError: it is not for lack of memory, or not even one row fits.
        """
        while True:
            try:
                return compute(self.most)
            except OOM_ERRORS as problem:
                lack = describe_oom(problem)
                if lack is None or min(self.most, rows) <= 1:
                    raise
            # Here, where what had been computed is let go of.
            if before_again is not None:
                before_again()
            self._halve(rows, lack)

    def _halve(self, rows: int, lack: Localized) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.most = (min(self.most, rows) + 1) // 2
        warn("{lack}: {most} rows at once from now on, {what}", lack=lack, most=self.most, what=self._what)
