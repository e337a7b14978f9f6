"""Long rows: they are named, and cut into parts where their labels hold for each."""

import csv

import numpy as np
import pytest
import soundfile

from mdl_toolkit.audio.loading import load
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.check.fixed import equal_parts
from mdl_toolkit.data.check.rows import FACTS
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from tests.support.runs import write_csv
from tests.support.waves import wave

RATE = 8_000
SECONDS = (70.5, 1.0, 30.0, 2.0, 31.0, 1.5)


@pytest.fixture
def rows(tmp_path):
    """Rows of two classes, of which the first and the fifth are longer than 30 s."""
    made = []
    for number, seconds in enumerate(SECONDS):
        file = tmp_path / f"{number}.wav"
        soundfile.write(file, wave(round(seconds * RATE), number), RATE, subtype="PCM_16")
        made.append(
            {"audio": str(file), "prediction": ("rain", "wind")[number % 2], "note": f"{number:03},x"}
        )
    return made


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_long_rows_are_named_in_one_line_with_their_lengths(run, rows, tmp_path, capsys, golden):
    table = write_csv(tmp_path / "in.csv", rows)
    lines = [line for line in run(table).out.splitlines() if "longer than 30 s" in line]
    assert [line.partition(": longer")[0] for line in lines] == ["  warning"]
    assert lines[0].endswith(": 2, line 2 (70.5 s), 6 (31 s)")
    model = golden / "checkpoints/A-small"
    convert_dataset(ConvertOptions(input=str(table), output=str(tmp_path / "d"), model_name=str(model)))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "longer than 30 s" in line]
    assert said.startswith("warning: 2 rows are longer than 30 s")
    assert "line 2 (70 s), 6 (31 s);" in said


def test_parts_hold_the_sound_of_their_row_and_its_label(run, rows, tmp_path, golden):
    rows.insert(1, {**rows[0], "audio": str(tmp_path / "missing.wav")})
    table, fixed = write_csv(tmp_path / "in.csv", rows), tmp_path / "fixed.csv"
    done = run(table, "--write-fixed", fixed, "--cut", "30")
    assert done.status == 1
    assert f"{fixed}: 9 rows written, 1 left out\n  2 rows cut into parts" in done.out
    written = read(fixed)
    times = [(row["note"][:3], row["start"], row["end"]) for row in written]
    assert times == [
        ("000", "0", "23.5"), ("000", "23.5", "47"), ("000", "47", "70.5"), ("001", "", ""), ("002", "", ""),
        ("003", "", ""), ("004", "0", "15.5"), ("004", "15.5", "31"), ("005", "", ""),
    ]  # fmt: skip
    assert [row["prediction"] for row in written] == [rows[0]["prediction"]] * 3 + [
        *("wind", "rain", "wind"), *("rain", "rain"), "wind"
    ]  # fmt: skip
    # The parts of the first row are its samples, one after the other.
    model = golden / "checkpoints/A-small"
    convert_dataset(ConvertOptions(input=str(fixed), output=str(tmp_path / "d"), model_name=str(model)))
    dataset = ConvertedDataset(tmp_path / "d")
    parts = np.concatenate([dataset[number].waveform for number in range(3)])
    whole = load(rows[0]["audio"]).samples
    # Each part is resampled by itself, which shows at its ends alone.
    assert parts.shape == whole.shape
    assert np.mean(np.abs(parts - whole) < 1e-4) > 0.99
    again = run(fixed, "--write-fixed", tmp_path / "again.csv", "--cut", "30")
    assert again.status == 0
    assert (tmp_path / "again.csv").read_bytes() == fixed.read_bytes()


def test_the_training_that_is_forecast_is_that_on_the_parts(run, rows, tmp_path):
    table, fixed = write_csv(tmp_path / "in.csv", rows), tmp_path / "fixed.csv"
    forecast, of_parts = (
        run(*words, "--json").figures["training"]
        for words in ([table, "--write-fixed", fixed, "--cut", "30"], [fixed])
    )
    assert forecast["steps"] == of_parts["steps"] == 2
    assert forecast["command"] == of_parts["command"]
    assert forecast["operations"] == pytest.approx(of_parts["operations"], rel=1e-3)
    assert forecast["bytes"]["activations"] == pytest.approx(of_parts["bytes"]["activations"], rel=1e-3)


def test_rows_as_long_as_a_part_are_not_cut():
    """Whatever rounding makes of their ends."""
    facts = np.zeros(1000, FACTS)
    facts["line"], facts["start"] = np.arange(1000), np.arange(1000) / 10
    facts["end"] = facts["start"] + 30.0
    assert max(facts["end"] - facts["start"]) > 30
    assert equal_parts(facts, 30) == {}
    facts["end"] += 30.0
    assert {len(each) for each in equal_parts(facts, 30).values()} == {2}


def test_transcripts_are_not_cut(run, rows, tmp_path):
    for row in rows:
        row["prediction"] += row["note"]
    table, fixed = write_csv(tmp_path / "in.csv", rows), tmp_path / "fixed.csv"
    done = run(table, "--write-fixed", fixed, "--cut", "30")
    assert done.status == 1
    assert "--cut: no row was cut, as most answers are different, like transcripts" in done.err
    assert fixed.read_bytes() == table.read_bytes()


def test_the_length_of_a_whole_recording_is_not_taken_for_that_of_a_part(run, rows, tmp_path):
    for row, seconds in zip(rows, SECONDS, strict=True):
        row["duration"] = f"{seconds:.0f}"
    table, fixed = write_csv(tmp_path / "in.csv", rows), tmp_path / "fixed.csv"
    assert run(table, "--write-fixed", fixed, "--cut", "30").status == 0
    assert [row["duration"] for row in read(fixed)] == ["23.5"] * 3 + ["", "", "", "15.5", "15.5", ""]
    assert run(fixed).status == 0


@pytest.mark.parametrize("words", [[], ["--write-fixed", "fixed.csv", "--for-inference"]])
def test_nothing_but_what_is_trained_on_is_cut(run, rows, tmp_path, words):
    done = run(write_csv(tmp_path / "in.csv", rows), "--cut", "30", *words)
    assert done.status == 2
    assert "--cut is for rows to train on" in done.err
