"""Signals that ask a run to stop: a training after its step (rule 31), an inference at once."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from mdl_toolkit.console import warn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0  # seconds in which signals are one request: a launcher passes on what everybody has got already


class StopRequest:
    """While this context lasts, the first SIGINT or SIGTERM is a request, and the next has its usual effect.

    A next one that is usually ignored, as SIGINT by what a script starts with `&`, raises KeyboardInterrupt.
    What a launcher passes on is still the same request if it comes after this context.

    Attributes:
        is_made: somebody has asked.
    """

    def __init__(self) -> None:
        self.is_made, self._asked = False, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        with suppress(ValueError):  # not in the main thread: signals are somebody else's
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if not self.is_made or self._is_another:
            self._restore()  # else the next signal that is another request does

    @property
    def _is_another(self) -> bool:
        """Tell whether a signal that comes now is more than the first one passed on."""
        return time.monotonic() - self._asked > SAME

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.is_made:
            if self._is_another:
                self._insist(number)
            return
        self.is_made, self._asked = True, time.monotonic()
        self._answer()

    def _answer(self) -> None:
        warn(
            "stopping after this step, with a checkpoint; once more stops at once",
            "本步完成后保存检查点并停止；再次发送信号则立即停止",
        )

    def _insist(self, number: int) -> None:
        self._restore()
        if signal.getsignal(number) is signal.SIG_IGN:
            raise KeyboardInterrupt
        os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._take:  # else an inner one still waits for what is passed on
                signal.signal(number, handler)
        self._before.clear()


class Interruption(StopRequest):
    """While this context lasts, the first SIGINT or SIGTERM raises KeyboardInterrupt, for work that keeps all
    it has finished; the next has its usual effect.

    Where that is lost, as in a callback of a C library, `end_if_asked` raises it again.
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
    """Called now and then in long work: a request to end must not be lost.

    Raises:
        KeyboardInterrupt: a signal came in an `Interruption` that is still open.
    """
    if any(each.is_made for each in _OPEN):
        raise KeyboardInterrupt
