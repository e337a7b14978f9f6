"""Columns that name a segment and a channel: rows of a long recording are as files of their own."""

import csv
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mdl_toolkit.audio.segments import WHOLE_RECORDING, Segment
from mdl_toolkit.config.data import CheckOptions, ConvertOptions
from mdl_toolkit.data import open_audio
from mdl_toolkit.data.check.run import check
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.segment_columns import read_segment, segment_cells
from mdl_toolkit.errors import InputError, RowProblem, RowsError
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.run import train
from tests.support.inferences import infer_options
from tests.support.paths import MODEL
from tests.support.recordings import sound
from tests.support.runs import copy_checkpoint, history, make_rows, train_options, write_csv
from tests.support.server import needs_server

RATE = 16_000
SIDES = ("left", "right", "mean", "1", "2", "")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The files that are decoded."""
    names, real = [], open_audio.load_segments

    def noted(path, *given, **more):
        names.append(Path(path).name)
        return real(path, *given, **more)

    monkeypatch.setattr(open_audio, "load_segments", noted)
    return names


def call(name: str, seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Write a call with a speaker on each side, `[n, 2]`."""
    samples = np.stack([sound(seconds, rate, seed), 0.4 * sound(seconds, rate, seed + 1)[::-1]], 1)
    soundfile.write(name, samples, rate, subtype="PCM_16")
    return soundfile.read(name, dtype="int16")[0]


def segments_and_files(count: int, rate: int = RATE) -> tuple[list[dict], list[dict]]:
    """Rows of a call, and the same rows with a file of its own for each, cut by a plain slice."""
    samples, parts, files = call("call.wav", 20.0, rate), [], []
    rng = random.Random(0)
    for number in range(count):
        start = round(rng.uniform(0, 18), 3)
        end, side = round(start + rng.uniform(0.3, 1.5), 3), SIDES[number % 6]
        answer = {"prediction": f"answer {number}", "user_prompt": "What is said?"}
        parts.append({"audio": "call.wav", "start": str(start), "end": str(end), "channel": side, **answer})
        columns = {"left": [0], "1": [0], "right": [1], "2": [1]}.get(side, [0, 1])
        cut = samples[round(start * rate) : round(end * rate), columns]
        soundfile.write(f"own-{number}.wav", cut, rate, subtype="PCM_16")
        files.append({"audio": f"own-{number}.wav", **answer})
    return parts, files


def convert(rows: list[dict[str, str]], output: str, **changes) -> ConvertedDataset:
    write_csv(Path(f"{output}.csv"), rows)
    given = {
        "input": f"{output}.csv",
        "output": output,
        "model_name": str(MODEL),
        "num_workers": 1,
        **changes,
    }
    convert_dataset(ConvertOptions(**given))
    return ConvertedDataset(Path(output))


def assert_alike(one: ConvertedDataset, other: ConvertedDataset) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in ((one[row], other[row]) for row in range(len(one))):
        assert np.array_equal(mine.waveform, theirs.waveform)
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        assert np.array_equal(mine.labels, theirs.labels)


# --- cells -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "segment"), [
    ({}, WHOLE_RECORDING),
    ({"start": "", "end": "null", "channel": "mean"}, WHOLE_RECORDING),
    ({"start": "1.5", "end": "2"}, Segment(1.5, 2.0)),
    ({"begin": " 1.5 ", "end": ".75e1"}, Segment(1.5, 7.5)),
    ({"offset": "1.5", "duration": "0.5"}, Segment(1.5, 2.0)),
    ({"start": "", "duration": "2.5"}, Segment(0.0, 2.5)),
    ({"start": "1", "end": "3.01", "duration": "2"}, Segment(1.0, 3.01)),
    ({"start": "1:02.5", "end": "1:00:00"}, Segment(62.5, 3600.0)),
    ({"end": "4."}, Segment(0.0, 4.0)),
    # What a recording lasts, as many tables say it, is no segment.
    ({"duration": "2.5"}, WHOLE_RECORDING),
    ({"duration": "2.5", "end": "1"}, Segment(0.0, 1.0)),
    ({"channel": "2.0"}, Segment(channel=2)),
])  # fmt: skip
def test_cells_name_a_segment(cells, segment):
    assert read_segment(segment_cells(cells)) == segment


