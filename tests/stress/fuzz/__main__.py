"""Give the commands thousands of spoilt inputs and count how many were taken cleanly.

`python -m tests.stress.fuzz [--scale 0.1] [--seed 1] [--only tables recordings ...] [--keep FOLDER]` in the
repository's root, or `make fuzz`. Clean means: exit status 0, 1 or 2 within a minute (or `--seconds`) and a
gigabyte, no traceback, no bug of ours, no control characters, a sentence if it failed, and no less heard than
there is without a word.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tests.stress.fuzz import cases, datasets, memory, models, recordings, servers, tables
from tests.stress.fuzz.cases import Case, judge

Maker = Callable[[Path, Path, np.random.Generator], Case]
# How many cases of each kind a run of scale 1 has, and how many run side by side for each processor.
KINDS: dict[str, tuple[Maker, int, int]] = {
    "tables": (tables.make, 3000, 1),
    "recordings": (recordings.make, 1500, 1),
    "models": (models.make, 800, 1),
    "datasets": (datasets.make, 400, 1),
    "servers": (servers.make, 200, 8),
    "memory": (memory.make, 100, 1),
}

# Unclean cases of a kind that are printed.
SHOWN = 20


def main() -> int:
    """Run the cases, print a table and the faults, and return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the usual numbers of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--keep", type=Path, help="keep the folders of unclean cases here")
    parser.add_argument("--seconds", type=int, default=cases.SECONDS, help="that a case may take")
    given = parser.parse_args()
    cases.SECONDS = given.seconds
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false"
    )
    faults = 0
    head = ("kind", "cases", "clean", "status 0 / 1 / 2", "slowest s", "most MB", "minutes")
    _say(f"seed {given.seed}\n", _table_row(head), _table_row(["---"] * len(head)))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        shared = Path(place) / "shared"
        shared.mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for kinds in (tables, models, datasets, memory):
                kinds.make_shared(shared)
        for kind in given.only:
            faults += fuzz(kind, shared, given)
    return min(faults, 1)


def fuzz(kind: str, shared: Path, given: argparse.Namespace) -> int:
    """Run the cases of a kind in several lanes, print their row, and return how many were unclean."""
    started = time.monotonic()
    _, count, abreast = KINDS[kind]
    numbers = [given.case] if given.case is not None else range(max(1, round(count * given.scale)))
    lanes = min(len(numbers), abreast * len(os.sched_getaffinity(0)))
    results = [shared.parent / f"{kind}-{lane}.jsonl" for lane in range(lanes)]
    pids = []
    for lane, result in enumerate(results):
        if (pid := os.fork()) == 0:
            _run_lane(kind, numbers[lane::lanes], shared, result, given)
        pids.append(pid)
    broken = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    verdicts = [json.loads(line) for result in results for line in result.read_text().splitlines()]
    unclean = [verdict for verdict in verdicts if verdict["faults"]]
    ends = Counter(verdict["status"] for verdict in verdicts)
    row = (
        kind,
        len(verdicts),
        len(verdicts) - len(unclean),
        f"{ends[0]} / {ends[1]} / {ends[2]}",
        f"{max(verdict['seconds'] for verdict in verdicts):.1f}",
        f"{max(verdict['megabytes'] for verdict in verdicts):.0f}",
        f"{(time.monotonic() - started) / 60:.1f}",
    )
    _say(_table_row(row))
    for verdict in unclean[:SHOWN]:
        _say(
            f"\n{kind} --case {verdict['number']}: {'; '.join(verdict['faults'])}",
            f"  {verdict['spoilt']}",
            f"  {' '.join(verdict['words'])}",
            f"  {verdict['said'][-800:]!r}",
        )
    if broken:
        _say(f"{kind}: {broken} lanes ended early")
    return len(unclean) + broken


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _table_row(cells: Iterable[object]) -> str:
    return "".join(f"| {cell} " for cell in cells) + "|"


def _run_lane(kind: str, numbers, shared: Path, result: Path, given: argparse.Namespace) -> None:
    """Run some of the cases in this process, which ends with them."""
    status = 1
    try:
        make = KINDS[kind][0]
        source = servers.BadServer() if kind == "servers" else shared
        with result.open("w", encoding="utf-8") as file:
            for number in numbers:
                folder = shared.parent / f"{kind}-{number}"
                folder.mkdir()
                random = np.random.default_rng([given.seed, number, sorted(KINDS).index(kind)])
                verdict = judge(make(folder, source, random))
                file.write(json.dumps({"number": number, **asdict(verdict)}) + "\n")
                file.flush()
                if verdict.faults and given.keep:
                    shutil.move(folder, given.keep / folder.name)
                shutil.rmtree(folder, ignore_errors=True)
        status = 0
    except Exception:  # noqa: BLE001 - this process must not return
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
