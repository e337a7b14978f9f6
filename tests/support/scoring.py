"""Answers to score, scoring rules, and the value of a metric over answers."""

import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.evaluation.answers import Answers, ScoringRules
from mdl_toolkit.evaluation.bootstrap import point_estimate
from mdl_toolkit.evaluation.metrics import CORPUS_METRICS
from tests.support.runs import write_csv

TEXTS = [
    ("a.wav", "The cat sat on the mat.", "the cat sat on a mat", "en", "1"),
    ("b.wav", "Good morning, everyone!", "good morning everyone", "en", "2"),
    ("c.wav", "What a day", "what day", "us", "1"),
    ("d.wav", "nothing at all to say here", "", "us", "2"),
]
PLAIN = ScoringRules(normalize=True, is_chinese=False, is_spaceless=False, label_separator=None)
RAW = ScoringRules(normalize=False, is_chinese=False, is_spaceless=False, label_separator=None)
CHINESE = ScoringRules(normalize=True, is_chinese=True, is_spaceless=True, label_separator=None)
TAGS = ScoringRules(normalize=True, is_chinese=False, is_spaceless=False, label_separator=";")


def answers(
    pairs: Sequence[tuple[str, str]], failed: Collection[int] = (), scores: tuple[str, ...] | None = None
) -> Answers:
    """Build answers of pairs of reference and prediction; rows that failed have no prediction."""
    lost = np.array([row in failed for row in range(len(pairs))])
    predictions = tuple("" if row in failed else pair[1] for row, pair in enumerate(pairs))
    references = tuple(pair[0] for pair in pairs)
    return Answers(references, predictions, tuple(range(2, len(pairs) + 2)), lost, scores)


def metric_value(
    name: str, pairs: Sequence[tuple[str, str]], rules: ScoringRules = PLAIN, **more: Any
) -> float:
    """Compute a metric by its name over pairs of reference and prediction."""
    return point_estimate(CORPUS_METRICS[name].build(answers(pairs, **more), rules), len(pairs))


def labelled(count: int, labels: int = 5, seed: int = 0, strange: bool = True) -> list[tuple[str, str]]:
    """Draw labels and predictions, 70 % of which are right; strange ones are no label of a reference."""
    generator = random.Random(seed)
    names = [f"label {n}" for n in range(labels)]
    given = [*names, "what?"] if strange else names
    return [
        (name, name if generator.random() < 0.7 else generator.choice(given))
        for name in generator.choices(names, k=count)
    ]


def several(
    count: int, seed: int, with_scores: bool = True
) -> tuple[list[tuple[str, str]], tuple[str, ...] | None]:
    """Draw rows of up to three labels, their predictions, and scores of the predicted labels."""
    generator = random.Random(seed)
    names = [f"c{n}" for n in range(8)]
    rows: list[tuple[str, str]] = []
    scores: list[str] = []
    for _ in range(count):
        expected = generator.sample(names[:7], generator.randint(0, 3))
        given = list(
            dict.fromkeys([n for n in expected if generator.random() < 0.7] + generator.choices(names, k=2))
        )
        rows.append(("; ".join(expected), ";".join(given)))
        scores.append(";".join(str(round(generator.random(), 1)) for _ in given))
    return rows, tuple(scores) if with_scores else None


def labels(
    folder: Path,
    answers: Sequence[str],
    name: str = "p.csv",
    references: Sequence[str] | None = None,
    **columns: Sequence[str],
) -> str:
    """Write a CSV of predictions with their references, `yes` and `no` by turns if none are given."""
    references = references or ["yes", "no"] * (len(answers) // 2)
    rows = [
        {"reference": reference, "prediction": answer, **{key: cells[row] for key, cells in columns.items()}}
        for row, (reference, answer) in enumerate(zip(references, answers, strict=True))
    ]
    return str(write_csv(folder / name, rows))


def options(place: Path, **more: Any) -> EvaluateOptions:
    """The options for the files of the fixture `place`."""
    return EvaluateOptions(
        **{"input": str(place / "p.csv"), "reference": str(place / "r.csv"), "bootstrap": 50, **more}
    )
