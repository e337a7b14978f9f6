"""Take signals as requests to stop: a training after its step, an inference at once."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from mdl_toolkit.utils.console import warn

# A closed terminal sends SIGHUP, which Windows does not have.
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
# Signals within so many seconds are one request: a launcher passes on a signal that all have got already.
SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """Take the first SIGINT, SIGTERM or SIGHUP in this context as a request; the next has its usual effect.

    A SIGHUP that is ignored, as under nohup, stays so.

    A next one that is usually ignored, as SIGINT by a script's background process, raises KeyboardInterrupt.
    A signal that a launcher passes on is the same request, also after this context.

    Attributes:
        is_made: a signal has come.
    """

    def __init__(self) -> None:
        self.is_made, self._made_at = False, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Python refuses this outside the main thread, which alone gets signals.
        with suppress(ValueError):
            for number in SIGNALS:
                if (
                    number not in (signal.SIGINT, signal.SIGTERM)
                    and signal.getsignal(number) is signal.SIG_IGN
                ):
                    continue
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if not self.is_made or self._is_another:
            # Otherwise the next signal that is another request restores the handlers.
            self._restore()

    @property
    def _is_another(self) -> bool:
        """Tell whether a signal that comes now is another request, and not the first one passed on."""
        return time.monotonic() - self._made_at > SAME_REQUEST_SECONDS

    def _take(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.is_made:
            if self._is_another:
                self._restore()
                if signal.getsignal(number) is signal.SIG_IGN:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), number)
            return
        self.is_made, self._made_at = True, time.monotonic()
        self.on_request()

    def on_request(self) -> None:
        """Answer the first signal."""
        warn("stopping after this step, with a checkpoint; once more stops at once")

    def _restore(self) -> None:
        """Give signals the handlers back that they had before this context."""
        for number, handler in self._before.items():
            # Otherwise an inner context still waits for what is passed on.
            if signal.getsignal(number) == self._take:
                signal.signal(number, handler)
        self._before.clear()


class Interruption(StopRequest):
    """Raise KeyboardInterrupt at the first signal of these in this context; the next has its usual effect.

    It is for work that keeps all it has finished. Where the exception is lost, as in a callback of a C
    library, `raise_if_interrupted` raises it again.
    """

    def __enter__(self) -> "Interruption":
        super().__enter__()
        _OPEN.append(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        _OPEN.remove(self)
        super().__exit__(*raised)

    def on_request(self) -> None:
        """Raise KeyboardInterrupt."""
        raise KeyboardInterrupt


_OPEN: list[Interruption] = []


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt again if it was lost; long work calls this now and then.

    Raises:
        KeyboardInterrupt: a signal came in an `Interruption` that is still open.
    """
    if any(each.is_made for each in _OPEN):
        raise KeyboardInterrupt
