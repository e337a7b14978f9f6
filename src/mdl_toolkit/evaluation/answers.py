"""References and one system's predictions, and the rules by which they are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.evaluation.text_metrics import (
    CHARACTER,
    CHINESE,
    SPACELESS,
    WORD,
    are_mostly,
    normalized,
)


@dataclass(frozen=True)
class Answers:
    """Hold one system's predictions with their references.

    Attributes:
        references: `[rows]`.
        predictions: `[rows]`; empty for a row without one.
        lines: `[rows]` line of each prediction in its file.
        failed: `[rows]` booleans: the row has an error instead of a prediction.
        scores: `[rows]` cells with the scores of the predicted labels, or None.
    """

    references: tuple[str, ...]
    predictions: tuple[str, ...]
    lines: tuple[int, ...]
    failed: np.ndarray
    scores: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ScoringRules:
    """Say how references and predictions are compared.

    Attributes:
        normalize: compare normalized texts in word and character errors and in exact match.
        is_chinese: the references are mostly Chinese.
        is_spaceless: they are mostly in a script without spaces between words, such as Chinese or Thai.
        label_separator: separates the labels of one row; None where each row has one label.
    """

    normalize: bool
    is_chinese: bool
    is_spaceless: bool
    label_separator: str | None

    @classmethod
    def of(cls, references: Sequence[str], options: EvaluateOptions) -> "ScoringRules":
        """Derive the rules from the references and what the user asked for."""
        is_chinese, is_spaceless = (are_mostly(script, references) for script in (CHINESE, SPACELESS))
        return cls(options.normalize, is_chinese, is_spaceless, options.label_separator or None)

    @property
    def bleu_tokenizer(self) -> str:
        """Name sacrebleu's tokenizer."""
        return "zh" if self.is_chinese else "char" if self.is_spaceless else "13a"

    @property
    def unit(self) -> str:
        """Name the unit of a row's errors where no metric sets it."""
        return CHARACTER if self.is_spaceless else WORD

    def comparable(self, text: str) -> str:
        """Return a text as exact match compares it."""
        return normalized(text) if self.normalize else text.strip()

    def split_labels(self, text: str) -> list[str]:
        """Split a cell into its labels, in their order."""
        parts = text.split(self.label_separator) if self.label_separator else [text]
        return [part.strip() for part in parts if part.strip()]


def correct_rows(answers: Answers, rules: ScoringRules, criterion: str) -> np.ndarray:
    """Tell which rows are right; those that failed are not.

    Args:
        answers: references and predictions.
        rules: how they are compared.
        criterion: `accuracy` compares texts to the letter but for white space around them, `exact-match`
            compares them as the rules say, `same labels` compares sets of labels.

    Returns:
        `[rows]` booleans.
    """
    keys: dict[str, Callable[[str], object]] = {
        "accuracy": str.strip,
        "exact-match": rules.comparable,
        "same labels": lambda text: {*rules.split_labels(text)},
    }
    key = keys[criterion]
    texts = zip(answers.references, answers.predictions, strict=True)
    is_same = np.array([key(reference) == key(prediction) for reference, prediction in texts])
    is_right: np.ndarray = is_same & ~answers.failed
    return is_right


def concatenate(first: Answers, second: Answers) -> Answers:
    """Append the rows of a second system; scores count only if both systems have them."""
    has_scores = first.scores is not None and second.scores is not None
    return Answers(
        references=first.references + second.references,
        predictions=first.predictions + second.predictions,
        lines=first.lines + second.lines,
        failed=np.concatenate([first.failed, second.failed]),
        scores=(first.scores or ()) + (second.scores or ()) if has_scores else None,
    )
