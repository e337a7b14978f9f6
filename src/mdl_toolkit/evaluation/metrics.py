"""The metrics of `evaluate`: what each row contributes, and the figure over any rows. No files.

Edits come from jiwer, n-grams and the formula of BLEU from sacrebleu, label tables from scikit-learn. What is
ours is to keep the rows apart, so that intervals and groups cost next to nothing.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from operator import itemgetter
from typing import Any

import numpy as np

from mdl_toolkit.evaluation.text_metrics import CHARACTER, TEXT_METRICS, WORD, edits, normalized

CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
LETTER = re.compile(r"[^\W\d_]")
LIBRARIES = ("jiwer", "rapidfuzz", "sacrebleu", "scikit-learn", "scipy", "numpy")


@dataclass(frozen=True)
class Answers:
    """References and one system's predictions of the same rows.

    Attributes:
        references: `[rows]`.
        predictions: `[rows]`; empty where there is none.
        lines: `[rows]` where each prediction stands in its file.
        failed: `[rows]` booleans: there is no prediction since the row could not be answered.
        scores: `[rows]` cells with the scores of the predicted labels, or None.
    """

    references: tuple[str, ...]
    predictions: tuple[str, ...]
    lines: tuple[int, ...]
    failed: np.ndarray
    scores: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Manner:
    """How texts are compared.

    Attributes:
        normalize: word and character errors and exact match compare what `metrics.normalized` leaves.
        is_chinese: most letters of the references are Chinese characters.
        separator: what separates labels of one row, or None where a row has one.
    """

    normalize: bool
    is_chinese: bool
    separator: str | None

    @property
    def tokenize(self) -> str:
        """How BLEU finds words."""
        return "zh" if self.is_chinese else "13a"

    @property
    def unit(self) -> str:
        """In what a row's errors are counted, unless a metric says otherwise."""
        return CHARACTER if self.is_chinese else WORD

    def comparable(self, text: str) -> str:
        """What exact match compares."""
        return normalized(text) if self.normalize else text.strip()


def are_chinese(texts: Sequence[str]) -> bool:
    """Tell whether at least half of the letters are Chinese characters."""
    joined = "".join(texts)
    return 2 * len(CHINESE.findall(joined)) >= max(len(LETTER.findall(joined)), 1)


def versions() -> dict[str, str]:
    """The libraries that the figures come from."""
    return {name: version(name) for name in LIBRARIES}


# --- figures over rows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """A figure that follows from sums over rows.

    Attributes:
        statistics: `[rows, sums]`.
        formula: `[samples, sums]` to `[samples]`.
    """

    statistics: np.ndarray
    formula: Callable[[np.ndarray], np.ndarray]

    def values(self, weights: np.ndarray) -> np.ndarray:
        """`[rows, samples]` to `[samples]`."""
        return self.formula(weights.T @ self.statistics)

    def of(self, rows: np.ndarray) -> "Sums":
        """The figure over some rows."""
        return replace(self, statistics=self.statistics[rows])


def _ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second; NaN where the second is 0."""
    undefined = np.full(len(sums), np.nan)
    ratio: np.ndarray = np.divide(sums[:, 0], sums[:, 1], out=undefined, where=sums[:, 1] > 0)
    return ratio


@dataclass(frozen=True)
class MacroF1:
    """The mean F1 of the labels that occur among the references of the rows looked at.

    Attributes:
        references: `[rows]` numbers of labels.
        predictions: `[rows]` likewise; `size` for what is no reference's label.
        size: how many labels there are.
    """

    references: np.ndarray
    predictions: np.ndarray
    size: int

    def values(self, weights: np.ndarray) -> np.ndarray:
        """`[rows, samples]` to `[samples]`."""
        right = np.where(self.references == self.predictions, self.references, self.size)
        expected, given, both = (
            _sums_by(codes, weights, self.size + 1)[: self.size]
            for codes in (self.references, self.predictions, right)
        )
        f1 = 2 * both / np.maximum(expected + given, 1)
        return _ratio(np.stack([f1.sum(axis=0, where=expected > 0), (expected > 0).sum(axis=0)], axis=1))

    def of(self, rows: np.ndarray) -> "MacroF1":
        """The figure over some rows."""
        return replace(self, references=self.references[rows], predictions=self.predictions[rows])


