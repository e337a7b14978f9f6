"""Metrics of labels over any rows: macro F1 and mean average precision; counts of confused labels."""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np

from mdl_toolkit.errors import RowProblem, RowsError
from mdl_toolkit.evaluation.answers import Answers, ScoringRules
from mdl_toolkit.evaluation.bootstrap import SumBasedMetric
from mdl_toolkit.evaluation.text_metrics import ratio
from mdl_toolkit.i18n import Localized


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort the distinct names, digits in them by their value."""

    def key(name: str) -> tuple[list[str], str]:
        parts = re.split(r"(\d+)", name)
        return [part.zfill(20) if index % 2 else part for index, part in enumerate(parts)], name

    return sorted(set(names), key=key)


# --- one label for each row ----------------------------------------------------------------------------


def encode_labels(answers: Answers) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Number the labels of the references, and encode both sides by these numbers.

    Returns:
        The labels, sorted; `[rows]` codes of references; `[rows]` codes of predictions, the number of labels
        for a prediction that is no reference's label and for a row that failed.
    """
    references = [reference.strip() for reference in answers.references]
    labels = natural_order(references)
    codes = {label: code for code, label in enumerate(labels)}
    predicted = [codes.get(prediction.strip(), len(labels)) for prediction in answers.predictions]
    return (
        labels,
        np.array([codes[label] for label in references]),
        np.where(answers.failed, len(labels), predicted),
    )


def confusion_counts(answers: Answers) -> tuple[list[str], np.ndarray]:
    """Count how often each label was answered with each label.

    Returns:
        The labels, and `[labels, labels + 1]` counts, references first; the last column counts predictions
        that are no such label.
    """
    labels, references, predictions = encode_labels(answers)
    counts = np.zeros((len(labels), len(labels) + 1), dtype=int)
    np.add.at(counts, (references, predictions), 1)
    return labels, counts


def macro_f1(answers: Answers, _rules: ScoringRules) -> SumBasedMetric:
    """Define the mean F1 of the labels that occur among the references of the rows.

    Its statistics are sparse, `[rows, 3 * (labels + 1)]`: the label that is expected, the one that is
    predicted, and the one that is both; the last of each part is for anything that is no label.
    """
    from scipy.sparse import csr_array

    labels, references, predictions = encode_labels(answers)
    both = np.where(references == predictions, references, len(labels))
    columns = np.stack([references, predictions, both], axis=1) + np.arange(3) * (len(labels) + 1)
    rows, width = len(references), 3 * (len(labels) + 1)
    cells = (np.ones(3 * rows), columns.ravel(), np.arange(0, 3 * rows + 1, 3))

    def formula(sums: np.ndarray) -> np.ndarray:
        expected, predicted, right = np.moveaxis(sums.reshape(len(sums), 3, -1)[..., :-1], 1, 0)
        f1 = 2 * right / np.maximum(expected + predicted, 1)
        is_there = expected > 0
        return ratio(np.stack([f1.sum(axis=1, where=is_there), is_there.sum(axis=1)], axis=1))

    return SumBasedMetric(csr_array(cells, shape=(rows, width)), formula)


# --- several labels for each row -----------------------------------------------------------------------


def scored_labels(answers: Answers, row: int, rules: ScoringRules) -> dict[str, float] | None:
    """Return the labels of a prediction with their scores, 1 for each if the file has no scores.

    A label that is listed twice gets its higher score.

    Returns:
        None if the scores are not one finite number for each label.
    """
    if answers.failed[row]:
        return {}
    labels = rules.split_labels(answers.predictions[row])
    if answers.scores is None:
        return dict.fromkeys(labels, 1.0)
    with suppress(ValueError):
        scores = [*map(float, rules.split_labels(answers.scores[row]))]
        if np.isfinite(scores).all():
            return dict(sorted(zip(labels, scores, strict=True), key=itemgetter(1)))
    return None


