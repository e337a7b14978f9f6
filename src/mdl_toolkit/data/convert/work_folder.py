"""The work folder of a conversion: what is finished, and what is stale.

It lies beside the output, `.NAME.partial`, and is gone when the dataset is complete:

    lock            held by the process that is at work
    shards/N.json   one for each finished shard: its fingerprint and its counts
    dataset/        the finished shards; in the end it takes the output's place
    writing/        files that are being written
    previous/       what was at the output's place, for the moment of putting in place
    discarded/      the same while it is removed
    downloads/      recordings that were fetched

A shard counts as finished when its line in the journal is on the disk, and that is written after the shard
itself is. Whatever a killed run leaves is therefore either finished or not looked at.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdl_toolkit.data.convert.plan import Plan, Shard
from mdl_toolkit.data.convert.stats import ConversionStats
from mdl_toolkit.data.dataset_writer import shard_name
from mdl_toolkit.errors import DatasetError, InputError
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import fsync, parse_json, put_in_place, report_write_errors, write_text
from mdl_toolkit.utils.locks import hold_lock
from mdl_toolkit.utils.ownership import discard, seal

# Of output, for the record of its files.
KIND = "convert-dataset"


class WorkFolder:
    """Keep the work folder of one output."""

    def __init__(self, output: Path) -> None:
        self.output, self._target = output, output.resolve()
        self.path = self._target.with_name(f".{self._target.name}.partial")
        self.dataset, self.downloads = self.path / "dataset", self.path / "downloads"
        self._entries, self._writing, self._previous = (
            self.path / name for name in ("shards", "writing", "previous")
        )
        self._count = 0

    @contextmanager
    def locked(self) -> Iterator["WorkFolder"]:
        """Lock the folder, which is yielded, against other conversions for the context.

        Raises:
            InputError: another conversion is at work on the same output, or the folder cannot be made.
        """
        with report_write_errors(f"--output {self.output}", InputError):
            self.path.mkdir(parents=True, exist_ok=True)
        busy = InputError(
            "--output {output}: another conversion is writing it; wait for its end", output=self.output
        )
        with hold_lock(self.path / "lock", busy):
            with report_write_errors(f"--output {self.output}", InputError):
                # Put back what a run moved away that was killed at the very moment of putting in place.
                if self._previous.exists() and not self.output.exists():
                    self._previous.rename(self._target)
                self._discard_previous()
            yield self

    def begin(self, plan: Plan, *, keeps_going: bool = False) -> int:
        """Remove what another plan left, saying so, and return how many rows are finished.

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
                    "{path}: {shards} {shards:shard of an earlier run is|shards of an earlier run are} "
                    "damaged, or of other rows, recordings, options or versions; {shards:it is|they are} "
                    "removed, and converted anew where needed",
                    path=self.path,
                    shards=stale,
                )
            _keep_only(self._entries, entries)
            _keep_only(self.dataset, names)
        return sum(shard.rows for shard in kept.values())

    # --- shards ---

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

    def _shard(self, shard: Shard) -> Path:
        return self.dataset / shard_name(shard.number, self._count)

    def _is_good(self, shard: Shard, keeps_going: bool = True) -> bool:
        stats, file = self.entry(shard), self._shard(shard)
        if stats is None or (stats.problems.count and not keeps_going):
            return False
        return file.is_file() and file.stat().st_size == stats.bytes

    def finished(self, plan: Plan, *, with_problems: bool = True) -> int:
        """Count the rows of finished shards whose files are there, those with bad rows among them or not."""
        self._count = len(plan.shards)
        return sum(shard.rows for shard in plan.shards if self._is_good(shard, with_problems))

    # --- the end ---

    def finish(self) -> None:
        """Put the dataset in place, and remove everything else."""
        with report_write_errors(f"--output {self.output}", InputError):
            seal(self.dataset, KIND)
            put_in_place(self.dataset, self._target, self._previous)
            self._discard_previous()
        self.remove()

    def _discard_previous(self) -> None:
        if self._previous.exists():
            discard(self._previous, self._target, KIND, self.path / "discarded")

    def remove(self) -> None:
        """Remove the folder with all that is in it; the lock last, which keeps others out meanwhile."""
        with suppress(OSError):
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def leave(self) -> None:
        """Remove the folder if nothing in it is finished."""
        if not any(self._entries.glob("*.json")):
            self.remove()


def _keep_only(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