def _sums_by(codes: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """`[rows, samples]` summed over the rows of each code: `[size, samples]`."""
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    sums = np.zeros((size, weights.shape[1]))
    sums[present] = np.add.reduceat(weights[order], starts, axis=0)
    return sums


@dataclass(frozen=True)
class MeanAveragePrecision:
    """The mean average precision of the labels that occur among the references of the rows looked at.

    A label that a row's prediction does not list comes after all that list it, with none before another.

    Attributes:
        expected: `[pairs, 2]` label and row, for each label of each reference, sorted.
        listed: `[pairs, 2]` label and row of each predicted label, by label, the highest score first.
        scores: `[pairs]` of the listed ones.
        size: how many labels there are.
    """

    expected: np.ndarray
    listed: np.ndarray
    scores: np.ndarray
    size: int

    def values(self, weights: np.ndarray) -> np.ndarray:
        """`[rows, samples]` to `[samples]`."""
        bounds = [np.searchsorted(pairs[:, 0], np.arange(self.size + 1)) for pairs in self._tables]
        drawn, total = weights.sum(axis=0), np.zeros((weights.shape[1], 2))
        for label in range(self.size):
            (first, last), (start, end) = ((b[label], b[label + 1]) for b in bounds)
            truth = self.expected[first:last, 1]
            precision = self._precision(truth, slice(start, end), weights, drawn)
            total += np.stack([np.nan_to_num(precision), np.isfinite(precision)], axis=1)
        return _ratio(total)

    @property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        return self.expected, self.listed

    def _precision(
        self, truth: np.ndarray, place: slice, weights: np.ndarray, drawn: np.ndarray
    ) -> np.ndarray:
        """Average precision of one label in each sample; NaN where the sample has no row with it.

        Args:
            truth: the rows with the label.
            place: where the rows are listed that are predicted to have it.
            weights: `[rows, samples]`.
            drawn: `[samples]`, their sum.
        """
        rows, scores = self.listed[place, 1], self.scores[place]
        ends = np.flatnonzero(np.diff(scores, append=-np.inf))  # equal scores are one threshold
        hits = weights[rows] * np.isin(rows, truth)[:, None]
        everything = weights[truth].sum(axis=0)
        found = np.vstack([np.cumsum(hits, axis=0)[ends], everything])
        taken = np.vstack([np.cumsum(weights[rows], axis=0)[ends], drawn])
        gains = np.diff(found, axis=0, prepend=0) * found / np.maximum(taken, 1)
        return _ratio(np.stack([gains.sum(axis=0), everything], axis=1))

    def of(self, rows: np.ndarray) -> "MeanAveragePrecision":
        """The figure over some rows."""
        kept, place = (np.isin(pairs[:, 1], rows) for pairs in self._tables)
        expected, listed = self.expected[kept], self.listed[place]
        expected[:, 1], listed[:, 1] = (np.searchsorted(rows, pairs[:, 1]) for pairs in (expected, listed))
        return replace(self, expected=expected, listed=listed, scores=self.scores[place])


# --- answers to figures --------------------------------------------------------------------------------


def is_exact(answers: Answers, _manner: Manner) -> np.ndarray:
    """Which rows are right to the letter, white space around them aside, `[rows]`."""
    count = TEXT_METRICS["accuracy"].count
    return _right(answers, lambda reference, prediction: count(reference, prediction)[0] > 0)


def is_match(answers: Answers, manner: Manner) -> np.ndarray:
    """Which rows are right after normalisation, `[rows]`."""
    same = manner.comparable
    return _right(answers, lambda reference, prediction: same(reference) == same(prediction))


def is_same_set(answers: Answers, manner: Manner) -> np.ndarray:
    """Which rows have all labels of their reference, in any order, and no other, `[rows]`."""

    def is_right(reference: str, prediction: str) -> bool:
        return {*labels_of(reference, manner)} == {*labels_of(prediction, manner)}

    return _right(answers, is_right)


def _right(answers: Answers, is_right: Callable[[str, str], bool]) -> np.ndarray:
    pairs = zip(answers.references, answers.predictions, strict=True)
    right: np.ndarray = np.array([is_right(*pair) for pair in pairs]) & ~answers.failed
    return right


def labels_of(text: str, manner: Manner) -> list[str]:
    """The labels of one row, as they stand there."""
    parts = text.split(manner.separator) if manner.separator else [text]
    return [part.strip() for part in parts if part.strip()]


def natural_order(names: Iterable[str]) -> list[str]:
    """Different names sorted, numbers in them by their value."""

    def key(name: str) -> tuple[list[str], str]:
        parts = re.split(r"(\d+)", name)
        return [part.zfill(20) if place % 2 else part for place, part in enumerate(parts)], name

    return sorted(set(names), key=key)


def _shares(is_right: Callable[[Answers, Manner], np.ndarray]) -> "Builder":
    def build(answers: Answers, manner: Manner) -> Sums:
        right = is_right(answers, manner)
        return Sums(np.stack([right, np.ones_like(right)], axis=1).astype(float), _ratio)

    return build


def _error_rate(unit: str) -> "Builder":
    def build(answers: Answers, manner: Manner) -> Sums:
        counts = edits(answers.references, answers.predictions, unit, normalize=manner.normalize)
        return Sums(np.stack([counts[:, :3].sum(axis=1), counts[:, 3]], axis=1).astype(float), _ratio)

    return build


def _macro_f1(answers: Answers, _manner: Manner) -> MacroF1:
    labels, references, predictions = coded(answers)
    return MacroF1(references, predictions, len(labels))


def coded(answers: Answers) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The labels among the references, sorted, and both sides as their numbers.

    Returns:
        `labels`; `[rows]` references; `[rows]` predictions, `len(labels)` for what is no reference's label,
        and for rows that failed.
    """
    names = [reference.strip() for reference in answers.references]
    labels = natural_order(names)
    number = {label: place for place, label in enumerate(labels)}
    given = [number.get(prediction.strip(), len(labels)) for prediction in answers.predictions]
    return labels, np.array([number[name] for name in names]), np.where(answers.failed, len(labels), given)


def confusion(answers: Answers) -> tuple[list[str], np.ndarray]:
    """How often rows of each label (first axis) were answered with each label (second), by scikit-learn.

    Returns:
        `[labels]`, and `[labels, labels + 1]` counts; the last column is for all that is no such label.
    """
    from sklearn.metrics import confusion_matrix

    labels, references, predictions = coded(answers)
    counts = confusion_matrix(references, predictions, labels=range(len(labels) + 1))
    return labels, counts[: len(labels)]


def _mean_average_precision(answers: Answers, manner: Manner) -> MeanAveragePrecision:
    expected = [labels_of(text, manner) for text in answers.references]
    names = sorted({label for labels in expected for label in labels})
    number = {label: place for place, label in enumerate(names)}
    truth = sorted((number[label], row) for row, labels in enumerate(expected) for label in {*labels})
    listed = sorted(
        (number[label], -score, row)
        for row in range(len(expected))
        for label, score in (listed_labels(answers, row, manner) or {}).items()
        if label in number
    )
    return MeanAveragePrecision(
        np.array(truth, dtype=np.int64).reshape(-1, 2),
        np.array([(label, row) for label, _, row in listed], dtype=np.int64).reshape(-1, 2),
        -np.array([score for _, score, _ in listed], dtype=float),
        len(names),
    )


def listed_labels(answers: Answers, row: int, manner: Manner) -> dict[str, float] | None:
    """The labels of a prediction with their scores, 1 each without any; None without a number for each.

    Of a label that is there twice the higher score counts.
    """
    if answers.failed[row]:
        return {}
    labels = labels_of(answers.predictions[row], manner)
    if answers.scores is None:
        return dict.fromkeys(labels, 1.0)
    try:
        scores = [float(part) for part in answers.scores[row].split(manner.separator) if part.strip()]
    except ValueError:
        return None
    if len(scores) != len(labels) or not np.isfinite(scores).all():
        return None
    return dict(sorted(zip(labels, scores, strict=True), key=itemgetter(1)))


def stacked(first: Answers, second: Answers, manner: Manner) -> Answers:
    """Return the rows of two systems, one below the other; labels without scores get 1 if others have."""
    scores = None
    if first.scores is not None or second.scores is not None:
        separator = manner.separator or ";"
        scores = tuple(
            cell
            for each in (first, second)
            for cell in each.scores
            or (separator.join("1" for _ in labels_of(text, manner)) for text in each.predictions)
        )
    return Answers(
        references=first.references + second.references,
        predictions=first.predictions + second.predictions,
        lines=first.lines + second.lines,
        failed=np.concatenate([first.failed, second.failed]),
        scores=scores,
    )


def _bleu(answers: Answers, manner: Manner) -> Sums:
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=manner.tokenize, effective_order=True)
    pairs = zip(answers.predictions, answers.references, strict=True)
    rows = [metric.sentence_score(prediction, [reference]) for prediction, reference in pairs]
    statistics = [[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in rows]

    def formula(sums: np.ndarray) -> np.ndarray:
        orders = metric.max_ngram_order
        return np.array(
            [
                BLEU.compute_bleu(
                    counts[:orders], counts[orders:], int(predicted), int(expected), smooth_method="exp"
                ).score
                for predicted, expected, *counts in sums.tolist()
            ]
        )

    return Sums(np.array(statistics, dtype=float), formula)


def _chrf(answers: Answers, _manner: Manner) -> Sums:
    """Count character n-grams as sacrebleu finds them, `[rows, 3 * orders]`: predicted, expected, in both."""
    from sacrebleu.metrics import CHRF
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    def counts(reference: str, prediction: str) -> list[list[int]]:
        sides = (extract_all_char_ngrams(text, CHRF.CHAR_ORDER) for text in (prediction, reference))
        return [
            [given.total() if expected else 0, expected.total(), (given & expected).total()]
            for given, expected in zip(*sides, strict=True)
        ]

    rows = [counts(*pair) for pair in zip(answers.references, answers.predictions, strict=True)]
    return Sums(np.array(rows, dtype=float).reshape(len(rows), -1), _chrf_of_counts)


def _chrf_of_counts(sums: np.ndarray) -> np.ndarray:
    """Return chrF2 (Popović 2015) of n-gram counts, `[samples, 3 * orders]` to `[samples]`.

    Precision and recall are means over the orders that both sides have; recall counts 2 times as much.
    """
    given, expected, both = np.moveaxis(sums.reshape(len(sums), -1, 3), -1, 0)
    has_order = (given > 0) & (expected > 0)
    orders = np.maximum(has_order.sum(axis=1), 1)
    precision, recall = (
        np.where(has_order, both / np.maximum(count, 1), 0).sum(axis=1) / orders
        for count in (given, expected)
    )
    total = 4 * precision + recall
    score: np.ndarray = 100 * 5 * precision * recall / np.where(total > 0, total, 1)
    return score


Builder = Callable[[Answers, Manner], Any]


@dataclass(frozen=True)
class CorpusMetric:
    """A metric of `evaluate`.

    Attributes:
        title: as tables show it.
        build: answers to the figure over their rows.
        more_is_better: whether a larger value is the better one.
        is_share: the value is a share, shown in percent; else it is out of 100 already.
        is_proportion: the value is the share of rows that are right: the statistics are one column with 1 for
            each right row, and one of ones.
    """

    title: str
    build: Builder
    more_is_better: bool = True
    is_share: bool = True
    is_proportion: bool = False


CORPUS_METRICS = {
    "accuracy": CorpusMetric("accuracy", _shares(is_exact), is_proportion=True),
    "exact-match": CorpusMetric("exact match", _shares(is_match), is_proportion=True),
    "macro-f1": CorpusMetric("macro F1", _macro_f1),
    "wer": CorpusMetric("WER", _error_rate(WORD), more_is_better=False),
    "cer": CorpusMetric("CER", _error_rate(CHARACTER), more_is_better=False),
    "bleu": CorpusMetric("BLEU", _bleu, is_share=False),
    "chrf": CorpusMetric("chrF", _chrf, is_share=False),
    "map": CorpusMetric("mAP", _mean_average_precision),
}
