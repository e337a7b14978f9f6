"""Kill a training at random moments, let the same command go on, and compare every byte of the end.

`python -m tests.torture.train --tries 50 [--seed N] [--only N]` in the repository's root, or `make torture`.
Each try kills the command several times: at a moment of the clock, a little after a step, or right before an
exact file operation. In every third try two processes train together, and one of them, or both, are killed.
After each kill every checkpoint must be whole; at the end weights, optimizer, log and result must be those of
the unbroken run, bit for bit, and nothing else may be left.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.fleet import Job, Start, fleet, start_ranks
from tests.torture.convert import Files, check_same, listing, say
from tests.torture.inputs import MODEL, make_csv
from tests.torture.processes import FailedError

from mdl_toolkit import distributed
from mdl_toolkit.checkpoints import checkpoints, damage
from mdl_toolkit.runlog import read_log

PHRASES, ANSWERED = 9, 4  # recordings to learn (some odd ones come on top) and to be evaluated on
OUT = "out"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
TIMES = {"elapsed", "waited"}  # in the log: never the same
LOST = ("another process of this training has ended", "not all processes of this training met")
KINDS = ("clock", "step", "operation")


@dataclass(frozen=True)
class Moment:
    """When to kill whom.

    Attributes:
        kind: `clock`, `step` or `operation`.
        share: of the run that lies before it, from 0 to 1.
        delay: seconds after a step.
        victim: `first`, `second` or `both`; of one process `first`.
    """

    kind: str
    share: float
    delay: float
    victim: str


@dataclass(frozen=True)
class Try:
    """One training that is killed several times before it may end."""

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
    """What happened in all tries."""

    tries: int = 0
    failures: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    too_late: int = 0
    resumed: list[int] = field(default_factory=list)
    saving: int = 0

    def __str__(self) -> str:
        fresh = sum(not step for step in self.resumed)
        return (
            f"{self.tries} tries, {self.kills.total()} kills {dict(self.kills)}, {self.saving} of them while "
            f"saving; {len(self.resumed)} runs begun again, {fresh} of them from nothing; "
            f"{self.too_late} kills came too late; {self.failures} failures"
        )


def all_tries(count: int, seed: int) -> Iterator[Try]:
    """Every try of a run of this script; by seed and number the same every time, but for the clock."""
    for number in range(count):
        random = Random(f"{seed}-{number}")
        processes = 2 if number % 3 == 2 else 1
        kills = random.choices((1, 2, 3, 4), (2, 3, 2, 1))[0]
        yield Try(number, processes, tuple(_any_moment(random, processes) for _ in range(kills)))


def _any_moment(random: Random, processes: int) -> Moment:
    victim = random.choice(("first", "second", "both")) if processes == 2 else "first"
    return Moment(random.choice(KINDS), random.random(), random.uniform(0, 0.1), victim)


# --- in the process --------------------------------------------------------------------------------------


def is_operation(event: str, words: tuple[Any, ...]) -> bool:
    """Tell whether an audit event changes files of the run, or opens one of them to write or to flush it."""
    if event in CHANGES:
        return True
    return event == "open" and OUT in str(words[0]) and words[1] not in ("r", "rb")


def begin(folder: str, act: Callable[[int], object]) -> None:
    """Go to the folder of the try, and act before each file operation, which are numbered from 1."""
    os.chdir(folder)
    distributed.MEETING = timedelta(seconds=20)  # the other one may have been killed before it came
    numbers = itertools.count(1)
    sys.addaudithook(lambda event, words: act(next(numbers)) if is_operation(event, words) else None)


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
    """Carry a try out in a folder of its own."""

    def __init__(self, place: Path, tried: Try, unbroken: Unbroken, counts: Counts, start: Start) -> None:
        self.tried, self.unbroken, self.counts, self.launch = tried, unbroken, counts, start
        self.place, self.folder = place, place / f"try-{tried.number}"
        self.out = self.folder / OUT

    def carry_out(self) -> None:
        """Kill as planned, let it end, and look at everything.

        Raises:
            FailedError: something is not as it must be.
        """
        self.folder.mkdir()
        for moment in self.tried.moments:
            self._kill(moment)
            self._check_broken()
        resumed = f"checkpoint-{self._newest()}/"
        for job in self._start():
            if job.end() != 0:
                raise FailedError(f"the last run ended with {job.end()}, and said: {job.said()}")
        found, expected = result_of(self.out), self.unbroken.files
        more = {name for name in found.keys() - expected.keys() if _is_due(name, resumed)}
        check_same({n: b for n, b in found.items() if n not in more}, expected, "what the run left")
        shutil.rmtree(self.folder)

    def _start(self, act: Callable[[int], object] | None = None) -> list[Job]:
        """The command; in its first process something is done before each file operation."""
        if self.out.exists():
            self.counts.resumed.append(self._newest())
        return start(self.launch, self.place, self.folder, self.tried.processes, act)

    def _newest(self) -> int:
        steps = [int(path.name.rpartition("-")[2]) for path in checkpoints(self.out)]
        return max(steps, default=0)

    def _kill(self, moment: Moment) -> None:
        victims = {"first": (0,), "second": (1,), "both": (0, 1)}[moment.victim]
        operation = 1 + int(moment.share * self._left() * self.unbroken.operations)
        by_itself = moment.kind == "operation" and moment.victim == "first"
        jobs = self._start(partial(die_at, operation) if by_itself else None)
        if not by_itself and self._wait_for(moment, jobs):
            for victim in victims:
                jobs[victim].kill()
        ends = [job.end() for job in jobs]
        self._count(moment, ends, jobs)

    def _left(self) -> float:
        """About the share of a whole run that the next one makes: it is shorter the later it begins."""
        return 0.3 + 0.7 * (1 - self._newest() / self.unbroken.steps)

    def _wait_for(self, moment: Moment, jobs: list[Job]) -> bool:
        began = time.monotonic()
        if moment.kind == "step":
            wanted = self._newest() + 1 + int(moment.share * (self.unbroken.steps - self._newest()))
            if not jobs[0].until(lambda: self._steps() >= wanted):
                return False
            time.sleep(moment.delay)
            return True
        ends = began + moment.share * self._left() * self.unbroken.seconds
        return jobs[0].until(lambda: time.monotonic() >= ends)

    def _steps(self) -> int:
        log = self.out / "log.jsonl"
        return max((line["step"] for line in read_log(log)), default=0) if log.exists() else 0

    def _count(self, moment: Moment, ends: list[int | None], jobs: list[Job]) -> None:
        if -signal.SIGKILL not in ends:
            self.counts.too_late += 1
            if set(ends) != {0}:
                raise FailedError(
                    f"nobody was killed, and it ended with {ends}: {[job.said() for job in jobs]}"
                )
            return
        who = f"{moment.victim} of two" if len(jobs) == 2 else "the only one"
        self.counts.kills[who] += ends.count(-signal.SIGKILL)
        self.counts.saving += (self.out / ".saving").exists()
        for end, job in zip(ends, jobs, strict=True):
            self._check_survivor(end, job)

    def _check_survivor(self, end: int | None, job: Job) -> None:
        """Whoever is left behind says so, or had done all already."""
        said = job.said()
        if end not in (0, -signal.SIGKILL) and not (end == 1 and any(words in said for words in LOST)):
            raise FailedError(f"who was left behind ended with {end}, and said: {said}")
        if "Traceback" in said or "a bug in" in said:
            raise FailedError(f"it said: {said}")

    def _check_broken(self) -> None:
        for path in checkpoints(self.out):
            if reason := damage(path):
                raise FailedError(f"{path.name}: {reason}")
        final = {name: content for name, content in result_of(self.out).items() if name.startswith("final/")}
        if final:
            whole = {
                name: content for name, content in self.unbroken.files.items() if name.startswith("final/")
            }
            check_same(final, whole, "the result")


def _is_due(name: str, resumed: str) -> bool:
    """What only a broken run leaves: the checkpoint it has gone on from, and logs of lives without any."""
    folder, _, file = name.partition("/")
    is_life = folder.startswith("previous-") and file in ("log.jsonl", "mdl-toolkit.yaml")
    return is_life or name.startswith(resumed)


# --- runs and what they leave ----------------------------------------------------------------------------


def start(
    launch: Start,
    place: Path,
    folder: Path,
    processes: int,
    act: Callable[[int], object] | None = None,
) -> list[Job]:
    """The command in a folder, always the same, as one process or two; the first one may act."""
    split = ("2", "2") if processes == 1 else ("1", "2")
    words = [
        "train", "--train-dataset", str(place / "rows.csv"), "--eval-dataset", str(place / "asked.csv"),
        "--model-name", str(MODEL), "--output", OUT, "--resume-from-checkpoint", "true", "--num-epochs", "3",
        "--batch-size", split[0], "--gradient-accumulation-steps", split[1], "--lora-dropout", "0.1",
        "--lora-rank", "4", "--lr", "1e-3", "--warmup-steps", "2", "--save-steps", "2", "--eval-steps", "3",
        "--save-total-limit", "2", "--gradient-checkpointing", "false", "--num-workers", "1",
        "--train-target", "encoder", "--train-target", "projector", "--train-target", "decoder",
        "--train-target", "lm_head",
    ]  # fmt: skip
    acts = [act or _nothing, *[_nothing] * (processes - 1)]
    befores = [partial(begin, str(folder), each) for each in acts]
    return start_ranks(launch, words, processes, befores) if processes > 1 else [launch(words, befores[0])]


def _nothing(_: int) -> None:
    pass


def result_of(out: Path) -> Files:
    """All that a run has left, whichever way it went: the log without times."""
    files = {name: content for name, content in listing(out).items() if not name.endswith("/")}
    if "log.jsonl" in files:
        lines = [{n: v for n, v in line.items() if n not in TIMES} for line in read_log(out / "log.jsonl")]
        files["log.jsonl"] = json.dumps(lines).encode()
    return files


def unbroken(place: Path, processes: int) -> Unbroken:
    """What comes out if nobody disturbs, twice the same."""
    found = []
    for name in ("reference", "again"):
        folder, count = place / f"{name}-{processes}", place / f"operations-{processes}"
        folder.mkdir()
        began = time.monotonic()
        with fleet(folder) as launch:
            jobs = start(launch, place, folder, processes, partial(write_down, str(count)))
            if any(job.end() for job in jobs):
                raise FailedError(f"the unbroken run failed: {jobs[0].said()}")
        seconds, files = time.monotonic() - began, result_of(folder / OUT)
        steps = max(line["step"] for line in read_log(folder / OUT / "log.jsonl"))
        found.append(Unbroken(files, seconds, steps, int(count.read_text())))
    check_same(found[1].files, found[0].files, "a second unbroken run")
    return found[1]


def torture(place: Path, tries: list[Try], seed: int) -> Counts:
    """Carry out all tries, and tell of each that fails."""
    counts = Counts()
    references = {number: unbroken(place, number) for number in sorted({tried.processes for tried in tries})}
    for number, reference in references.items():
        say(
            f"{number} process(es): {reference.steps} steps, {reference.operations} file operations, "
            f"{reference.seconds:.2f} s unbroken"
        )
    for tried in tries:
        try:
            with fleet(place) as launch:
                Attempt(place, tried, references[tried.processes], counts, launch).carry_out()
        except FailedError as problem:
            counts.failures += 1
            again = f"repeat with --seed {seed} --only {tried.number}; see {place}"
            say(f"FAILED: {tried}: {problem}; {again}")
        counts.tries += 1
        if counts.tries % 10 == 0:
            say(f"{counts.tries} of {len(tries)}: {counts}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=50, help="trainings, each killed once or several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one try to carry out")
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", LANGUAGE="en")
    place = Path(tempfile.mkdtemp(prefix="mdl-torture-"))
    make_csv(place, PHRASES)
    (place / "asked").mkdir()
    make_csv(place / "asked", ANSWERED).rename(place / "asked.csv")
    tries = [tried for tried in all_tries(given.tries, given.seed) if given.only in (None, tried.number)]
    counts = torture(place, tries, given.seed)
    say(str(counts))
    if not counts.failures:
        shutil.rmtree(place)
    return int(counts.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
