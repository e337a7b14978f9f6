"""The command: what is compared with what, what is told, and what is written."""

import csv
import json
import subprocess
import sys

import pytest

from mdl_toolkit.cli.main import run
from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.config.yaml import from_mapping, read_settings
from mdl_toolkit.errors import InputError
from mdl_toolkit.evaluation.evaluate import evaluate
from mdl_toolkit.evaluation.render import as_text
from tests.support.runs import files_below, write_csv
from tests.support.scoring import TEXTS, labels, options

# --- what is compared ------------------------------------------------------------------------------------


def test_answers_of_inference_against_the_csv_they_were_asked_from(place, capsys):
    found = evaluate(options(place))
    assert found.value("wer") == (1 + 0 + 1 + 6) / (6 + 3 + 3 + 6)
    first = found.rows[0]
    assert (first.line, first.reference, first.prediction) == (2, TEXTS[0][1], TEXTS[0][2])
    assert (first.errors, first.length, first.is_right) == (1, 6, False)
    assert first.cells == {"audio": "a.wav", "prediction": TEXTS[0][2], "speaker": "1", "language": "en"}
    assert [row.is_right for row in found.rows] == [False, True, False, False]
    assert [row.errors for row in found.rows] == [1, 0, 1, 6]
    said = capsys.readouterr().err
    assert "r.csv, joined by the column audio" in said
    assert "metrics chosen from the data: wer, cer; --metric chooses others" in said
    assert "empty predictions: 1" in said
    assert "compared after NFKC, case folding" in said


def test_a_column_of_the_same_file(tmp_path):
    path = labels(tmp_path, ["yes", "no", "no", "no"])
    found = evaluate(EvaluateOptions(input=path))
    assert [figure.metric for figure in found.metrics] == ["accuracy", "macro-f1"]
    assert found.value("accuracy") == 0.75
    assert found.confusion.labels == ("no", "yes")
    assert found.confusion.counts == ((2, 0, 0), (1, 1, 0))
    assert found.settings["right_by"] == "accuracy"


def test_the_reference_column_by_name(place):
    rows = [
        {"prediction": "a", "gold": "a", "reference": "b"},
        {"prediction": "b", "gold": "b", "reference": "c"},
    ]
    path = str(write_csv(place / "both.csv", rows))
    asked = {"input": path, "reference": None, "metric": ("accuracy",)}
    assert evaluate(options(place, **asked)).value("accuracy") == 0
    assert evaluate(options(place, **asked, reference_column="gold")).value("accuracy") == 1
    other = {**asked, "input": str(write_csv(place / "q.csv", [{"prediction": "b"}, {"prediction": "c"}]))}
    assert evaluate(options(place, **{**other, "reference": path})).value("accuracy") == 1


