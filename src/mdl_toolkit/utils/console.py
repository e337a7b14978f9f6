"""Write lines, warnings and progress for a person to standard error.

In a terminal progress is a bar; in a pipe or a log file it is a plain line now and then. Of several
processes that work together only the first writes.
"""

import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from mdl_toolkit.i18n import Localized

# Seconds between two plain progress lines.
PLAIN_INTERVAL = 10.0


def is_first_process() -> bool:
    """Tell whether this process has rank 0 or is the only one: it writes for all."""
    return os.environ.get("RANK", "0") == "0"


def say(template: str | Localized, /, **fields: Any) -> None:
    """Write one line, in the first process: a template with its fields, or a message."""
    if not is_first_process():
        return
    sys.stderr.write(f"{Localized.of(template, fields)}\n")
    sys.stderr.flush()


def warn(template: str | Localized, /, **fields: Any) -> None:
    """Write one line that asks for attention."""
    say("warning: {message}", message=Localized.of(template, fields))


class Progress(Protocol):
    """Show how far a piece of work has come."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count parts as done; a note, such as the loss, stays until the next one."""

    def begin(self, done: int) -> None:
        """Count parts as done before now, so that the estimate of the time left does not rest on them."""


class _Lines:
    """Show progress as plain lines, at most one in ten seconds."""

    def __init__(self, title: Localized, total: int) -> None:
        self._title, self._total = title, total
        self._done, self._before, self._note = 0, 0, ""
        self._started = self._last = time.monotonic()

    def begin(self, done: int) -> None:
        self._done = self._before = done
        self._started = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done, self._note = self._done + count, note or self._note
        now = time.monotonic()
        if now - self._last < PLAIN_INTERVAL:
            return
        self._last, elapsed = now, now - self._started
        left = clock(elapsed / max(self._done - self._before, 1) * (self._total - self._done))
        state = {"title": self._title, "done": self._done, "total": self._total, "left": left}
        if self._note:
            say(Localized("{title}: {done}/{total}, {note}, {left} left", note=self._note, **state))
        else:
            say(Localized("{title}: {done}/{total}, {left} left", **state))


@contextmanager
def progress(total: int, template: str | Localized, /, **fields: Any) -> Iterator[Progress]:
    """Show progress over `total` parts under a title: a bar in a terminal, lines elsewhere."""
    title = Localized.of(template, fields)
    if not (sys.stderr.isatty() and is_first_process()):
        yield _Lines(title, total)
        return
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True)
    # Where the terminal is narrow only the note is cut.
    note = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(max(8, min(40, console.width - 100))),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[note]}", table_column=note),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, expand=True) as shown:
        yield _Bar(shown, shown.add_task(str(title), total=total, note=""))


class _Bar:
    """Forward progress to a task of rich's."""

    def __init__(self, shown: Any, task: Any) -> None:
        self._shown, self._task = shown, task

    def begin(self, done: int) -> None:
        self._shown.reset(self._task, completed=done)

    def advance(self, count: int = 1, note: str = "") -> None:
        self._shown.advance(self._task, count)
        if note:
            self._shown.update(self._task, note=note)


def clock(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def width_of(text: str) -> int:
    """Return the columns of a terminal that a text takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
