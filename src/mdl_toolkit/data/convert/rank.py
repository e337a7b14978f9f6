"""One rank of a conversion: it takes shards, has them converted in worker processes, and commits them."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.data.convert.plan import Plan, Shard, read_shards
from mdl_toolkit.data.convert.stats import ConversionStats, warn_of_clips
from mdl_toolkit.data.convert.work_folder import WorkFolder
from mdl_toolkit.data.convert.worker import ShardConverter, ShardJob, ShardProgress
from mdl_toolkit.data.dataset import Record
from mdl_toolkit.data.dataset_writer import write_metadata
from mdl_toolkit.data.manifest import Manifest
from mdl_toolkit.data.open_audio import Recordings
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import MOST_ROWS_SHOWN, DatasetError, Problems
from mdl_toolkit.utils.console import progress, say, warn
from mdl_toolkit.utils.files import report_write_errors
from mdl_toolkit.utils.launcher import Ranks
from mdl_toolkit.utils.machine import default_workers
from mdl_toolkit.utils.signals import raise_if_interrupted
from mdl_toolkit.utils.worker_pool import work_through

# Below this, starting processes costs more than they save.
FEW_ROWS = 64
# In a dataset whose conversion kept going: the rows that it does not hold.
LEFT_OUT_FILE = "left-out.json"
# Seconds that a rank waits for the first one to begin, between two looks at the other ranks, and that the
# first rank waits for the others to end.
PATIENCE = 300.0
POLL = 0.3
FAREWELL = 60.0


@dataclass
class RankConversion:
    """Convert one rank's shards of a plan.

    Attributes:
        manifest: the rows.
        plan: the shards.
        work: the work folder, which is locked for this rank.
        tokenizer: the model's tokenizer and template.
        options: workers, downloads, tolerance for truncated files.
        with_answer: for training; otherwise prompts alone, and no labels.
        keeps_going: leave rows out that cannot be used.
        ranks: this process among those that divide the work.
    """

    manifest: Manifest
    plan: Plan
    work: WorkFolder
    tokenizer: ChatTokenizer
    options: ConversionOptions
    with_answer: bool
    keeps_going: bool
    ranks: Ranks

    def run_first(self, extra_files: dict[str, str]) -> Record:
        """Do the first rank's part: convert, wait for the others, and put the dataset in place.

        Args:
            extra_files: the texts of more files of the dataset, by name.
        """
        if finished := self.work.begin(self.plan, keeps_going=self.keeps_going):
            say(
                "going on from an earlier run: {done} of {rows} rows are converted already",
                done=finished,
                rows=self.plan.rows,
            )
        # Who has bad rows already may not want to wait.
        if self.plan.problems.count and not self.keeps_going and self.plan.rows >= FEW_ROWS:
            warn(
                "{problems} rows cannot be used; looking at all recordings, to report everything at once",
                problems=self.plan.problems.count,
            )
        self._convert(lambda shard: shard.number % self.ranks.count == 0)
        is_waiting = False
        while unfinished := self._unfinished():
            if self._convert(lambda _: True):
                continue
            # The other ranks are at the last shards.
            if not is_waiting:
                say("waiting for other ranks ({shards} parts)", shards=len(unfinished))
            is_waiting = True
            time.sleep(POLL)
        # The other ranks look at the folder; let them see that all is done before it is removed.
        ends = time.monotonic() + FAREWELL
        while time.monotonic() < ends and any(map(self.work.is_held, range(1, self.ranks.count))):
            time.sleep(POLL)
        stats = self._total()
        record = stats.record(self.tokenizer.files, self.options)
        counted = [entry for shard in self.plan.shards if (entry := self.work.entry(shard))]
        write_metadata(self.work.dataset, [entry.crc32 for entry in counted], record)
        if self.keeps_going:
            left_out = json.dumps([problem.to_json() for problem in stats.problems.first])
            extra_files = {**extra_files, LEFT_OUT_FILE: left_out}
        with report_write_errors(str(self.work.dataset), DatasetError):
            for name, text in extra_files.items():
                (self.work.dataset / name).write_text(text, encoding="utf-8")
        self.work.finish()
        warn_of_clips(stats, is_list=self.manifest.listed is not None)
        return record

    def run_other(self) -> None:
        """Do any other rank's part: convert until there is no shard left to take."""
        ends = time.monotonic() + PATIENCE
        while not self.work.join(self.plan):
            if self.work.was_completed():
                self.work.leave()
                return
            # The first rank is there, and reads the CSV.
            if self.work.is_held(0):
                ends = time.monotonic() + PATIENCE
            if time.monotonic() > ends:
                self.work.leave()
                raise DatasetError(
                    "rank {rank}: rank 0 has not begun after {patience:.0f} s; start both",
                    rank=self.ranks.rank,
                    patience=PATIENCE,
                )
            time.sleep(POLL)
        self._convert(lambda shard: shard.number % self.ranks.count == self.ranks.rank)
        while self._convert(lambda _: True):
            pass

    def _unfinished(self) -> list[Shard]:
        return [shard for shard in self.plan.shards if self.work.entry(shard) is None]

    def _convert(self, is_mine: Callable[[Shard], bool]) -> int:
        """Convert those of my shards that no other process is at, and return how many there were."""
        mine = [shard for shard in self._unfinished() if is_mine(shard) and self.work.is_free(shard)]
        if not mine:
            return 0
        rows = sum(shard.rows for shard in mine)
        workers = 1
        if rows >= FEW_ROWS:
            workers = min(self.options.num_workers or default_workers(), len(mine))
        jobs, converted = self._jobs({shard.number for shard in mine}), 0
        seconds, began = 0.0, time.monotonic()
        with (
            progress(rows, "converting") as bar,
            closing(work_through(jobs, self._converter(), workers)) as messages,
        ):
            for message in messages:
                if isinstance(message, ShardProgress):
                    raise_if_interrupted()
                    seconds += message.samples / SAMPLE_RATE
                    speed = seconds / max(time.monotonic() - began, 1e-3)
                    bar.advance(message.rows, f"{seconds / 3600:.2f} h, {speed:.0f}x")
                    continue
                self.work.commit(message.shard, message.file, message.stats)
                converted += 1
        return converted

    def _jobs(self, numbers: set[int]) -> Iterator[ShardJob]:
        """Yield a job for each shard that can be claimed."""

        def is_wanted(shard: Shard) -> bool:
            return shard.number in numbers and self.work.claim(shard)

        for shard, rows in read_shards(self.manifest, self.plan, is_wanted):
            yield ShardJob(shard, [replace(row, cells=()) for row in rows], self.work.file_to_write())

    def _converter(self) -> ShardConverter:
        options, cache = self.options, self.options.download_cache
        folder = self.work.downloads if cache is None else Path(cache).expanduser()
        downloads = Downloads(folder, options.max_download_mb, self.work.run)
        return ShardConverter(
            self.tokenizer,
            Recordings(downloads, options.allow_truncated, options.max_audio_hours),
            self.with_answer,
            self.keeps_going,
            options.tokenizing_batch_size,
        )

    def _total(self) -> ConversionStats:
        """Add up the counts of all shards.

        Raises:
            RowsError: all rows that cannot be used.
            DatasetError: finished shards are not there any more.
        """
        most = None if self.keeps_going else MOST_ROWS_SHOWN
        total = ConversionStats(problems=Problems(most=most))
        for shard in self.plan.shards:
            if stats := self.work.entry(shard):
                total.merge(stats)
        total.problems.merge(self.plan.problems)
        if not self.keeps_going:
            self.manifest.check(total.problems)
        if self.work.finished(self.plan) != self.plan.rows:
            raise DatasetError(
                "{path}: something else has changed what is in it; start again", path=self.work.path
            )
        return total