def test_names_of_columns_in_another_case_or_spacing(place, capsys):
    """In either file, and in options, which name a column as the file has it or as it is read."""
    more = {"group_by": ("language",), "score_column": "confidence", "metric": ("accuracy", "cer")}
    answers = [{"audio": a, "prediction": p, "confidence": "0.5"} for a, _, p, _, _ in TEXTS]
    references = [{"audio": a, "reference": r, "language": x} for a, r, _, x, _ in TEXTS]
    write_csv(place / "p.csv", answers)
    write_csv(place / "r.csv", references)
    expected = evaluate(options(place, **more))
    capsys.readouterr()

    spelled = {
        "audio": "Audio",
        "prediction": " PREDICTION",
        "reference": "Reference",
        "language": "Language",
    }

    def renamed(rows):
        return [{spelled.get(name, name): cell for name, cell in row.items()} for row in rows]

    write_csv(place / "p.csv", renamed(answers))
    write_csv(place / "r.csv", renamed(references))
    for column in (None, "Reference", "reference", "REFERENCE"):
        other = {**more, "group_by": ("LANGUAGE",), "score_column": "Confidence", "reference_column": column}
        found = evaluate(options(place, **other))
        assert found.metrics == expected.metrics
        assert [(group.name, group.metrics) for group in found.groups] == [
            (group.name, group.metrics) for group in expected.groups
        ]
        said = capsys.readouterr().err
        for file, name in (("p", "audio"), ("p", "prediction"), ("r", "audio"), ("r", "reference")):
            line = f"{place / file}.csv: the column {spelled[name]!r} is read as {name}\n"
            assert said.count(line) == 1, name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"reference": None},
            "there is no column 'reference' with references; name it with --reference-column",
        ),
        ({"reference": None, "reference_column": "prediction"}, "would be compared with itself"),
        ({"reference": "p.csv"}, "would be compared with itself"),
        ({"reference_column": "gold"}, "the column 'gold' is missing"),
        ({"compare": "none.csv"}, "none.csv: there is no such file"),
        ({"group_by": ("dialect",)}, "there is no such column; there are 'audio', 'prediction', 'language'"),
        ({"score_column": "confidence"}, "the column 'confidence' is missing"),
        ({"output": ("p.csv",)}, "inside the input"),
        ({"output": ("folder.csv",)}, "a folder is there"),
        ({"output": ("r.csv/x/y.json",)}, "inside the input"),
        ({"report": "r.csv"}, "--report r.csv: it is, holds or lies inside the input "),
        ({"output": ("x.csv",), "report": "x.csv"}, "it is, holds or lies inside --output x.csv;"),
    ],
)
def test_what_cannot_be_done(place, monkeypatch, capsys, more, message):
    (place / "folder.csv").mkdir()
    monkeypatch.chdir(place)
    with pytest.raises(InputError) as refused:
        evaluate(options(place, **more))
    assert message in str(refused.value)


