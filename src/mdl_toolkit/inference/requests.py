"""Turn the rows of a CSV into questions, each with a limit of new tokens; report those without room."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.check.rows import too_long
from mdl_toolkit.data.convert.run import left_out
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.manifest import Manifest, Row
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, Problems, RowProblem, shorten
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.generate import Question
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.weights.provenance import Prompts

# The value of --on-error.
KEEP = "keep"
# Rows are sorted by length in windows of so many batches, so that the first answers need not wait for long.
WINDOW = 16
# Characters of a prompt in a message.
LONGEST_PROMPT = 60


@dataclass(frozen=True)
class Inputs:
    """Hold the rows to answer.

    Attributes:
        manifest: the CSV.
        dataset: its rows with usable recordings, or the windows of these, converted without answers.
        lines: line of the CSV of each of these, `[examples]`.
        max_new_tokens: the most new tokens of each, `[examples]`.
        problems: by line of the CSV, the reason why a row gets no answer.
    """

    manifest: Manifest
    dataset: ConvertedDataset
    lines: NDArray[np.int64]
    max_new_tokens: NDArray[np.int64]
    problems: dict[int, RowProblem]

    def __iter__(self) -> Iterator[tuple[Row, list[int]]]:
        """Yield every row of the CSV, with its examples in the dataset: none for a row without an answer."""
        indices: dict[int, list[int]] = {}
        for index, line in enumerate(self.lines.tolist()):
            indices.setdefault(line, []).append(index)
        for row in self.manifest.rows_unchecked():
            yield row, [] if row.line in self.problems else indices[row.line]

    @property
    def most_tokens(self) -> int:
        """Return the most tokens that a row may have, its answer included."""
        return int((self.dataset.token_counts + self.max_new_tokens).max())

    def question(self, index: int) -> Question:
        """Read and decode a row of the dataset."""
        return Question(index, self.dataset[index], int(self.max_new_tokens[index]))

    def order(self, answered: set[int], batch_size: int) -> NDArray[np.int64]:
        """Sort the rows that are left, `[left]`: the longest first in each window, equal lengths together."""
        is_left = [
            index not in answered and int(line) not in self.problems for index, line in enumerate(self.lines)
        ]
        left, size = np.flatnonzero(is_left), WINDOW * batch_size
        lengths = self.dataset.token_counts
        windows = [left[start : start + size] for start in range(0, len(left), size)]
        return np.concatenate(
            [left[:0], *(each[np.argsort(-lengths[each], kind="stable")] for each in windows)]
        )

    def leave_out(self, reasons: Mapping[int, Localized], *, keeps_going: bool) -> None:
        """Note the rows of the dataset, by their index, that get no answer, and why.

        Raises:
            RowsError: there are any, and the others are not to be answered without them.
        """
        by_line = {int(self.lines[index]): reason for index, reason in reasons.items()}
        problems = [
            RowProblem(row.line, "audio", row.shown, by_line[row.line])
            for row in (self.manifest.rows_unchecked() if by_line else ())
            if row.line in by_line
        ]
        if not keeps_going:
            self.manifest.check(Problems(problems, len(problems)))
        self.problems.update((each.line, each) for each in problems)

    def without_room(self, required: "TokenBudget", limit: int) -> dict[int, Localized]:
        """Tell of each row whose prompt leaves fewer new tokens than are required, by its index."""
        reasons = {}
        for index in map(int, np.flatnonzero(self.max_new_tokens < required.tokens)):
            length = int(self.dataset.token_counts[index])
            reason = too_long(length, limit)
            if required.choice is not None:
                reason = Localized(
                    "the prompt takes {length} tokens and the longest choice {choice!r} {tokens} more; "
                    "--max-length {limit} must be at least {whole}",
                    length=length,
                    **vars(required),
                    limit=limit,
                    whole=length + required.tokens,
                )
            reasons[index] = reason
        return reasons


@dataclass(frozen=True)
class TokenBudget:
    """Hold the number of new tokens that every row must have room for.

    Attributes:
        tokens: the number.
        choice: the longest of the choices, which takes so many; None if there are no choices.
    """

    tokens: int = 1
    choice: str | None = None

    @classmethod
    def of_choices(
        cls, choices: Sequence[str] | None, tokenizer: ChatTokenizer, options: InferenceOptions
    ) -> "TokenBudget":
        """Count the tokens of the longest choice; without choices one token is enough.

        Raises:
            InputError: `--max-new-tokens` is less.
        """
        if choices is None:
            return cls()
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


def open_inputs(manifest: Manifest, folder: Path, options: InferenceOptions, required: TokenBudget) -> Inputs:
    """Open the converted rows, and find those without room for an answer.

    Args:
        manifest: the CSV.
        folder: the dataset that was made of it.
        options: the inference's.
        required: the new tokens that every row must have room for.

    Raises:
        RowsError: all rows without room, or whose cells are wrong.
    """
    dataset, keeps_going = ConvertedDataset(folder), options.on_error == KEEP
    problems = {each.line: each for each in left_out(folder)} if keeps_going else {}
    lines = [row.line for row in manifest.rows_unchecked()]
    # Rows whose cells cannot be told apart cannot be written either.
    if unreadable := [problems[line] for line in problems.keys() - {*lines}]:
        manifest.check(Problems(unreadable, len(unreadable)))
    limits = options.max_length - dataset.token_counts
    if options.max_new_tokens is not None:
        limits = np.full(len(dataset), options.max_new_tokens, dtype=np.int64)
    inputs = Inputs(manifest, dataset, dataset.lines, limits, problems)
    inputs.leave_out(inputs.without_room(required, options.max_length), keeps_going=keeps_going)
    return inputs


# --- the prompts of the training -------------------------------------------------------------------------


def with_training_prompts(manifest: Manifest, trained: Prompts) -> Manifest:
    """Fill in the prompts of the training where the user gives none, and warn of other ones."""
    for name, kind in (("system", Localized("system prompt")), ("user", Localized("user prompt"))):
        column, prompt = f"{name}_prompt", getattr(trained, name)
        if getattr(manifest, column) is None and column not in manifest.columns and prompt:
            say("{kind}: that of the training is used: {prompt}", kind=kind, prompt=_excerpt(prompt))
            manifest = replace(manifest, **{column: prompt})
            continue
        if getattr(trained, f"{name}_differs"):
            continue
        used = ((row.line, getattr(row, column)) for row in manifest.rows_unchecked())
        if others := [(line, other) for line, other in used if (other or None) != (prompt or None)]:
            line, other = others[0]
            is_list = manifest.listed is not None
            warn(
                "{kind}: {count} {count:row has|rows have} another one than the training ({where}: "
                "{theirs}; the training: {prompt}); answers may be worse",
                kind=kind,
                count=len(others),
                where=Localized("here") if is_list else Localized("line {line}", line=line),
                theirs=_excerpt(other),
                prompt=_excerpt(prompt),
            )
    return manifest


def _excerpt(prompt: str | None) -> str | Localized:
    return repr(shorten(prompt, LONGEST_PROMPT)) if prompt else Localized("none")
