"""Groups of rows, and two systems on the same rows."""

import csv
import json

import numpy as np
import pytest

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.evaluation.evaluate import evaluate
from mdl_toolkit.evaluation.render import as_text
from tests.support.runs import write_csv
from tests.support.scoring import TEXTS, labels, options

# --- groups ----------------------------------------------------------------------------------------------


def test_groups_by_columns_of_both_files(place):
    found = evaluate(options(place, group_by=("speaker", "language"), metric=("wer",)))
    assert [(group.column, group.name, group.rows, group.metrics[0].value) for group in found.groups] == [
        ("speaker", "1", 2, (1 + 1) / (6 + 3)),
        ("speaker", "2", 2, (0 + 6) / (3 + 6)),
        ("language", "en", 2, 1 / 9),
        ("language", "us", 2, 7 / 9),
    ]
    assert found.rows[2].groups == {"speaker": "1", "language": "us"}


def test_a_group_has_the_interval_of_its_rows_alone(place, tmp_path):
    (tmp_path / "alone").mkdir()
    answers, group = ["yes", "no"] * 10 + ["yes"] * 20, ["a"] * 20 + ["b"] * 20
    path = labels(tmp_path, answers, group=group)
    found = evaluate(EvaluateOptions(input=path, group_by=("group",), bootstrap=200))
    alone = labels(tmp_path / "alone", answers[20:], references=["yes", "no"] * 10)
    assert found.groups[1].metrics == evaluate(EvaluateOptions(input=alone, bootstrap=200)).metrics


def test_a_group_has_the_other_model_too(tmp_path):
    """Its difference, interval and p are those of an evaluation of its rows alone."""
    answers, others = ["yes", "no"] * 20, ["yes", "no"] * 12 + ["no", "yes"] * 8
    path = labels(tmp_path, answers, group=["a"] * 20 + ["b"] * 20)
    out = (str(tmp_path / "o.csv"), str(tmp_path / "o.json"))
    asked = {"metric": ("accuracy", "macro-f1"), "bootstrap": 100}
    found = evaluate(EvaluateOptions(
        input=path, compare=labels(tmp_path, others, "q.csv"), group_by=("group",), output=out, **asked
    ))  # fmt: skip
    (tmp_path / "alone").mkdir()
    alone = evaluate(EvaluateOptions(
        input=labels(tmp_path / "alone", answers[20:]),
        compare=labels(tmp_path / "alone", others[20:], "q.csv"), **asked,
    ))  # fmt: skip
    assert found.groups[1].metrics == alone.metrics
    assert found.groups[1].metrics[0].comparison.difference == 0.8
    assert [each.comparison.difference for each in found.groups[0].metrics] == [0, 0]
    table = as_text(found).split("\n\n")[1].splitlines()
    assert table[0].split()[2:6] == ["accuracy", "95", "%", "interval"]
    assert table[2].split()[2] == "100.00%"
    assert "+80.00%" in table[2]
    written = json.loads((tmp_path / "o.json").read_text())["groups"][1]["comparison"]["accuracy"]
    assert written["difference"]["value"] == 0.8
    with (tmp_path / "o.csv").open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["group"] == "b"]
    assert float(lines[0]["difference"]) == 0.8
    assert all(line["p_value"] for line in lines)


def test_length_in_quarters_of_characters(tmp_path):
    texts = ["a" * n for n in range(1, 101)]
    path = labels(tmp_path, texts, references=texts)
    groups = evaluate(EvaluateOptions(input=path, group_by=("length",), bootstrap=0)).groups
    assert [(group.column, group.name, group.rows) for group in groups] == [
        ("length (characters)", "1-25", 25),
        ("length (characters)", "26-50", 25),
        ("length (characters)", "51-75", 25),
        ("length (characters)", "76-100", 25),
    ]


def test_length_in_seconds_where_they_are_known_and_as_it_is_where_it_is_a_column(tmp_path):
    texts, seconds = ["a b", "c", "d e", "f"], ["0.5", "2.25", "0.5", "1e1"]
    path = labels(tmp_path, texts, references=texts, seconds=seconds)
    groups = evaluate(EvaluateOptions(input=path, group_by=("length",), bootstrap=0)).groups
    assert [(group.column, group.name, group.rows) for group in groups] == [
        ("length (seconds)", "0.5-0.5", 2),
        ("length (seconds)", "2.25-2.25", 1),
        ("length (seconds)", "10-10", 1),
    ]
    path = labels(tmp_path, texts, references=texts, seconds=seconds, length=["short", "", "short", "long"])
    groups = evaluate(EvaluateOptions(input=path, group_by=("length",), bootstrap=0)).groups
    assert [(group.name, group.rows) for group in groups] == [("", 1), ("long", 1), ("short", 2)]


# --- two systems -----------------------------------------------------------------------------------------


def test_a_comparison_of_the_same_rows(tmp_path, capsys):
    """Of 40 rows, A alone has 8 right and B alone 2: McNemar's p is 2 * (1 + 10 + 45) / 1024."""
    right = ["yes", "no"] * 20
    wrong = ["no", "yes"] * 20
    ours = [*right[:38], *wrong[38:]]
    others = [*wrong[:8], *right[8:]]
    found = evaluate(
        EvaluateOptions(
            input=labels(tmp_path, ours), compare=labels(tmp_path, others, "other.csv"),
            metric=("accuracy", "macro-f1"), bootstrap=4000,
        )
    )  # fmt: skip
    accuracy, macro = (each.comparison for each in found.metrics)
    assert accuracy.other == 0.8
    assert accuracy.difference == pytest.approx(38 / 40 - 32 / 40)
    assert accuracy.mcnemar_p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert macro.mcnemar_p_value is None
    # The sum of 40 differences of 1 (8 of them) and -1 (2), drawn again, by a plain loop.
    generator = np.random.default_rng(0)
    plain = generator.choice([1] * 8 + [-1] * 2 + [0] * 30, size=(20_000, 40)).mean(axis=1)
    low, high = np.percentile(plain, [2.5, 97.5])
    assert (accuracy.difference_low, accuracy.difference_high) == pytest.approx((low, high), abs=0.026)
    # Swapping rows at random gives each of the 10 that differ a sign: McNemar's test again.
    assert accuracy.p_value == pytest.approx(accuracy.mcnemar_p_value, abs=0.025)
    assert as_text(found).splitlines()[0].split()[-2:] == ["McNemar", "p"]


def test_a_comparison_joins_by_audio_too(place, capsys):
    rows = [{"audio": audio, "prediction": reference} for audio, reference, *_ in TEXTS[::-1]]
    write_csv(place / "perfect.csv", rows)
    found = evaluate(options(place, compare=str(place / "perfect.csv"), metric=("wer",)))
    assert found.metrics[0].comparison.other == 0
    said = capsys.readouterr().err
    assert "perfect.csv, joined by the column audio" in said
    assert said.count("empty") == 1
