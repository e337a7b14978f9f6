"""Every metric against the library that is known for it, and by hand; over any rows and weights."""

import jiwer
import numpy as np
import pytest
import sacrebleu

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.config.types import METRIC_NAMES
from mdl_toolkit.evaluation.answers import ScoringRules, correct_rows
from mdl_toolkit.evaluation.bootstrap import point_estimate
from mdl_toolkit.evaluation.label_metrics import confusion_counts
from mdl_toolkit.evaluation.metrics import CORPUS_METRICS, library_versions
from mdl_toolkit.evaluation.text_metrics import CHARACTER, TEXT_METRICS, WORD, edits, normalized
from tests.support.scoring import CHINESE, PLAIN, RAW, TAGS, answers, labelled, metric_value, several

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


def test_every_name_of_the_option_is_a_metric():
    assert tuple(CORPUS_METRICS) == METRIC_NAMES
    assert set(TEXT_METRICS) <= set(CORPUS_METRICS)


# --- texts -----------------------------------------------------------------------------------------------


def test_error_rates_by_hand():
    pairs = [("The cat sat.", "the dog sat down"), ("hello", "hello"), ("a b", "")]
    assert metric_value("wer", pairs) == (2 + 0 + 2) / (3 + 1 + 2)
    assert metric_value("cer", [("狗在叫。", "猫在 叫"), ("很好", "很好吗")], CHINESE) == (1 + 1) / (3 + 2)


@pytest.mark.parametrize("pairs", [ENGLISH, HAN, ENGLISH + HAN])
def test_error_rates_are_those_of_jiwer(pairs):
    tidy = [[normalized(text) for text in column] for column in zip(*pairs, strict=True)]
    assert metric_value("wer", pairs) == pytest.approx(jiwer.wer(*tidy))
    letters = [[text.replace(" ", "") for text in column] for column in tidy]
    assert metric_value("cer", pairs) == pytest.approx(jiwer.cer(*letters))
    raw = [list(column) for column in zip(*pairs, strict=True)]
    assert metric_value("wer", pairs, RAW) == pytest.approx(jiwer.wer(*raw))
    assert metric_value("cer", pairs, RAW) == pytest.approx(jiwer.cer(*raw))


def test_edits_of_each_row():
    rows = [("a b c d", "a x c d e"), ("a b c", "c"), ("", "x y"), ("a", "a")]
    counts = edits([row[0] for row in rows], [row[1] for row in rows], "word")
    assert counts.tolist() == [[2, 4], [2, 3], [2, 0], [0, 1]]


@pytest.mark.timeout(60)
def test_edits_of_long_texts_take_time_by_their_length():
    """Of 4 MB each, every hundredth character another one; at once 10^13 pairs would take hours."""
    draw = np.random.default_rng(1)
    reference = draw.integers(0, 26, 4_000_000, dtype=np.uint8) + ord("a")
    prediction = reference.copy()
    prediction[::100] = ord("z") + 1
    texts = [[bytes(side).decode("latin-1")] for side in (reference, prediction)]
    assert edits(*texts, CHARACTER, normalize=False).tolist() == [[40_000, 4_000_000]]


def test_pieces_never_count_too_few_edits(monkeypatch):
    draw = np.random.default_rng(2)
    words = [[" ".join(draw.choice([*"abc"], size)) for size in draw.integers(0, 60, 200)] for _ in range(2)]
    exact = edits(*words, WORD)
    monkeypatch.setattr("mdl_toolkit.evaluation.text_metrics.MOST_PAIRS", 500)
    bound = edits(*words, WORD)
    assert bound[:, 1].tolist() == exact[:, 1].tolist()
    assert (bound[:, 0] >= exact[:, 0]).all()
    assert 1 < bound[:, 0].sum() / exact[:, 0].sum() < 1.1


def test_white_space_of_any_kind_separates_words_even_without_normalisation():
    assert metric_value("wer", [("a\tb\n c", " a b  c ")], RAW) == 0


@pytest.mark.parametrize("name", ["wer", "cer", "accuracy"])
def test_training_counts_the_same(name):
    """`--eval-metric` of train and `--metric` of evaluate are one definition."""
    parts = np.array([TEXT_METRICS[name].count(*pair) for pair in ENGLISH + HAN])
    assert metric_value(name, ENGLISH + HAN) == pytest.approx(parts[:, 0].sum() / parts[:, 1].sum())


