"""Classify recordings: answer with the most likely of given texts.

Each recording and prompt is computed once; all choices are scored from there in one batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.data.collate import collate_prompts
from mdl_toolkit.data.csv_format import csv_error
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.generate import Question, admit, base_model
from mdl_toolkit.model.decoding_batch import DecodingBatch


def read_choices(path: Path) -> list[str]:
    """Read the choices of a text file, one on each line; blank lines are left out.

    Raises:
        InputError: the file cannot be read, or holds fewer than two choices, or one twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise csv_error(path, Localized("there is no such file; correct --choices")) from None
    except (OSError, ValueError) as problem:
        raise csv_error(
            path, Localized("cannot be read as UTF-8 text ({reason})", reason=problem)
        ) from problem
    choices = [line.strip() for line in text.splitlines() if line.strip()]
    if len(choices) < 2:
        raise csv_error(path, Localized("write at least two choices, one on each line"))
    if twice := next((choice for choice in choices if choices.count(choice) > 1), None):
        raise csv_error(path, Localized("the choice {twice!r} is there twice; remove one", twice=twice))
    return choices


@dataclass(frozen=True)
class Chooser:
    """Choose among given texts with a model.

    Attributes:
        model: a MiDashengLM in evaluation mode, with or without adapters.
        tokenizer: its tokenizer.
        choices: the texts.
        batch_size: the most questions at once.
        top_k: the number of choices that an answer lists, the best first.
        normalize_scores: divide log-probabilities by the number of tokens, so that long choices are not at a
            disadvantage.
    """

    model: Any
    tokenizer: ChatTokenizer
    choices: Sequence[str]
    batch_size: int
    top_k: int
    normalize_scores: bool

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[int, list[str] | None]]:
        """Yield each question's key and its best choices, each followed by its log-probability.

        A question with a score that is NaN or infinite has None.
        """
        model, waiting = base_model(self.model), iter(questions)
        choice_ids = [self.tokenizer.answer_ids(choice) for choice in self.choices]
        divisors = torch.tensor([len(ids) if self.normalize_scores else 1 for ids in choice_ids])
        while batch := [*islice(waiting, self.batch_size)]:
            prompts = collate_prompts([question.sample for question in batch], self.tokenizer.pad_id)
            decoding = DecodingBatch(model.decoder)
            logits = admit(decoding, model, prompts, len(batch), 0)
            scores = decoding.score(logits, choice_ids).cpu() / divisors
            values, order = (part[:, : self.top_k] for part in scores.sort(descending=True, stable=True))
            is_finite = scores.isfinite().all(1).tolist()
            for number, (best, row) in enumerate(zip(order.tolist(), values.tolist(), strict=True)):
                pairs = zip([self.choices[n] for n in best], [f"{score:.4f}" for score in row], strict=True)
                yield batch[number].key, [*chain.from_iterable(pairs)] if is_finite[number] else None


def answer_columns(choices: int, top_k: int) -> list[str]:
    """Name the columns of the best choices: `prediction`, `score`, `prediction_2`, `score_2` and so on."""
    ranks = range(2, min(choices, top_k) + 1)
    return ["prediction", "score", *(name for n in ranks for name in (f"prediction_{n}", f"score_{n}"))]
