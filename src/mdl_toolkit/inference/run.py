"""Predict an answer for every recording: check all rows first, then write each answer down at once.

Answers do not depend on the batch: every clip is computed as if alone, and each row has its own budget of
new tokens. That holds in float32; in bfloat16 rounding can turn a word that is a near tie.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit import __version__
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.data.convert.run import PLAN_FILE, read_rows
from mdl_toolkit.data.csv_reader import file_stamp
from mdl_toolkit.data.listing import is_listing, list_recordings, write_listing
from mdl_toolkit.data.manifest import Manifest, Row
from mdl_toolkit.data.prefetch import Prefetcher
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.choices import answer_columns, read_choices
from mdl_toolkit.inference.engines import check_engine, make_engine
from mdl_toolkit.inference.generate import JOINING
from mdl_toolkit.inference.journal import AnswerJournal, write_table
from mdl_toolkit.inference.requests import (
    KEEP,
    Inputs,
    TokenBudget,
    convert_inputs,
    open_inputs,
    with_training_prompts,
)
from mdl_toolkit.reporting.report import report_answers
from mdl_toolkit.utils.console import progress, say
from mdl_toolkit.utils.distributed import PeerLostError, World, join_world
from mdl_toolkit.utils.files import check_apart, check_file, removing_empty
from mdl_toolkit.utils.launcher import warn_of_idle_gpus
from mdl_toolkit.utils.signals import Interruption, raise_if_interrupted
from mdl_toolkit.weights.loading import base_of, explaining_memory
from mdl_toolkit.weights.provenance import fingerprint, read_provenance
from mdl_toolkit.weights.resolve import ADAPTER_CONFIG, find_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

MEMORY_REMEDY = Localized("lower --batch-size")
# The column that --on-error keep adds.
ERROR = "error"
# So many threads read and decode what comes next.
THREADS = 2
# Options that may differ when a killed run is taken up again, since the answers do not depend on them.
ANY_TIME = frozenset(
    {"batch_size", "num_workers", "tokenizing_batch_size", "download_cache", "max_download_mb", "report"}
)
# Options of whose content the answers come: the fingerprint covers that, so that no spelling matters.
BY_CONTENT = frozenset(
    {
        "input", "output", "base_dir", "system_prompt", "user_prompt", "allow_empty_prediction",
        "model_name", "from_modelscope", "choices",
    }
)  # fmt: skip


def infer(options: InferenceOptions) -> list[str]:
    """Answer every row of a CSV and write the CSV with the answers in the column `prediction`.

    Returns:
        The predictions, in the order of the rows; in any but the first of several processes, none.

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
        with _at_work(journal, world):
            predictions, problems = _Inference(options, choices, journal, world).run()
            # The answers are kept until the report is written.
            if options.report is not None and world.is_first:
                report_answers(options)
    if problems:
        raise InputError(
            "{output}: written, but {problems} of its rows have no prediction; see the column `{column}`",
            output=output,
            problems=problems,
            column=ERROR,
        )
    return predictions


@contextmanager
def _at_work(journal: AnswerJournal, world: World) -> Iterator[None]:
    """Keep what is finished if the work does not come to its end, and nothing otherwise."""
    with journal.locked() if world.is_first else nullcontext():
        try:
            yield
        except BaseException as problem:
            if world.is_first:
                _leave(journal, is_stopped=isinstance(problem, (KeyboardInterrupt, PeerLostError)))
            raise
        if world.is_first:
            journal.remove()


def _leave(journal: AnswerJournal, *, is_stopped: bool) -> None:
    """Keep answers always, converted rows if somebody has stopped it, and what a conversion says it keeps."""
    if answered := len(journal.answers()):
        say(
            "{answered} rows are answered (in {path}): the same command goes on from there",
            answered=answered,
            path=journal.path,
        )
    elif is_stopped and journal.dataset.exists():
        say("all rows are converted (in {path}): the same command goes on from there", path=journal.path)
    elif not journal.is_converting:
        journal.remove()


