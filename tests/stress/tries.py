"""Commands that are killed several times each before they may end.

Each try kills the command several times: at a moment of the clock, a little after a step, or right before an
exact file operation; by SIGKILL, or by what ends it in an orderly way: SIGTERM, Ctrl-C, SIGHUP, a terminal
that is closed. In every third try of a command that may run as two processes it does, and one of them,
or both, are killed. Then the same command may come to its end. Each script has its own kind of `Attempt`,
which knows the command, and what must be found after a kill and in the end.
"""

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from mdl_toolkit.utils import distributed
from tests.stress.files import Files, check_same
from tests.stress.processes import FailedError, say
from tests.support.fleet import Job, Start, fleet, start_ranks

OUT = "out"  # what the output's name begins with
LAST = 8  # file operations, in which outputs are put in place
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
LOST = ("another process of this run has ended", "not all processes of this run met")
INTERRUPTED = 130  # exit status


@dataclass(frozen=True)
class Moment:
    """When to kill whom.

    Attributes:
        kind: `clock`, `step`, `operation`, or `end` for one of the last operations.
        share: of the run that lies before it, from 0 to 1.
        delay: seconds after a step.
        victim: `first`, `second` or `both`; of one process `first`.
        signal: what kills; None closes the terminal; before an operation always SIGKILL.
    """

    kind: str
    share: float
    delay: float
    victim: str
    signal: signal.Signals | None


@dataclass(frozen=True)
class Try:
    """One run of a command that is killed several times before it may end."""

    number: int
    processes: int
    moments: tuple[Moment, ...]


@dataclass
class Unbroken:
    """What a run leaves that nobody disturbs, and how long it takes."""

    files: Files
    seconds: float
    steps: int
    operations: int


@dataclass
class Counts:
    """What happened in all tries.

    Attributes:
        resumed: the step from which each run went on that was begun again.
        found: how often something was found after a kill, by its name.
    """

    tries: int = 0
    failures: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    means: Counter[str] = field(default_factory=Counter)
    too_late: int = 0
    resumed: list[int] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        fresh = sum(not step for step in self.resumed)
        return (
            f"{self.tries} tries, {self.kills.total()} kills {dict(self.kills)} by {dict(self.means)}; "
            f"then found {dict(self.found)}; {len(self.resumed)} runs begun again, {fresh} from nothing; "
            f"{self.too_late} kills came too late; {self.failures} failures"
        )


# --- in the process --------------------------------------------------------------------------------------


def is_operation(event: str, words: tuple[Any, ...]) -> bool:
    """Tell whether an audit event changes files of the run, or opens one of them to write or to flush it."""
    if event in CHANGES:
        return True
    return event == "open" and OUT in str(words[0]) and words[1] not in ("r", "rb")


def begin(folder: str, act: Callable[[int], object]) -> None:
    """Go to the folder of the try, and act before each file operation, which are numbered from 1."""
    os.chdir(folder)
    Path(f"{folder}.ready-{os.environ.get('RANK', '0')}").touch()
    distributed.RENDEZVOUS_TIMEOUT = timedelta(
        seconds=20
    )  # the other one may have been killed before it came
    numbers = itertools.count(1)
    sys.addaudithook(lambda event, words: act(next(numbers)) if is_operation(event, words) else None)


def nothing(_: int) -> None:
    """What is done before most operations."""


def die_at(number: int, now: int) -> None:
    """Kill this process at a certain operation."""
    if now == number:
        os.kill(os.getpid(), signal.SIGKILL)


def write_down(file: str, now: int) -> None:
    """Write down how many there were until now."""
    with suppress(OSError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, str(now).encode())
        os.close(descriptor)


# --- one try ---------------------------------------------------------------------------------------------


