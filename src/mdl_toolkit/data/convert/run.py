"""Rows to a converted dataset: decode, resample, tokenise and store, in parallel.

What comes out depends on the rows, the audio, the prompts and the tokenizer, never on the number of
processes. Whole shards are the unit of work: a killed run goes on from those that it had finished. All bad
rows are reported together, and then nothing is left behind, unless one of them may be fine the next time.
"""

import json
import secrets
import time
from collections.abc import Callable
from contextlib import closing, suppress
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
from mdl_toolkit.data.convert.plan import Plan, make_plan, read_shards
from mdl_toolkit.data.convert.stats import ConversionStats, say_summary, warn_of_clips, warn_of_long_clips
from mdl_toolkit.data.convert.work_folder import WorkFolder
from mdl_toolkit.data.convert.worker import ShardConverter, ShardJob, ShardProgress
from mdl_toolkit.data.dataset import FORMAT, ConvertedDataset, Record
from mdl_toolkit.data.dataset_writer import check_output, write_metadata
from mdl_toolkit.data.manifest import Manifest, Row, read_manifest
from mdl_toolkit.data.open_audio import Recordings
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import MOST_ROWS_SHOWN, DatasetError, Problems, RowProblem, RowsError
from mdl_toolkit.utils.console import progress, say, warn
from mdl_toolkit.utils.files import check_apart, parse_json, removing_empty, report_write_errors
from mdl_toolkit.utils.launcher import Ranks
from mdl_toolkit.utils.machine import default_workers
from mdl_toolkit.utils.signals import raise_if_interrupted
from mdl_toolkit.utils.worker_pool import end_unguarded_script, work_through
from mdl_toolkit.weights.resolve import find_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

# Another version of one of these may write other bytes.
LIBRARIES = ("av", "numpy", "pyarrow", "soundfile", "soxr", "tokenizers")
# In a dataset that may be used again: the fingerprint of its plan.
PLAN_FILE = "plan.txt"
# In a dataset whose conversion kept going: the rows that it does not hold.
LEFT_OUT_FILE = "left-out.json"
# Below this, starting processes costs more than they save.
FEW_ROWS = 64


