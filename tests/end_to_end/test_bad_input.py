"""Bad input, as a user would type it: one clear message, the right status, nothing left behind."""

import csv
import json

import numpy as np
import pytest
import soundfile

from mdl_toolkit.cli.main import run
from tests.support.runs import copy_checkpoint, files_below, make_rows, write_csv


@pytest.fixture
def place(golden, tmp_path, monkeypatch):
    """A folder with a model, good data and a converted dataset, and the current directory there."""
    monkeypatch.chdir(tmp_path)
    copy_checkpoint(golden, "A-small", tmp_path).rename(tmp_path / "model")
    write_csv(tmp_path / "good.csv", make_rows(tmp_path / "audio", 3))
    return tmp_path


def refused(place, capsys, words, status, *parts):
    """Run a command that must fail; returns what it said."""
    before, names = files_below(place), {path.name for path in place.iterdir()}
    assert run(words) == status
    said = capsys.readouterr()
    assert said.out == ""
    for part in parts:
        assert part in said.err
    assert "Traceback" not in said.err
    assert "bug in mdl-toolkit" not in said.err
    assert files_below(place) == before
    assert {path.name for path in place.iterdir()} == names
    return said.err.rstrip("\n")


COMMANDS = {
    "convert": lambda source: ["convert-dataset", source, "--model-name", "model", "--output", "out"],
    "train": lambda source: ["train", "--train-dataset", source, "--model-name", "model", "--output", "out"],
    "infer": lambda source: ["inference", source, "--model-name", "model", "--output", "out"],
}
WITH_PREDICTION = ("convert", "train")


def one_line(message):
    assert "\n" not in message, message
    return message


@pytest.mark.parametrize("command", COMMANDS)
class TestTheCsv:
    def test_missing(self, place, capsys, command):
        one_line(refused(place, capsys, COMMANDS[command]("nowhere.csv"), 1, "nowhere.csv"))

    def test_without_audio_column(self, place, capsys, command):
        (place / "bad.csv").write_text("file,prediction\na.wav,x\n")
        one_line(refused(place, capsys, COMMANDS[command]("bad.csv"), 1, "bad.csv", "audio", "file"))

    def test_not_utf_8(self, place, capsys, command):
        (place / "bad.csv").write_bytes("audio,prediction\na.wav,狗\n".encode("gbk"))
        refused(place, capsys, COMMANDS[command]("bad.csv"), 1, "bad.csv", "UTF-8", "line 2")

    def test_empty_file(self, place, capsys, command):
        (place / "bad.csv").write_text("")
        one_line(refused(place, capsys, COMMANDS[command]("bad.csv"), 1, "bad.csv"))

    def test_all_bad_rows_come_in_one_message(self, place, capsys, command):
        write_bad_recordings(place)
        message = refused(place, capsys, COMMANDS[command]("bad.csv"), 1, "bad.csv", "NaN")
        lines = [line.split(",")[0].strip() for line in message.split("\n")[1:]]
        assert lines == ["line 3", "line 4", "line 5", "line 6"]


def write_bad_recordings(place):
    """Row 2 is good; 3 is missing, 4 an empty file, 5 text named .wav, 6 holds NaN."""
    (place / "empty.wav").touch()
    (place / "text.wav").write_text("this is not audio, it is text\n" * 20)
    soundfile.write(place / "nan.wav", np.array([0.1, np.nan, 0.2] * 2000), 16_000, subtype="FLOAT")
    good = make_rows(place / "audio", 1)[0]
    names = [good["audio"], "missing.wav", "empty.wav", "text.wav", "nan.wav"]
    write_csv(place / "bad.csv", [{"audio": name, "prediction": "x"} for name in names])


@pytest.mark.parametrize("command", WITH_PREDICTION)
class TestTheCsvForTraining:
    def test_without_prediction_column(self, place, capsys, command):
        (place / "bad.csv").write_text("audio,text\na.wav,x\n")
        one_line(refused(place, capsys, COMMANDS[command]("bad.csv"), 1, "prediction", "text"))

    def test_without_rows(self, place, capsys, command):
        (place / "bad.csv").write_text("audio,prediction\n")
        one_line(refused(place, capsys, COMMANDS[command]("bad.csv"), 1, "bad.csv"))

    def test_empty_predictions(self, place, capsys, command):
        rows = make_rows(place / "audio", 3)
        rows[0]["prediction"] = rows[2]["prediction"] = ""
        write_csv(place / "bad.csv", rows)
        message = refused(place, capsys, COMMANDS[command]("bad.csv"), 1, "--allow-empty-prediction")
        assert "line 2" in message
        assert "line 4" in message


