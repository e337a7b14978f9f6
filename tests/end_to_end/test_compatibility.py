"""What the commit before the packages wrote opens, goes on and answers as it did then.

`golden/compatibility/README.md` tells how the folders were made.
"""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, read_settings
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.checkpoints import checkpoints
from mdl_toolkit.training.run import train
from tests.support.runs import history

GOLDEN = Path(__file__).parents[1] / "golden"
BEFORE = GOLDEN / "compatibility"
EXPECTED = json.loads((BEFORE / "expected.json").read_text(encoding="utf-8"))
MODEL = "/example/model"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A copy in the current folder, with the model beside it, on one thread, as it was then."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    shutil.copytree(GOLDEN / "checkpoints/A-small", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def assert_same_tensors(file: Path, expected: Path) -> None:
    found, wanted = load_file(file), load_file(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Not to the bit: kernels for CPUs that summed in another order are gone since.
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_dataset_has_the_same_rows():
    data = ConvertedDataset(BEFORE / "dataset")
    assert len([*data.folder.glob("data-*.arrow")]) == 2
    found = [
        {
            "input_ids": row.input_ids.tolist(),
            "labels": row.labels.tolist(),
            "samples": len(row.waveform),
            "sha256": hashlib.sha256(row.waveform.astype("<f4").tobytes()).hexdigest(),
        }
        for row in (data[number] for number in range(len(data)))
    ]
    assert found == EXPECTED["rows"]
    assert len(found) == 7


def test_a_training_says_that_a_dataset_is_rounded_to_16_bits(place, capsys):
    names = {"model_name": "model", "train_dataset": "dataset", "num_epochs": 0.1, "merge_lora": False}
    train(TrainOptions(**names, output="new"))
    said = [line for line in capsys.readouterr().err.splitlines() if "rounded recordings to 16 bits" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: dataset: ")
    assert "convert again" in said[0]


def test_a_checkpoint_goes_on_to_the_same_weights(place, capsys):
    """With dropout and an evaluation that answers, so that random states and the best so far count too."""
    output = place / "run"
    assert [folder.name for folder in checkpoints(output)][-1] == "checkpoint-6"
    given = read_settings(output / "checkpoint-6" / SETTINGS_FILE, TrainOptions)
    train(TrainOptions(**{**given, "resume_from_checkpoint": True}))
    assert "going on after step 6 of 8, from " in capsys.readouterr().err
    wanted = place / "finished"
    assert_same_tensors(
        output / "checkpoint-8/adapter_model.safetensors", wanted / "checkpoint-8/adapter_model.safetensors"
    )
    assert_same_tensors(
        output / "final/adapter_model.safetensors", wanted / "final/adapter_model.safetensors"
    )
    for found, line in zip(history(output), history(wanted), strict=True):
        assert found == pytest.approx(line, rel=1e-3)


def test_a_result_answers_the_same(place):
    """Also after its base, of which it knows the absolute path, has moved: as a user would tell it."""
    for name in ("adapter_config.json", "mdl-toolkit.json"):
        file = place / "finished/final" / name
        content = file.read_text(encoding="utf-8")
        assert MODEL in content
        file.write_text(content.replace(MODEL, str(place / "model")), encoding="utf-8")
    found = infer(
        InferenceOptions(
            input="recordings/rows.csv", output="found.csv", model_name="finished/final", batch_size=4
        )
    )
    with (place / "answers.csv").open(encoding="utf-8", newline="") as file:
        wanted = [row["prediction"] for row in csv.DictReader(file)]
    assert found == wanted
    assert len({*wanted}) > 1
