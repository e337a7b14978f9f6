"""The metrics of `evaluate`, each as a function of any rows. No files.

Edits come from rapidfuzz, n-grams and the formula of BLEU from sacrebleu.
Statistics are kept for each row, so that intervals and groups cost next to nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from mdl_toolkit.evaluation.answers import Answers, ScoringRules, correct_rows
from mdl_toolkit.evaluation.bootstrap import SumBasedMetric
from mdl_toolkit.evaluation.label_metrics import MeanAveragePrecision, macro_f1
from mdl_toolkit.evaluation.text_metrics import CHARACTER, WORD, edits, ratio

# Answers and scoring rules to a `bootstrap.Statistic` over their rows.
Builder = Callable[[Answers, ScoringRules], Any]


def _proportion(criterion: str) -> Builder:
    def build(answers: Answers, rules: ScoringRules) -> SumBasedMetric:
        is_right = correct_rows(answers, rules, criterion)
        return SumBasedMetric(np.stack([is_right, np.ones_like(is_right)], axis=1).astype(float), ratio)

    return build


def _error_rate(unit: str) -> Builder:
    def build(answers: Answers, rules: ScoringRules) -> SumBasedMetric:
        counts = edits(answers.references, answers.predictions, unit, normalize=rules.normalize)
        return SumBasedMetric(counts, ratio)

    return build


def bleu(answers: Answers, rules: ScoringRules) -> SumBasedMetric:
    """Count n-grams by sacrebleu, `[rows, 2 + 2 * orders]`: two lengths, n-grams in both, predicted ones."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=rules.bleu_tokenizer, effective_order=True)
    texts = zip(answers.predictions, answers.references, strict=True)
    scores = [metric.sentence_score(prediction, [reference]) for prediction, reference in texts]
    statistics = [[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores]

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

    return SumBasedMetric(np.array(statistics, dtype=float), formula)


def chrf(answers: Answers, _rules: ScoringRules) -> SumBasedMetric:
    """Count character n-grams by sacrebleu, `[rows, 3 * orders]`: predicted, expected, in both."""
    from sacrebleu.metrics import CHRF
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    statistics = []
    for texts in zip(answers.predictions, answers.references, strict=True):
        orders = zip(*(extract_all_char_ngrams(text, CHRF.CHAR_ORDER) for text in texts), strict=True)
        counts = [
            (predicted.total() if expected else 0, expected.total(), (predicted & expected).total())
            for predicted, expected in orders
        ]
        statistics.append(counts)

    def formula(sums: np.ndarray) -> np.ndarray:
        """Return chrF2 (Popović 2015) over the orders that both sides have; recall counts twice."""
        predicted, expected, both = np.moveaxis(sums.reshape(len(sums), -1, 3), -1, 0)
        has_order = (predicted > 0) & (expected > 0)
        orders = np.maximum(has_order.sum(axis=1), 1)
        precision, recall = (
            np.where(has_order, both / np.maximum(count, 1), 0).sum(axis=1) / orders
            for count in (predicted, expected)
        )
        total = 4 * precision + recall
        score: np.ndarray = 100 * 5 * precision * recall / np.where(total > 0, total, 1)
        return score

    return SumBasedMetric(np.array(statistics, dtype=float).reshape(len(statistics), -1), formula)


@dataclass(frozen=True)
class CorpusMetric:
    """Define a metric of `evaluate`.

    Attributes:
        title: its name in tables.
        build: makes a `bootstrap.Statistic` over the rows of answers.
        more_is_better: whether a larger value is the better one.
        is_share: the value is a share and shown in percent; else it is out of 100 already.
        is_proportion: the value is the share of rows that are right: the first column of the statistics is 1
            for each right row, the second is 1 for every row.
    """

    title: str
    build: Builder
    more_is_better: bool = True
    is_share: bool = True
    is_proportion: bool = False


CORPUS_METRICS = {
    "accuracy": CorpusMetric("accuracy", _proportion("accuracy"), is_proportion=True),
    "exact-match": CorpusMetric("exact match", _proportion("exact-match"), is_proportion=True),
    "macro-f1": CorpusMetric("macro F1", macro_f1),
    "wer": CorpusMetric("WER", _error_rate(WORD), more_is_better=False),
    "cer": CorpusMetric("CER", _error_rate(CHARACTER), more_is_better=False),
    "bleu": CorpusMetric("BLEU", bleu, is_share=False),
    "chrf": CorpusMetric("chrF", chrf, is_share=False),
    "map": CorpusMetric("mAP", MeanAveragePrecision.from_answers),
}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute metrics and intervals."""
    names = ("rapidfuzz", "sacrebleu", "scipy", "numpy")
    return {name: version(name) for name in names}
