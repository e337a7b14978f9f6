"""JSON Lines, arrays, chats and manifests of others: the rows of a CSV, and where they are wrong."""

import csv
import json
from pathlib import Path

import pytest
from datasets import load_from_disk

from mdl_toolkit.config.data import CheckOptions, ConversionOptions
from mdl_toolkit.data.check.run import check
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.errors import InputError
from mdl_toolkit.inference.run import infer
from tests.support.inferences import infer_options, table
from tests.support.paths import MODEL
from tests.support.runs import convert, make_rows, write_csv

QUESTION = "What is it?"


def rows_of(path, **changes):
    """Line, recording, prompts and answer of each row."""
    manifest = read_manifest(path, ConversionOptions(**changes), needs_prediction=False)
    return [
        (row.line, Path(row.audio).name, row.system_prompt, row.user_prompt, row.prediction)
        for row in manifest.rows()
    ]


@pytest.fixture
def rows(tmp_path):
    return make_rows(tmp_path / "audio", 5)


def lines(path, values):
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    path.write_text(text, encoding="utf-8")
    return path


def chat(row, style):
    audio, question, answer = row["audio"], row["user_prompt"], row["prediction"]
    if style == "sharegpt":
        turns = [("human", f"<audio>{question}"), ("gpt", answer)]
        return {"conversations": [{"from": a, "value": b} for a, b in turns], "audios": [audio]}
    if style == "parts":
        # As `datasets` writes them: each part has the keys of all.
        parts = [
            {"type": "audio", "audio": audio, "text": None},
            {"type": "text", "audio": None, "text": question},
        ]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}
    turns = [("system", "Be brief."), ("user", f"<audio>\n{question}"), ("assistant", answer)]
    return {"messages": [{"role": a, "content": b} for a, b in turns], "audios": audio}


WAYS = {
    "our keys": (lambda row: row, None),
    "messages": (lambda row: chat(row, "messages"), "Be brief."),
    "ShareGPT": (lambda row: chat(row, "sharegpt"), None),
    "parts": (lambda row: chat(row, "parts"), None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["lines", "array"])
def test_every_way_of_writing_gives_the_rows_of_the_csv(tmp_path, rows, capsys, way, form):
    make, system = WAYS[way]
    expected = [(*row[:2], system, *row[3:]) for row in rows_of(write_csv(tmp_path / "a.csv", rows))]
    file = lines(tmp_path / "a.jsonl", map(make, rows))
    if form == "array":
        file.write_text(json.dumps([*map(make, rows)], indent=2), encoding="utf-8")
    found = rows_of(file)
    assert [row[1:] for row in found] == [row[1:] for row in expected]
    # Lines of the file, or objects of the array.
    assert [row[0] for row in found] == [1, 2, 3, 4, 5]
    said = {
        "lines": "JSON Lines, an object on each\n",
        "array": "a JSON array, whose objects are counted as lines\n",
    }
    assert f"{file}: taken for {said[form]}" in capsys.readouterr().err


def test_the_dataset_is_that_of_the_csv(tmp_path, rows):
    made = [
        convert(source, MODEL, tmp_path / name)
        for name, source in (
            ("one", write_csv(tmp_path / "a.csv", rows)),
            ("two", lines(tmp_path / "a.jsonl", [chat(row, "sharegpt") for row in rows])),
        )
    ]
    # Their lines differ by that of the column names.
    rows_one, rows_two = (load_from_disk(str(folder)) for folder in made)
    assert rows_one.remove_columns("line").to_list() == rows_two.remove_columns("line").to_list()


def test_a_manifest_of_nemo_s_has_segments_and_answers(tmp_path, rows):
    file = lines(
        tmp_path / "manifest.json",
        [{"audio_filepath": row["audio"], "offset": 0.1, "duration": 0.1, "text": "x"} for row in rows],
    )
    manifest = [*read_manifest(file, ConversionOptions(), needs_prediction=True).rows()]
    assert [(row.segment.start, round(row.segment.end, 6)) for row in manifest] == [(0.1, 0.2)] * 5
    assert {row.prediction for row in manifest} == {"x"}


def test_values_are_text_as_they_are_written(tmp_path, rows):
    values = ["0012", 12, 1.0, 1e5, True, None, "null", "a\nb", ["x", 1]]
    cells = ["0012", "12", "1.0", "100000.0", "true", "", "null", "a\nb", '["x", "1"]']
    file = lines(tmp_path / "a.jsonl", [{"audio": rows[0]["audio"], "prediction": value} for value in values])
    assert [row[-1] for row in rows_of(file)] == cells


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"audio": "a.wav"}\n\n{"audio": \n', "line 3 is no valid JSON"),
        ('{"audio": "a.wav"}\n"text"\n', "line 2: expected an object, not text"),
        ('{"audio": "a.wav"}\n[{"audio": "a.wav"}]\n', "line 2: expected an object"),
        ('[{"audio": "a.wav"},\n {"audio": }]', "line 2 is no valid JSON"),
        ('[{"audio": "a.wav"}, ["a.wav"]]', "line 2: expected an object"),
        ('{\n  "audio": "a.wav"\n}\n', "line 1 is no valid JSON"),
        (
            '{"messages": [{"role": "user", "content": "x"}], "audios": ["a", "b"]}\n',
            "one recording, not .*a.*b",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "line 1: a chat .* one recording, not"),
        ('{"messages": [], "audios": [null]}\n', r"one recording, not \[null\]"),
        ('{"messages": [], "audios": {"path": "a.wav"}}\n', "one recording, not .*path"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', "text and audio, not .*image"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}\n', "text and audio, not x"),
        ('{"messages": [{"role": "tool", "content": "x"}], "audios": ["a"]}\n', "once each, not 'tool'"),
        ('{"messages": [{"role": "user"}, {"role": "user"}], "audios": ["a"]}\n', "once each, not 'user'"),
        ('{"messages": ["x"], "audios": ["a"]}\n', "once each, not None"),
        ('{"text": "x"}\n', "the column 'audio' is missing"),
        ('[{"audio": "a.wav"}', "line 1 is no valid JSON"),
        ("[]", "the file is empty"),
        ("[" * 100_000, "line 1 is no valid JSON"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, said):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=said):
        rows_of(tmp_path / "a.jsonl")


