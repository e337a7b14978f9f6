"""What a training leaves in its output folder, and what it finds there."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import read_settings
from mdl_toolkit.errors import InputError, ModelError, RowsError, ToolkitError
from mdl_toolkit.training import datasets as training_data
from mdl_toolkit.training import run as training
from mdl_toolkit.training.run import train
from tests.support.runs import (
    convert,
    copy_checkpoint,
    files_below,
    make_csv,
    make_rows,
    train_options,
    write_csv,
)
from tests.support.weight_files import tensors_of


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


CHECKPOINT_FILES = {
    "adapter_config.json", "adapter_model.safetensors", "checksums.json", "mdl-toolkit.json",
    "mdl-toolkit.yaml", "optimizer.safetensors", "state.json",
}  # fmt: skip


def test_the_exact_set_of_files_after_a_run(model, tmp_path):
    output = tmp_path / "run"
    options = train_options(make_csv(tmp_path, 8), model, output, save_steps=0.5, num_epochs=2, lora_rank=2)
    train(replace(options, save_total_limit=2))
    expected = {"mdl-toolkit.json", "mdl-toolkit.yaml", "log.jsonl", "loss.png", "report.html"}
    expected |= {f"checkpoint-{step}/{name}" for step in (3, 4) for name in CHECKPOINT_FILES}
    expected |= {
        f"final/{name}" for name in files_below(model) | {"mdl-toolkit.json", "mdl-toolkit.yaml", "README.md"}
    }
    assert files_below(output) == expected


def test_the_settings_can_be_given_back(model, tmp_path):
    output = tmp_path / "run"
    options = train_options(make_csv(tmp_path, 4), model, output, user_prompt="中文: 'a'", num_epochs=0.1)
    train(options)
    for place in (output, output / "final"):
        assert TrainOptions(**read_settings(place / "mdl-toolkit.yaml", TrainOptions)) == options
    assert (
        yaml.safe_load((output / "mdl-toolkit.yaml").read_text(encoding="utf-8"))["user_prompt"]
        == "中文: 'a'"
    )


def test_resuming_gives_the_unbroken_runs_weights(model, tmp_path):
    csv = make_csv(tmp_path, 10)
    settings = {"num_epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.2}
    whole = train(train_options(csv, model, tmp_path / "whole", save_steps=4, **settings))
    (tmp_path / "broken").mkdir()
    (tmp_path / "whole/checkpoint-4").rename(tmp_path / "broken/checkpoint-4")
    options = train_options(csv, model, tmp_path / "broken", save_steps=4, **settings)
    resumed = train(replace(options, resume_from_checkpoint=True))
    assert resumed.steps == whole.steps == 9
    expected, got = tensors_of(whole.final), tensors_of(resumed.final)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_fresh_start_sets_an_earlier_run_aside(model, tmp_path, capsys):
    csv, output = make_csv(tmp_path, 4), tmp_path / "run"
    for _ in range(2):
        train(train_options(csv, model, output))
    assert {p.name for p in output.iterdir()} == {
        ".mdl-toolkit-files.json",
        "checkpoint-1",
        "final",
        "log.jsonl",
        "loss.png",
        "report.html",
        "previous-1",
        "mdl-toolkit.json",
        "mdl-toolkit.yaml",
    }
    assert {p.name for p in (output / "previous-1").iterdir()} == {
        "checkpoint-1",
        "final",
        "log.jsonl",
        "loss.png",
        "report.html",
        "mdl-toolkit.json",
        "mdl-toolkit.yaml",
    }
    assert "previous-1" in capsys.readouterr().err


def test_resume_true_with_nothing_to_resume_warns(model, tmp_path, capsys):
    train(train_options(make_csv(tmp_path, 4), model, tmp_path / "run", resume_from_checkpoint=True))
    assert "starting afresh" in capsys.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize("resume", [False, True])
def test_a_log_that_is_a_fifo_is_refused(model, tmp_path, resume):
    output = tmp_path / "run"
    (output / "checkpoint-1").mkdir(parents=True)
    (output / "mdl-toolkit.yaml").write_text("# mdl-toolkit train\n")
    os.mkfifo(output / "log.jsonl")
    with pytest.raises(InputError, match="log.jsonl: a FIFO"):
        train(train_options(make_csv(tmp_path, 2), model, output, resume_from_checkpoint=resume))


@pytest.mark.parametrize("output", ["run", "another"])
def test_a_finished_run_can_be_given_back(model, tmp_path, capsys, output):
    csv = make_csv(tmp_path, 4)
    done = train(train_options(csv, model, tmp_path / "run", eval_dataset=str(csv)))
    checkpoint = tmp_path / "run/checkpoint-1"
    options = train_options(csv, model, tmp_path / output, eval_dataset=str(csv))
    again = train(replace(options, resume_from_checkpoint=str(checkpoint)))
    assert "nothing is left to train" in capsys.readouterr().err
    assert again.eval_loss == pytest.approx(done.eval_loss, rel=1e-5)
    expected, got = tensors_of(done.final), tensors_of(again.final)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_what_a_killed_run_converted_is_not_used(model, tmp_path):
    """The private dataset of another CSV is there, as after kill -9."""
    output, csv = tmp_path / "run", make_csv(tmp_path / "new", 8)
    convert(make_csv(tmp_path / "old", 4, seed=70), model, output / training.PRIVATE / "train")
    left = tensors_of(train(train_options(csv, model, output)).final)
    clean = tensors_of(train(train_options(csv, model, tmp_path / "clean")).final)
    assert all(torch.equal(left[name], clean[name]) for name in left)
    assert not (output / training.PRIVATE).exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_rank": 8}, "--lora-rank 4"),
        (
            {"train_target": ("decoder", "lm_head")},
            "--train-target encoder --train-target projector --train-target embed_tokens",
        ),
    ],
)
def test_resuming_with_an_adapter_of_another_shape_is_refused(model, tmp_path, changes, named):
    csv = make_csv(tmp_path, 4)
    options = train_options(
        csv, model, tmp_path / "run", train_target=("encoder", "projector", "embed_tokens")
    )
    train(options)
    before, other = files_below(tmp_path), replace(options, resume_from_checkpoint=True, **changes)
    with pytest.raises(ModelError, match=f"it was trained with {named}; give the same"):
        train(other)
    assert files_below(tmp_path) == before


def test_the_order_of_targets_and_the_rank_of_none_do_not_matter_to_a_resumption(model, tmp_path):
    csv = make_csv(tmp_path, 4)
    options = train_options(csv, model, tmp_path / "run", train_target=("encoder", "decoder"))
    train(options)
    train(replace(options, train_target=("decoder", "encoder"), resume_from_checkpoint=True))
    options = replace(options, train_target=("lm_head",), output=str(tmp_path / "full"))
    train(options)
    train(replace(options, lora_rank=8, resume_from_checkpoint=True))


@pytest.mark.parametrize("slip", ["a model that is not there", "a bad evaluation row", "a loss that is NaN"])
def test_what_an_interrupted_run_converted_outlives_a_slip(model, tmp_path, monkeypatch, slip):
    """The message of the interruption promised it."""
    options = train_options(make_csv(tmp_path, 8), model, tmp_path / "run", save_steps=1, num_epochs=2)
    loss, calls = training.ForwardPass.loss, []

    def interrupted(self, *words):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(training.ForwardPass, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options)
    left = files_below(tmp_path / "run/.dataset")
    assert "train/state.json" in left
    bad = make_rows(tmp_path / "audio", 2)
    bad[1]["audio"] = "missing.wav"
    wrong = {
        "a model that is not there": {"model_name": str(tmp_path / "nowhere")},
        "a bad evaluation row": {"eval_dataset": str(write_csv(tmp_path / "bad.csv", bad))},
        "a loss that is NaN": {},
    }[slip]
    with monkeypatch.context() as patch:
        patch.setattr(training.ForwardPass, "loss", lambda *words: loss(*words) * math.nan)
        with pytest.raises(ToolkitError):
            train(replace(options, resume_from_checkpoint=True, **wrong))
    assert files_below(tmp_path / "run/.dataset") == left
    train(replace(options, resume_from_checkpoint=True))
    assert not (tmp_path / "run/.dataset").exists()


def test_a_model_that_does_not_fit_leaves_an_earlier_run_alone(model, tmp_path):
    csv = make_csv(tmp_path, 4)
    train(train_options(csv, model, tmp_path / "run"))
    tensors = load_file(model / "model.safetensors")
    save_file(
        {**tensors, "acoustic.weight": torch.ones(2)}, model / "model.safetensors", metadata={"format": "pt"}
    )
    before = files_below(tmp_path)
    with pytest.raises(ModelError, match=r"unknown: acoustic\.weight"):
        train(train_options(csv, model, tmp_path / "run"))
    assert files_below(tmp_path) == before


def test_bad_evaluation_rows_are_known_first_and_told_with_those_of_training(model, tmp_path, monkeypatch):
    converted, real = [], training_data.convert_rows
    monkeypatch.setattr(
        training_data, "convert_rows", lambda *w, **m: converted.append(w[1].name) or real(*w, **m)
    )
    rows = make_rows(tmp_path / "audio", 2)
    rows[1]["audio"] = "missing.wav"
    bad = write_csv(tmp_path / "eval.csv", rows)
    with pytest.raises(RowsError, match=r"missing\.wav"):
        train(train_options(make_csv(tmp_path, 4), model, tmp_path / "run", eval_dataset=str(bad)))
    assert converted == ["eval", "train"]
    assert not (tmp_path / "run").exists()


def test_after_a_lack_of_memory_nothing_is_converted_again(model, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    options = train_options(make_csv(tmp_path, 4), model, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(training.ForwardPass, "loss", fail)
        with pytest.raises(ModelError, match="ran out of memory"):
            train(options)
    (data,) = (tmp_path / "run/.dataset/train").glob("*.arrow")
    before = data.stat().st_ino
    opened = []
    real = training_data.ConvertedDataset
    monkeypatch.setattr(
        training_data, "ConvertedDataset", lambda p: opened.append(data.stat().st_ino) or real(p)
    )
    train(options)
    assert opened == [before]
    assert not (tmp_path / "run/.dataset").exists()


def test_out_of_memory_is_explained(model, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(training.ForwardPass, "loss", fail)
    with pytest.raises(ModelError, match="ran out of memory; lower --batch-size"):
        train(train_options(make_csv(tmp_path, 4), model, tmp_path / "run"))