def test_no_reference_word_at_all_leaves_error_rates_undefined():
    assert np.isnan(metric_value("wer", [("", "a"), ("。", "b")]))


@pytest.mark.parametrize(
    ("pairs", "rules"),
    [(ENGLISH, PLAIN), (HAN, CHINESE), (ENGLISH + HAN, PLAIN), ([("a", "b")], PLAIN), ([("", "")], PLAIN)],
)
def test_bleu_and_chrf_are_those_of_sacrebleu(pairs, rules):
    references, predictions = zip(*pairs, strict=True)
    bleu = sacrebleu.corpus_bleu(predictions, [references], tokenize=rules.bleu_tokenizer).score
    assert metric_value("bleu", pairs, rules) == pytest.approx(bleu, rel=0, abs=1e-9)
    chrf = sacrebleu.corpus_chrf(predictions, [references]).score
    assert metric_value("chrf", pairs, rules) == pytest.approx(chrf, rel=0, abs=1e-9)


def test_chinese_is_tokenised_as_chinese():
    assert metric_value("bleu", HAN, CHINESE) > 10 * metric_value("bleu", HAN)


def test_thai_is_tokenised_by_character():
    pairs = [("สวัสดีครับ", "สวัสดีค่ะ")]
    rules = ScoringRules.of([pairs[0][0]], EvaluateOptions(input="p.csv"))
    expected = sacrebleu.corpus_bleu([pairs[0][1]], [[pairs[0][0]]], tokenize="char").score
    assert metric_value("bleu", pairs, rules) == pytest.approx(expected)
    assert expected > 10


def test_bleu_by_hand():
    """Precisions 5/6, 3/5, 1/4 and, of no match among 3, 1/(2*3); lengths are equal."""
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert metric_value("bleu", [("the cat sat on a mat", "the cat sat at a mat")]) == pytest.approx(expected)


def test_exact_match_is_after_normalisation_and_accuracy_before():
    pairs = [("Yes.", "yes"), ("no", " no\n"), ("a", "b")]
    assert metric_value("exact-match", pairs) == pytest.approx(2 / 3)
    assert metric_value("exact-match", pairs, RAW) == metric_value("accuracy", pairs) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("texts", "is_chinese", "is_spaceless"),
    [
        (["今天天气好"], True, True),
        (["打开 Wi-Fi 和蓝牙开关"], True, True),
        (["こんにちは、元気ですか"], False, True),
        (["ｺﾝﾆﾁﾊ"], False, True),
        (["สวัสดีครับ ยินดีที่ได้รู้จัก"], False, True),
        (["ສະບາຍດີ"], False, True),
        (["សួស្តី"], False, True),
        (["မင်္ဂလာပါ"], False, True),
        (["བཀྲ་ཤིས་བདེ་ལེགས"], False, True),
        (["안녕하세요 반갑습니다"], False, False),
        (["xin chào", "नमस्ते दुनिया", "مرحبا بالعالم"], False, False),
        (["hello"], False, False),
        (["12", ""], False, False),
        (["你 OK"], False, False),
    ],
)
def test_which_texts_are_chinese_and_which_have_no_spaces(texts, is_chinese, is_spaceless):
    rules = ScoringRules.of(texts, EvaluateOptions(input="p.csv"))
    assert (rules.is_chinese, rules.is_spaceless) == (is_chinese, is_spaceless)
    assert rules.unit == ("character" if is_spaceless else "word")


def test_a_row_that_failed_is_wrong_whatever_its_reference():
    pairs = [("", "x"), ("a", "a"), ("b c", "b c")]
    for name in ("accuracy", "exact-match"):
        assert metric_value(name, pairs, failed={0, 2}) == pytest.approx(1 / 3)
    assert metric_value("wer", pairs, failed={0, 2}) == 2 / 3
    assert confusion_counts(answers(pairs, failed={0}))[1][0].tolist() == [0, 0, 0, 1]


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
        assert value == pytest.approx(metric_value(name, again, rules, scores=cells)), name
    part = np.array([0, 2, 3, 7, 12, 30, 39])
    cells = tuple(scores[place] for place in part) if scores else None
    expected = metric_value(name, [rows[place] for place in part], rules, scores=cells)
    assert point_estimate(measure.subset(part), 7) == pytest.approx(expected)


def test_versions_are_told():
    assert library_versions()["sacrebleu"] == sacrebleu.__version__
    assert library_versions()["numpy"] == np.__version__
