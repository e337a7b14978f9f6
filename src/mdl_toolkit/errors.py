"""The errors that a user can put right.

    ToolkitError            exit status 1: the work could not be done
    |-- UsageError          exit status 2: the command line is wrong by itself
    |-- InputError          a CSV, a configuration file or an output path
    |   `-- RowsError       rows of a CSV: all of them in one message
    |-- AudioError          one recording that cannot be used
    |   |-- TooLongError      longer than is accepted
    |   |-- CutOffError       not all there
    |   `-- UnavailableError  to be had at another time, perhaps
    |-- DatasetError        a converted dataset
    `-- ModelError          a model, tokenizer, adapter or checkpoint, or the way to it

Anything else that reaches the user is a bug in this toolkit.
"""

from bisect import insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import packages_distributions
from operator import attrgetter
from traceback import walk_tb
from typing import Any

from mdl_toolkit.i18n import Localized, Verbatim, join_messages

# A message names at most so many rows, and counts the others.
MOST_ROWS_SHOWN = 50
# Characters of a cell in a message.
LONGEST_VALUE = 120


def shorten(text: str, most: int = LONGEST_VALUE) -> str:
    """Cut a text for a message or a picture."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


class ToolkitError(Exception):
    """Say what went wrong, where, and what to do, in one sentence.

    Args:
        template: the sentence, with fields as `str.format` has them, or the message that is made already.
        fields: their values.

    Attributes:
        message: it in the reader's language.

    Example:
        ```python
        from mdl_toolkit import ToolkitError, TrainOptions, train

        try:
            train(TrainOptions(train_dataset="missing.csv", output="run"))
        except ToolkitError as error:
            print(error)
        ```
    """

    exit_status = 1

    def __init__(self, template: str | Localized, /, **fields: Any) -> None:
        self.message = Localized.of(template, fields)
        super().__init__(self.message)

    def __str__(self) -> str:
        return str(self.message)


def broken_package(problem: BaseException | None) -> str | None:
    """Return the package that could not be imported, by its name in the package index.

    An exception that left the body of a module came from importing it; the outermost one that is not ours is
    named.

    Returns:
        None if the exception did not come from importing a package of others.
    """
    while problem is not None:
        modules = [
            frame.f_globals.get("__name__", "")
            for frame, _ in walk_tb(problem.__traceback__)
            if frame.f_code.co_name == "<module>"
        ]
        if isinstance(problem, ImportError):
            modules.append(problem.name or "")
        for name in (module.partition(".")[0] for module in modules):
            if name and name not in (__package__, "__main__", "__mp_main__"):
                names: list[str] = packages_distributions().get(name, [name])
                return names[0]
        problem = problem.__cause__ or problem.__context__
    return None


def is_error(problem: BaseException) -> bool:
    """Tell an error from a wish to end the process; a library in Rust that gives up raises no `Exception`."""
    return isinstance(problem, Exception) or type(problem).__name__ == "PanicException"


def breakdown(problem: BaseException) -> Localized | None:
    """Say that memory ran out or a library gave up; None for errors that say themselves what is wrong."""
    if isinstance(problem, MemoryError):
        return Localized("the machine ran out of memory")
    if is_error(problem) and not isinstance(problem, Exception):
        return Localized("a library gave up on it: {words}", words=" ".join(str(problem).split()))
    return None


@contextmanager
def naming_row(line: int, audio: str) -> Iterator[None]:
    """Name the row at which memory runs out or a library gives up in the context.

    Args:
        line: of the CSV, where the row starts.
        audio: its recording.

    Raises:
        ToolkitError: one of these has happened.
    """
    try:
        yield
    except BaseException as problem:
        if (reason := breakdown(problem)) is None:
            raise
        raise ToolkitError(
            "line {line} ({audio}): {reason}", line=line, audio=shorten(audio), reason=reason
        ) from problem


class UsageError(ToolkitError):
    """Refuse a command line that is wrong by itself, whatever the files hold."""

    exit_status = 2


class InputError(ToolkitError):
    """Refuse a CSV, a configuration file or an output path that cannot be used."""


class AudioError(ToolkitError):
    """Refuse a recording; the message does not name it, its caller does."""


class TooLongError(AudioError):
    """Refuse a recording that is longer than is accepted."""


class CutOffError(AudioError):
    """Refuse a recording that is not all there; the field `missing` of its message says how that is known."""


class UnavailableError(AudioError):
    """Refuse a recording that may be had at another time: a server or a disk failed, or memory ran out."""


class DatasetError(ToolkitError):
    """Refuse a converted dataset that cannot be written, opened or used."""


class ModelError(ToolkitError):
    """Refuse a model, tokenizer, adapter or checkpoint that cannot be had or used."""


@dataclass(frozen=True)
class RowProblem:
    """Say what is wrong with one row of a CSV.

    Attributes:
        line: line of the CSV file where the row starts, counted from 1.
        column: the column's name.
        value: the cell's text.
        reason: what is wrong with it and what to do.
        may_pass: the row may be fine at another time.
    """

    line: int
    column: str
    value: str
    reason: Localized
    may_pass: bool = False

    def as_line(self, *, is_list: bool) -> Localized:
        """Return the problem as a line of a message.

        Args:
            is_list: the CSV was made of a folder or a pattern, so that line and column say nothing.
        """
        value = shorten(self.value)
        if is_list:
            return Localized("  {value!r}: {reason}", value=value, reason=self.reason)
        return Localized(
            "  line {line}, column {column} {value!r}: {reason}",
            line=self.line,
            column=self.column,
            value=value,
            reason=self.reason,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads."""
        return {**vars(self), "reason": self.reason.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RowProblem":
        """Read the plain values of `to_json`.

        Raises:
            TypeError, KeyError: these are other values.
        """
        return cls(**{**values, "reason": Verbatim(**values["reason"])})


class RowsError(InputError):
    """Refuse a CSV for its bad rows: name the first ones of them, and count all.

    Where the CSV is a list that was made of a folder or a pattern, nobody has seen its lines: the recordings
    alone are named.
    """

    may_pass = False

    def __init__(
        self, source: str, problems: Sequence[RowProblem], count: int | None = None, *, is_list: bool = False
    ) -> None:
        self.source, self.is_list = source, is_list
        self.problems = tuple(sorted(problems, key=attrgetter("line")))
        self.count = len(problems) if count is None else count
        if is_list:
            head = Localized("{source}: {count} bad file(s):", source=source, count=self.count)
        else:
            head = Localized("{source}: {count} bad row(s):", source=source, count=self.count)
        lines = [head, *(problem.as_line(is_list=is_list) for problem in self.problems[:MOST_ROWS_SHOWN])]
        if self.count > MOST_ROWS_SHOWN:
            lines.append(Localized("  ... and {more} more", more=self.count - MOST_ROWS_SHOWN))
        super().__init__(join_messages(lines, "{left}\n{right}"))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), is_list=self.is_list), (self.source, self.problems, self.count)


@dataclass
class Problems:
    """Collect problems of rows: keep the first ones, and count all.

    Attributes:
        first: those of the lowest lines, in order.
        count: how many were added.
        most: how many are kept; None for all.
        may_pass: one of them may pass.
    """

    first: list[RowProblem] = field(default_factory=list)
    count: int = 0
    most: int | None = MOST_ROWS_SHOWN
    may_pass: bool = False

    def add(self, problem: RowProblem) -> None:
        """Count a problem, and keep it if it is one of the first."""
        insort(self.first, problem, key=attrgetter("line"))
        if self.most is not None:
            del self.first[self.most :]
        self.count += 1
        self.may_pass |= problem.may_pass

    def merge(self, other: "Problems") -> None:
        """Add all problems of another one."""
        for problem in other.first:
            self.add(problem)
        self.count += other.count - len(other.first)
        self.may_pass |= other.may_pass

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "first": [problem.to_json() for problem in self.first]}

    def check(self, source: str, *, is_list: bool = False) -> None:
        """Raise RowsError if there is any problem."""
        if self.count:
            error = RowsError(source, self.first, self.count, is_list=is_list)
            error.may_pass = self.may_pass
            raise error