def convert_dataset(options: ConvertOptions) -> Record | None:
    """Convert a CSV into a dataset for training, replacing what is at the output.

    Returns:
        The dataset's record; None in any but the first of several ranks, which converts alone while the
        others wait, and fail if it does. The dataset itself is not opened: that would map a page of each of
        its batches.

    Raises:
        PeerLostError: another rank has ended.
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
    end_unguarded_script()
    if Ranks.from_environment().count == 1:
        return convert_alone(options)
    # It needs torch, which takes memory in every process of a conversion.
    from mdl_toolkit.utils.distributed import join_world

    with join_world(on_devices=False) as world:
        record = convert_alone(options) if world.is_first else None
        world.wait()
        return record


def convert_alone(options: ConvertOptions) -> Record:
    """Convert a CSV into a dataset in this process and its workers, whatever others there are.

    Raises:
        ToolkitError: as `convert_dataset`.
    """
    output = Path(options.output)
    check_output(output)
    check_apart(output, Path(options.input))
    if Path(options.model_name).is_dir():
        check_apart(output, Path(options.model_name))
    if options.download_cache is not None:
        check_apart(output, Path(options.download_cache), other="--download-cache")
    manifest = read_manifest(options.input, options, needs_prediction=True)
    folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=False)
    tokenizer = ChatTokenizer(read_tokenizer_files(folder))
    record = convert_rows(manifest, output, tokenizer, options, settings=to_yaml(options))
    say_summary(output, record)
    return record


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
    run: str = "",
) -> Record:
    """Convert all rows into a dataset that takes the place of what is at the output.

    Args:
        manifest: the rows.
        output: where the dataset goes.
        tokenizer: the model's tokenizer and template.
        options: workers, downloads, tolerance for truncated files.
        with_answer: for training; otherwise prompts alone, and no labels.
        settings: text of the dataset's settings file, if there is to be one.
        reuse: if the output is what would come out, leave it; such a dataset names its plan.
        keeps_going: leave rows out that cannot be used; `left_out` tells which.
        run: the name under which addresses may have been asked for already, if there is one.

    Returns:
        The dataset's record.

    Raises:
        ToolkitError: rows that cannot be used, all of them; no row; another conversion is at work there.
    """
    with removing_empty(output.resolve().parent), WorkFolder(output).locked() as work:
        plan: Plan | None = None
        try:
            identity = _conversion_identity(tokenizer, options, with_answer, keeps_going)
            most = None if keeps_going else MOST_ROWS_SHOWN
            plan = make_plan(manifest, identity, _recording_check(output), most)
            if reuse and (record := _reusable(output, plan, keeps_going)):
                work.remove()
                return record
            files = {PLAN_FILE: plan.fingerprint if reuse else None, SETTINGS_FILE: settings}
            conversion = _Conversion(manifest, plan, work, tokenizer, options, with_answer, keeps_going, run)
            return conversion.run({name: text for name, text in files.items() if text is not None})
        except BaseException as problem:
            _clear_up(work, plan, problem)
            raise


@dataclass
class _Conversion:
    """Convert the shards of a plan in worker processes, and put the dataset in place.

    Attributes:
        manifest: the rows.
        plan: the shards.
        work: the work folder, which is locked.
        tokenizer: the model's tokenizer and template.
        options: workers, downloads, tolerance for truncated files.
        with_answer: for training; otherwise prompts alone, and no labels.
        keeps_going: leave rows out that cannot be used.
        run_name: under which addresses are asked for; empty for a new one.
    """

    manifest: Manifest
    plan: Plan
    work: WorkFolder
    tokenizer: ChatTokenizer
    options: ConversionOptions
    with_answer: bool
    keeps_going: bool
    run_name: str

    def run(self, extra_files: dict[str, str]) -> Record:
        """Convert what is not finished, and put the dataset in place.

        Args:
            extra_files: the texts of more files of the dataset, by name.
        """
        if finished := self.work.begin(self.plan, keeps_going=self.keeps_going):
            say(
                "going on from an earlier run: {done} of {rows} rows {done:is|are} converted already",
                done=finished,
                rows=self.plan.rows,
            )
        # Who has bad rows already may not want to wait.
        if self.plan.problems.count and not self.keeps_going and self.plan.rows >= FEW_ROWS:
            warn(
                "{problems} {problems:row|rows} cannot be used; looking at all recordings, to report "
                "everything at once",
                problems=self.plan.problems.count,
            )
        if wanted := {shard.number for shard in self.plan.shards if self.work.entry(shard) is None}:
            self._convert(wanted)
        entries = [entry for shard in self.plan.shards if (entry := self.work.entry(shard))]
        stats = self._total(entries)
        record = stats.record(self.tokenizer.files, self.options)
        write_metadata(self.work.dataset, [entry.crc32 for entry in entries], record)
        if self.keeps_going:
            left_out = json.dumps([problem.to_json() for problem in stats.problems.first])
            extra_files = {**extra_files, LEFT_OUT_FILE: left_out}
        with report_write_errors(str(self.work.dataset), DatasetError):
            for name, text in extra_files.items():
                (self.work.dataset / name).write_text(text, encoding="utf-8")
        self.work.finish()
        warn_of_clips(stats, is_list=self.manifest.listed is not None)
        # Of what is to be answered, inference has its own way.
        if self.with_answer:
            warn_of_long_clips(stats)
        return record

    def _convert(self, wanted: set[int]) -> None:
        """Convert the shards with these numbers."""
        options, rows = self.options, sum(self.plan.shards[number].rows for number in wanted)
        folder = Path(options.download_cache or self.work.downloads).expanduser()
        downloads = Downloads(folder, options.max_download_mb, self.run_name or secrets.token_hex(8))
        converter = ShardConverter(
            self.tokenizer,
            Recordings(downloads, options.allow_truncated, options.max_audio_hours),
            self.with_answer,
            self.keeps_going,
            options.tokenizing_batch_size,
        )
        jobs = (
            ShardJob(shard, [replace(row, cells=()) for row in members], self.work.file_to_write())
            for shard, members in read_shards(self.manifest, self.plan, lambda each: each.number in wanted)
        )
        workers = min(options.num_workers or default_workers(), len(wanted)) if rows >= FEW_ROWS else 1
        seconds, began = 0.0, time.monotonic()
        with (
            progress(rows, "converting") as bar,
            closing(work_through(jobs, converter, workers)) as messages,
        ):
            for message in messages:
                if isinstance(message, ShardProgress):
                    raise_if_interrupted()
                    seconds += message.samples / SAMPLE_RATE
                    speed = seconds / max(time.monotonic() - began, 1e-3)
                    bar.advance(message.rows, f"{seconds / 3600:.2f} h, {speed:.0f}x")
                else:
                    self.work.commit(message.shard, message.file, message.stats)

    def _total(self, entries: list[ConversionStats]) -> ConversionStats:
        """Add up the counts of all shards.

        Raises:
            RowsError: all rows that cannot be used.
            DatasetError: finished shards are not there any more.
        """
        most = None if self.keeps_going else MOST_ROWS_SHOWN
        total = ConversionStats(problems=Problems(most=most))
        for entry in entries:
            total.merge(entry)
        total.problems.merge(self.plan.problems)
        if not self.keeps_going:
            self.manifest.check(total.problems)
        if self.work.finished(self.plan) != self.plan.rows:
            raise DatasetError(
                "{path}: something else has changed what is in it; start again", path=self.work.path
            )
        return total


def _recording_check(output: Path) -> Callable[[Row], None]:
    """Return a check that refuses recordings in the output, which would go with the dataset it replaces."""
    target = output.resolve()

    @lru_cache(maxsize=1024)
    def check_folder(folder: Path) -> None:
        if target in (resolved := folder.resolve(), *resolved.parents):
            check_apart(output, folder)

    return lambda row: None if is_url(row.audio) else check_folder(Path(row.audio).parent)


def _conversion_identity(
    tokenizer: ChatTokenizer, options: ConversionOptions, with_answer: bool, keeps_going: bool
) -> str:
    """Return all that a sample's bytes come from besides its row, as text."""
    files = tokenizer.files
    return json.dumps(
        [
            FORMAT, __version__, *map(version, LIBRARIES), soundfile.__libsndfile_version__,
            files.tokenizer_fingerprint, files.template_fingerprint, files.specials,
            options.allow_truncated, options.max_audio_hours, with_answer, keeps_going,
        ]
    )  # fmt: skip


