"""Metrics of single answers, as sums that add up over rows and processes; the best of several evaluations.

Nothing here needs a model or a file.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mdl_toolkit.i18n import Localized

WORD, CHARACTER = "word", "character"
# Units of a reference by units of its prediction that are compared at once: some seconds.
MOST_PAIRS = 10**10


@dataclass(frozen=True)
class TextMetric:
    """Define a metric that is the ratio of two sums over rows.

    Attributes:
        name: as on the command line.
        title: as in a message.
        more_is_better: whether a larger value is the better one.
        unit: in which edits are counted; None for a share of equal answers.
    """

    name: str
    title: Localized
    more_is_better: bool = False
    unit: str | None = None

    def count(self, reference: str, prediction: str) -> tuple[float, float]:
        """Return a row's numerator and denominator."""
        if self.unit is None:
            return float(reference.strip() == prediction.strip()), 1.0
        ((errors, length),) = edits([reference], [prediction], self.unit).tolist()
        return errors, length

    def rank(self, value: float, loss: float) -> tuple[float, float]:
        """Return a sort key that is higher for a better evaluation: by value, then by lower loss.

        NaN ranks below everything, else it would stay the best for ever.
        """
        keys = (value if self.more_is_better else -value, -loss)
        first, second = (-math.inf if math.isnan(key) else key for key in keys)
        return first, second


@dataclass(frozen=True)
class Best:
    """Remember the best evaluation so far.

    Attributes:
        value: its metric, or its loss; None before the first evaluation.
        step: optimizer steps that were made before it.
        worse: number of evaluations since then.
        loss: its loss; None in old checkpoints, which kept the first of equal values.
    """

    value: float | None = None
    step: int | None = None
    worse: int = 0
    loss: float | None = None

    def after(self, metric: TextMetric, step: int, value: float, loss: float) -> "Best":
        """Return the best evaluation once another one is known; the first one is always the best."""
        least = -math.inf if self.loss is None else self.loss
        if self.value is None or metric.rank(value, loss) > metric.rank(self.value, least):
            return Best(value, step, loss=loss)
        return replace(self, worse=self.worse + 1)


LETTERS = re.compile(r"[^\W\d_]+")
CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# Han, kana, Thai, Lao, Tibetan, Burmese, Khmer: the scripts that put no spaces between words.
SPACELESS = re.compile(
    "[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9d"
    "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff]"
)
WORDLESS = Localized(
    "WER counts what stands between spaces, and these references are written without them: a sentence is one "
    "word; take cer"
)


def are_mostly(script: re.Pattern[str], texts: Iterable[str]) -> bool:
    """Tell whether at least half of the letters are of a script."""
    letters = "".join(run for text in texts for run in LETTERS.findall(text))
    return bool(letters) and 2 * len(script.sub("", letters)) <= len(letters)


class _PunctuationRemoval(dict[int, str]):
    """Map code points for `str.translate`, punctuation to nothing; filled in as characters occur."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        self[code] = "" if unicodedata.category(letter).startswith("P") else letter
        return self[code]


_WITHOUT_PUNCTUATION = _PunctuationRemoval()


def normalized(text: str) -> str:
    """Normalize a text for error rates: NFKC, case folded, without punctuation, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_WITHOUT_PUNCTUATION).split())


def ratio(sums: np.ndarray) -> np.ndarray:
    """Divide the first sum by the second, `[samples, 2]` to `[samples]`; NaN where the second is 0."""
    undefined = np.full(len(sums), np.nan)
    quotient: np.ndarray = np.divide(sums[:, 0], sums[:, 1], out=undefined, where=sums[:, 1] > 0)
    return quotient


def edits(
    references: Sequence[str], predictions: Sequence[str], unit: str, *, normalize: bool = True
) -> np.ndarray:
    """Count the edits that turn each reference into its prediction (Levenshtein distance), by rapidfuzz.

    Two texts of more than 100,000 units each are compared piece by piece, so that time grows with their
    length and not with its square; the count is then one that suffices, which a smaller one might do too.

    Args:
        references: `[rows]`, at least one.
        predictions: `[rows]`.
        unit: `WORD` (separated by white space) or `CHARACTER`.
        normalize: compare normalized texts, characters without spaces; else the texts as they are, with
            single spaces.

    Returns:
        `[rows, 2]`: substitutions, deletions and insertions together, and the reference's length in units.
    """
    from rapidfuzz.distance import Levenshtein

    def units(text: str) -> Sequence[str]:
        words = (normalized(text) if normalize else text).split()
        return words if unit == WORD else ("" if normalize else " ").join(words)

    counts = []
    for pair in zip(references, predictions, strict=True):
        sides = reference, prediction = [units(text) for text in pair]
        count = len(reference) * len(prediction) // MOST_PAIRS + 1
        pieces = [
            [side[len(side) * n // count : len(side) * (n + 1) // count] for n in range(count)]
            for side in sides
        ]
        counts.append((sum(map(Levenshtein.distance, *pieces)), len(reference)))
    return np.array(counts, dtype=float)


LOSS = TextMetric("loss", Localized("loss"))
TEXT_METRICS = {
    metric.name: metric
    for metric in (
        TextMetric("accuracy", Localized("accuracy"), more_is_better=True),
        TextMetric("wer", Localized("wer"), unit=WORD),
        TextMetric("cer", Localized("cer"), unit=CHARACTER),
    )
}
