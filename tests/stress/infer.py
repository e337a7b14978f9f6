"""Kill an inference at random moments, let the same command go on, and compare every byte of the end.

`python -m tests.stress.infer --tries 50 [--seed N] [--only N]` in the repository's root, or `make stress`.
How it is killed is told in `tries.py`; a step is an answer that is written down. Rows may be spoilt and
kept, answers may be chosen, and the output may be the input. After each kill the output must be whole or what
it was, and no answer may be lost; no run may begin a row that is answered already; at the end the output must
be that of the unbroken run, and nothing else may be left.
"""

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mdl_toolkit.data.convert import plan
from mdl_toolkit.inference import run as inference
from tests.stress.files import Files, check_same, listing
from tests.stress.inputs import make_csv
from tests.stress.processes import FailedError
from tests.stress.tries import INTERRUPTED, LOST, Attempt, Try, begin, main
from tests.support.fleet import Job
from tests.support.paths import MODEL

PHRASES, BATCH = 20, 3  # recordings (some odd ones come on top), and rows at once
ROWS = 5  # in a shard of the conversion
SPOILT = {2: "text.wav", 7: "missing.wav", 11: ""}  # recordings of some rows
WORDY = 15  # the row whose prompt leaves no room
OUTPUT, WORK = "out.csv", ".out.csv.partial"
MODES = ("plain", "kept", "chosen", "in place")
HAS_ROWS_WITHOUT = "of its rows have no prediction"
TAKEN_OVER = "going on from an earlier run"
GOES_ON = "the same command goes on from there"


class Inference(Attempt):
    """An inference that is killed."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.mode = MODES[self.tried.number % len(MODES)]
        self.status = int(self.mode in ("kept", "in place"))
        self.before: dict[int, list[str]] = {}  # what was answered before a run

    @staticmethod
    def make_inputs(place: Path) -> None:
        """Rows; the same with some that cannot be answered; choices."""
        rows = [*csv.reader(make_csv(place, PHRASES).open(encoding="utf-8", newline=""))]
        (place / "text.wav").write_text("this is text", encoding="utf-8")
        for number, name in SPOILT.items():
            rows[number + 1][0] = str(place / name) if name else ""
        rows[WORDY + 1][1] = "long " * 80
        with (place / "spoilt.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        (place / "choices.txt").write_text("rain\na dog that barks\nclick\n狗在叫\n", encoding="utf-8")

    @classmethod
    def variant(cls, tried: Try) -> str:
        """The mode, and how many processes."""
        return f"{MODES[tried.number % len(MODES)]}, {super().variant(tried)}"

    def words(self) -> list[str]:
        """The command."""
        source = {"in place": OUTPUT, "kept": str(self.place / "spoilt.csv")}
        more = ["--choices", str(self.place / "choices.txt"), "--top-k", "2"] if self.mode == "chosen" else []
        more += ["--on-error", "keep"] if self.status else []
        return [
            "inference", source.get(self.mode, str(self.place / "rows.csv")), "--output", OUTPUT,
            "--model-name", str(MODEL), "--batch-size", str(BATCH), "--num-workers", "1", *more,
        ]  # fmt: skip

    def hook(self, act: Callable[[int], object]) -> Callable[[], object]:
        """Small shards, and a note of each row that is begun."""
        self.before = {} if self._is_in_place() else self.answers()  # then they may be removed already
        self.notes.write_text("", encoding="utf-8")
        return partial(_begin, str(self.folder), act, str(self.notes))

    @property
    def notes(self) -> Path:
        return self.folder.with_suffix(".begun")

    def prepare(self) -> None:
        """Where the output is the input, it is there."""
        if self.mode == "in place":
            shutil.copyfile(self.place / "spoilt.csv", self.folder / OUTPUT)

    def answers(self) -> dict[int, list[str]]:
        """Whole lines of the journal."""
        found = {}
        for file in sorted((self.folder / WORK).glob("answers-*.jsonl")):
            with suppress(FileNotFoundError):
                for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
                    with suppress(ValueError):  # killed in the middle, and gone on in the next line
                        number, cells = json.loads(line or "[")
                        found[number] = cells
        return found

    def kept(self) -> int:
        """Rows that are answered."""
        return len(self.answers())

    def all_steps(self) -> int:
        """Rows that were begun."""
        return len(self._begun())

    def result(self) -> Files:
        """All that lies in the folder."""
        return listing(self.folder)

    def _begun(self) -> list[int]:
        return [*map(int, self.notes.read_text(encoding="utf-8").split())]

    def _is_in_place(self) -> bool:
        output = self.folder / OUTPUT
        return (
            self.unbroken is not None
            and output.exists()
            and output.read_bytes() == self.unbroken.files[OUTPUT]
        )

    def check_run(self, jobs: list[Job]) -> None:
        """No row was begun that had been answered, and none twice; no more is lost than was under way."""
        begun = self._begun()
        for job in jobs:
            is_told = any(words in job.said() for words in (HAS_ROWS_WITHOUT, *LOST))
            if job.end() == 1 and job.terminal is None and not is_told:
                raise FailedError(f"it ended with 1, and said: {job.said()}")
        if len({*begun}) < len(begun):
            raise FailedError(f"some rows were begun twice in one run: {sorted(begun)}")
        if again := self.before.keys() & begun:
            raise FailedError(f"rows {sorted(again)} were answered before, and are computed again")
        if not (self.unbroken and (self.folder / WORK).exists()) or self._is_in_place():
            return
        lost = {*begun} - self.answers().keys()
        self.counts.found["rows under way"] += len(lost)
        if len(lost) > BATCH * len(jobs):
            raise FailedError(f"rows {sorted(lost)} were begun, and are not answered")
        said = jobs[0].said()
        has_begun = len(begun) > 0 or TAKEN_OVER in said  # before that it has not looked at what is there
        is_heard = jobs[0].end() == INTERRUPTED and jobs[0].terminal is None
        if is_heard and has_begun and self.answers() and GOES_ON not in said:
            raise FailedError(f"it does not say how to go on: {said}")

    def check_broken(self) -> None:
        """The output is what it was or whole; until it is whole, no answer is lost."""
        output, found = self.folder / OUTPUT, self.answers()
        self.counts.found["the output in place"] += self._is_in_place()
        self.counts.found["rows half converted"] += (self.folder / WORK / ".dataset.partial").exists()
        if self._is_in_place():
            return
        if self.mode == "in place":
            check_same({"": output.read_bytes()}, {"": (self.place / "spoilt.csv").read_bytes()}, "the input")
        elif output.exists():
            raise FailedError(f"the output is there, and not what it must be: {output.read_bytes()!r}")
        if lost := {number for number, cells in self.before.items() if found.get(number) != cells}:
            raise FailedError(f"the answers of rows {sorted(lost)} are lost")


# --- in the process --------------------------------------------------------------------------------------


def _begin(folder: str, act: Callable[[int], object], notes: str) -> None:
    plan.CHUNK_ROWS, plan.FEWEST_BYTES = ROWS, 1
    make = inference.make_engine
    inference.make_engine = lambda *words: _noting(make(*words), notes)
    begin(folder, act)


def _noting(engine: Any, notes: str) -> Any:
    """Return an engine that notes each row that it takes in."""

    def noted(questions: Iterable[Any]) -> Iterator[Any]:
        descriptor = os.open(notes, os.O_WRONLY | os.O_APPEND)
        for question in questions:
            os.write(descriptor, f"{question.key}\n".encode())
            yield question

    return lambda questions: engine(noted(questions))


if __name__ == "__main__":
    sys.exit(main(Inference, __doc__.splitlines()[0]))
