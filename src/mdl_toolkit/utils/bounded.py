"""Run a small computation on data from elsewhere with bounds on its time and memory.

It runs in a forked child, which starts at once and whose limits the system keeps, whatever the computation is
busy with. The child must use no threads and no GPU.
"""

import os
import resource
import select
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Seconds after which a child that does not even compute is given up.
PATIENCE = 60


class OutOfBoundsError(Exception):
    """Report a computation that took more time or memory, or gave a longer text, than it may."""


def call_bounded(function: Callable[[], str], *, seconds: int, memory: int, length: int) -> str:
    """Call a function in a child process and return the text that it returns.

    Args:
        function: is called without arguments.
        seconds: the most processor time that it may take.
        memory: the most bytes that it may allocate.
        length: the most bytes of its text in UTF-8.

    Raises:
        OutOfBoundsError: it went beyond one of them.
        ValueError: it raised an exception, whose text this is.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Newer versions of Python warn where there are threads; the child uses none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _answer(function, writer, seconds, memory, length)
    os.close(writer)
    answer = b""
    try:
        while select.select([reader], [], [], PATIENCE)[0] and (piece := os.read(reader, 1 << 16)):
            answer += piece
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    kind, text = answer[:1], answer[1:].decode(errors="replace")
    if kind == b"=":
        return text
    if kind == b"!":
        raise ValueError(text)
    raise OutOfBoundsError


def _answer(function: Callable[[], str], writer: int, seconds: int, memory: int, length: int) -> None:
    """Write to a pipe what a function returns or raises, and end this process."""
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        with suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
            most = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            answer = b"=" + function().encode()
        except MemoryError:
            answer = b""
        except Exception as problem:  # noqa: BLE001
            answer = b"!" + (str(problem) or type(problem).__name__).encode(errors="replace")[:length]
        # A file writes all of it, whatever fits into the pipe at once.
        with os.fdopen(writer, "wb") as file:
            file.write(answer if len(answer) <= length + 1 else b"")
    finally:
        os._exit(0)
