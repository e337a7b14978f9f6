"""How good answers are, as sums that can be added up over rows and processes. No model, no files."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

Count = Callable[[str, str], tuple[float, float]]


@dataclass(frozen=True)
class Metric:
    """A share of two sums over rows.

    Attributes:
        name: as on the command line.
        more_is_better: whether a larger value is the better one.
        count: reference and prediction to the row's part of numerator and denominator.
    """

    name: str
    more_is_better: bool
    count: Count

    def is_better(self, value: float, than: float | None) -> bool:
        """Compare two values; anything is better than none."""
        if than is None:
            return True
        return value > than if self.more_is_better else value < than


def normalized(text: str) -> str:
    """A text as error rates compare it: NFKC, case folded, without punctuation, single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = ("" if unicodedata.category(letter).startswith("P") else letter for letter in folded)
    return " ".join("".join(kept).split())


def _accuracy(reference: str, prediction: str) -> tuple[float, float]:
    """The same text to the letter, white space around it aside."""
    return float(reference.strip() == prediction.strip()), 1.0


def _word_errors(reference: str, prediction: str) -> tuple[float, float]:
    """Words to substitute, insert and delete, and words of the reference."""
    return _errors(normalized(reference).split(), normalized(prediction).split())


def _character_errors(reference: str, prediction: str) -> tuple[float, float]:
    """The same of characters, spaces left out: for Chinese and other scripts without them."""
    return _errors(
        list(normalized(reference).replace(" ", "")), list(normalized(prediction).replace(" ", ""))
    )


def _errors(reference: list[str], prediction: list[str]) -> tuple[float, float]:
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.distance(reference, prediction)), float(len(reference))


LOSS = Metric("loss", False, lambda _reference, _prediction: (0.0, 0.0))
METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", True, _accuracy),
        Metric("wer", False, _word_errors),
        Metric("cer", False, _character_errors),
    )
}