def _reusable(output: Path, plan: Plan, keeps_going: bool) -> Record | None:
    """Return the record of what is at the output if the same plan made it and it is whole, else say so."""
    # Rows that are in no shard are not in the plan's fingerprint.
    if plan.problems.count and not keeps_going:
        return None
    with suppress(OSError, ValueError, DatasetError):
        if (output / PLAN_FILE).read_text(encoding="utf-8") == plan.fingerprint:
            if keeps_going:
                # A run that was killed while it removed the dataset may have removed this list.
                left_out(output)
            return ConvertedDataset(output).record
    if (output / PLAN_FILE).exists():
        say(
            "{output}: damaged, or converted from other rows or recordings, with other options or by "
            "another version; it is converted anew",
            output=output,
        )
    return None


def _clear_up(work: WorkFolder, plan: Plan | None, problem: BaseException) -> None:
    """Keep finished shards for the next run, unless rows must be put right first."""
    # Without a plan, what an earlier run finished was not looked at.
    if plan is None:
        work.leave()
        return
    is_final = isinstance(problem, RowsError) and not problem.may_pass
    finished = 0 if is_final else work.finished(plan, with_problems=False)
    if not finished:
        work.remove()
        return
    say(
        "{finished} of {rows} rows {finished:is|are} finished (in {path}): the same command goes on from "
        "there",
        finished=finished,
        rows=plan.rows,
        path=work.path,
    )


def left_out(dataset: Path) -> list[RowProblem]:
    """Return the rows that a conversion which kept going left out, in the order of the CSV.

    Raises:
        DatasetError: it was another kind of conversion.
    """
    try:
        problems = parse_json((dataset / LEFT_OUT_FILE).read_text(encoding="utf-8"))
        return [*map(RowProblem.from_json, problems)]
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise DatasetError(
            "{dataset}: the list of rows left out cannot be read ({reason}); start again",
            dataset=dataset,
            reason=problem,
        ) from problem
