"""Write lines, warnings and progress for a person to standard error.

In a terminal progress is a bar; in a pipe or a log file it is a plain line now and then. Of several
processes that work together only the first writes.
"""

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mdl_toolkit.i18n import Localized

if TYPE_CHECKING:
    import rich.progress

# Seconds between two plain progress lines.
PLAIN_INTERVAL = 10.0


def is_first_process() -> bool:
    """Tell whether this process has rank 0 or is the only one: it writes for all."""
    return os.environ.get("RANK", "0") == "0"


class ForgivingStream:
    """Write to a text stream as long as it takes anything: a full disk or a closed terminal ends no work.

    Args:
        stream: for the rest, it is used as it is.

    Attributes:
        problem: why something was not written, if anything was not.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.problem: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, or lose it; return its length."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it takes what is left."""
        self._try(self._stream.flush)

    def finish(self) -> None:
        """Flush the stream; what it does not take will not be tried again when Python ends."""
        self.flush()
        if self.problem is not None:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as problem:
            self.problem = self.problem or problem


def say(template: str | Localized, /, **fields: Any) -> None:
    """Write one line, in the first process: a template with its fields, or a message."""
    if not is_first_process():
        return
    stream = ForgivingStream(sys.stderr)
    stream.write(f"{Localized.of(template, fields)}\n")
    stream.flush()


def warn(template: str | Localized, /, **fields: Any) -> None:
    """Write one line that asks for attention."""
    say("warning: {message}", message=Localized.of(template, fields))


class Progress:
    """Show how far a piece of work has come: a bar in a terminal, at most a line in ten seconds elsewhere.

    Args:
        title: what is done.
        total: number of parts.
        bar: rich's progress, of which this is the only task; None for lines.
    """

    def __init__(self, title: Localized, total: int, bar: "rich.progress.Progress | None" = None) -> None:
        self._title, self._total, self._bar = title, total, bar
        self._done, self._before, self._note = 0, 0, ""
        self._started = self._last = time.monotonic()
        self._task = bar.add_task(str(title), total=total, note="") if bar else None

    def begin(self, done: int) -> None:
        """Count parts as done before now, so that the estimate of the time left does not rest on them."""
        self._done = self._before = done
        self._started = time.monotonic()
        if self._bar and self._task is not None:
            self._bar.reset(self._task, completed=done)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count parts as done; a note, such as the loss, stays until the next one."""
        self._done, self._note, now = self._done + count, note or self._note, time.monotonic()
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=count, note=self._note)
        elif now - self._last >= PLAIN_INTERVAL:
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
        yield Progress(title, total)
        return
    from rich import progress as shown
    from rich.console import Console
    from rich.table import Column

    console = Console(file=ForgivingStream(sys.stderr))  # type: ignore[arg-type]
    columns = (
        shown.TextColumn("{task.description}"),
        shown.BarColumn(max(8, min(40, console.width - 100))),
        shown.MofNCompleteColumn(),
        # Where the terminal is narrow only the note is cut.
        shown.TextColumn(
            "{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
        shown.TimeElapsedColumn(),
        shown.TimeRemainingColumn(),
    )
    with shown.Progress(*columns, console=console, expand=True) as bar:
        yield Progress(title, total, bar)


def clock(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Format a number of bytes, by thousands: 16.9 GB, 310 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def width_of(text: str) -> int:
    """Return the columns of a terminal that a text takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