class Attempt:
    """Carry a try out in a folder of its own; each command has a kind of its own.

    Attributes:
        KINDS: of moments.
        SIGNALS: what kills.
        MOST: processes that may work together.
        status: the exit status of a run that comes to its end.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("clock", "step", "operation")
    SIGNALS: ClassVar[tuple[signal.Signals | None, ...]] = (
        *[signal.SIGKILL] * 4, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, None,
    )  # fmt: skip
    MOST: ClassVar[int] = 2
    status = 0
    unbroken: Unbroken | None = None

    def __init__(self, place: Path, name: str, tried: Try, counts: Counts, launch: Start) -> None:
        self.place, self.tried, self.counts, self.launch = place, tried, counts, launch
        self.folder = place / name

    # --- what each kind says for itself ---

    @staticmethod
    def make_inputs(place: Path) -> None:
        """Make what all tries use."""
        raise NotImplementedError

    @classmethod
    def variant(cls, tried: Try) -> str:
        """Tries of one variant must come to the same end."""
        return f"{tried.processes} process(es)"

    def words(self) -> list[str]:
        """The command."""
        raise NotImplementedError

    def hook(self, act: Callable[[int], object]) -> Callable[[], object]:
        """What is done in a process before the command, so that it acts before each operation."""
        return partial(begin, str(self.folder), act)

    def prepare(self) -> None:
        """Fill the folder before the first run."""

    def kept(self) -> int:
        """Steps that the next run need not make."""
        return 0

    def steps(self) -> int:
        """Steps that have been made."""
        return self.kept()

    def all_steps(self) -> int:
        """Steps of a run that has come to its end."""
        return self.steps()

    def result(self) -> Files:
        """All that lies in the folder."""
        raise NotImplementedError

    def check_run(self, jobs: list[Job]) -> None:
        """After each run, however it ended."""

    def check_broken(self) -> None:
        """After each kill."""

    def check_end(self) -> None:
        """After the last run."""
        check_same(self.result(), self.unbroken.files, "what the run left")

    # --- what all do alike ---

    def carry_out(self, unbroken: Unbroken) -> None:
        """Kill as planned, let it end, and look at everything.

        Raises:
            FailedError: something is not as it must be.
        """
        self.unbroken = unbroken
        self.folder.mkdir()
        self.prepare()
        for moment in self.tried.moments:
            self._kill(moment)
            self.check_broken()
        self._complete()
        self.check_end()
        shutil.rmtree(self.folder)

    def undisturbed(self) -> Unbroken:
        """Let it end at once.

        Raises:
            FailedError: it does not.
        """
        self.folder.mkdir()
        self.prepare()
        count, began = self.folder.with_suffix(".operations"), time.monotonic()
        self._complete(partial(write_down, str(count)))
        return Unbroken(self.result(), time.monotonic() - began, self.all_steps(), int(count.read_text()))

    def _complete(self, act: Callable[[int], object] = nothing) -> None:
        jobs = self._start(act)
        if {*(ends := [job.end() for job in jobs])} != {self.status}:
            raise FailedError(f"the last run ended with {ends}, and said: {[job.said() for job in jobs]}")
        self.check_run(jobs)

    def _start(self, act: Callable[[int], object] = nothing, in_terminal: tuple[int, ...] = ()) -> list[Job]:
        """The command as one process or two; in the first one something is done before each operation."""
        for file in self._ready():
            file.unlink()
        hooks = [self.hook(each) for each in [act, *[nothing] * (self.tried.processes - 1)]]
        if len(hooks) > 1:
            return start_ranks(self.launch, self.words(), len(hooks), hooks, in_terminal)
        return [self.launch(self.words(), hooks[0], in_terminal=0 in in_terminal)]

    def _ready(self) -> list[Path]:
        """A file of each process that is about to begin the command."""
        return [*self.place.glob(f"{self.folder.name}.ready-*")]

    def _kill(self, moment: Moment) -> None:
        victims = {"first": (0,), "second": (1,), "both": (0, 1)}[moment.victim]
        by_itself = moment.kind in ("operation", "end") and moment.victim == "first"
        by = signal.SIGKILL if by_itself else moment.signal
        act = partial(die_at, self._operation(moment)) if by_itself else nothing
        jobs = self._start(act, victims if by is None else ())
        if not by_itself and self._wait_for(moment, jobs):
            for victim in victims:
                jobs[victim].end_by(by)
        ends = [job.end() for job in jobs]
        self._count(moment, by, ends, jobs)
        self.check_run(jobs)
        self.counts.resumed.append(self.kept())

    def _operation(self, moment: Moment) -> int:
        if moment.kind == "end":
            return self.unbroken.operations - int(moment.share * LAST)
        return 1 + int(moment.share * self._left() * self.unbroken.operations)

    def _left(self) -> float:
        """About the share of a whole run that the next one makes: it is shorter the later it begins."""
        return 0.3 + 0.7 * (1 - self.kept() / max(1, self.unbroken.steps))

    def _wait_for(self, moment: Moment, jobs: list[Job]) -> bool:
        began = time.monotonic()
        if moment.kind == "step":
            wanted = self.kept() + 1 + int(moment.share * (self.unbroken.steps - self.kept()))
            if not jobs[0].until(lambda: self.steps() >= wanted):
                return False
            time.sleep(moment.delay)
            return True
        ends = began + moment.share * self._left() * self.unbroken.seconds
        return jobs[0].until(lambda: time.monotonic() >= ends and len(self._ready()) == len(jobs))

    def _count(
        self, moment: Moment, by: signal.Signals | None, ends: list[int | None], jobs: list[Job]
    ) -> None:
        deaths = (-signal.SIGKILL, -(by or signal.SIGHUP), INTERRUPTED)
        killed = [end for end in ends if end in deaths]
        if not killed:
            self.counts.too_late += 1
            if {*ends} != {self.status}:
                raise FailedError(
                    f"nobody was killed, and it ended with {ends}: {[job.said() for job in jobs]}"
                )
            return
        who = f"{moment.victim} of two" if len(jobs) == 2 else "the only one"
        self.counts.kills[who] += len(killed)
        self.counts.means["a closed terminal" if by is None else by.name] += len(killed)
        for end, job in zip(ends, jobs, strict=True):
            self._check_said(None if end in killed else end, job)

    def _check_said(self, end: int | None, job: Job) -> None:
        """Whoever is left behind says so, or had done all already; nobody is at a loss."""
        said = job.said()
        is_told = job.terminal is not None or any(words in said for words in LOST)
        if end not in (None, self.status) and not (end == 1 and is_told):
            raise FailedError(f"who was left behind ended with {end}, and said: {said}")
        if "Traceback" in said or "a bug in" in said:
            raise FailedError(f"it said: {said}")


# --- all tries -------------------------------------------------------------------------------------------


def all_tries(kind: type[Attempt], count: int, seed: int) -> Iterator[Try]:
    """Every try of a run of a script; by seed and number the same every time, but for the clock."""
    for number in range(count):
        random = Random(f"{seed}-{number}")
        processes = 2 if kind.MOST > 1 and number % 3 == 2 else 1
        kills = random.choices((1, 2, 3, 4), (2, 3, 2, 1))[0]
        yield Try(number, processes, tuple(_any_moment(kind, random, processes) for _ in range(kills)))


def _any_moment(kind: type[Attempt], random: Random, processes: int) -> Moment:
    victim = random.choice(("first", "second", "both")) if processes == 2 else "first"
    when = random.choice(kind.KINDS), random.random(), random.uniform(0, 0.1)
    return Moment(*when, victim, random.choice(kind.SIGNALS))


def unbroken(kind: type[Attempt], place: Path, tried: Try) -> Unbroken:
    """What comes out if nobody disturbs, twice the same."""
    found = []
    for name in ("reference", "again"):
        folder = f"{name} {kind.variant(tried)}"
        with fleet(place, folder) as launch:
            attempt = kind(place, folder, replace(tried, moments=()), Counts(), launch)
            found.append(attempt.undisturbed())
    check_same(found[1].files, found[0].files, "a second unbroken run")
    say(
        f"{kind.variant(tried)}: {found[1].steps} steps, {found[1].operations} file operations, "
        f"{found[1].seconds:.2f} s unbroken"
    )
    return found[1]


def run_tries(kind: type[Attempt], place: Path, tries: list[Try], seed: int) -> Counts:
    """Carry out all tries, and tell of each that fails."""
    counts, references = Counts(), dict[str, Unbroken]()
    for tried in tries:
        variant, name = kind.variant(tried), f"try-{tried.number}"
        if variant not in references:
            references[variant] = unbroken(kind, place, tried)
        try:
            with fleet(place, name) as launch:
                kind(place, name, tried, counts, launch).carry_out(references[variant])
        except (FailedError, AssertionError) as problem:  # of a process that does not end
            counts.failures += 1
            again = f"repeat with --seed {seed} --only {tried.number}; see {place}"
            say(f"FAILED: {tried}: {problem}; {again}")
        counts.tries += 1
        if counts.tries % 10 == 0:
            say(f"{counts.tries} of {len(tries)}: {counts}")
    return counts


def main(kind: type[Attempt], summary: str) -> int:
    """What a script does; its exit status."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--tries", type=int, default=50, help="runs, each killed once or several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one try to carry out")
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", LANGUAGE="en")
    place = Path(tempfile.mkdtemp(prefix="mdl-stress-"))
    kind.make_inputs(place)
    tries = list(all_tries(kind, (given.only or 0) + given.tries, given.seed))
    chosen = [tried for tried in tries if given.only in (None, tried.number)]
    counts = run_tries(kind, place, chosen, given.seed)
    say(str(counts))
    if not counts.failures:
        shutil.rmtree(place)
    return int(counts.failures > 0)
