"""Every metric against the library that is known for it, and by hand; over any rows and weights."""

import random

import jiwer
import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, f1_score

from mdl_toolkit.config.types import METRIC_NAMES
from mdl_toolkit.evaluation.answers import Answers, ScoringRules, are_chinese, correct_rows
from mdl_toolkit.evaluation.bootstrap import point_estimate
from mdl_toolkit.evaluation.label_metrics import confusion_counts, natural_order
from mdl_toolkit.evaluation.metrics import CORPUS_METRICS, library_versions
from mdl_toolkit.evaluation.text_metrics import TEXT_METRICS, edits, normalized

PLAIN = ScoringRules(normalize=True, is_chinese=False, label_separator=None)
RAW = ScoringRules(normalize=False, is_chinese=False, label_separator=None)
CHINESE = ScoringRules(normalize=True, is_chinese=True, label_separator=None)
TAGS = ScoringRules(normalize=True, is_chinese=False, label_separator=";")
ENGLISH = [
    ("The cat sat on the mat.", "the cat sat on a mat"),
    ("It's half-past ten!", "its halfpast ten"),
    ("one two three", ""),
    ("", "a word too many"),
    ("A quick brown fox jumps over it", "a quick brown fox jumped over it today"),
    ("same", "same"),
]
HAN = [
    ("今天天气很好，我们出去走走。", "今天天气好我们出去走一走"),
    ("你好 世界", "你好世界"),
    ("再见", "在见"),
]


def answers(pairs, failed=(), scores=None):
    lost = np.array([row in failed for row in range(len(pairs))])
    predictions = tuple("" if row in failed else pair[1] for row, pair in enumerate(pairs))
    references = tuple(pair[0] for pair in pairs)
    return Answers(references, predictions, tuple(range(2, len(pairs) + 2)), lost, scores)


def figure(name, pairs, rules=PLAIN, **more):
    return point_estimate(CORPUS_METRICS[name].build(answers(pairs, **more), rules), len(pairs))


def labelled(count, labels=5, seed=0, strange=True):
    generator = random.Random(seed)
    names = [f"label {n}" for n in range(labels)]
    given = [*names, "what?"] if strange else names
    return [
        (name, name if generator.random() < 0.7 else generator.choice(given))
        for name in generator.choices(names, k=count)
    ]


def test_every_name_of_the_option_is_a_metric():
    assert tuple(CORPUS_METRICS) == METRIC_NAMES
    assert set(TEXT_METRICS) <= set(CORPUS_METRICS)


# --- texts -----------------------------------------------------------------------------------------------


def test_error_rates_by_hand():
    pairs = [("The cat sat.", "the dog sat down"), ("hello", "hello"), ("a b", "")]
    assert figure("wer", pairs) == (2 + 0 + 2) / (3 + 1 + 2)
    assert figure("cer", [("狗在叫。", "猫在 叫"), ("很好", "很好吗")], CHINESE) == (1 + 1) / (3 + 2)


@pytest.mark.parametrize("pairs", [ENGLISH, HAN, ENGLISH + HAN])
def test_error_rates_are_those_of_jiwer(pairs):
    tidy = [[normalized(text) for text in column] for column in zip(*pairs, strict=True)]
    assert figure("wer", pairs) == pytest.approx(jiwer.wer(*tidy))
    letters = [[text.replace(" ", "") for text in column] for column in tidy]
    assert figure("cer", pairs) == pytest.approx(jiwer.cer(*letters))
    raw = [list(column) for column in zip(*pairs, strict=True)]
    assert figure("wer", pairs, RAW) == pytest.approx(jiwer.wer(*raw))
    assert figure("cer", pairs, RAW) == pytest.approx(jiwer.cer(*raw))


def test_the_kinds_of_edits():
    rows = [("a b c d", "a x c d e"), ("a b c", "c"), ("", "x y"), ("a", "a")]
    counts = edits([row[0] for row in rows], [row[1] for row in rows], "word")
    assert counts.tolist() == [[1, 0, 1, 4], [0, 2, 0, 3], [0, 0, 2, 0], [0, 0, 0, 1]]


def test_white_space_of_any_kind_separates_words_even_without_normalisation():
    assert figure("wer", [("a\tb\n c", " a b  c ")], RAW) == 0


@pytest.mark.parametrize("name", ["wer", "cer", "accuracy"])
def test_training_counts_the_same(name):
    """`--eval-metric` of train and `--metric` of evaluate are one definition."""
    parts = np.array([TEXT_METRICS[name].count(*pair) for pair in ENGLISH + HAN])
    assert figure(name, ENGLISH + HAN) == pytest.approx(parts[:, 0].sum() / parts[:, 1].sum())


def test_no_reference_word_at_all_leaves_error_rates_undefined():
    assert np.isnan(figure("wer", [("", "a"), ("。", "b")]))


@pytest.mark.parametrize(
    ("pairs", "rules"),
    [(ENGLISH, PLAIN), (HAN, CHINESE), (ENGLISH + HAN, PLAIN), ([("a", "b")], PLAIN), ([("", "")], PLAIN)],
)
def test_bleu_and_chrf_are_those_of_sacrebleu(pairs, rules):
    references, predictions = zip(*pairs, strict=True)
    bleu = sacrebleu.corpus_bleu(predictions, [references], tokenize=rules.bleu_tokenizer).score
    assert figure("bleu", pairs, rules) == pytest.approx(bleu, rel=0, abs=1e-9)
    chrf = sacrebleu.corpus_chrf(predictions, [references]).score
    assert figure("chrf", pairs, rules) == pytest.approx(chrf, rel=0, abs=1e-9)


