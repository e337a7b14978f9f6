"""Rows to a converted dataset: decode, resample, tokenise and store, in parallel.

What comes out depends on the rows, the audio, the prompts and the tokenizer, never on the number of
processes. Whole shards are the unit of work: a killed run goes on from those that it had finished, and ranks
that share a file system divide them. All bad rows are reported together, and then nothing is left behind.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import soundfile

from mdl_toolkit import __version__
from mdl_toolkit.audio.urls import is_url
from mdl_toolkit.config.data import ConversionOptions, ConvertOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.data.convert.plan import Plan, make_plan
from mdl_toolkit.data.convert.rank import LEFT_OUT_FILE, RankConversion
from mdl_toolkit.data.convert.stats import say_summary
from mdl_toolkit.data.convert.work_folder import WorkFolder
from mdl_toolkit.data.dataset import FORMAT, ConvertedDataset, Record
from mdl_toolkit.data.dataset_writer import check_output
from mdl_toolkit.data.manifest import Manifest, Row, read_manifest
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import MOST_ROWS_SHOWN, DatasetError, RowProblem, RowsError
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import check_apart, parse_json, removing_empty
from mdl_toolkit.utils.launcher import Ranks
from mdl_toolkit.utils.worker_pool import end_unguarded_script
from mdl_toolkit.weights.resolve import find_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

# Another version of one of these may write other bytes.
LIBRARIES = ("av", "numpy", "pyarrow", "soundfile", "soxr", "tokenizers")
# In a dataset that may be used again: the fingerprint of its plan.
PLAN_FILE = "plan.txt"
ALONE = Ranks()


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
    end_unguarded_script()
    output, ranks = Path(options.output), Ranks.from_environment()
    check_output(output)
    check_apart(output, Path(options.input))
    if Path(options.model_name).is_dir():
        check_apart(output, Path(options.model_name))
    if options.download_cache is not None:
        check_apart(output, Path(options.download_cache), other="--download-cache")
    manifest = read_manifest(options.input, options, needs_prediction=True)
    folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=False)
    tokenizer = ChatTokenizer(read_tokenizer_files(folder))
    record = convert_rows(manifest, output, tokenizer, options, settings=to_yaml(options), ranks=ranks)
    if record is not None:
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
    ranks: Ranks = ALONE,
) -> Record | None:
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
        ranks: this process among those that divide the work.

    Returns:
        The dataset's record; None in any but the first rank, whose part ends when no shard is left to take.

    Raises:
        ToolkitError: rows that cannot be used, all of them; no row; another conversion is at work there.
    """
    with removing_empty(output.resolve().parent), WorkFolder(output, ranks.rank) as work:
        plan: Plan | None = None
        try:
            identity = _conversion_identity(tokenizer, options, with_answer, keeps_going)
            most = None if keeps_going else MOST_ROWS_SHOWN
            plan = make_plan(manifest, identity, _recording_check(output), most)
            if reuse and (record := _reusable(output, plan, keeps_going)):
                work.remove()
                return record
            rank = RankConversion(manifest, plan, work, tokenizer, options, with_answer, keeps_going, ranks)
            if not ranks.rank:
                files = {PLAN_FILE: plan.fingerprint if reuse else None, SETTINGS_FILE: settings}
                return rank.run_first({name: text for name, text in files.items() if text is not None})
            rank.run_other()
        except BaseException as problem:
            if not ranks.rank:
                _clear_up(work, plan, problem)
            raise
    return None


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