@pytest.mark.parametrize(("cells", "column", "words"), [
    ({"start": "2", "end": "2"}, "end", "not after the start, 2 s"),
    ({"begin": "-1"}, "begin", "count seconds from 0"),
    ({"start": "soon"}, "start", "write seconds"),
    ({"start": "1,5"}, "start", "write seconds"),
    ({"start": "2024-01-01 10:00"}, "start", "rename the column"),
    ({"start": "nan"}, "start", "write seconds"),
    ({"start": "1_000"}, "start", "write seconds"),
    ({"offset": "1", "duration": "-2"}, "duration", "not after the start"),
    ({"offset": "1", "duration": "0"}, "duration", "not after the start"),
    ({"start": "1", "end": "2", "duration": "7"}, "duration", "start and end are 1 s apart"),
    ({"channel": "telephone"}, "channel", "rename the column"),
    ({"channel": "0"}, "channel", "counted from 1"),
])  # fmt: skip
def test_wrong_cells_are_named_by_line_and_column(place, cells, column, words):
    call("call.wav", 3.0)
    write_csv(place / "x.csv", [{"audio": "call.wav", **cells, "prediction": "yes"}])
    given = ConvertOptions(input="x.csv", output="out")
    (problem,) = read_manifest("x.csv", given, needs_prediction=True)
    assert isinstance(problem, RowProblem)
    assert (problem.line, problem.column, problem.value) == (2, column, cells[column])
    assert words in str(problem.reason)


def test_what_a_recording_does_not_have_is_named_by_line_and_column(place):
    call("call.wav", 3.0)
    rows = [
        {"audio": "call.wav", "offset": offset, "duration": duration, "channel": channel, "prediction": "yes"}
        for offset, duration, channel in (("1", "1", ""), ("1", "9", ""), ("3", "1", ""), ("1", "1", "3"))
    ]
    with pytest.raises(RowsError) as raised:
        convert(rows, "out")
    problems = [(problem.line, problem.column, problem.value) for problem in raised.value.problems]
    assert problems == [(3, "duration", "9"), (4, "offset", "3"), (5, "channel", "3")]


def test_two_columns_of_one_meaning_are_refused(place):
    write_csv(place / "x.csv", [{"audio": "call.wav", "start": "1", "offset": "2"}])
    with pytest.raises(InputError, match="'start' and 'offset' mean the same"):
        read_manifest("x.csv", ConvertOptions(input="x.csv", output="out"), needs_prediction=False)


# --- conversion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_a_converted_segment_is_what_its_own_file_would_be(place, rate):
    parts, files = segments_and_files(24, rate)
    assert_alike(convert(parts, "parts"), convert(files, "files"))
    assert (place / "parts/data-00000-of-00001.arrow").read_bytes() == (
        place / "files/data-00000-of-00001.arrow"
    ).read_bytes()


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_a_recording_of_many_rows_is_decoded_once(place, decoded, is_shuffled):
    parts, _ = segments_and_files(150)
    more = call("other.wav", 15.0, seed=7)
    assert len(more)
    rows = parts + [{**row, "audio": "other.wav", "start": "1", "end": "2.5"} for row in parts]
    if is_shuffled:
        random.Random(1).shuffle(rows)
    dataset = convert(rows, "out")
    assert len(dataset) == 300
    assert sorted(decoded) == ["call.wav", "other.wav"]
    assert dataset.audio_lengths.sum() < 300 * 1.5 * RATE


