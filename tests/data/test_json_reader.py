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


# --- lhotse's cuts, as lhotse 1.33 wrote them ------------------------------------------------------------

STEREO = {
    "id": "call-1",
    "sources": [{"type": "file", "channels": [0, 1], "source": "calls/1.wav"}],
    "sampling_rate": 16000,
    "num_samples": 64000,
    "duration": 4.0,
    "channel_ids": [0, 1],
}
SAID = {
    "id": "s1",
    "recording_id": "call-1",
    "start": 0.0,
    "duration": 1.5,
    "channel": 1,
    "text": "hello",
    "language": "en",
    "speaker": "ann",
}
WHOLE = {"id": "call-1", "start": 0.0, "duration": 4.0, "channel": [0, 1], "supervisions": []}
PART = {"id": "c1", "start": 1.0, "duration": 1.5, "channel": 1, "supervisions": [SAID]}
CUTS = [
    {**WHOLE, "recording": STEREO, "type": "MultiCut"},
    {**PART, "recording": STEREO, "custom": {"user_prompt": "What?", "snr": 12.5}, "type": "MonoCut"},
]


def changed(cut, where, value):
    """A copy of a cut with another value at a place within."""
    copy = json.loads(json.dumps(cut))
    inside = copy
    for name in where[:-1]:
        inside = inside[name]
    inside[where[-1]] = value
    return copy


def test_a_cut_of_lhotse_s_is_a_segment_with_its_channel(tmp_path):
    file = lines(tmp_path / "cuts.jsonl", CUTS)
    manifest = read_manifest(file, ConversionOptions(), needs_prediction=True)
    columns = "audio channel duration id language prediction snr speaker start user_prompt"
    assert sorted(manifest.columns) == columns.split()
    rows = [*manifest.rows_unchecked()]
    # The first has no text.
    (problem, *_), row = [each for each in manifest if each.line == 1], rows[-1]
    assert "not found" in str(problem.reason)
    assert (row.audio, row.user_prompt, row.prediction) == ("calls/1.wav", "What?", "hello")
    assert (row.segment.start, row.segment.end, row.segment.channel) == (1.0, 2.5, 2)
    (whole,) = read_manifest(
        lines(tmp_path / "whole.jsonl", CUTS[:1]), ConversionOptions(), needs_prediction=False
    ).rows_unchecked()
    assert whole.segment.is_whole


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["type"], "MixedCut", "not 'MixedCut'; write its sound to a file with lhotse's save_audios"),
        (["recording"], None, "not 'MonoCut'"),
        (["recording", "sources", 0, "type"], "command", "not 'command'"),
        (["recording", "sources", 0, "type"], "memory", "not 'memory'"),
        (["recording", "transforms"], [{"name": "Speed", "kwargs": {"factor": 1.1}}], "not 'transforms'"),
        (["channel"], 3, "not 'channel 3'"),
        (["recording", "sources"], [], "not 'channel 1'"),
        (["recording", "sources"], {}, "recording.sources: expected a list"),
        (["recording", "sources", 0, "source"], ["a"], r"recording.sources\[0\].source: expected a text"),
        (
            ["supervisions"],
            [SAID, SAID],
            "one supervision, not 2; make such with lhotse's trim_to_supervisions",
        ),
        (["supervisions"], ["hello"], r"supervisions\[0\]: expected an object"),
        (["custom"], ["x"], "custom: expected an object or null"),
        (["start"], None, "start: expected a text, not null"),
    ],
)
def test_cuts_that_are_no_part_of_a_file_are_refused_with_their_line(tmp_path, where, value, said):
    file = lines(tmp_path / "cuts.jsonl", [CUTS[1], changed(CUTS[1], where, value)])
    with pytest.raises(InputError, match=f"line 2: .*{said}"):
        rows_of(file)
