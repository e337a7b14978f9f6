"""Answer every recording of a CSV: check all rows first, then record each answer as soon as it is computed.

Answers do not depend on the batch: every clip is computed as if alone, and each row has its own limit of new
tokens. That holds in float32; in bfloat16 rounding can change a token that is nearly tied with another one.
"""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit import __version__
from mdl_toolkit.audio.segments import Segment
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.data.convert.run import PLAN_FILE, convert_rows
from mdl_toolkit.data.csv_reader import file_stamp
from mdl_toolkit.data.listing import is_listing, list_recordings, write_listing
from mdl_toolkit.data.manifest import Manifest, Row, read_manifest
from mdl_toolkit.data.prefetch import Prefetcher
from mdl_toolkit.data.segment_columns import TimeColumns
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.choices import answer_columns, read_choices
from mdl_toolkit.inference.engines import Engine, check_engine, is_server, make_engine
from mdl_toolkit.inference.generate import JOINING, not_finite
from mdl_toolkit.inference.journal import AnswerJournal
from mdl_toolkit.inference.output import (
    answered_rows,
    check_output,
    check_rows,
    check_single_recording,
    is_subtitles,
    lines_of,
    write_subtitles,
    write_table,
)
from mdl_toolkit.inference.requests import (
    KEEP,
    Inputs,
    TokenBudget,
    open_inputs,
    with_training_prompts,
)
from mdl_toolkit.inference.windows import LIST, cut_rows
from mdl_toolkit.reporting.report import report_answers
from mdl_toolkit.utils.console import progress, say, warn
from mdl_toolkit.utils.distributed import World, join_world
from mdl_toolkit.utils.files import check_apart, check_file, removing_empty, replace_file, report_write_errors
from mdl_toolkit.utils.launcher import warn_of_idle_gpus
from mdl_toolkit.utils.signals import Interruption, raise_if_interrupted
from mdl_toolkit.utils.worker_pool import end_unguarded_script
from mdl_toolkit.weights.loading import choose_dtype, explaining_memory, find_with_base
from mdl_toolkit.weights.provenance import fingerprint, read_provenance
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

MEMORY_REMEDY = Localized("lower --batch-size, or give --bf16 true or --quantization 4bit")
# The column that --on-error keep adds.
ERROR = "error"
# The column that --keep-reference adds.
REFERENCE = "reference"
# Threads that read and decode the next recordings.
THREADS = 2
# Options that may change before a killed run is resumed, since the answers do not depend on them.
CHANGEABLE = frozenset(
    {
        "batch_size", "num_workers", "tokenizing_batch_size", "download_cache", "max_download_mb", "report",
        "keep_reference", "join",
    }
)  # fmt: skip
# Suffixes of the files of a model that answers depend on.
READ_OF_MODELS = {".safetensors", ".json", ".jinja", ".txt", ".model"}
# Options that name content: the fingerprint covers the content, so that no spelling of a path matters.
BY_CONTENT = frozenset(
    {
        "input", "output", "base_dir", "system_prompt", "user_prompt", "allow_empty_prediction",
        "model_name", "from_modelscope", "choices",
    }
)  # fmt: skip


def infer(options: InferenceOptions) -> list[str]:
    """Answer every row of a CSV and write the CSV with the answers in the column `prediction`.

    Returns:
        The predictions, in the order of the rows written; in any but the first of several processes, none.

    Raises:
        ToolkitError: bad rows, rows that are too long (all of them in one message), no model. With
            `--on-error keep`, rows without an answer: then the output is in place all the same.

    Example:
        ```python
        from mdl_toolkit import InferenceOptions, infer

        answers = infer(
            InferenceOptions(
                input="test.csv", output="predictions.csv", model_name="midashenglm-7b",
                base_dir="recordings", max_new_tokens=16,
            )
        )
        print(answers[0])
        ```
    """
    end_unguarded_script()
    check_output(options)
    check_engine(options)
    output = Path(options.output)
    lists = [] if options.choices is None else [options.choices]
    # The input itself may be replaced, as it is read before.
    check_file(output, lists)
    if options.report is not None:
        check_file(Path(options.report), [options.input, *lists], "--report")
        check_apart(Path(options.report), output, "--report", "--output")
    choices = None if options.choices is None else read_choices(Path(options.choices))
    with Interruption(), join_world() as world, removing_empty(output.resolve().parent):
        journal = AnswerJournal(output)
        with journal.locked() if world.is_first else nullcontext():
            predictions, problems = _Inference(options, choices, journal, world).run()
            # The answers are kept until the report is written; other processes and no rows give none.
            if options.report is not None and predictions:
                report_answers(options)
    if problems:
        raise InputError(
            "{output}: written, but {problems} of its rows {problems:has|have} no prediction; see the "
            "column `{column}`",
            output=output,
            problems=problems,
            column=ERROR,
        )
    return predictions


