"""The work folder of a conversion: what is finished, what is stale, and who is at work.

It lies beside the output, `.NAME.partial`, and is gone when the dataset is complete:

    lock            record locks: who works for which rank, and who is at which shard
    plan.json       the plan's fingerprint, and a name of the run
    shards/N.json   one for each finished shard: its fingerprint and its counts
    dataset/        the finished shards; in the end it takes the output's place
    writing/        files that are being written
    previous/       what was at the output's place, for the moment of putting in place
    downloads/      recordings that were fetched

A shard counts as finished when its line in the journal is on the disk, and that is written after the shard
itself is. Whatever a killed run leaves is therefore either finished or not looked at.
"""

import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mdl_toolkit.data.convert.plan import Plan, Shard
from mdl_toolkit.data.convert.stats import ConversionStats
from mdl_toolkit.data.dataset_writer import shard_name
from mdl_toolkit.errors import DatasetError, InputError
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import fsync, parse_json, put_in_place, report_write_errors, write_text
from mdl_toolkit.utils.locks import TRIES, ByteLocks
from mdl_toolkit.utils.ownership import discard, seal

# Byte r of the lock file stands for rank r, byte _RANKS + n for shard n; _BEGUN: the plan is made known.
_RANKS = 1 << 20
_BEGUN = _RANKS - 1
# Of output, for the record of its files.
KIND = "convert-dataset"


