"""Rows to a converted dataset: decode, resample, tokenise and store, in parallel.

What comes out depends on the rows, the audio, the prompts and the tokenizer, never on the number of
processes. Whole shards are the unit of work: a killed run goes on from those that it had finished, and ranks
that share a file system divide them. All bad rows are reported together, and then nothing is left behind.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import soundfile

from mdl_toolkit import __version__
from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.audio.urls import is_url
from mdl_toolkit.config.data import ConversionOptions, ConvertOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.data.convert.plan import Plan, Shard, rows_of, survey
from mdl_toolkit.data.convert.stats import ConversionStats, say_summary, warn_of
from mdl_toolkit.data.convert.work_folder import WorkFolder
from mdl_toolkit.data.convert.worker import Job, ShardTask, Step
from mdl_toolkit.data.dataset import FORMAT, ConvertedDataset, Record
from mdl_toolkit.data.dataset_writer import check_output, write_metadata
from mdl_toolkit.data.manifest import Manifest, Row, read_manifest
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import MOST_ROWS_SHOWN, DatasetError, Problems, RowProblem, RowsError
from mdl_toolkit.utils.console import Progress, progress, say, warn
from mdl_toolkit.utils.files import check_apart, removing_empty, report_write_errors
from mdl_toolkit.utils.launcher import Ranks
from mdl_toolkit.utils.machine import default_workers
from mdl_toolkit.utils.signals import raise_if_interrupted
from mdl_toolkit.utils.worker_pool import work_through
from mdl_toolkit.weights.resolve import find_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

FEW_ROWS = 64  # below this, starting processes costs more than they save
LIBRARIES = ("av", "numpy", "pyarrow", "soundfile", "soxr", "tokenizers")  # another version, other bytes
LEFT_OUT_FILE = "left-out.json"  # in a dataset whose conversion kept going: rows that it does not hold
PLAN_FILE = "plan.txt"  # in a dataset that may be used again: the fingerprint of its plan
ALONE = Ranks()
PATIENCE = 300.0  # seconds that a rank waits for the first one to begin
POLL = 0.3  # seconds between two looks at what other ranks do
FAREWELL = 60.0  # seconds that the first rank waits for the others to be gone


def convert_dataset(options: ConvertOptions) -> Record | None:
    """Convert a CSV into a dataset for training, replacing what is at the output.

    Returns:
        The dataset's record; None in any but the first of several ranks. The dataset itself is not opened:
        that would map a page of each of its batches.

    Raises:
        ToolkitError: bad rows (all of them in one message), a bad output folder, no model.

    Example:
        ```python
        from mdl_toolkit import ConvertOptions, convert_dataset

        record = convert_dataset(
            ConvertOptions(
                input="train.csv", output="train-dataset", model_name="midashenglm-7b", base_dir="recordings"
            )
        )
        print(record.rows, record.seconds)
        ```
    """
    output, ranks = Path(options.output), Ranks.from_environment()
    _check_places(output, options)
    manifest = read_rows(options.input, options, needs_prediction=True)
    folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=False)
    tokenizer = ChatTokenizer(read_tokenizer_files(folder))
    record = convert_rows(manifest, output, tokenizer, options, settings=to_yaml(options), ranks=ranks)
    if record is not None:
        say_summary(output, record)
    return record


def _check_places(output: Path, options: ConvertOptions) -> None:
    check_output(output)
    check_apart(output, Path(options.input))
    if Path(options.model_name).is_dir():
        check_apart(output, Path(options.model_name))
    if options.download_cache is not None:
        check_apart(output, Path(options.download_cache), other="--download-cache")


def _check_recording(output: Path) -> Callable[[Row], None]:
    """Refuse an output with recordings in it: they would go with the dataset that it replaces."""
    target = output.resolve()

    @lru_cache(maxsize=1024)
    def check(folder: Path) -> None:
        if target in (found := folder.resolve(), *found.parents):
            check_apart(output, folder)

    return lambda row: None if is_url(row.audio) else check(Path(row.audio).parent)


def read_rows(path: str, options: ConversionOptions, *, needs_prediction: bool) -> Manifest:
    """The rows of a CSV under the options' prompts and base folder."""
    return read_manifest(
        path, base_dir=options.base_dir, system_prompt=options.system_prompt, user_prompt=options.user_prompt,
        needs_prediction=needs_prediction, allow_empty_prediction=options.allow_empty_prediction,
    )  # fmt: skip


