"""Take signals as requests to stop: a training after its step, an inference at once."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from mdl_toolkit.utils.console import warn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Signals within so many seconds are one request: a launcher passes on what everybody has got already.
SAME = 1.0


class StopRequest:
    """Take the first SIGINT or SIGTERM in this context as a request; the next one has its usual effect.

    A next one that is usually ignored, as SIGINT by what a script starts with `&`, raises KeyboardInterrupt.
    What a launcher passes on is still the same request if it comes after this context.

    Attributes:
        is_made: somebody has asked.
    """

    def __init__(self) -> None:
        self.is_made, self._asked = False, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Python refuses this outside the main thread, where signals are somebody else's.
        with suppress(ValueError):
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if not self.is_made or self._is_another:
            # Otherwise the next signal that is another request restores the handlers.
            self._restore()

    @property
    def _is_another(self) -> bool:
        """Tell whether a signal that comes now is another request, and not the first one passed on."""
        return time.monotonic() - self._asked > SAME

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.is_made:
            if self._is_another:
                self._insist(number)
            return
        self.is_made, self._asked = True, time.monotonic()
        self._answer()

    def _answer(self) -> None:
        warn("stopping after this step, with a checkpoint; once more stops at once")

    def _insist(self, number: int) -> None:
        self._restore()
        if signal.getsignal(number) is signal.SIG_IGN:
            raise KeyboardInterrupt
        os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # Otherwise an inner context still waits for what is passed on.
            if signal.getsignal(number) == self._take:
                signal.signal(number, handler)
        self._before.clear()


class Interruption(StopRequest):
    """Raise KeyboardInterrupt at the first SIGINT or SIGTERM in this context; the next has its usual effect.

    It is for work that keeps all it has finished. Where the exception is lost, as in a callback of a C
    library, `end_if_asked` raises it again.
    """

    def __enter__(self) -> "Interruption":
        super().__enter__()
        _OPEN.append(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        _OPEN.remove(self)
        super().__exit__(*raised)

    def _answer(self) -> None:
        raise KeyboardInterrupt


_OPEN: list[Interruption] = []


def end_if_asked() -> None:
    """Raise KeyboardInterrupt again if a signal asked for the end; long work calls this now and then.

    Raises:
        KeyboardInterrupt: a signal came in an `Interruption` that is still open.
    """
    if any(each.is_made for each in _OPEN):
        raise KeyboardInterrupt
