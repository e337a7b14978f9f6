"""Kill a training at random moments, let the same command go on, and compare every byte of the end.

`python -m tests.stress.train --tries 50 [--seed N] [--only N]` in the repository's root, or `make stress`.
How it is killed is told in `tries.py`; a step is a step of the training. After each kill every checkpoint
must be whole; at the end weights, optimizer, log and result must be those of the unbroken run, bit for bit,
and nothing else may be left.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from mdl_toolkit.training.checkpoints import checkpoints, damage
from mdl_toolkit.utils.ownership import RECORD
from mdl_toolkit.utils.run_folder import read_log
from tests.stress.files import Files, check_same, listing
from tests.stress.inputs import make_csv
from tests.stress.processes import FailedError
from tests.stress.tries import OUT, Attempt, main
from tests.support.paths import MODEL

PHRASES, ANSWERED = 9, 4  # recordings to learn (some odd ones come on top) and to be evaluated on
LIMIT = 2  # checkpoints that are kept
TIMES = {"elapsed", "waited"}  # in the log: never the same
MADE = re.compile(rb'"made":"[^"]*"')  # when the report was


class Training(Attempt):
    """A training that is killed."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.resumed: list[int] = []  # steps of checkpoints from which runs have gone on

    @staticmethod
    def make_inputs(place: Path) -> None:
        """Rows to learn, and rows to be evaluated on."""
        make_csv(place, PHRASES)
        (place / "asked").mkdir()
        make_csv(place / "asked", ANSWERED).rename(place / "asked.csv")

    def words(self) -> list[str]:
        """Steps of the same rows by one process or two; rows share words only without dropout."""
        split, dropout = (("2", "2"), "0") if self.tried.processes == 1 else (("1", "2"), "0.1")
        return [
            "train", "--train-dataset", str(self.place / "rows.csv"),
            "--eval-dataset", str(self.place / "asked.csv"), "--model-name", str(MODEL), "--output", OUT,
            "--resume-from-checkpoint", "true", "--num-epochs", "3", "--batch-size", split[0],
            "--gradient-accumulation-steps", split[1], "--lora-dropout", dropout, "--lora-rank", "4",
            "--lr", "1e-3", "--warmup-steps", "2", "--save-steps", "2", "--eval-steps", "3",
            "--save-total-limit", str(LIMIT), "--gradient-checkpointing", "false", "--num-workers", "1",
            "--train-target", "encoder", "--train-target", "projector", "--train-target", "decoder",
            "--train-target", "lm_head",
        ]  # fmt: skip

    @property
    def out(self) -> Path:
        return self.folder / OUT

    def kept(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(path.name.rpartition("-")[2]) for path in checkpoints(self.out)), default=0)

    def steps(self) -> int:
        """Steps in the log."""
        log = self.out / "log.jsonl"
        return max((line["step"] for line in read_log(log)), default=0) if log.exists() else 0

    def result(self) -> Files:
        """All that a run has left, whichever way it went: log and report without times."""
        files = {name: content for name, content in listing(self.out).items() if not name.endswith("/")}
        if "log.jsonl" in files:
            log = read_log(self.out / "log.jsonl")
            lines = [{n: v for n, v in line.items() if n not in TIMES} for line in log]
            files["log.jsonl"] = json.dumps(lines).encode()
        if "report.html" in files:
            files["report.html"] = MADE.sub(b"", files["report.html"])
        if RECORD in files:
            # Names; the report has the time when it was made.
            files[RECORD] = json.dumps(sorted(json.loads(files[RECORD])["files"])).encode()
        return files

    def check_broken(self) -> None:
        """Checkpoints are whole, and so is the result if it is there."""
        self.resumed.append(self.kept())
        self.counts.found["a checkpoint half saved"] += any(self.out.glob(".checkpoint-*.partial-*"))
        for path in checkpoints(self.out):
            if reason := damage(path):
                raise FailedError(f"{path.name}: {reason}")
        if final := _final(self.result()):
            check_same(final, _final(self.unbroken.files), "the result")

    def check_end(self) -> None:
        """All is there, nothing but what is due; a stop's checkpoint may take an older one's place."""
        found, expected = self.result(), self.unbroken.files
        kept = sorted({_step(name) for name in found})[-LIMIT:]
        # That from which the last run has gone on stays beside them.
        stops = {*self.resumed[-1:], *({*kept} & {*self.resumed})} - {0}
        new = found.keys() - expected.keys()
        more = {name for name in new if _is_record(name) or _step(name) in stops}
        displaced = {name for name in expected.keys() - found.keys() if 0 < _step(name) < kept[0]}
        check_same(
            {name: found[name] for name in found.keys() - more},
            {name: expected[name] for name in expected.keys() - displaced},
            "what the run left",
        )


def _final(files: Files) -> Files:
    return {name: content for name, content in files.items() if name.startswith("final/")}


def _is_record(name: str) -> bool:
    """Tell whether a file is in the record of a life without a checkpoint; broken runs leave them."""
    folder, _, file = name.partition("/")
    return folder.startswith("previous-") and file in ("log.jsonl", "mdl-toolkit.json", "mdl-toolkit.yaml")


def _step(name: str) -> int:
    """The step of the checkpoint that a file is in; 0 if it is in none."""
    found = re.match(r"checkpoint-(\d+)/", name)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    sys.exit(main(Training, __doc__.splitlines()[0]))