def test_shards_of_a_long_recording_are_few(place, decoded):
    """Sizes of files say nothing of segments: of an hour of 16-bit sound each row has a second."""
    with soundfile.SoundFile("hour.flac", "w", RATE, 1, "PCM_16") as file:
        for _ in range(3600 // 60):
            file.write(np.zeros(60 * RATE, np.int16))
    rows = [
        {"audio": "hour.flac", "start": str(7 * n), "end": str(7 * n + 1), "prediction": "yes"}
        for n in range(500)
    ]
    assert len(convert(rows, "out")) == 500
    assert decoded == ["hour.flac"]


def test_rows_of_whole_recordings_are_held_one_at_a_time(place, decoded):
    rows = make_rows(place / "audio", 3)
    asked = [{**row, "user_prompt": prompt} for row in rows for prompt in ("What?", "Who?")]
    assert len(convert(asked, "together")) == 6
    assert len(decoded) == 3
    decoded.clear()
    apart = [{**row, "user_prompt": prompt} for prompt in ("What?", "Who?") for row in rows]
    assert len(convert(apart, "apart")) == 6
    assert len(decoded) == 6


def test_another_segment_is_converted_anew(place):
    call("call.wav", 5.0)
    row = {"audio": "call.wav", "start": "1", "end": "2", "channel": "1", "prediction": "yes"}
    first, fingerprints = convert([row], "out")[0].waveform, set()
    for change in ({}, {"start": "1.5"}, {"end": "3"}, {"channel": "2"}):
        changed = convert([{**row, **change}], "out")
        fingerprints.add((changed.audio_lengths[0], changed[0].waveform[:50].tobytes()))
        assert (len(first) == changed.audio_lengths[0]) == (change.keys() <= {"channel"})
    assert len(fingerprints) == 4


@needs_server
def test_segments_of_an_address_are_fetched_once(place, server, decoded):
    parts, files = segments_and_files(12)
    server.files["/call.wav"] = Path("call.wav").read_bytes()
    rows = [{**row, "audio": f"{server.url}/call.wav"} for row in parts]
    assert_alike(convert(rows, "parts"), convert(files, "files"))
    assert server.asked == ["/call.wav"]
    assert len(decoded) == 1 + 12


# --- the other commands ----------------------------------------------------------------------------------


def test_training_on_segments_is_training_on_files(place, golden):
    model = copy_checkpoint(golden, "A-small", place)
    parts, files = segments_and_files(12)
    convert(parts, "converted", model_name=str(model))
    given = write_csv(place / "p.csv", parts), write_csv(place / "f.csv", files), place / "converted"
    losses = []
    for number, data in enumerate(given):
        train(train_options(data, model, place / f"run-{number}"))
        losses.append(history(place / f"run-{number}"))
    assert losses[0] == losses[1] == losses[2]
    assert losses[0]


def test_answers_to_segments_are_answers_to_files(place, golden, decoded):
    model = copy_checkpoint(golden, "A-small", place)
    parts, files = segments_and_files(8)
    answers = []
    for name, rows in (("parts", parts), ("files", files)):
        data = write_csv(place / f"{name}.csv", rows)
        answers.append(infer(infer_options(data, model, place / f"{name}-out.csv")))
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1
    assert decoded.count("call.wav") == 1
    with (place / "parts-out.csv").open(encoding="utf-8", newline="") as file:
        written = [*csv.DictReader(file)]
    assert [{**row, "prediction": ""} for row in written] == [{**row, "prediction": ""} for row in parts]


def findings(*rows: list[dict[str, str]]) -> dict[str, tuple[list[int], list[int]]]:
    """The lines of each finding on the last file."""
    names = [str(write_csv(Path(f"{number}.csv"), each)) for number, each in enumerate(rows)]
    figures = check(CheckOptions(input=tuple(names), model_name="none", num_workers=1))
    found = figures["files"][-1]["findings"]
    return {each["name"]: (each["lines"], each.get("details")) for each in found if "lines" in each}


def test_check_tells_segments_apart(place, decoded):
    call("call.wav", 20.0)
    times = [("1", "2", ""), ("2", "3", ""), ("1.0", "2.00", ""), ("1", "2", "left"), ("1", "2", "right")]
    rows = [
        {"audio": "call.wav", "start": start, "end": end, "channel": side, "prediction": "yes"}
        for start, end, side in times
    ]
    # What sounds periodically is found as copies, too.
    assert findings(rows)["duplicate"] == ([4], [2])
    assert decoded == ["call.wav"]


def test_check_finds_sound_that_is_also_trained_on(place):
    for name in ("call.wav", "other.wav"):
        call(name, 20.0, seed=len(name))
    trained = [("call.wav", "1", "2", ""), ("call.wav", "5", "6", "left"), ("whole.wav", "", "", "")]
    call("whole.wav", 8.0, seed=50)
    asked = [
        ("call.wav", "2", "3", ""), ("call.wav", "1.5", "2.5", ""), ("call.wav", "1", "2", "right"),
        ("call.wav", "5.5", "7", "right"), ("call.wav", "5.5", "7", "1"), ("other.wav", "1", "2", ""),
        ("whole.wav", "1", "2", ""), ("call.wav", "1", "2", ""),
    ]  # fmt: skip
    names = ("audio", "start", "end", "channel")
    first, second = (
        [{**dict(zip(names, row, strict=True)), "prediction": f"{n}"} for n, row in enumerate(rows)]
        for rows in (trained, asked)
    )
    found = findings(first, second)
    assert found["leak_overlap"] == ([3, 4, 6, 8], [2, 2, 3, 4])
    assert found["same_recording"] == ([2, 5], [2, 2])
    assert found["leak_other_text"] == ([9], [2])
