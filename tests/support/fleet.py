"""`mdl-toolkit` in processes of their own, forked from one that has imported everything: each is quick.

Everything else is the real command's: its words, environment, signals, exit status and what it says. A test
may have something done in the process before the command begins, such as dying at an exact moment.
"""

import gc
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.support.processes import PATIENCE, wait_for
from tests.support.terminals import Terminal, own_terminal

PRELOADED = [
    "mdl_toolkit.cli.main",
    "mdl_toolkit.training.run",
    "mdl_toolkit.inference.run",
    "mdl_toolkit.training.merge",
    "peft",
    "transformers",
    __name__,
]


def free_port() -> int:
    """A port that nobody uses, below those that the system gives away; no socket is opened to find it."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in _lines(Path("/proc/net", name))]
    taken = {int(words[1].rpartition(":")[2], 16) for words in lines if ":" in words[1]}
    return random.choice([port for port in range(20_000, 32_000) if port not in taken])


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


# --- in the process --------------------------------------------------------------------------------------


def _serve(words: list[str], log: str, environment: dict[str, str], before: Callable[[], object]) -> None:
    from mdl_toolkit.cli import main as cli

    gc.freeze()  # what the libraries hold need not be looked through again and again
    os.setsid()
    # Whose parent runs in the background lacks them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    descriptor = own_terminal(log)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.environ.update(environment)
    cli.open_streams()
    before()
    sys.exit(cli.run(words))


def nothing() -> None:
    """What is done before most commands."""


def die_before(event: str, pattern: str) -> None:
    """Kill the process right before an audit event, such as `os.rename`, of a file whose name matches."""

    def hear(happens: str, words: tuple[Any, ...]) -> None:
        if happens == event and re.search(pattern, str(words[0])):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def slow_steps(seconds: float, saving: float = 0.0) -> None:
    """Let every step, and every saving, take so much longer."""
    from mdl_toolkit.training import trainer

    slowly(trainer.BatchSampler, "tokens", seconds)
    slowly(trainer, "save", saving)


def slowly(owner: Any, name: str, seconds: float) -> None:
    """Let a function wait before each call."""
    function = getattr(owner, name)

    def waited(*words: Any, **more: Any) -> Any:
        time.sleep(seconds)
        return function(*words, **more)

    setattr(owner, name, waited)


# --- for the test ----------------------------------------------------------------------------------------


class Job:
    """One process; `log` holds what it says.

    Attributes:
        terminal: to which it says that, if it has one.
    """

    def __init__(
        self,
        words: list[str],
        log: Path,
        environment: dict[str, str],
        before: Callable[[], object],
        in_terminal: bool,
    ) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.log, self.terminal = log, Terminal(log) if in_terminal else None
        place = str(log) if self.terminal is None else self.terminal.name
        self._process = context.Process(target=_serve, args=(words, place, environment, before))
        self._process.start()

    @property
    def is_running(self) -> bool:
        """Tell whether it has not ended."""
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended by itself."""
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def end_by(self, number: int | None) -> None:
        """Send it a signal, or close its terminal."""
        if number is not None:
            self.signal(number)
        else:
            assert self.terminal is not None
            self.terminal.close()

    def until(self, condition: Callable[[], Any]) -> bool:
        """Wait for a condition; False if the process ended before."""
        wait_for(lambda: condition() or not self.is_running)
        return bool(condition())

    def end(self) -> int | None:
        """Wait for its end; the exit status, or minus the signal that ended it."""
        self._process.join(PATIENCE)
        assert not self.is_running, f"it does not end, and said: {self.said()}"
        if self.terminal is not None:
            self.terminal.close()
        return self._process.exitcode

    def kill(self) -> int | None:
        """Kill -9, unless it has ended by itself."""
        self._process.kill()
        return self.end()

    def said(self) -> str:
        """What it wrote until now."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


Start = Callable[..., Job]


@contextmanager
def fleet(folder: Path, name: str = "said") -> Iterator[Start]:
    """Starts commands: `start(words, before=..., RANK="0")`; none of them outlives the context."""
    jobs: list[Job] = []

    def start(
        words: list[str],
        before: Callable[[], object] = nothing,
        *,
        in_terminal: bool = False,
        **environment: str,
    ) -> Job:
        jobs.append(Job(words, folder / f"{name}-{len(jobs)}.log", environment, before, in_terminal))
        return jobs[-1]

    try:
        yield start
    finally:
        for job in jobs:
            job.kill()


def start_ranks(
    start: Start,
    words: list[str],
    count: int = 2,
    before: Callable[[], object] | list[Any] = nothing,
    in_terminal: tuple[int, ...] = (),
) -> list[Job]:
    """The command as so many processes that train together, some with a terminal, as any launcher starts."""
    befores = before if isinstance(before, list) else [before] * count
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    return [
        start(words, befores[rank], in_terminal=rank in in_terminal, RANK=str(rank), **there)
        for rank in range(count)
    ]