def convert_rows(
    manifest: Manifest,
    output: Path,
    tokenizer: ChatTokenizer,
    options: ConversionOptions,
    *,
    with_answer: bool = True,
    settings: str | None = None,
    reuse: bool = False,
    keeps_going: bool = False,
    ranks: Ranks = ALONE,
) -> Record | None:
    """Convert all rows into a dataset that takes the place of what is at the output.

    Args:
        manifest: the rows.
        output: where the dataset goes.
        tokenizer: the model's tokenizer and template.
        options: workers, downloads, tolerance for truncated files.
        with_answer: for training; otherwise prompts alone, and no labels.
        settings: what goes into the dataset's settings file, if there is to be one.
        reuse: if the output is what would come out, leave it; such a dataset names its plan.
        keeps_going: leave rows out that cannot be used; `left_out` tells which.
        ranks: this process among those that divide the work.

    Returns:
        The dataset's record; None in any but the first rank, whose part ends when no shard is left to take.

    Raises:
        RowsError: rows that cannot be used, all of them.
        InputError: there is no row, or another conversion is at work on the output.
        WorkerDiedError: a worker process was killed.
    """
    with removing_empty(output.resolve().parent), WorkFolder(output, ranks.rank) as work:
        plan: Plan | None = None
        try:
            identity = _identity(tokenizer, options, with_answer, keeps_going)
            most = None if keeps_going else MOST_ROWS_SHOWN
            plan = survey(manifest, identity, _check_recording(output), most)
            if reuse and (record := _already(output, plan, keeps_going)):
                work.remove()
                return record
            run = _Run(manifest, plan, work, tokenizer, options, with_answer, keeps_going, ranks)
            if ranks.rank == 0:
                beside = {PLAN_FILE: plan.fingerprint} if reuse else {}
                return run.complete(beside if settings is None else {**beside, SETTINGS_FILE: settings})
            run.help()
            return None
        except BaseException as problem:
            if not ranks.rank:
                _clear_up(work, plan, problem)
            raise


def _identity(
    tokenizer: ChatTokenizer, options: ConversionOptions, with_answer: bool, keeps_going: bool
) -> str:
    """What a sample's bytes come from besides its row."""
    files = tokenizer.files
    return json.dumps(
        [
            FORMAT, __version__, *map(version, LIBRARIES), soundfile.__libsndfile_version__,
            files.tokenizer_fingerprint, files.template_fingerprint, files.specials,
            options.allow_truncated, with_answer, keeps_going,
        ]
    )  # fmt: skip


def _already(output: Path, plan: Plan, keeps_going: bool) -> Record | None:
    """Return the record of what is at the output if the same plan made it and it is whole, else say so."""
    if (
        plan.problems.count and not keeps_going
    ):  # rows that are in no shard: the plan's fingerprint does not know of them
        return None
    with suppress(OSError, ValueError, DatasetError):
        if (output / PLAN_FILE).read_text(encoding="utf-8") == plan.fingerprint:
            if keeps_going:
                left_out(output)  # a run that was killed while it removed the dataset may have got so far
            return ConvertedDataset(output).record
    if (output / PLAN_FILE).exists():
        say(
            "{output}: damaged, or converted from other rows or recordings, with other options or by "
            "another version; it is converted anew",
            output=output,
        )
    return None


def _clear_up(work: WorkFolder, plan: Plan | None, problem: BaseException) -> None:
    """Keep finished shards for the next run, unless rows must be put right first (rule 12)."""
    if plan is None:  # what an earlier run finished was not looked at yet
        work.leave()
        return
    finished = 0 if isinstance(problem, RowsError) else work.finished(plan)
    if not finished:
        work.remove()
        return
    say(
        "{finished} of {rows} rows are finished (in {path}): the same command goes on from there",
        finished=finished,
        rows=plan.rows,
        path=work.path,
    )


