"""What a person sees while it works: lines, warnings and progress, all on standard error.

In a terminal progress is a bar; in a pipe or a log file it is a plain line now and then. Of several
processes that work together only the first speaks.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mdl_toolkit.language import Text

PLAIN_INTERVAL = 10.0  # seconds between two plain progress lines


def is_first_process() -> bool:
    """Tell whether this is the process that speaks and writes (rank 0, or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def say(en: str, zh: str) -> None:
    """Write one line."""
    if not is_first_process():
        return
    sys.stderr.write(f"{Text(en, zh)}\n")
    sys.stderr.flush()


def warn(en: str, zh: str) -> None:
    """Write one line that asks for attention."""
    say(f"warning: {en}", f"警告：{zh}")


@dataclass
class Progress:
    """How far a piece of work has come; `advance` is called after each part of it."""

    title: Text
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    _last: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count parts as done and, now and then, say so."""
        self.done += count
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL:
            self._last = now
            self._write(note)

    def close(self) -> None:
        """Leave the last state on the screen."""

    def _write(self, note: str) -> None:
        left = _clock((time.monotonic() - self.started) / max(self.done, 1) * (self.total - self.done))
        more = f", {note}" if note else ""
        say(
            f"{self.title.en}: {self.done}/{self.total}{more}, {left} left",
            f"{self.title.zh}：{self.done}/{self.total}{more}，剩余 {left}",
        )


class _Bar(Progress):
    """The same in a terminal, drawn by rich."""

    def __post_init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(str(self.title), total=self.total, note="")
        self._bar.start()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self._bar.advance(self._task, count)
        if note:
            self._bar.update(self._task, note=note)

    def close(self) -> None:
        self._bar.stop()


@contextmanager
def progress(en: str, zh: str, total: int, *, quiet: bool = False) -> Iterator[Progress]:
    """Show progress over `total` parts; a bar in a terminal, lines elsewhere, nothing when `quiet`."""
    fancy = sys.stderr.isatty() and not quiet and is_first_process()
    shown = (_Bar if fancy else Progress)(Text(en, zh), total)
    if quiet:
        shown._last = float("inf")
    try:
        yield shown
    finally:
        shown.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