class WorkFolder:
    """Keep the work folder of one output for one process of a run; a context that locks it.

    Raises:
        InputError: another conversion is at work on the same output, or the folder cannot be made.
    """

    def __init__(self, output: Path, rank: int = 0) -> None:
        self.output, self.rank = output, rank
        target = output.resolve()
        self.path = target.with_name(f".{target.name}.partial")
        self.dataset, self.downloads = self.path / "dataset", self.path / "downloads"
        self._entries, self._writing, self._plan = (
            self.path / name for name in ("shards", "writing", "plan.json")
        )
        self._previous = self.path / "previous"
        # The name of this run, which is the same in all ranks.
        self.run = secrets.token_hex(8)
        self._count, self._began = 0, 0.0

    def __enter__(self) -> "WorkFolder":
        with report_write_errors(f"--output {self.output}", InputError):
            # A run that just ended may remove the folder in between.
            while not self._lock():
                pass
            if self.rank == 0:
                self._plan.unlink(missing_ok=True)
                # Put back what a run moved away that was killed at the very moment of putting in place.
                if self._previous.exists() and not self.output.exists():
                    self._previous.rename(self.output.resolve())
                self._discard_previous()
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: BaseException | TracebackType | None) -> None:
        self._locks.close()

    # --- the plan ---

    def begin(self, plan: Plan, *, keeps_going: bool = False) -> int:
        """Announce a plan, remove what another one left, saying so, and return how many rows are finished.

        Args:
            plan: the shards.
            keeps_going: a shard is finished also if some of its rows cannot be used.
        """
        self._count = len(plan.shards)
        with report_write_errors(f"--output {self.output}", InputError):
            shutil.rmtree(self._writing, ignore_errors=True)
            for folder in (self.dataset, self._entries, self._writing):
                folder.mkdir(exist_ok=True)
            kept = {shard.number: shard for shard in plan.shards if self._is_good(shard, keeps_going)}
            names = {shard_name(number, self._count) for number in kept}
            entries = {f"{number}.json" for number in kept}
            if stale := sum(path.name not in entries for path in self._entries.glob("*.json")):
                say(
                    "{path}: {shards} shards of an earlier run are damaged, or of other rows, recordings, "
                    "options or versions; they are removed, and converted anew where they are needed",
                    path=self.path,
                    shards=stale,
                )
            _keep_only(self._entries, entries)
            _keep_only(self.dataset, names)
            write_text(self._plan, json.dumps({"fingerprint": plan.fingerprint, "run": self.run}))
        self._locks.try_acquire(_BEGUN, TRIES)
        return sum(shard.rows for shard in kept.values())

    def join(self, plan: Plan) -> bool:
        """Tell whether the first rank has begun, on the same plan.

        Raises:
            DatasetError: on another one.
        """
        self._count = len(plan.shards)
        # Without the lock, a plan that lies there is an earlier run's.
        if not self.is_held(_BEGUN):
            return False
        try:
            values = parse_json(self._plan.read_text(encoding="utf-8"))
            theirs, self.run = values["fingerprint"], values["run"]
        except (OSError, ValueError, KeyError):
            return False
        if theirs != plan.fingerprint:
            raise DatasetError(
                "rank {rank} finds another CSV, other recordings, options or versions than rank 0; give "
                "all ranks the same",
                rank=self.rank,
            )
        return True

    def was_completed(self) -> bool:
        """Tell whether the output was put in place after this process began."""
        try:
            return (self.output / "state.json").stat().st_mtime >= self._began
        except OSError:
            return False

    # --- shards ---

    def is_free(self, shard: Shard) -> bool:
        """Tell whether nobody is at a shard."""
        return self._locks.is_free(_RANKS + shard.number)

    def claim(self, shard: Shard) -> bool:
        """Take a shard for this process, if nobody else is at it or has finished it."""
        if not self._locks.try_acquire(_RANKS + shard.number):
            return False
        if self.entry(shard) is not None:
            self._locks.release(_RANKS + shard.number)
            return False
        return True

    def entry(self, shard: Shard) -> ConversionStats | None:
        """Return the counts in the journal's line of a shard; None if it is not finished."""
        try:
            values = parse_json((self._entries / f"{shard.number}.json").read_text(encoding="utf-8"))
            stats = ConversionStats.from_json(values["tally"])
            return stats if values["fingerprint"] == shard.fingerprint else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def file_to_write(self) -> Path:
        """Return a new path for a file that may become a shard."""
        return self._writing / f"{secrets.token_hex(8)}.arrow"

    def commit(self, shard: Shard, file: Path, stats: ConversionStats) -> None:
        """Write down that a shard is finished; `file` is its content."""
        with report_write_errors(str(self.dataset), DatasetError):
            file.replace(self._shard(shard))
            fsync(self.dataset)
            entry = {"fingerprint": shard.fingerprint, "tally": stats.to_json()}
            write_text(self._entries / f"{shard.number}.json", json.dumps(entry))
        self._locks.release(_RANKS + shard.number)

    def _shard(self, shard: Shard) -> Path:
        return self.dataset / shard_name(shard.number, self._count)

    def _is_good(self, shard: Shard, keeps_going: bool = True) -> bool:
        stats, file = self.entry(shard), self._shard(shard)
        if stats is None or (stats.problems.count and not keeps_going):
            return False
        return file.is_file() and file.stat().st_size == stats.bytes

    def finished(self, plan: Plan) -> int:
        """Count the rows of finished shards whose files are there."""
        self._count = len(plan.shards)
        return sum(shard.rows for shard in plan.shards if self._is_good(shard))

    # --- the end ---

    def finish(self) -> None:
        """Put the dataset in place, and remove everything else."""
        with report_write_errors(f"--output {self.output}", InputError):
            seal(self.dataset, KIND)
            put_in_place(self.dataset, self.output.resolve(), self._previous)
            self._discard_previous()
        self.remove()

    def _discard_previous(self) -> None:
        if self._previous.exists():
            discard(self._previous, self.output.resolve(), KIND)

    def remove(self) -> None:
        """Remove the folder with all that is in it; the lock last, which keeps others out meanwhile."""
        with suppress(OSError):
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def leave(self) -> None:
        """Remove the folder if nothing in it is finished and no other process works for the first rank."""
        if self._locks.try_acquire(0, TRIES) and not any(self._entries.glob("*.json")):
            self.remove()

    # --- locks ---

    def is_held(self, rank: int) -> bool:
        """Tell whether another process works for a rank; where there are no locks, it may be."""
        return not self._locks.is_free(rank) or not self._locks.are_there

    def _lock(self) -> bool:
        """Lock the folder for this rank; False if the folder was removed meanwhile."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "lock"
        try:
            self._locks = ByteLocks(file)
        except FileNotFoundError:
            return False
        if not self._locks.try_acquire(self.rank, TRIES):
            self._locks.close()
            raise InputError(
                "--output {output}: another conversion is writing it; wait for its end", output=self.output
            )
        with suppress(OSError):
            # By the clock of whoever keeps the files.
            os.utime(file)
            self._began = file.stat().st_mtime - _process_age()
            if self._locks.is_in_place():
                return True
        self._locks.close()
        return False


def _process_age() -> float:
    """Return the seconds since this process was started, 0 if that cannot be known."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0


def _keep_only(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
