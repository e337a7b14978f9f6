"""Answer with the most likely of given texts, for classification.

Each row's recording and prompt are computed once; all choices continue from there together.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.data.collate import collate_prompts
from mdl_toolkit.data.csv_reader import csv_error
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.generate import Question, admit, base_model
from mdl_toolkit.model.decoding_batch import DecodingBatch


def read_choices(path: Path) -> list[str]:
    """Read the choices of a text file, one on each line; blank lines are left out.

    Raises:
        InputError: it cannot be read, or holds fewer than two choices, or one twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise csv_error(path, Localized("there is no such file; correct --choices")) from None
    except (OSError, ValueError) as problem:
        raise csv_error(
            path, Localized("cannot be read as UTF-8 text ({reason})", reason=problem)
        ) from problem
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if len(found) < 2:
        raise csv_error(path, Localized("write at least two choices, one on each line"))
    if twice := next((choice for choice in found if found.count(choice) > 1), None):
        raise csv_error(path, Localized("the choice {twice!r} is there twice; remove one", twice=twice))
    return found


@dataclass(frozen=True)
class Chooser:
    """Choose among given texts with a model.

    Attributes:
        model: a MiDashengLM in evaluation mode, with or without adapters.
        tokenizer: its tokenizer.
        choices: the texts.
        batch_size: most rows at once.
        most: how many of the choices are given, the best first.
        by_length: log-probabilities are divided by the number of tokens, so that long choices are not at a
            disadvantage.
    """

    model: Any
    tokenizer: ChatTokenizer
    choices: Sequence[str]
    batch_size: int
    most: int
    by_length: bool

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[int, list[str]]]:
        """Yield each question's key and its best choices, each followed by its log-probability."""
        model, waiting = base_model(self.model), iter(questions)
        tokens = [self.tokenizer.answer_ids(choice) for choice in self.choices]
        lengths = torch.tensor([len(each) if self.by_length else 1 for each in tokens])
        while batch := [*islice(waiting, self.batch_size)]:
            prompts = collate_prompts([question.sample for question in batch], self.tokenizer.pad_id)
            rows = DecodingBatch(model.decoder)
            logits = admit(rows, model, prompts, len(batch), 0)
            scores = rows.score(logits, tokens).cpu() / lengths
            for question, row in zip(batch, scores, strict=True):
                yield question.key, self._cells(row)

    def _cells(self, scores: torch.Tensor) -> list[str]:
        best = scores.sort(descending=True, stable=True)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            cell
            for choice, score in islice(pairs, self.most)
            for cell in (self.choices[choice], f"{score:.4f}")
        ]


def answer_columns(choices: int, most: int) -> list[str]:
    """Return columns for the best choices: `prediction`, `score`, `prediction_2`, `score_2` and so on."""
    numbered = [(f"prediction_{place}", f"score_{place}") for place in range(2, min(choices, most) + 1)]
    return ["prediction", "score", *(name for pair in numbered for name in pair)]