def test_what_is_no_character_is_said_before_it_is_written(tmp_path, rows):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({**rows[0], "note": "\ud800"}) + "\n" + json.dumps({**rows[1], "note": "😀"}))
    with pytest.raises(InputError, match="line 1, column note .*not UTF-8") as refused:
        convert(file, MODEL, tmp_path / "data")
    assert "line 2" not in refused.value.message.en


def test_marks_of_the_recording_and_columns_beside_a_chat(tmp_path, rows):
    questions = ["a\n<audio>\nb", " a ", "<audio>", "a<audio>"]
    values = [
        {
            "messages": [{"role": "user", "content": question}],
            "system": "Be brief.",
            "audios": [rows[0]["audio"]],
            "prediction": "x",
        }
        for question in questions
    ]
    found = [row[2:] for row in rows_of(lines(tmp_path / "a.jsonl", values))]
    assert found == [("Be brief.", asked, "x") for asked in ("a b", " a ", None, "a")]


def test_a_csv_whose_first_name_begins_like_json_stays_a_csv(tmp_path, rows):
    write_csv(tmp_path / "a.csv", [{"[note]": "x", **row} for row in rows])
    assert [row[0] for row in rows_of(tmp_path / "a.csv")] == [2, 3, 4, 5, 6]


def test_bad_rows_are_named_together_as_those_of_a_csv(tmp_path, rows):
    file = lines(tmp_path / "a.jsonl", [*rows, {"audio": "gone.wav"}, {**rows[0], "prediction": ""}])
    with pytest.raises(InputError) as refused:
        convert(file, MODEL, tmp_path / "data")
    assert "line 6" in refused.value.message.en
    assert "line 7" in refused.value.message.en


def test_answers_and_corrected_rows_are_written_as_a_csv(tmp_path, rows):
    file = lines(tmp_path / "a.jsonl", [*rows, {"audio": "gone.wav", "note": "é"}])
    with pytest.raises(InputError, match="1 row cannot be used"):
        check(
            CheckOptions(input=(str(file),), model_name=str(MODEL), write_fixed=str(tmp_path / "fixed.csv"))
        )
    fixed = table(tmp_path / "fixed.csv")
    assert [row["audio"] for row in fixed] == [row["audio"] for row in rows]
    good = lines(tmp_path / "good.jsonl", rows)
    infer(infer_options(good, MODEL, tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as answers:
        assert [row[0] for row in csv.reader(answers)] == ["audio", *(row["audio"] for row in rows)]
    with pytest.raises(InputError, match="--output"):
        infer(infer_options(good, MODEL, good))