def test_chinese_is_tokenised_as_chinese():
    assert figure("bleu", HAN, CHINESE) > 10 * figure("bleu", HAN)


def test_bleu_by_hand():
    """Precisions 5/6, 3/5, 1/4 and, of no match among 3, 1/(2*3); lengths are equal."""
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert figure("bleu", [("the cat sat on a mat", "the cat sat at a mat")]) == pytest.approx(expected)


def test_exact_match_is_after_normalisation_and_accuracy_before():
    pairs = [("Yes.", "yes"), ("no", " no\n"), ("a", "b")]
    assert figure("exact-match", pairs) == pytest.approx(2 / 3)
    assert figure("exact-match", pairs, RAW) == figure("accuracy", pairs) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["今天天气好"], True),
        (["hello"], False),
        (["打开 Wi-Fi 和蓝牙开关"], True),
        (["12", ""], False),
        (["你 OK"], False),
    ],
)
def test_which_texts_are_chinese(texts, expected):
    assert are_chinese(texts) is expected


# --- labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strange", [False, True])
def test_labels_against_scikit_learn(strange):
    pairs = labelled(300, strange=strange)
    references, predictions = zip(*pairs, strict=True)
    labels = sorted(set(references))
    assert figure("accuracy", pairs) == pytest.approx(accuracy_score(references, predictions))
    expected = f1_score(references, predictions, labels=labels, average="macro")
    assert figure("macro-f1", pairs) == pytest.approx(expected)
    names, counts = confusion_counts(answers(pairs))
    assert names == labels
    assert np.array_equal(
        counts[:, :-1], confusion_matrix(references, predictions, labels=[*labels, "what?"])[:5, :5]
    )
    assert counts.sum() == 300


def test_macro_f1_by_hand():
    """a: precision 1/2, recall 1; b: 1 and 1/2; both 2/3. An answer that is no label only costs recall."""
    assert figure("macro-f1", [("a", "a"), ("b", "a"), ("b", "b")]) == pytest.approx(2 / 3)
    assert figure("macro-f1", [("a", "a"), ("b", "?"), ("b", "b")]) == pytest.approx((1 + 2 / 3) / 2)


def test_a_row_that_failed_is_wrong_whatever_its_reference():
    pairs = [("", "x"), ("a", "a"), ("b c", "b c")]
    for name in ("accuracy", "exact-match"):
        assert figure(name, pairs, failed={0, 2}) == pytest.approx(1 / 3)
    assert figure("wer", pairs, failed={0, 2}) == 2 / 3
    assert confusion_counts(answers(pairs, failed={0}))[1][0].tolist() == [0, 0, 0, 1]


# --- several labels --------------------------------------------------------------------------------------


def several(count, seed, with_scores=True):
    generator = random.Random(seed)
    names = [f"c{n}" for n in range(8)]
    rows, scores = [], []
    for _ in range(count):
        expected = generator.sample(names[:7], generator.randint(0, 3))
        given = list(
            dict.fromkeys([n for n in expected if generator.random() < 0.7] + generator.choices(names, k=2))
        )
        rows.append(("; ".join(expected), ";".join(given)))
        scores.append(";".join(str(round(generator.random(), 1)) for _ in given))
    return rows, tuple(scores) if with_scores else None


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
    assert figure("map", rows, TAGS, scores=("0.9", "0.4;0.2", "")) == pytest.approx(expected)


def test_a_label_given_twice_counts_with_its_higher_score():
    rows = [("x", "x;x"), ("y", "x")]
    assert figure("map", rows, TAGS, scores=("0.1;0.9", "0.5")) == figure(
        "map", rows, TAGS, scores=("0.9;0.1", "0.5")
    )
    assert figure("map", rows, TAGS, scores=("0.1;0.9", "0.5")) == pytest.approx((1 + 1 / 2) / 2)


def test_the_same_labels_in_any_order_are_right():
    rows = [("a; b", "b;a"), ("a;b", "a"), ("", ""), ("a", "a;b")]
    assert correct_rows(answers(rows), TAGS, "same labels").tolist() == [True, False, True, False]


# --- any rows, any weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_weights_are_repetitions_and_parts_are_rows(name):
    """What intervals and groups rest on: the figure by weights is the figure of the rows written out."""
    rows, scores = several(40, 2) if name == "map" else (ENGLISH + HAN + labelled(31, 3), None)
    rules = TAGS if name == "map" else PLAIN
    measure = CORPUS_METRICS[name].build(answers(rows, scores=scores), rules)
    weights = np.random.default_rng(1).multinomial(40, [1 / 40] * 40, size=5).T
    for column, value in zip(weights.T, measure.values(weights.astype(float)), strict=True):
        places = np.repeat(np.arange(40), column)
        again = [rows[place] for place in places]
        cells = tuple(scores[place] for place in places) if scores else None
        assert value == pytest.approx(figure(name, again, rules, scores=cells)), name
    part = np.array([0, 2, 3, 7, 12, 30, 39])
    cells = tuple(scores[place] for place in part) if scores else None
    expected = figure(name, [rows[place] for place in part], rules, scores=cells)
    assert point_estimate(measure.subset(part), 7) == pytest.approx(expected)


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


def test_versions_are_told():
    assert library_versions()["sacrebleu"] == sacrebleu.__version__
    assert library_versions()["numpy"] == np.__version__