@dataclass(frozen=True)
class _Inference:
    """Run one process's part in an inference."""

    options: InferenceOptions
    choices: Sequence[str] | None
    journal: AnswerJournal
    world: World

    def run(self) -> tuple[list[str], int]:
        """Check, convert, answer and write; return the predictions, and how many rows have none."""
        manifest = self._manifest()
        if not any(True for _ in manifest):
            if self.world.is_first:
                self.journal.begin("no rows")
            return (self._write(manifest, None) if self.world.is_first else []), 0
        # Of a local folder everything is here to be checked at once; of a hub's, weights wait for the rows.
        folder = self._find(weights=Path(self.options.model_name).is_dir())
        tokenizer = ChatTokenizer(read_tokenizer_files(folder))
        if (origin := read_provenance(folder)) is not None:
            manifest = with_training_prompts(manifest, origin.prompts)
        inputs = self._inputs(manifest, tokenizer)
        if self.world.is_first:
            self._begin(inputs)
        self.world.wait()
        order = inputs.order({*self.journal.answers()}, self.options.batch_size)
        # No process writes another answer before all know what is left.
        self.world.wait()
        self._answer(inputs, tokenizer, order[self.world.rank :: self.world.size])
        self.world.wait()
        return (self._write(manifest, inputs) if self.world.is_first else []), len(inputs.problems)

    # --- before ---

    def _manifest(self) -> Manifest:
        """Open the input as a CSV, which is made first of a folder or pattern."""
        options = self.options
        if not is_listing(options.input):
            return read_rows(options.input, options, needs_prediction=False)
        if self.world.is_first:
            write_listing(list_recordings(options.input), self.journal.listing)
        self.world.wait()
        listing = read_rows(
            str(self.journal.listing), replace(options, base_dir=None), needs_prediction=False
        )
        return replace(listing, listed=options.input)

    def _find(self, *, weights: bool) -> Path:
        options = self.options
        folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=weights)
        if weights and (folder / ADAPTER_CONFIG).is_file():
            base_of(folder, from_modelscope=options.from_modelscope)
        return folder

    def _inputs(self, manifest: Manifest, tokenizer: ChatTokenizer) -> Inputs:
        """Open the rows, which the first process converts for all."""
        place, required = self.journal.dataset, TokenBudget()
        if self.choices is not None:
            required = TokenBudget.of_choices(self.choices, tokenizer, self.options)
        if self.world.is_first:
            convert_inputs(manifest, place, tokenizer, self.options)
            inputs = open_inputs(manifest, place, self.options, required)
            self.world.wait()
            return inputs
        self.world.wait()
        return open_inputs(manifest, place, self.options, required)

    def _begin(self, inputs: Inputs) -> None:
        if answered := self.journal.begin(self._fingerprint(inputs)):
            say(
                "going on from an earlier run: {answered} of {count} rows are answered already",
                answered=answered,
                count=len(inputs.lines),
            )

    def _fingerprint(self, inputs: Inputs) -> str:
        """Return a digest of all that the answers come from: content, and never how a path is spelt."""
        used = {
            name: value for name, value in vars(self.options).items() if name not in ANY_TIME | BY_CONTENT
        }
        plan = (self.journal.dataset / PLAN_FILE).read_text(encoding="utf-8")
        # Which rows of the CSV are in the dataset: not all, where some could not be fetched.
        rows = [
            hashlib.sha256(array.tobytes()).hexdigest()
            for array in (inputs.lines, inputs.dataset.token_counts)
        ]
        values = [__version__, used, self.choices, plan, *rows, *self._weights()]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _weights(self) -> list[tuple[str, list[tuple[str, int, int]]]]:
        """Return a digest of the weights and each file's size and time, for the model and a base."""
        folder = self._find(weights=True)
        is_adapter = (folder / ADAPTER_CONFIG).is_file()
        base = [base_of(folder, from_modelscope=self.options.from_modelscope)] if is_adapter else []
        return [
            (
                fingerprint(each),
                [(file.name, *file_stamp(file.stat())) for file in sorted(each.iterdir()) if file.is_file()],
            )
            for each in (folder, *base)
        ]

    # --- the answers ---

    def _answer(self, inputs: Inputs, tokenizer: ChatTokenizer, mine: NDArray[np.int64]) -> None:
        """Answer some rows, and write each answer down at once."""
        with explaining_memory(MEMORY_REMEDY), progress(len(mine), "answering") as shown:
            if not len(mine):
                return
            warn_of_idle_gpus(self.world.size, self.options.COMMAND)
            engine = make_engine(self.options, tokenizer, self.choices)
            group = max(1, self.options.batch_size // JOINING)
            loader = Prefetcher(lambda rows: [inputs.question(int(row)) for row in rows], THREADS)
            groups = (mine[start : start + group] for start in range(0, len(mine), group))
            with closing(loader.batches(groups)) as batches, self.journal.writer(self.world.rank) as pen:
                questions = (question for batch in batches for question in batch)
                for number, cells in engine.answers(questions):
                    pen.add(number, cells)
                    shown.advance()
                    raise_if_interrupted()

    # --- after ---

    def _write(self, manifest: Manifest, inputs: Inputs | None) -> list[str]:
        """Write the output and its settings, and return the predictions."""
        output, answers = Path(self.options.output), self.journal.answers()
        names = (
            ["prediction"] if self.choices is None else answer_columns(len(self.choices), self.options.top_k)
        )
        columns = [*names, ERROR] if self.options.on_error == KEEP else names
        predictions: list[str] = []

        def rows() -> Iterator[tuple[Row, list[str]]]:
            for row, number in () if inputs is None else inputs:
                cells = [""] * len(names) if number is None else answers[number]
                predictions.append(cells[0])
                yield row, [*cells, _reason(inputs, row)][: len(columns)]

        write_table(output, manifest.columns, columns, rows())
        output.with_name(f"{output.name}.{SETTINGS_FILE}").write_text(to_yaml(self.options), encoding="utf-8")
        _tell(output, len(predictions), 0 if inputs is None else len(inputs.problems))
        return predictions


def _tell(output: Path, rows: int, without: int) -> None:
    if without:
        say(
            "{output}: {predictions} predictions, {without} rows without one",
            output=output,
            predictions=rows - without,
            without=without,
        )
    else:
        say("{output}: {predictions} predictions", output=output, predictions=rows)


def _reason(inputs: Inputs | None, row: Row) -> str:
    problem = None if inputs is None else inputs.problems.get(row.line)
    return "" if problem is None else str(problem.reason)
