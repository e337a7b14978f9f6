"""The examples: each runs as it stands, offline, on a few phrases, and leaves what it promises."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mdl_toolkit.demo import make_tiny_model
from mdl_toolkit.model import MiDashengLMModel
from tests.support.paths import EXAMPLES, PHRASES
from tests.support.runs import write_csv


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(folder, PHRASES, seed=1)
    return folder


@pytest.fixture
def data(tmp_path):
    """Sixteen phrases to train on and six to test."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train.csv", 16), ("test.csv", 6)):
        few = rows(PHRASES / name)
        few = few[:: len(few) // count][:count]
        write_csv(folder / name, [{**row, "audio": str(PHRASES / row["audio"])} for row in few])
    return folder


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def start(name, folder, *words):
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def run(name, folder, *words):
    done = start(name, folder, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_classify_trains_answers_and_evaluates(tmp_path, model, data):
    said = run(
        "classify.py", tmp_path, "--model-name", model, "--data", data, "--num-epochs", 1, "--output", "out"
    )
    MiDashengLMModel.from_pretrained(tmp_path / "out/run/final")
    answers, references = rows(tmp_path / "out/answers.csv"), rows(data / "test.csv")
    assert [row["audio"] for row in answers] == [row["audio"] for row in references]
    right = [one["prediction"] == other["prediction"] for one, other in zip(answers, references, strict=True)]
    assert f"accuracy: {sum(right) / 6:.3f}" in said
    assert json.loads((tmp_path / "out/evaluation.json").read_text(encoding="utf-8"))


def test_caption_learns_the_text_column(tmp_path, model, data):
    options = ("--num-epochs", 1, "--max-new-tokens", 8, "--output", "out")
    said = run("caption.py", tmp_path, "--model-name", model, "--data", data, *options)
    MiDashengLMModel.from_pretrained(tmp_path / "out/run/final")
    references = rows(data / "test.csv")
    assert [row["prediction"] for row in rows(tmp_path / "out/test.csv")] == [
        row["transcript"] for row in references
    ]
    assert len(rows(tmp_path / "out/answers.csv")) == 6
    assert f"reference: {references[0]['transcript']}" in said


@pytest.fixture
def recordings(tmp_path, data):
    """The six phrases of the test as files in one folder."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for row in rows(data / "test.csv"):
        shutil.copy(row["audio"], folder)
    return folder


def test_batch_inference_answers_a_folder(tmp_path, model, recordings):
    said = run("batch_inference.py", tmp_path, recordings, "--model-name", model, "--max-new-tokens", 4)
    answers = rows(tmp_path / "answers.csv")
    assert {Path(row["audio"]).name for row in answers} == {path.name for path in recordings.iterdir()}
    assert "answers.csv: 6 recordings answered" in said


def test_batch_inference_says_which_recording_cannot_be_used(tmp_path, model, recordings):
    (recordings / "broken.flac").write_bytes(b"no recording")
    done = start("batch_inference.py", tmp_path, recordings, "--model-name", model, "--max-new-tokens", 4)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("answers.csv: written")
    answers = rows(tmp_path / "answers.csv")
    assert len(answers) == 7
    assert [Path(row["audio"]).name for row in answers if row["error"]] == ["broken.flac"]