def check_scores(path: str | Path, column: str, answers: Answers, rules: ScoringRules) -> None:
    """Check that each row of a file has a score for each label.

    Raises:
        RowsError: rows that do not, all of them.
    """
    reason = Localized(
        "expected a number for each label, separated by {separator!r}; correct it",
        separator=rules.label_separator,
    )
    lines = zip(answers.lines, answers.scores or (), strict=False)
    problems = [
        RowProblem(line, column, cell, reason)
        for row, (line, cell) in enumerate(lines)
        if scored_labels(answers, row, rules) is None
    ]
    if problems:
        raise RowsError(str(path), problems)


@dataclass(frozen=True)
class MeanAveragePrecision:
    """Compute the mean average precision of the labels that occur among the references of the rows.

    For a label, rows whose predictions do not list it rank after all that do, as ties.

    Attributes:
        expected: `[pairs, 2]` label and row, for each label of each reference, sorted.
        listed: `[pairs, 2]` label and row of each predicted label, by label, then by descending score.
        scores: `[pairs]` scores of the predicted labels.
        num_labels: number of labels.
    """

    expected: np.ndarray
    listed: np.ndarray
    scores: np.ndarray
    num_labels: int

    @classmethod
    def from_answers(cls, answers: Answers, rules: ScoringRules) -> "MeanAveragePrecision":
        """Encode the labels of all rows; predicted labels that no reference has are left out."""
        expected = [{*rules.split_labels(text)} for text in answers.references]
        labels = sorted(set().union(*expected))
        codes = {label: code for code, label in enumerate(labels)}
        listed = sorted(
            (codes[label], -score, row)
            for row in range(len(expected))
            for label, score in (scored_labels(answers, row, rules) or {}).items()
            if label in codes
        )
        pairs = sorted((codes[label], row) for row, present in enumerate(expected) for label in present)
        return cls(
            np.array(pairs, dtype=np.int64).reshape(-1, 2),
            np.array([(label, row) for label, _, row in listed], dtype=np.int64).reshape(-1, 2),
            -np.array([score for _, score, _ in listed], dtype=float),
            len(labels),
        )

    def values(self, weights: np.ndarray) -> np.ndarray:
        """Return the metric by columns of weights, `[rows, samples]` to `[samples]`."""
        bounds = [
            np.searchsorted(pairs[:, 0], np.arange(self.num_labels + 1))
            for pairs in (self.expected, self.listed)
        ]
        total, sums = weights.sum(axis=0), np.zeros((weights.shape[1], 2))
        for label in range(self.num_labels):
            expected, listed = (slice(*each[label : label + 2]) for each in bounds)
            positives, rows, scores = self.expected[expected, 1], self.listed[listed, 1], self.scores[listed]
            # Rows with equal scores share one threshold.
            thresholds = np.flatnonzero(np.diff(scores, append=-np.inf))
            hits = weights[rows] * np.isin(rows, positives)[:, None]
            everything = weights[positives].sum(axis=0)
            true_positives = np.vstack([np.cumsum(hits, axis=0)[thresholds], everything])
            predicted = np.vstack([np.cumsum(weights[rows], axis=0)[thresholds], total])
            gains = np.diff(true_positives, axis=0, prepend=0) * true_positives / np.maximum(predicted, 1)
            precision = ratio(np.stack([gains.sum(axis=0), everything], axis=1))
            sums += np.stack([np.nan_to_num(precision), np.isfinite(precision)], axis=1)
        return ratio(sums)

    def subset(self, rows: np.ndarray) -> "MeanAveragePrecision":
        """Return the metric over some of the rows."""
        is_expected, is_listed = (np.isin(pairs[:, 1], rows) for pairs in (self.expected, self.listed))
        expected, listed = self.expected[is_expected], self.listed[is_listed]
        expected[:, 1], listed[:, 1] = (np.searchsorted(rows, pairs[:, 1]) for pairs in (expected, listed))
        return replace(self, expected=expected, listed=listed, scores=self.scores[is_listed])