# --- all shards ----------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One process's part in a conversion: take shards, convert them, write them down."""

    manifest: Manifest
    plan: Plan
    work: WorkFolder
    tokenizer: ChatTokenizer
    options: ConversionOptions
    with_answer: bool
    keeps_going: bool
    ranks: Ranks

    def __post_init__(self) -> None:
        self.is_spoilt = (
            self.plan.problems.count > 0 and not self.keeps_going
        )  # nothing will come of it: only look at recordings
        self.is_waiting = False

    def complete(self, beside: dict[str, str]) -> Record:
        """The first rank's part: begin, convert, wait for the others, and put the dataset in place.

        Args:
            beside: more files of the dataset, by name.
        """
        self._begin()
        self._convert(lambda shard: shard.number % self.ranks.count == 0)
        while left := self._left():
            if not self._convert(lambda _: True):
                self._wait(len(left))
        self._see_others_off()
        stats = self._total()
        record = stats.record(self.tokenizer.files, self.options)
        write_metadata(self.work.dataset, len(self.plan.shards), record)
        with report_write_errors(str(self.work.dataset), DatasetError):
            for name, text in {**beside, **self._left_out(stats)}.items():
                (self.work.dataset / name).write_text(text, encoding="utf-8")
        self.work.finish()
        warn_of(stats, is_list=self.manifest.listed is not None)
        return record

    def help(self) -> None:
        """Any other rank's part: convert until there is nothing left to take."""
        ends = time.monotonic() + PATIENCE
        while not self.work.join(self.plan):
            if self.work.was_completed():
                self.work.leave()
                return
            if self.work.is_held(0):  # it reads the CSV
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

    def _begin(self) -> None:
        done, problems = self.work.begin(self.plan), self.plan.problems.count
        if done:
            say(
                "going on from an earlier run: {done} of {rows} rows are converted already",
                done=done,
                rows=self.plan.rows,
            )
        if self.is_spoilt and self.plan.rows >= FEW_ROWS:  # who has bad rows already may not want to wait
            warn(
                "{problems} rows cannot be used; looking at all recordings, to report everything at once",
                problems=problems,
            )

    def _left(self) -> list[Shard]:
        return [shard for shard in self.plan.shards if self.work.entry(shard) is None]

    def _convert(self, is_mine: Callable[[Shard], bool]) -> int:
        """Convert those of my shards that nobody else is at; how many there were."""
        mine = [shard for shard in self._left() if is_mine(shard) and self.work.is_free(shard)]
        if not mine:
            return 0
        jobs, done = self._jobs({shard.number for shard in mine}), 0
        with (
            _progress(mine) as shown,
            closing(work_through(jobs, self._task(), self._workers(mine))) as messages,
        ):
            for message in messages:
                if isinstance(message, Step):
                    shown.add(message)
                    continue
                is_bad = message.stats.problems.count > 0 and not self.keeps_going
                self.is_spoilt = self.is_spoilt or is_bad
                self.work.commit(message.shard, message.file, message.stats)
                done += 1
        return done

    def _jobs(self, numbers: set[int]) -> Iterator[Job]:
        def is_wanted(shard: Shard) -> bool:
            return shard.number in numbers and self.work.claim(shard)

        for shard, rows in rows_of(self.manifest, self.plan, is_wanted):
            sent = [replace(row, cells=()) for row in rows]
            yield Job(shard, sent, self.work.file_to_write(), self.is_spoilt)

    def _task(self) -> ShardTask:
        options, cache = self.options, self.options.download_cache
        folder = self.work.downloads if cache is None else Path(cache).expanduser()
        downloads = Downloads(folder, options.max_download_mb, self.work.run)
        return ShardTask(
            self.tokenizer, downloads, options.allow_truncated, self.with_answer, self.keeps_going,
            options.tokenizing_batch_size,
        )  # fmt: skip

    def _workers(self, shards: list[Shard]) -> int:
        if sum(shard.rows for shard in shards) < FEW_ROWS:
            return 1
        return min(self.options.num_workers or default_workers(), len(shards))

    def _wait(self, shards: int) -> None:
        """Others are at the last shards; look again soon."""
        if not self.is_waiting:
            say("waiting for other ranks ({shards} parts)", shards=shards)
        self.is_waiting = True
        time.sleep(POLL)

    def _total(self) -> ConversionStats:
        """All counts together.

        Raises:
            RowsError: all rows that cannot be used.
            DatasetError: finished shards are not there any more.
        """
        most = None if self.keeps_going else MOST_ROWS_SHOWN
        total = ConversionStats(problems=Problems(most=most))
        for shard in self.plan.shards:
            if entry := self.work.entry(shard):
                total.merge(entry.stats)
        total.problems.merge(self.plan.problems)
        if not self.keeps_going:
            self.manifest.check(total.problems)
        if self.work.finished(self.plan) != self.plan.rows:
            raise DatasetError(
                "{path}: something else has changed what is in it; start again", path=self.work.path
            )
        return total

    def _left_out(self, stats: ConversionStats) -> dict[str, str]:
        if not self.keeps_going:
            return {}
        return {LEFT_OUT_FILE: json.dumps([problem.to_json() for problem in stats.problems.first])}

    def _see_others_off(self) -> None:
        """Let the other ranks see that all is done, before what they look at is removed."""
        ends = time.monotonic() + FAREWELL
        while time.monotonic() < ends and any(map(self.work.is_held, range(1, self.ranks.count))):
            time.sleep(POLL)


def left_out(dataset: Path) -> list[RowProblem]:
    """The rows that a conversion which kept going left out, in the order of the CSV.

    Raises:
        DatasetError: it was another kind of conversion.
    """
    try:
        found = json.loads((dataset / LEFT_OUT_FILE).read_text(encoding="utf-8"))
        return [*map(RowProblem.from_json, found)]
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise DatasetError(
            "{dataset}: the list of rows left out cannot be read ({reason}); start again",
            dataset=dataset,
            reason=problem,
        ) from problem


class _Shown:
    """Progress in rows, with the hours of audio that were converted and how fast."""

    def __init__(self, shown: Progress) -> None:
        self._shown, self._seconds, self._began = shown, 0.0, time.monotonic()

    def add(self, step: Step) -> None:
        """Show one step more.

        Raises:
            KeyboardInterrupt: somebody asked for the end.
        """
        raise_if_interrupted()
        self._seconds += step.samples / SAMPLE_RATE
        speed = self._seconds / max(time.monotonic() - self._began, 1e-3)
        self._shown.advance(step.rows, f"{self._seconds / 3600:.2f} h, {speed:.0f}x")


@contextmanager
def _progress(shards: list[Shard]) -> Iterator[_Shown]:
    with progress(sum(shard.rows for shard in shards), "converting") as shown:
        yield _Shown(shown)