def check_reference(manifest: Manifest) -> None:
    """Refuse to keep references that are not there, or in a column that is.

    Raises:
        InputError: naming both columns.
    """
    if "prediction" not in manifest.file.columns or REFERENCE in manifest.file.columns:
        raise InputError(
            "{input}: --keep-reference needs a column `prediction` to keep, and none named `{column}`",
            input=manifest.source,
            column=REFERENCE,
        )


@dataclass(frozen=True)
class _Inference:
    """Run one process's part in an inference."""

    options: InferenceOptions
    choices: Sequence[str] | None
    journal: AnswerJournal
    world: World

    def run(self) -> tuple[list[str], int]:
        """Check, convert, answer and write; return the predictions, and the number of rows without one."""
        manifest, world, journal = self._open_manifest(), self.world, self.journal
        check_single_recording(self.options, manifest)
        check_rows(self.options, manifest)
        if self.options.keep_reference:
            check_reference(manifest)
        if not any(True for _ in manifest):
            if world.is_first:
                journal.begin("no rows")
            return (self._write(manifest, None, {}) if world.is_first else []), 0
        # A local folder is checked as a whole now; a hub's weights are downloaded once the rows are checked.
        options = self.options
        find = partial(find_with_base, options.model_name, from_modelscope=options.from_modelscope)
        has_weights = not is_server(options.engine)
        folder, base = find(weights=has_weights and Path(options.model_name).is_dir())
        tokenizer = ChatTokenizer(read_tokenizer_files(folder, base))
        if (origin := read_provenance(folder)) is not None:
            manifest = with_training_prompts(manifest, origin.prompts)
        required = TokenBudget.of_choices(self.choices, tokenizer, options)
        # The first process converts for all.
        parts: Mapping[int, Sequence[Segment]] = {}
        if world.is_first:
            parts = self.convert(manifest, tokenizer)
        else:
            world.wait()
        inputs = open_inputs(manifest, journal.dataset, options, required)
        if world.is_first:
            world.wait()
            if answered := journal.begin(self._fingerprint(inputs, *find(weights=has_weights))):
                say(
                    "going on from an earlier run: {done} of {rows} rows {done:is|are} answered already",
                    done=answered,
                    rows=len(inputs.lines),
                )
        world.wait()
        left = inputs.order(journal.answered(), options.batch_size)
        # No process writes another answer before all have read those that are there.
        world.wait()
        if len(rows := left[world.rank :: world.size]):
            warn_of_idle_gpus(world.size, options.COMMAND)
            with explaining_memory(MEMORY_REMEDY):
                engine = make_engine(options, *find(weights=has_weights), tokenizer, self.choices, inputs)
                self._answer(inputs, rows, engine)
        world.wait()
        unanswered = journal.unanswered(not_finite(choose_dtype(options.bf16)))
        inputs.leave_out(unanswered, keeps_going=options.on_error == KEEP)
        return (self._write(manifest, inputs, parts) if world.is_first else []), len(inputs.problems)

    def convert(self, manifest: Manifest, tokenizer: ChatTokenizer) -> Mapping[int, Sequence[Segment]]:
        """Convert all rows, and return the windows of those that were cut into some, by line."""
        options, run = self.options, secrets.token_hex(8)
        if options.window is not None:
            # What is fetched to be measured is what is converted.
            options = replace(options, download_cache=options.download_cache or str(self.journal.downloads))
            manifest = cut_rows(manifest, options, self.journal.lengths, run)
        convert_rows(
            manifest,
            self.journal.dataset,
            tokenizer,
            options,
            with_answer=False,
            reuse=True,
            keeps_going=options.on_error == KEEP,
            run=run,
        )
        return manifest.parts

    def _open_manifest(self) -> Manifest:
        """Open the input's CSV, which is made first where a folder or pattern is given."""
        options = self.options
        if not is_listing(options.input):
            manifest = read_manifest(options.input, options, needs_prediction=False)
            # What is written is a CSV, whatever was read.
            if not manifest.file.format.is_csv:
                check_file(Path(options.output), manifest.file.files)
            return manifest
        if self.world.is_first:
            files, output = list_recordings(options.input), Path(options.output)
            check_file(output, [file for file in files if Path(file).name == output.name])
            with report_write_errors(f"--output {output}", InputError):
                write_listing(files, self.journal.listing)
        self.world.wait()
        listing = read_manifest(self.journal.listing, replace(options, base_dir=None), needs_prediction=False)
        return replace(listing, listed=options.input)

    def _fingerprint(self, inputs: Inputs, *folders: Path | None) -> str:
        """Hash all that the answers depend on: content, however its paths are spelt."""
        names = sorted({field.name for field in fields(self.options)} - CHANGEABLE - BY_CONTENT)
        options = {name: getattr(self.options, name) for name in names}
        plan = (self.journal.dataset / PLAN_FILE).read_text(encoding="utf-8")
        # The rows of the CSV that are in the dataset: not all, where some could not be fetched.
        arrays = (inputs.lines, inputs.dataset.token_counts)
        rows = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
        weights = []
        for folder in filter(None, folders):
            # A model card may change.
            files = (file for file in sorted(folder.iterdir()) if file.suffix in READ_OF_MODELS)
            weights.append((fingerprint(folder), [(file.name, *file_stamp(file.stat())) for file in files]))
        content = [__version__, options, self.choices, plan, *rows, *weights]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _answer(self, inputs: Inputs, rows: NDArray[np.int64], engine: Engine) -> None:
        """Answer rows of the dataset, and record each answer at once."""
        size = max(1, self.options.batch_size // JOINING)
        loader = Prefetcher(lambda group: [inputs.question(int(row)) for row in group], THREADS)
        groups = (rows[start : start + size] for start in range(0, len(rows), size))
        with (
            progress(len(rows), "answering") as bar,
            closing(loader.batches(groups)) as batches,
            self.journal.appending(self.world.rank),
        ):
            failed = 0
            for done, (row, cells) in enumerate(engine(chain.from_iterable(batches)), 1):
                self.journal.add(row, cells)
                if not isinstance(cells, list):
                    failed, lost = failed + 1, cells or not_finite(choose_dtype(self.options.bf16))
                    if done == failed == self.options.batch_size > 1:
                        self._report_lost_batch(failed, lost)
                bar.advance()
                raise_if_interrupted()

    def _report_lost_batch(self, count: int, reason: Localized) -> None:
        """Warn that the whole first batch has no answer, and why the last of it has none.

        Raises:
            ModelError: rows without an answer are not to be kept.
        """
        message = Localized(
            "none of the first {count} rows has an answer: {reason}", count=count, reason=reason
        )
        if self.options.on_error != KEEP:
            raise ModelError(message)
        warn(message)

    def _write(
        self, manifest: Manifest, inputs: Inputs | None, parts: Mapping[int, Sequence[Segment]]
    ) -> list[str]:
        """Write the output and its settings, and return the predictions.

        Args:
            manifest: the CSV.
            inputs: its rows; None if it has none.
            parts: by line, the windows in which its row was answered.
        """
        options, output = self.options, Path(self.options.output)
        choices = self.choices
        names = ["prediction"] if choices is None else answer_columns(len(choices), options.top_k)
        more = [REFERENCE] * options.keep_reference + [ERROR] * (options.on_error == KEEP)
        times = TimeColumns.of(manifest.file.columns, manifest.columns).names if options.join == LIST else {}
        problems = {} if inputs is None else inputs.problems
        answered = () if inputs is None else answered_rows(inputs, parts, self.journal.answers(), options)
        predictions: list[str] = []

        def rows() -> Iterator[tuple[Row, dict[str, str]]]:
            for row, pieces in answered:
                reason = str(problems[row.line].reason) if row.line in problems else ""
                others = {REFERENCE: row.prediction or "", ERROR: reason}
                for line in lines_of(pieces, names, manifest, options):
                    predictions.append(line[names[0]])
                    yield row, {**line, **{name: others[name] for name in more}}

        if is_subtitles(options):
            pieces = [piece for _, its in answered for piece in its]
            predictions = [piece.cells[0].strip() for piece in pieces]
            write_subtitles(output, pieces)
        else:
            write_table(output, manifest, [*names, *times.values(), *more], rows())
        with (
            report_write_errors(f"--output {output}", InputError),
            replace_file(output.with_name(f"{output.name}.{SETTINGS_FILE}"), "predictions") as work,
        ):
            work.write_text(to_yaml(self.options), encoding="utf-8")
        written = Localized(
            "{output}: {predictions} {predictions:prediction|predictions}",
            output=output,
            predictions=len(predictions) - len(problems),
        )
        if problems:
            written = Localized(
                "{written}, {rows} {rows:row|rows} without one", written=written, rows=len(problems)
            )
        say(written)
        return predictions