@pytest.mark.parametrize("command", COMMANDS)
class TestTheModel:
    def words(self, command, model):
        words = COMMANDS[command]("good.csv")
        words[words.index("model")] = model
        return words

    def test_that_is_not_there(self, place, capsys, command):
        one_line(refused(place, capsys, self.words(command, "./nowhere"), 1, "./nowhere", "--model-name"))

    def test_on_a_hub_that_cannot_be_reached(self, place, capsys, command):
        message = refused(place, capsys, self.words(command, "mispeech/midashenglm-7b"), 1, "Hugging Face")
        assert all(way in one_line(message) for way in ("local folder", "HF_ENDPOINT", "--from-modelscope"))

    def test_that_is_another_model(self, place, capsys, command):
        config = json.loads((place / "model/config.json").read_text())
        (place / "model/config.json").write_text(json.dumps({**config, "model_type": "llama"}))
        one_line(refused(place, capsys, self.words(command, "model"), 1, "not a MiDashengLM", "llama"))

    def test_without_weights(self, place, capsys, command):
        (place / "model/model.safetensors").unlink()
        if command != "convert":  # which needs none
            one_line(refused(place, capsys, self.words(command, "model"), 1, "no weights"))


class TestPlaces:
    def test_an_output_that_is_the_input(self, place, capsys):
        words = ["convert-dataset", "good.csv", "--model-name", "model", "--output", "good.csv"]
        one_line(refused(place, capsys, words, 1, "--output good.csv", "give another place"))

    def test_an_output_that_holds_the_input(self, place, capsys):
        words = ["convert-dataset", "good.csv", "--model-name", "model", "--output", "."]
        one_line(refused(place, capsys, words, 1, "--output ."))

    def test_an_output_that_holds_something_else(self, place, capsys):
        words = ["convert-dataset", "good.csv", "--model-name", "model", "--output", "audio"]
        one_line(refused(place, capsys, words, 1, "audio/clip-0-0.wav is there"))

    def test_training_into_its_own_dataset(self, place, capsys):
        assert run(["convert-dataset", "good.csv", "--model-name", "model", "--output", "data"]) == 0
        capsys.readouterr()
        words = ["train", "--train-dataset", "data", "--model-name", "model", "--output", "data"]
        one_line(refused(place, capsys, words, 1, "--output data"))

    def test_a_prompt_longer_than_max_length(self, place, capsys):
        words = [*COMMANDS["infer"]("good.csv"), "--max-length", "10"]
        message = refused(place, capsys, words, 1, "--max-length 10")
        assert len(message.split("\n")) == 1 + 3


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--lora-rnk", "8"], ["--lora-rnk", "--lora-rank"]),
        (["--lr", "abc"], ["--lr", "abc"]),
        (["--train-target", "nose"], ["--train-target", "nose", "encoder"]),
        (["--report-to", "tensorbord"], ["--report-to", "tensorbord", "tensorboard"]),
        (["--save-total-limit", "0"], ["--save-total-limit"]),
        (["--save-steps", "1.5"], ["--save-steps"]),
        (["--quantization", "2bit"], ["--quantization", "4bit"]),
    ],
)
def test_what_is_wrong_on_the_command_line_by_itself(place, capsys, words, parts):
    one_line(refused(place, capsys, [*COMMANDS["train"]("good.csv"), *words], 2, *parts))


def test_messages_are_chinese_for_chinese_users(place, capsys, monkeypatch):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    write_bad_recordings(place)
    message = refused(place, capsys, COMMANDS["convert"]("bad.csv"), 1, "错误：", "第 3 行")
    assert not any(word in message for word in ("error", "line", "column"))


def test_the_good_data_are_good(place):
    """The fixture itself is no reason for a refusal."""
    assert run(COMMANDS["convert"]("good.csv")) == 0
    assert run([*COMMANDS["infer"]("good.csv")[:-1], "answers.csv"]) == 0
    with (place / "answers.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 4
