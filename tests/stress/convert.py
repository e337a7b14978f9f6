"""Kill a conversion at hundreds of moments, let the same command go on, and compare every byte.

`python -m tests.stress.convert --moments 200 [--seed N] [--only N]` in the repository's root, or `make
stress`. The command is the real one, with 2 workers and small shards. `--moments` says at how many moments it
is killed: half are spread evenly over the seconds of an unbroken run, half over the shards that are written
down. It is killed by SIGKILL of one process or all, by SIGHUP, or by closing its terminal. Others come on
top: at the very end, and before an exact file operation. Some resumed runs are killed again; in some tries a
dataset is there already. After each kill the output must be whole or, between the two renames, whole where it
is put back from.
"""

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.stress.files import Files, check_same, listing, write_listing
from tests.stress.inputs import make_csv, write_csv
from tests.stress.processes import GENTLE, FailedError, Run, say
from tests.support.paths import MODEL

PHRASES = 175  # recordings; some odd ones come on top
OUT, WORK = "out", ".out.partial"
VICTIMS = ("parent", "group", "worker", "hangup", "terminal")
LAST_STEPS = 60  # file operations before the end, each of which is tried
END = 0.02  # seconds after the metadata are written, within which a run ends


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
        kind: `clock`, `shard`, `end` or `step`.
        number: shards that are written down, or the file operation.
        delay: seconds after the shard or the metadata; of the clock, a part of an unbroken run's seconds.
    """

    kind: str
    number: int = 0
    delay: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.number} + {self.delay:.4f}"


@dataclass(frozen=True)
class Try:
    """One conversion that is killed, perhaps several times, before it may end."""

    number: int
    seed: int
    kills: tuple[tuple[Moment, str], ...]
    has_previous: bool


@dataclass
class Setting:
    """What all tries have in common: inputs, what must come out, and how long it takes."""

    place: Path
    command: list[str]
    reference: Files = field(default_factory=dict)
    previous: Files = field(default_factory=dict)
    seconds: float = 0.0
    shards: int = 0
    steps: int = 0


@dataclass
class Counts:
    """What happened in all tries."""

    tries: int = 0
    failures: int = 0
    kept: list[int] = field(default_factory=list)
    victims: dict[str, int] = field(default_factory=dict)
    away: int = 0
    slowest_farewell: float = 0.0

    def __str__(self) -> str:
        kept = statistics.fmean(self.kept or [0])
        none = sum(not count for count in self.kept)
        return (
            f"{self.tries} tries, {sum(self.victims.values())} kills {self.victims}; "
            f"{len(self.kept)} resumed with {kept:.1f} shards kept on average ({none} with none); "
            f"{self.away} killed between the two renames; "
            f"all processes gone after at most {self.slowest_farewell:.2f} s; {self.failures} failures"
        )


# --- what is tried ---------------------------------------------------------------------------------------


def all_tries(setting: Setting, moments: int, seed: int) -> Iterator[Try]:
    """Every try of a run of this script; by seed and number the same every time, but for the clock."""
    firsts = list(_first_moments(setting, moments, Random(f"{seed}")))
    for number, first in enumerate(firsts):
        random = Random(f"{seed}-{number}")
        more = random.choices((0, 1, 2), (6, 3, 1))[0]
        chain = [first, *(_any_moment(setting, random) for _ in range(more))]
        kills = tuple((moment, random.choice(VICTIMS)) for moment in chain)
        is_last = first.kind == "step" and first.number > setting.steps - LAST_STEPS
        yield Try(number, seed, kills, is_last or random.random() < 0.35)


def _first_moments(setting: Setting, moments: int, random: Random) -> Iterator[Moment]:
    half, some = moments // 2, moments // 10
    for i in range(half):
        yield Moment("clock", delay=(i + 0.5) / half)
        yield Moment("shard", 1 + i * setting.shards // half, random.uniform(0, 0.04))
    for i in range(some):
        yield Moment("end", delay=i / some * END)
        yield Moment("step", 1 + i * (setting.steps - LAST_STEPS) // some)
    for number in range(setting.steps - LAST_STEPS, setting.steps):
        yield Moment("step", number + 1)


def _any_moment(setting: Setting, random: Random) -> Moment:
    if random.random() < 0.3:
        return Moment("step", random.randint(1, setting.steps))
    if random.random() < 0.3:
        return Moment("end", delay=random.uniform(0, END))
    return Moment("clock", delay=random.uniform(0.2, 1.0))


# --- one try ---------------------------------------------------------------------------------------------


class Attempt:
    """Carry a try out in a folder of its own."""

    def __init__(self, setting: Setting, tried: Try, counts: Counts) -> None:
        self.setting, self.tried, self.counts = setting, tried, counts
        self.random = Random(f"{tried.seed}-{tried.number}-victims")
        self.folder = setting.place / f"try-{tried.number}"
        self.logs = setting.place / f"logs-{tried.number}"
        self.out, self.work = self.folder / OUT, self.folder / WORK
        self.runs: list[Run] = []

    def carry_out(self) -> None:
        """Kill as planned, let it end, and look at everything.

        Raises:
            FailedError: something is not as it must be.
        """
        for folder in (self.folder, self.logs):
            folder.mkdir()
        if self.tried.has_previous:
            write_listing(self.out, self.setting.previous)
        for moment, victim in self.tried.kills:
            self._kill(moment, victim)
            self._check_broken()
        self._finish()
        shutil.rmtree(self.folder)
        shutil.rmtree(self.logs)

    def _start(self, *words: str, in_terminal: bool = False) -> Run:
        log = self.logs / f"{len(self.runs)}.log"
        self.runs.append(Run([*words, *self.setting.command], self.folder, log, in_terminal=in_terminal))
        return self.runs[-1]

    def _kill(self, moment: Moment, victim: str) -> None:
        kept = self._kept()
        if moment.kind == "step":
            who = "one" if victim == "parent" else "group"
            run, done = self._start("--die-before", str(moment.number), who), who
        else:
            run = self._start(in_terminal=victim == "terminal")
            done = run.kill(victim, self.random) if self._wait_for(run, moment) else "nobody"
        status = run.wait()
        if self.random.random() < 0.5:  # in the other half the next run begins beside what is left
            self._see_off(run)
        self.counts.victims[done] = self.counts.victims.get(done, 0) + 1
        ends = {"worker": 1, "nobody": 1, **dict.fromkeys(GENTLE, -signal.SIGHUP)}
        if status not in (0, ends.get(done, -signal.SIGKILL)):
            raise FailedError(f"exit status {status} after {done} was killed")
        self._check_said(run, status, kept)

    def _see_off(self, run: Run) -> None:
        seconds = run.seconds_until_gone()
        self.counts.slowest_farewell = max(self.counts.slowest_farewell, seconds)

    def _wait_for(self, run: Run, moment: Moment) -> bool:
        if moment.kind == "shard":
            is_there = run.until(lambda: len(self._entries()) >= moment.number)
        else:
            is_there = moment.kind == "clock" or run.until((self.work / "dataset/state.json").exists)
        if moment.kind == "clock":
            ends = run.began + moment.delay * self.setting.seconds
        else:
            ends = time.monotonic() + moment.delay
        return is_there and run.until(lambda: time.monotonic() >= ends)

    def _entries(self) -> list[Path]:
        return [path for path in (self.work / "shards").glob("*.json") if path.stem.isdecimal()]

    def _kept(self) -> list[int]:
        """Rows of every shard that the journal has, and of which the file is there."""
        kept = []
        for path in self._entries():
            file = self.work / "dataset" / f"data-{int(path.stem):05d}-of-{self.setting.shards:05d}.arrow"
            if file.exists():
                kept.append(json.loads(path.read_text(encoding="utf-8"))["tally"]["rows"])
        return kept

    def _check_said(self, run: Run, status: int, kept: list[int]) -> None:
        """A run that got so far said what it took over: all that was finished."""
        said = run.said()
        is_ours = status != -9 or "mdl_toolkit" in said  # not what Python's `spawn` says of a lost parent
        if ("Traceback" in said and is_ours) or (status == 1 and "a worker process was ended" not in said):
            raise FailedError(f"it said: {said}")
        if status == 0:
            if len(self.runs) > 1:
                self.counts.kept.append(len(kept))
            if kept and f"going on from an earlier run: {sum(kept)} of" not in said:
                raise FailedError(f"{sum(kept)} rows were finished before, and it said: {said}")

    def _check_broken(self) -> None:
        """After a kill: what was there is there, or all that is new, or it can be put back."""
        others = {path.name for path in self.folder.iterdir()} - {OUT, WORK}
        if others:
            raise FailedError(f"beside the output: {others}")
        if self.out.exists():
            self._check_output(also_previous=self.tried.has_previous)
        elif self.tried.has_previous:
            self.counts.away += 1
            check_same(listing(self.work / "previous"), self.setting.previous, "what was moved away")
            self._check_restored()

    def _check_restored(self) -> None:
        """The next run puts back what was moved away, long before it has anything new."""
        run = self._start()
        run.until(self.out.exists)
        run.kill("group", self.random)
        run.wait()
        check_same(listing(self.out), self.setting.previous, "what was put back")

    def _check_output(self, also_previous: bool) -> None:
        found = listing(self.out)
        if not (also_previous and found == self.setting.previous):
            check_same(found, self.setting.reference, "the output")

    def _finish(self) -> None:
        kept = self._kept()
        run = self._start()
        if status := run.wait():
            raise FailedError(f"exit status {status} of the last run, which said: {run.said()}")
        self._check_said(run, 0, kept)
        for each in self.runs:
            self._see_off(each)
        check_same(listing(self.folder / OUT), self.setting.reference, "the output")
        if left := sorted({path.name for path in self.folder.iterdir()} - {OUT}):
            raise FailedError(f"left beside the output: {left}")


# --- all of it -------------------------------------------------------------------------------------------


def prepare(place: Path) -> Setting:
    """Make inputs, convert them unbroken, and see how long that takes."""
    rows = make_csv(place, PHRASES)
    other = write_csv(place / "other.csv", sorted((place / "audio").iterdir())[:20], "An earlier dataset?")
    setting = Setting(place, _command(rows))
    setting.previous = _unbroken(place, "previous", [], _command(other))[0]
    setting.reference, _ = _unbroken(place, "reference", ["--count", str(place / "steps")], setting.command)
    take_time(setting)
    setting.shards = sum(name.endswith(".arrow") for name in setting.reference)
    setting.steps = int((place / "steps").read_text())
    return setting


def take_time(setting: Setting) -> None:
    """Note how long an unbroken run takes now, beside whatever else the machine does."""
    files, setting.seconds = _unbroken(setting.place, "timed", [], setting.command)
    check_same(files, setting.reference, "an unbroken run")
    shutil.rmtree(setting.place / "timed")


def _command(rows: Path) -> list[str]:
    return [
        "convert-dataset", str(rows), "--output", OUT, "--model-name", str(MODEL), "--num-workers", "2",
    ]  # fmt: skip


def _unbroken(place: Path, name: str, words: list[str], command: list[str]) -> tuple[Files, float]:
    """What comes out, and seconds."""
    (place / name).mkdir()
    run = Run([*words, *command], place / name, place / f"{name}.log")
    if run.wait():
        raise FailedError(f"the unbroken run failed: {run.said()}")
    seconds = time.monotonic() - run.began
    return listing(place / name / OUT), seconds


def run_tries(setting: Setting, tries: list[Try], moments: int) -> Counts:
    """Carry out all tries, and tell of each that fails."""
    counts = Counts()
    for tried in tries:
        if counts.tries % 10 == 9:
            take_time(setting)
        try:
            Attempt(setting, tried, counts).carry_out()
        except FailedError as problem:
            counts.failures += 1
            _tell(setting, tried, problem, moments)
        counts.tries += 1
        if counts.tries % 20 == 0:
            say(f"{counts.tries} of {len(tries)}: {counts}")
    return counts


def _tell(setting: Setting, tried: Try, problem: FailedError, moments: int) -> None:
    kills = ", then ".join(f"{victim} at {moment}" for moment, victim in tried.kills)
    what = f"try {tried.number}{' with a previous dataset' if tried.has_previous else ''}: killed {kills}"
    words = f"--moments {moments} --seed {tried.seed} --only {tried.number}"
    say(f"FAILED: {what}: {problem}; repeat: python -m tests.stress.convert {words}; see {setting.place}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--moments", type=int, default=200, help="spread evenly over a run; others come on top"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one try to carry out")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="mdl-stress-"))
    setting = prepare(place)
    tries = list(all_tries(setting, given.moments, given.seed))
    if given.only is not None:
        tries = [tries[given.only]]
    say(
        f"{setting.shards} shards, {setting.steps} file operations, {setting.seconds:.2f} s unbroken; "
        f"{len(tries)} tries, seed {given.seed}"
    )
    counts = run_tries(setting, tries, given.moments)
    say(str(counts))
    if not counts.failures:
        shutil.rmtree(place)
    return int(counts.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
