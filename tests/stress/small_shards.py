"""The real command with small shards: `python small_shards.py [--die-before N one|all] WORDS`.

With `--die-before` the process kills itself (or its whole group) right before its N-th file operation; that
is the only way to hit the moment between two of them every time. `--count FILE` writes how many there are.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdl_toolkit.cli import main as cli
from mdl_toolkit.data.convert import plan

ROWS = 6  # in a shard
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime"}


def is_operation(event: str, words: tuple[Any, ...]) -> bool:
    """Tell whether an audit event changes files, or opens one of the work folder to write or to flush it."""
    if event in CHANGES:
        return True
    return event == "open" and ".partial" in str(words[0]) and words[1] not in ("r", "rb")


class Counter:
    """Counts this process's file operations, and does something before one of them."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self.seen, self._number, self._act = 0, number, act
        sys.addaudithook(self._hear)

    def _hear(self, event: str, words: tuple[Any, ...]) -> None:
        if is_operation(event, words):
            self.seen += 1
            if self.seen == self._number:
                self._act()


def main(words: list[str]) -> int:
    plan.CHUNK_ROWS, plan.FEWEST_BYTES = ROWS, 1
    cli.open_streams()
    if words[0] == "--die-before":
        victim = os.getpid() if words[2] == "one" else -os.getpgrp()
        Counter(int(words[1]), lambda: os.kill(victim, signal.SIGKILL))
        return cli.run(words[3:])
    if words[0] == "--count":
        counter = Counter(0, lambda: None)
        status = cli.run(words[2:])
        Path(words[1]).write_text(str(counter.seen))
        return status
    return cli.run(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
