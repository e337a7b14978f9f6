"""A command and all the processes that it starts: begin it, kill some or all, see whether any is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from tests.support.terminals import Terminal, own_terminal

RUNNER = Path(__file__).with_name("small_shards.py")
LONGEST = 120.0  # seconds that a run may take on a busy machine
GENTLE = ("hangup", "terminal")  # ways to end it that let it tidy up
GONE = 20.0  # seconds in which processes end whose parent was killed


class FailedError(Exception):
    """Something is not as it must be."""


def say(text: str) -> None:
    """Tell whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Run:
    """The command in a session of its own, perhaps in a terminal; what it says is in a file."""

    def __init__(self, words: list[str], folder: Path, log: Path, *, in_terminal: bool = False) -> None:
        self.log = log
        self.began = time.monotonic()
        self._terminal = Terminal(log) if in_terminal else None
        self._process = subprocess.Popen(
            [sys.executable, str(RUNNER), *words],
            cwd=folder, start_new_session=True, stdin=subprocess.DEVNULL,
            preexec_fn=partial(_open_streams, str(log) if self._terminal is None else self._terminal.name),
            env={**os.environ, "LANGUAGE": "en", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def wait(self) -> int:
        """Its exit status; -9 if it was killed."""
        try:
            return self._process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self.kill("group", Random(0))
            raise FailedError(f"does not end within {LONGEST:.0f} s") from None

    def said(self) -> str:
        """What it wrote until now."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_over(self) -> bool:
        """Tell whether it has ended."""
        return self._process.poll() is not None

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False if the run ended before."""
        while not condition():
            if self.is_over():
                return False
            if time.monotonic() > self.began + LONGEST:
                raise FailedError("what should happen in the run does not happen")
            time.sleep(0.0005)
        return True

    def kill(self, victim: str, random: Random) -> str:
        """Kill `group`, `parent`, or a random `worker` (the parent if there is none); say which it was.

        Or close the `terminal`, or send the group what that sends it, a `hangup`.
        """
        if victim == "terminal" and self._terminal is not None:
            self._terminal.close()
            return victim
        workers = self._workers() if victim == "worker" else []
        if victim == "worker" and not workers:
            victim = "parent"
        pid = random.choice(workers) if workers else self._process.pid
        number = signal.SIGHUP if victim in GENTLE else signal.SIGKILL
        try:
            (os.killpg if victim in ("group", *GENTLE) else os.kill)(pid, number)
        except ProcessLookupError:
            return "nobody"
        return victim

    def seconds_until_gone(self) -> float:
        """Wait until no process of the session is left.

        Raises:
            FailedError: one stays.
        """
        began = time.monotonic()
        while left := self._members():
            if time.monotonic() > began + GONE:
                raise FailedError(f"processes {left} stay after {GONE:.0f} s")
            time.sleep(0.002)
        return time.monotonic() - began

    def _members(self) -> dict[int, int]:
        """Living processes of the session, each with its parent."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and (fields := _status(folder)):
                state, parent, _, session = fields[:4]
                if int(session) == self._process.pid and state not in ("Z", "X"):
                    found[int(folder.name)] = int(parent)
        return found

    def _workers(self) -> list[int]:
        children = sorted(pid for pid, parent in self._members().items() if parent == self._process.pid)
        return [pid for pid in children if b"spawn_main" in _words(pid)]


def _open_streams(name: str) -> None:
    """Let the new session write there; whose parent runs in the background ignores a hangup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    descriptor = own_terminal(name)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _status(folder: Path) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may hold anything."""
    try:
        return (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
