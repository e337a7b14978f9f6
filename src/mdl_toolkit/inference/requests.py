"""Convert the rows of an inference, each with a budget of new tokens or a reason for none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.check.rows import too_long
from mdl_toolkit.data.convert.run import convert_rows, left_out
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.manifest import SYSTEM, USER, Manifest, Row
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, Problems, RowProblem
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.generate import Question
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.weights.provenance import Prompts

# The value of --on-error.
KEEP = "keep"
# Rows are sorted by length within so many batches: the first answers need not wait for the last row.
WINDOW = 16


@dataclass(frozen=True)
class Inputs:
    """Hold the rows of an inference.

    Attributes:
        manifest: the CSV.
        dataset: the rows whose recordings can be used, converted; prompts alone.
        lines: of the CSV, where each of these starts, `[rows]`.
        budgets: most new tokens of each, `[rows]`.
        problems: by line of the CSV, why a row has no answer.
    """

    manifest: Manifest
    dataset: ConvertedDataset
    lines: NDArray[np.int64]
    budgets: NDArray[np.int64]
    problems: dict[int, RowProblem]

    def __iter__(self) -> Iterator[tuple[Row, int | None]]:
        """Yield every row of the CSV, with its number in the dataset, or None for one without an answer."""
        numbers = {int(line): number for number, line in enumerate(self.lines)}
        for row in self.manifest.rows_unchecked():
            yield row, None if row.line in self.problems else numbers[row.line]

    def question(self, number: int) -> Question:
        """Read and decode a row of the dataset."""
        return Question(number, self.dataset[number], int(self.budgets[number]))

    def order(self, answered: set[int], batch_size: int) -> NDArray[np.int64]:
        """Return the rows to answer: in each window the longest first, and those of one length together."""
        is_left = [
            number not in answered and int(line) not in self.problems
            for number, line in enumerate(self.lines)
        ]
        left, size = np.flatnonzero(is_left), WINDOW * batch_size
        lengths = self.dataset.token_counts
        windows = [left[start : start + size] for start in range(0, len(left), size)]
        return np.concatenate(
            [left[:0], *(each[np.argsort(-lengths[each], kind="stable")] for each in windows)]
        )


def convert_inputs(
    manifest: Manifest, place: Path, tokenizer: ChatTokenizer, options: InferenceOptions
) -> None:
    """Convert all rows, unless what would come out is there already.

    Raises:
        RowsError: all rows that cannot be used; with `--on-error keep`, they are left out.
    """
    keeps_going = options.on_error == KEEP
    convert_rows(manifest, place, tokenizer, options, with_answer=False, reuse=True, keeps_going=keeps_going)


@dataclass(frozen=True)
class TokenBudget:
    """Hold how many new tokens every row must have room for.

    Attributes:
        tokens: how many.
        choice: the longest of the choices, which takes so many; None if any answer will do.
    """

    tokens: int = 1
    choice: str | None = None

    @classmethod
    def of_choices(
        cls, choices: Sequence[str], tokenizer: ChatTokenizer, options: InferenceOptions
    ) -> "TokenBudget":
        """Return what the longest choice takes.

        Raises:
            InputError: `--max-new-tokens` gives less to every row.
        """
        tokens, choice = max((len(tokenizer.answer_ids(choice)), choice) for choice in choices)
        most = options.max_new_tokens
        if most is not None and most < tokens:
            raise InputError(
                "--max-new-tokens {most}: the longest choice {choice!r} takes {tokens} tokens; give as many",
                most=most,
                choice=choice,
                tokens=tokens,
            )
        return cls(tokens, choice)

    def lacking(self, length: int, limit: int) -> Localized:
        """Return what is wrong with a row whose prompt of so many tokens leaves too little."""
        if self.choice is None:
            return too_long(length, limit)
        whole = length + self.tokens
        return Localized(
            "the prompt takes {length} tokens and the longest choice {choice!r} {tokens} more; "
            "--max-length {limit} must be at least {whole}",
            length=length,
            choice=self.choice,
            tokens=self.tokens,
            limit=limit,
            whole=whole,
        )


def open_inputs(manifest: Manifest, place: Path, options: InferenceOptions, required: TokenBudget) -> Inputs:
    """Open the converted rows, and find those without room for an answer.

    Args:
        manifest: the CSV.
        place: the dataset that `convert_inputs` has made of it.
        options: the inference's.
        required: what every row must have room for.

    Raises:
        RowsError: all rows that have no room, or whose cells are wrong.
    """
    dataset, keeps_going = ConvertedDataset(place), options.on_error == KEEP
    problems = {each.line: each for each in left_out(place)} if keeps_going else {}
    lines = [row.line for row in manifest.rows_unchecked()]
    # Such rows cannot be written: their cells cannot be told apart.
    if wrong := [problems[line] for line in problems.keys() - {*lines}]:
        manifest.check(Problems(wrong, len(wrong)))
    kept = np.array([line for line in lines if line not in problems], dtype=np.int64)
    inputs = Inputs(manifest, dataset, kept, _budgets(dataset, options), problems)
    tight = [*_tight(inputs, options.max_length, required)]
    if tight and not keeps_going:
        manifest.check(Problems(tight, len(tight)))
    problems.update((each.line, each) for each in tight)
    return inputs


def _budgets(dataset: ConvertedDataset, options: InferenceOptions) -> NDArray[np.int64]:
    if options.max_new_tokens is not None:
        return np.full(len(dataset), options.max_new_tokens, dtype=np.int64)
    return options.max_length - dataset.token_counts


def _tight(inputs: Inputs, max_length: int, required: TokenBudget) -> Iterator[RowProblem]:
    """Yield a problem for each row without room for an answer."""
    short = {
        int(line): int(inputs.dataset.token_counts[n])
        for n, line in enumerate(inputs.lines)
        if inputs.budgets[n] < required.tokens
    }
    for row in inputs.manifest.rows_unchecked() if short else ():
        if row.line in short:
            yield RowProblem(row.line, "audio", row.shown, required.lacking(short[row.line], max_length))


# --- the prompts of the training -------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptKind:
    """Name one of the two prompts: in the record of a training, as a column, and for users."""

    name: str
    column: str
    text: Localized


PROMPT_KINDS = (
    PromptKind("system", SYSTEM, Localized("system prompt")),
    PromptKind("user", USER, Localized("user prompt")),
)


def with_training_prompts(manifest: Manifest, trained: Prompts) -> Manifest:
    """Return the rows with the training's prompts where none are given, and warn of others."""
    for kind in PROMPT_KINDS:
        prompt, given = getattr(trained, kind.name), getattr(manifest.defaults, kind.column)
        if given is None and kind.column not in manifest.columns and prompt:
            say("{kind}: that of the training is used: {prompt}", kind=kind.text, prompt=_shown(prompt))
            manifest = replace(manifest, defaults=replace(manifest.defaults, **{kind.column: prompt}))
        elif not getattr(trained, f"{kind.name}_differs"):
            _warn_other(manifest, kind, prompt)
    return manifest


def _warn_other(manifest: Manifest, kind: PromptKind, prompt: str | None) -> None:
    others = [
        row for row in manifest.rows_unchecked() if (getattr(row, kind.column) or None) != (prompt or None)
    ]
    if others:
        line, theirs = others[0].line, _shown(getattr(others[0], kind.column))
        is_list = manifest.listed is not None
        where = Localized("here") if is_list else Localized("line {line}", line=line)
        warn(
            "{kind}: {count} rows have another one than the training ({where}: {theirs}; the training: "
            "{prompt}); answers may be worse",
            kind=kind.text,
            count=len(others),
            where=where,
            theirs=theirs,
            prompt=_shown(prompt),
        )


def _shown(prompt: str | None, most: int = 60) -> str:
    if not prompt:
        return str(Localized("none"))
    return repr(prompt if len(prompt) <= most else prompt[: most - 1] + "…")
