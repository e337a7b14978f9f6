"""How good answers are, as sums that can be added up over rows and processes. No model, no files.

Also which of several evaluations is the best.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Count = Callable[[str, str], tuple[float, float]]

WORD, CHARACTER = "word", "character"
EDITS = ("substitute", "delete", "insert")


@dataclass(frozen=True)
class TextMetric:
    """A share of two sums over rows.

    Attributes:
        name: as on the command line.
        more_is_better: whether a larger value is the better one.
        count: reference and prediction to the row's part of numerator and denominator.
    """

    name: str
    more_is_better: bool
    count: Count

    def rank(self, value: float, loss: float) -> tuple[float, float]:
        """What is higher for a better evaluation: of equal values, the lower loss is the better one."""
        return _or_least(value if self.more_is_better else -value), _or_least(-loss)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        value: of the metric, or the loss; None before the first evaluation.
        step: after which it was.
        worse: evaluations since then.
        loss: of the same evaluation; None in checkpoints of a time when ties were left to the first.
    """

    value: float | None = None
    step: int | None = None
    worse: int = 0
    loss: float | None = None

    def after(self, metric: TextMetric, step: int, value: float, loss: float) -> "Best":
        """The best one when another is known; anything is better than none."""
        least = -math.inf if self.loss is None else self.loss
        if self.value is None or metric.rank(value, loss) > metric.rank(self.value, least):
            return Best(value, step, loss=loss)
        return replace(self, worse=self.worse + 1)


def _or_least(value: float) -> float:
    """Without it, NaN would stay the best: nothing is more than that."""
    return -math.inf if math.isnan(value) else value


class _Letters(dict[int, str]):
    """What remains of each character, filled in as they come by: nothing of punctuation."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        self[code] = "" if unicodedata.category(letter).startswith("P") else letter
        return self[code]


_LETTERS = _Letters()


def normalized(text: str) -> str:
    """A text as error rates compare it: NFKC, case folded, without punctuation, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS).split())


def _accuracy(reference: str, prediction: str) -> tuple[float, float]:
    """The same text to the letter, white space around it aside."""
    return float(reference.strip() == prediction.strip()), 1.0


def _word_errors(reference: str, prediction: str) -> tuple[float, float]:
    """Words to substitute, delete and insert, and words of the reference."""
    return _errors(WORD, reference, prediction)


def _character_errors(reference: str, prediction: str) -> tuple[float, float]:
    """The same of characters, spaces left out: for Chinese and other scripts without them."""
    return _errors(CHARACTER, reference, prediction)


def _errors(unit: str, reference: str, prediction: str) -> tuple[float, float]:
    (counts,) = edits([reference], [prediction], unit)
    return float(counts[:3].sum()), float(counts[3])


def edits(
    references: Sequence[str], predictions: Sequence[str], unit: str, *, normalize: bool = True
) -> np.ndarray:
    """What must be changed in each reference to get its prediction, by jiwer.

    Args:
        references: `[rows]`, at least one.
        predictions: `[rows]`.
        unit: `WORD` (what white space separates) or `CHARACTER`.
        normalize: compare what `normalized` leaves, characters without spaces; else the texts as they are,
            with single spaces.

    Returns:
        `[rows, 4]` whole numbers: substitutions, deletions, insertions, and the reference's length in units.
    """
    import jiwer

    joint = "" if normalize and unit == CHARACTER else " "

    def tidy(text: str) -> str:
        return joint.join((normalized(text) if normalize else text).split())

    process = jiwer.process_words if unit == WORD else jiwer.process_characters
    compared = process([tidy(text) for text in references], [tidy(text) for text in predictions])
    counts = np.zeros((len(references), 4), dtype=np.int64)
    for row, (words, chunks) in enumerate(zip(compared.references, compared.alignments, strict=True)):
        counts[row, 3] = len(words)
        for chunk in chunks:
            if chunk.type != "equal":
                sizes = chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
                counts[row, EDITS.index(chunk.type)] += max(sizes)
    return counts


LOSS = TextMetric("loss", False, lambda _reference, _prediction: (0.0, 0.0))
TEXT_METRICS = {
    metric.name: metric
    for metric in (
        TextMetric("accuracy", True, _accuracy),
        TextMetric("wer", False, _word_errors),
        TextMetric("cer", False, _character_errors),
    )
}
