"""Metrics of labels against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, f1_score

from mdl_toolkit.evaluation.bootstrap import point_estimate
from mdl_toolkit.evaluation.label_metrics import confusion_counts, natural_order
from mdl_toolkit.evaluation.metrics import CORPUS_METRICS
from tests.support.scoring import TAGS, answers, labelled, metric_value, several

# --- one label ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strange", [False, True])
def test_labels_against_scikit_learn(strange):
    pairs = labelled(300, strange=strange)
    references, predictions = zip(*pairs, strict=True)
    labels = sorted(set(references))
    assert metric_value("accuracy", pairs) == pytest.approx(accuracy_score(references, predictions))
    expected = f1_score(references, predictions, labels=labels, average="macro")
    assert metric_value("macro-f1", pairs) == pytest.approx(expected)
    names, counts = confusion_counts(answers(pairs))
    assert names == labels
    assert np.array_equal(
        counts[:, :-1], confusion_matrix(references, predictions, labels=[*labels, "what?"])[:5, :5]
    )
    assert counts.sum() == 300


def test_macro_f1_by_hand():
    """a: precision 1/2, recall 1; b: 1 and 1/2; both 2/3. An answer that is no label only costs recall."""
    assert metric_value("macro-f1", [("a", "a"), ("b", "a"), ("b", "b")]) == pytest.approx(2 / 3)
    assert metric_value("macro-f1", [("a", "a"), ("b", "?"), ("b", "b")]) == pytest.approx((1 + 2 / 3) / 2)


# --- several labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_scores", [True, False])
def test_map_is_the_mean_of_scikit_learns_average_precisions(with_scores):
    """Also under weights and over some of the rows; equal scores are common, and so are labels not listed."""
    rows, scores = several(200, 1, with_scores)
    measure = CORPUS_METRICS["map"].build(answers(rows, scores=scores), TAGS)
    chosen = np.sort(np.random.default_rng(5).choice(200, 80, replace=False))
    weights = np.random.default_rng(6).integers(0, 3, size=(200, 4)).astype(float)

    def expected(places, weight):
        values = []
        for name in (f"c{n}" for n in range(7)):
            truth = [name in [part.strip() for part in rows[p][0].split(";")] for p in places]
            listed = [
                dict(zip(rows[p][1].split(";"), (scores or ["1;" * 9] * 200)[p].split(";"), strict=False))
                for p in places
            ]
            values.append(
                average_precision_score(
                    truth, [float(each.get(name, -1)) for each in listed], sample_weight=weight
                )
            )
        return np.mean(values)

    everywhere = range(200)
    assert point_estimate(measure, 200) == pytest.approx(expected(everywhere, None))
    assert measure.values(weights) == pytest.approx([expected(everywhere, weights[:, n]) for n in range(4)])
    assert point_estimate(measure.subset(chosen), 80) == pytest.approx(expected(chosen, None))


def test_map_by_hand():
    """Of x: row 1 right (0.9), row 2 wrong (0.4), row 3 right, not listed: 1/2 * 1 + 1/2 * 2/3. Of y: 1."""
    rows = [("x", "x"), ("y", "x;y"), ("x", "")]
    expected = ((1 / 2 + 1 / 2 * 2 / 3) + 1) / 2
    assert metric_value("map", rows, TAGS, scores=("0.9", "0.4;0.2", "")) == pytest.approx(expected)


def test_a_label_given_twice_counts_with_its_higher_score():
    rows = [("x", "x;x"), ("y", "x")]
    assert metric_value("map", rows, TAGS, scores=("0.1;0.9", "0.5")) == metric_value(
        "map", rows, TAGS, scores=("0.9;0.1", "0.5")
    )
    assert metric_value("map", rows, TAGS, scores=("0.1;0.9", "0.5")) == pytest.approx((1 + 1 / 2) / 2)


def test_names_in_order():
    assert natural_order(["b", "s10", "s2", "aa", "s2", "", "1", "01"]) == [
        "",
        "01",
        "1",
        "aa",
        "b",
        "s2",
        "s10",
    ]
