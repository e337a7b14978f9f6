"""The demonstration: real learning on real recordings, for any seed, and nothing seen of the test phrases."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from mdl_toolkit import demo
from mdl_toolkit.cli.main import run
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.model import MiDashengLMModel
from tests.support.paths import PHRASES
from tests.support.readme import snippet_answers
from tests.support.runs import files_below


def column(path, name):
    with path.open(encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def in_own_process(folder, seed):
    words = [sys.executable, "-m", "mdl_toolkit", "demo", "--output", str(folder), "--seed", str(seed)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_it_learns_from_scratch_to_at_least_80_percent(tmp_path, seed):
    said = in_own_process(tmp_path / "demo", seed)
    answers = column(tmp_path / "demo/after.csv", "prediction")
    references = column(tmp_path / "demo/test.csv", "prediction")
    right = sum(answer == reference for answer, reference in zip(answers, references, strict=True))
    assert len(references) == 60
    assert right / 60 >= 0.8
    before = column(tmp_path / "demo/before.csv", "prediction")
    assert sum(a == b for a, b in zip(before, references, strict=True)) / 60 <= 0.4
    assert f"{right / 60:.0%} after training" in said
    assert said.splitlines()[-1] == f"report: {tmp_path / 'demo/report.html'}"
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    values = json.loads(re.search(r'id="values">(.*?)</script>', page, re.DOTALL)[1])
    assert sum(state == 1 for state in values["rows"]["state"]) == right
    assert values["run"]["curves"]["loss"]["x"][-1] == 400
    folder, names = (values["rows"]["audio"][name] for name in ("folder", "names"))
    assert all((tmp_path / "demo" / unquote(folder + name)).is_file() for name in names)
    assert "Traceback" not in said
    # It learns so long that the loss may rise again, which is said.
    others = re.sub(r"(?m)^warning: the evaluation loss has risen twice .*$", "", said)
    assert not re.search("[Ww]arning", others)
    assert snippet_answers(tmp_path / "demo/run/final", tmp_path / "demo") == answers


def test_the_splits_share_no_recording(tmp_path):
    demo.lay_out_phrases(tmp_path / "phrases", tmp_path)
    files = {name: column(tmp_path / f"{name}.csv", "audio") for name in ("train", "eval", "test")}
    assert [len(files[name]) for name in files] == [160, 20, 60]
    for left, right in (("train", "eval"), ("train", "test"), ("eval", "test")):
        assert not set(files[left]) & set(files[right])


def test_the_tiny_model_is_a_model_like_any_other(tmp_path):
    demo.make_tiny_model(tmp_path / "model", PHRASES, seed=5)
    model = MiDashengLMModel.from_pretrained(tmp_path / "model")
    assert 400_000 < sum(parameter.numel() for parameter in model.parameters()) < 700_000
    demo.make_tiny_model(tmp_path / "again", PHRASES, seed=5)
    assert files_below(tmp_path / "again") == files_below(tmp_path / "model")
    for name in files_below(tmp_path / "again"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_the_commands_shown_can_be_typed(tmp_path, monkeypatch, capsys):
    """Each command is shown as a user would type it; the words are those of the options used."""
    used = []

    def listen(options):
        used.append(options)
        if isinstance(options, InferenceOptions):
            shutil.copyfile(options.input, options.output)
        elif isinstance(options, ConvertOptions | TrainOptions):
            Path(options.output).mkdir()

    for name in ("convert_dataset", "train", "infer"):
        monkeypatch.setattr(demo, name, listen)
    scored = demo.evaluate
    monkeypatch.setattr(demo, "evaluate", lambda options: used.append(options) or scored(options))
    monkeypatch.setattr(demo, "report", used.append)
    assert run(["demo", "--output", str(tmp_path / "demo")]) == 0
    shown = [line[2:] for line in capsys.readouterr().err.split("\n") if line.startswith("$ ")]
    assert [shlex.split(line)[:2] for line in shown] == [
        ["mdl-toolkit", name]
        for name in (
            "convert-dataset",
            "convert-dataset",
            "inference",
            "train",
            "inference",
            "evaluate",
            "report",
        )
    ]
    again = []
    for module, name in (
        ("data.convert.run", "convert_dataset"),
        ("training.run", "train"),
        ("inference.run", "infer"),
        ("reporting.report", "report"),
    ):
        monkeypatch.setattr(f"mdl_toolkit.{module}.{name}", again.append)
    monkeypatch.setattr("mdl_toolkit.api.evaluate", lambda options: again.append(options) or scored(options))
    assert [run(shlex.split(line)[1:]) for line in shown] == [0] * 7
    assert again == used
    # What it made it may clear away.
    assert run(["demo", "--output", str(tmp_path / "demo")]) == 0


@pytest.mark.parametrize("mine", ["mine.txt", "model/config.json"])
@pytest.mark.parametrize("marked", [False, True])
def test_another_folder_is_not_cleared_away(tmp_path, capsys, mine, marked):
    (tmp_path / "model").mkdir()
    (tmp_path / mine).write_text("precious")
    if marked and mine == "mine.txt":
        (tmp_path / demo.MARK).touch()
    before = files_below(tmp_path)
    assert run(["demo", "--output", str(tmp_path)]) == 1
    assert "which demo did not write" in capsys.readouterr().err
    assert files_below(tmp_path) == before