def test_exit_statuses(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run(["evaluate", "p.csv", "--reference", "r.csv"]) == 0
    assert run(["evaluate", "p.csv"]) == 1
    assert run(["evaluate", "p.csv", "--reference", "r.csv", "--metric", "map"]) == 2
    assert run(["evaluate", "p.csv", "--output", "x.txt"]) == 2
    assert run(["evaluate"]) == 2
    assert files_below(place) == {"p.csv", "r.csv"}


def test_the_table_is_for_standard_output_and_all_else_is_not(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    run(["evaluate", "p.csv", "--reference", "r.csv", "--group-by", "speaker"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["4", "rows", "value", "95", "%", "interval"]
    assert out[1].split()[:2] == ["WER", "44.44%"]
    assert out[4].split()[:3] == ["speaker", "rows", "WER"]


def test_nothing_heavy_is_imported(place):
    code = (
        "import sys; from mdl_toolkit.cli.main import run; "
        f"assert run(['evaluate', {str(place / 'p.csv')!r}, '--reference', {str(place / 'r.csv')!r}]) == 0; "
        "assert not {'torch', 'transformers', 'sklearn', 'sacrebleu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


# --- metrics, normalisation, failures --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["yes", "no", "yes", "no"], ("accuracy", "macro-f1")),
        (["one text", "another one", "and a third"], ("wer", "cer")),
        (["今天天气很好", "明天见", "打开空调"], ("cer",)),
        (["おはようございます", "また明日", "エアコンをつけて"], ("cer",)),
        ([f"label {n}" for n in range(51)] * 2, ("wer", "cer")),
    ],
)
def test_metrics_follow_from_the_data(tmp_path, references, expected):
    path = labels(tmp_path, references, references=references)
    found = evaluate(EvaluateOptions(input=path, bootstrap=0))
    assert tuple(figure.metric for figure in found.metrics) == expected
    assert (found.confusion is not None) == (expected[0] == "accuracy")
    assert all(figure.low is None for figure in found.metrics)


def test_normalisation_can_be_switched_off(place, capsys):
    raw = evaluate(options(place, normalize=False, metric=("wer", "exact-match")))
    assert raw.value("wer") == (3 + 3 + 2 + 6) / 18
    assert raw.value("exact-match") == 0
    assert raw.settings["normalize"] is False
    assert "compared as they are" in capsys.readouterr().err
    assert evaluate(options(place, metric=("exact-match",))).value("exact-match") == 0.25


@pytest.mark.parametrize(
    ("references", "is_said"), [(["今天天气很好", "再见"], True), (["one two"] * 2, False)]
)
def test_word_errors_of_a_language_without_spaces_are_warned_of(tmp_path, capsys, references, is_said):
    path = labels(tmp_path, references, references=references)
    evaluate(EvaluateOptions(input=path, metric=("wer",), bootstrap=0))
    assert ("warning: WER counts what stands between spaces" in capsys.readouterr().err) is is_said


def test_the_most_frequent_answer_stands_beside_accuracy(tmp_path, capsys):
    references = ["yes"] * 3 + ["no"] + ["x" * 1000] * 6
    path, out = labels(tmp_path, ["yes"] * 10, references=references), tmp_path / "o.json"
    found = evaluate(EvaluateOptions(input=path, metric=("accuracy",), output=(str(out),)))
    assert found.most_frequent == ("x" * 1000, 0.6)
    assert json.loads(out.read_text())["most_frequent"] == {"reference": "x" * 1000, "share": 0.6}
    said = as_text(found).splitlines()[2]
    assert said.endswith("x…', the most frequent reference, has an accuracy of 60.00%")
    assert len(said) < 220
    words = evaluate(EvaluateOptions(input=path, metric=("wer",), bootstrap=0))
    assert words.most_frequent is None
    assert "most frequent" not in as_text(words)


def test_rows_with_an_error_are_wrong_and_counted(tmp_path, capsys):
    path = labels(
        tmp_path, ["yes", "no", "yes", ""], references=["yes", "no", "yes", ""], error=["", " ", "lost", "x"]
    )
    found = evaluate(EvaluateOptions(input=path, metric=("accuracy", "exact-match", "wer")))
    assert found.value("accuracy") == found.value("exact-match") == 0.5
    assert found.value("wer") == 1 / 3
    assert [(row.failed, row.is_right) for row in found.rows] == [(False, True)] * 2 + [(True, False)] * 2
    said = capsys.readouterr().err
    assert "rows with an error instead of an answer, counted as wrong: 2" in said
    assert "empty references, where every predicted word is an error: 1" in said
    assert "empty predictions" not in said
    assert as_text(found).split("\n\n")[1].splitlines()[1].split() == ["(empty)", "no", "yes", "(others)"]


def test_undefined_is_neither_zero_nor_an_error(tmp_path, capsys):
    path = labels(tmp_path, ["a", ""], references=["", "。"])
    found = evaluate(EvaluateOptions(input=path, metric=("wer",), output=(str(tmp_path / "o.json"),)))
    assert found.metrics[0] == found.metrics[0].__class__("wer", None, None, None)
    assert as_text(found).splitlines()[1].split() == ["WER", "–", "–"]
    assert json.loads((tmp_path / "o.json").read_text())["metrics"]["wer"]["value"] is None


@pytest.mark.timeout(60)
def test_labels_of_a_million_letters_are_told_apart_and_cut_in_tables(tmp_path, capsys):
    long = ["x" * 1_000_000 + end for end in "ab"]
    path = labels(tmp_path, [*long, long[0], long[0]], references=long * 2, group=long * 2)
    found = evaluate(EvaluateOptions(input=path, metric=("accuracy", "macro-f1", "cer"), group_by=("group",)))
    assert found.value("accuracy") == 0.75
    assert found.confusion.counts == ((2, 0, 0), (1, 1, 0))
    assert [group.metrics[0].value for group in found.groups] == [1, 0.5]
    assert max(map(len, as_text(found).splitlines())) < 400
    write_csv(tmp_path / "q.csv", [{"audio": "y" * 1_000_000, "prediction": "a", "reference": "b"}] * 2)
    with pytest.raises(InputError) as refused:
        evaluate(EvaluateOptions(input=path, compare=str(tmp_path / "q.csv")))
    assert len(str(refused.value)) < 600


def test_several_labels(tmp_path, capsys):
    rows = [
        {"prediction": "dog;rain", "reference": "rain; dog", "confidence": "0.9;0.2"},
        {"prediction": "rain", "reference": "dog", "confidence": "0.8"},
    ]
    path = str(write_csv(tmp_path / "p.csv", rows))
    asked = EvaluateOptions(input=path, label_separator=";", score_column="confidence", group_by=("length",))
    found = evaluate(asked)
    assert found.value("map") == pytest.approx(((1 / 2 + 1 / 2) + 1 / 2) / 2)
    assert [row.is_right for row in found.rows] == [True, False]
    rows[1]["confidence"] = "high"
    rows[0]["confidence"] = "0.9"
    write_csv(tmp_path / "p.csv", rows)
    assert run(["evaluate", path, "--label-separator", ";", "--score-column", "confidence"]) == 1
    said = capsys.readouterr().err
    assert "2 bad row(s)" in said
    assert "line 3, column confidence 'high': expected a number for each label, separated by ';'" in said


def test_a_macro_f1_of_five_thousand_labels_still_works(tmp_path):
    texts = [f"text {n}" for n in range(5000)]
    path = labels(tmp_path, texts[::-1], references=texts)
    found = evaluate(EvaluateOptions(input=path, metric=("macro-f1",), bootstrap=20))
    assert found.value("macro-f1") == 0
    assert found.confusion is None


# --- what is shown and written ---------------------------------------------------------------------------


def test_files(place, capsys):
    paths = (str(place / "new/o.json"), str(place / "o.csv"))
    (place / "o.csv").write_text("old")
    found = evaluate(
        options(place, output=paths, group_by=("language",), compare=str(place / "p.csv"), seed=7)
    )
    assert files_below(place) == {
        "p.csv", "r.csv", "new/o.json", "new/o.json.mdl-toolkit.yaml", "o.csv", "o.csv.mdl-toolkit.yaml",
        "o.csv.previous-1",
    }  # fmt: skip
    written = json.loads((place / "new/o.json").read_text(encoding="utf-8"))
    assert written["metrics"]["wer"] == {
        "value": found.value("wer"),
        "low": found.metrics[0].low,
        "high": found.metrics[0].high,
    }
    assert written["settings"]["normalize"] is True
    assert written["settings"]["seed"] == 7
    assert set(written["settings"]["versions"]) >= {"rapidfuzz", "sacrebleu", "scipy"}
    assert written["comparison"]["wer"]["difference"]["value"] == 0
    assert written["comparison"]["wer"]["p_value"] == 1
    assert [group["group"] for group in written["groups"]] == ["en", "us"]
    assert [(row["line"], row["errors"]) for row in written["rows"]] == [(2, 1), (3, 0), (4, 1), (5, 6)]
    with (place / "o.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["column"], line["group"], line["metric"], line["rows"]) for line in lines] == [
        ("", "", "wer", "4"), ("", "", "cer", "4"),
        ("language", "en", "wer", "2"), ("language", "en", "cer", "2"),
        ("language", "us", "wer", "2"), ("language", "us", "cer", "2"),
    ]  # fmt: skip
    assert float(lines[0]["value"]) == found.value("wer")
    assert {(line["normalize"], line["seed"]) for line in lines} == {("true", "7")}
    assert "rapidfuzz=" in lines[0]["versions"]
    again = from_mapping(EvaluateOptions, read_settings(place / "o.csv.mdl-toolkit.yaml", EvaluateOptions))
    assert evaluate(again).metrics == found.metrics


def test_cells_that_a_spreadsheet_would_run_are_kept_as_they_are(tmp_path):
    cells = ["=cmd|' /C calc'!A0", "+1", "-2", "@SUM(1)"]
    path, out = labels(tmp_path, cells, references=cells, group=cells), tmp_path / "o.csv"
    evaluate(EvaluateOptions(input=path, group_by=("group",), metric=("accuracy",), output=(str(out),)))
    with out.open(newline="", encoding="utf-8") as file:
        assert {line["group"] for line in csv.DictReader(file)} == {"", *cells}


def test_a_file_that_cannot_be_written_leaves_what_was_there(place, monkeypatch, capsys):
    (place / "o.json").write_text("old")
    monkeypatch.setattr("mdl_toolkit.evaluation.results.as_json", lambda _: None)
    with pytest.raises(TypeError):
        evaluate(options(place, output=(str(place / "o.json"),)))
    assert (place / "o.json").read_text() == "old"
    assert files_below(place) == {"p.csv", "r.csv", "o.json"}
