"""Training: what changes and what does not, which curve it follows, what it leaves on disk."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import read_settings
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import DatasetError, InputError, ModelError, RowsError, ToolkitError, UsageError
from mdl_toolkit.training import datasets as training_data
from mdl_toolkit.training import run as training
from mdl_toolkit.training.memory import plan as memory
from mdl_toolkit.training.run import train
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.schedule import Schedule
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.utils.run_folder import read_log
from mdl_toolkit.weights.loading import load_model, quiet_peft
from tests.support.runs import (
    ANSWERS,
    copy_checkpoint,
    files_below,
    make_csv,
    make_rows,
    train_options,
    write_csv,
)

ALL = ("encoder", "projector", "decoder", "embed_tokens", "lm_head")
CPU = torch.device("cpu")


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def convert(csv, model, output):
    convert_dataset(ConvertOptions(input=str(csv), output=str(output), model_name=str(model)))
    return output


def history(output, steps):
    lines = [line for line in read_log(output / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, steps + 1)]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def weights(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def close(left, right, tolerance):
    assert left.keys() == right.keys()
    return all(torch.allclose(left[name], right[name], atol=tolerance, rtol=tolerance) for name in left)


# --- what is trained ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("A-small", ("encoder", "projector", "decoder")),
        ("A-small", ALL),
        ("A-small", ("decoder",)),
        ("A-small", ("embed_tokens",)),
        ("A-small", ("lm_head",)),
        ("B-small", ALL),
        ("B-small-tied", ("lm_head",)),
        ("B-small-tied", ("encoder", "embed_tokens")),
    ],
)
def test_every_trainable_parameter_changes_and_nothing_else(golden, tmp_path, monkeypatch, name, targets):
    seen = {}

    class Watching(training.Trainer):
        def run(self):
            seen["model"] = self.forward.model
            seen["before"] = {n: t.clone() for n, t in seen["model"].state_dict().items()}
            return super().run()

    monkeypatch.setattr(training, "Trainer", Watching)
    model = copy_checkpoint(golden, name, tmp_path)
    train(train_options(make_csv(tmp_path, 8), model, tmp_path / "run", train_target=targets, num_epochs=3))
    trainable = {n for n, p in seen["model"].named_parameters() if p.requires_grad}
    after = seen["model"].state_dict()
    changed = {n for n, t in seen["before"].items() if not torch.equal(t, after[n])}
    tied = {n for n in changed if "lm_head.modules_to_save" in n} if "tied" in name else set()
    assert changed - tied == trainable
    assert len(trainable) > 0


def test_batch_norm_statistics_do_not_move(model, tmp_path):
    train(train_options(make_csv(tmp_path, 8), model, tmp_path / "run", train_target=ALL))
    before, after = weights(model), weights(tmp_path / "run/final")
    statistics = {name for name in before if ".init_bn." in name}
    assert len(statistics) == 5
    assert all(torch.equal(before[name], after[name]) for name in statistics)


# --- the curve ------------------------------------------------------------------------------------------


def test_one_by_eight_follows_eight_by_one(model, tmp_path):
    csv = make_csv(tmp_path, 20)  # a partial last batch and a partial last window
    curves, results = [], []
    for batch, accumulation in ((8, 1), (1, 8), (3, 8), (4, 2)):
        output = tmp_path / f"run-{batch}-{accumulation}"
        options = train_options(csv, model, output, batch_size=batch, num_epochs=2, lr=1e-3)
        done = train(replace(options, gradient_accumulation_steps=accumulation))
        curves.append(history(output, done.steps))
        results.append(weights(done.final))
    assert len(curves[0]) == 6  # 20 rows: two whole windows and a partial one in each epoch
    for other in (1, 3):
        assert curves[other] == [pytest.approx(pair, rel=1e-4) for pair in curves[0]]
        assert close(results[other], results[0], 1e-4)
    assert curves[2] != [pytest.approx(pair, rel=1e-4) for pair in curves[0]]  # 3 x 8 is another batch


def test_the_logged_loss_is_the_mean_over_the_windows_supervised_tokens(model, tmp_path):
    csv = make_csv(tmp_path, 8)
    output = tmp_path / "run"
    train(train_options(csv, model, output, batch_size=2, gradient_accumulation_steps=4, lr=1e-9))
    dataset = ConvertedDataset(convert(csv, model, tmp_path / "data"))
    assert history(output, 1)[0][0] == pytest.approx(plain_loss(model, dataset), rel=1e-4)


def plain_loss(folder, dataset):
    """Row by row: sum of token losses over number of supervised tokens."""
    model, total, tokens = load_model(folder, dtype=torch.float32, device=CPU).eval(), 0.0, 0
    for index in range(len(dataset)):
        batch = Collator(0)([dataset[index]])
        with torch.no_grad():
            logits = model(**batch, return_logits=True).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return total / tokens


def test_gradient_checkpointing_changes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: None)  # so that everything is computed again
    csv = make_csv(tmp_path, 8)
    results = []
    for checkpointing in (True, False):
        output = tmp_path / str(checkpointing)
        options = train_options(csv, model, output, gradient_checkpointing=checkpointing, lora_dropout=0.1)
        results.append(weights(train(options).final))
    assert close(results[0], results[1], 1e-6)


def test_gradient_checkpointing_gives_up_no_more_than_it_must(model, tmp_path, monkeypatch):
    """With memory to spare a small model keeps everything; after a lack of it, nothing any more."""
    found, plain = [], ForwardPass.loss

    def loss(forward, *words):
        base = forward.model.get_base_model()
        blocks = (*base.audio_encoder.blocks, *base.decoder.model.layers)
        found.append({block.gradient_checkpointing for block in blocks})
        if len(found) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(forward, *words)

    monkeypatch.setattr(ForwardPass, "loss", loss)
    train(train_options(make_csv(tmp_path, 8), model, tmp_path / "run", gradient_checkpointing=True))
    assert found == [{False}, *[{True}] * (len(found) - 1)]
    assert len(found) > 2


def test_a_csv_trains_as_its_converted_dataset_does(model, tmp_path):
    csv = make_csv(tmp_path, 8)
    data = convert(csv, model, tmp_path / "data")
    results = [
        weights(train(train_options(source, model, tmp_path / f"run-{i}")).final)
        for i, source in enumerate((csv, data))
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_it_learns(model, tmp_path):
    csv = make_csv(tmp_path, 12)
    done = train(train_options(csv, model, tmp_path / "run", num_epochs=20, eval_dataset=str(csv)))
    dataset = ConvertedDataset(convert(csv, model, tmp_path / "data"))
    assert done.eval_loss < 0.25 * plain_loss(model, dataset)


@pytest.mark.slow
def test_two_processes_follow_one(model, tmp_path):
    csv = make_csv(tmp_path, 24)
    settings = {"lr": 1e-3, "num_epochs": 2, "eval_dataset": str(csv)}
    alone = train(train_options(csv, model, tmp_path / "one", batch_size=8, **settings))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", "mdl-toolkit",
        "train", "--train-dataset", str(csv), "--eval-dataset", str(csv), "--model-name", str(model),
        "--output", str(tmp_path / "two"), "--lr", "1e-3", "--lora-rank", "4", "--lora-alpha", "8",
        "--batch-size", "4", "--num-epochs", "2", "--gradient-checkpointing", "false",
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, check=False, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: 6 steps") == 1
    assert close(weights(tmp_path / "two/final"), weights(alone.final), 1e-4)
    losses = [line["eval_loss"] for line in read_log(tmp_path / "two/log.jsonl") if "eval_loss" in line]
    assert losses[-1] == pytest.approx(alone.eval_loss, rel=1e-4)


# --- evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 1, 3])
def test_eval_loss_is_over_all_supervised_tokens(model, tmp_path, every):
    train_csv = make_csv(tmp_path / "t", 4)
    eval_csv = make_csv(tmp_path / "e", 7, seed=50)
    options = train_options(
        train_csv, model, tmp_path / "run", eval_dataset=str(eval_csv), eval_batch_size=3, lr=1e-9,
        eval_accumulation_steps=every,
    )  # fmt: skip
    data = ConvertedDataset(convert(eval_csv, model, tmp_path / "data"))
    assert train(options).eval_loss == pytest.approx(plain_loss(model, data), rel=1e-5)


def test_evaluations_come_when_they_are_due(model, tmp_path, capsys):
    csv = make_csv(tmp_path, 16)
    train(train_options(csv, model, tmp_path / "run", eval_dataset=str(csv), eval_steps=0.5, num_epochs=2))
    said = capsys.readouterr().err
    assert [f"evaluation at step {n}:" in said for n in range(1, 9)] == [n % 2 == 0 for n in range(1, 9)]


# --- schedule, checkpoints, output ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "processes", "changes", "per_epoch", "total"),
    [
        (180, 1, {"batch_size": 8}, 23, 23),
        (180, 1, {"batch_size": 8, "num_epochs": 0.1}, 23, 3),
        (10, 1, {"batch_size": 8, "num_epochs": 0.001}, 2, 1),
        (180, 2, {"batch_size": 4, "num_epochs": 2}, 23, 46),
        (20, 1, {"batch_size": 3, "gradient_accumulation_steps": 4}, 2, 2),
        (20, 1, {"batch_size": 8, "num_epochs": 1.5}, 3, 5),
    ],
)
def test_steps_of_a_run(rows, processes, changes, per_epoch, total):
    options = TrainOptions(train_dataset="d", output="o", **changes)
    nothing = np.zeros(rows, np.int64)
    split = options.batch_size, options.gradient_accumulation_steps, processes
    schedule = Schedule.of(BatchSampler(nothing, nothing, *split, 0).steps_per_epoch, options)
    assert (schedule.per_epoch, schedule.total) == (per_epoch, total)
    assert math.ceil(rows / (changes["batch_size"] * processes)) >= per_epoch


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
    expected, got = weights(whole.final), weights(resumed.final)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_fresh_start_sets_an_earlier_run_aside(model, tmp_path, capsys):
    csv, output = make_csv(tmp_path, 4), tmp_path / "run"
    for _ in range(2):
        train(train_options(csv, model, output))
    assert {p.name for p in output.iterdir()} == {
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


@pytest.mark.parametrize("output", ["run", "another"])
def test_a_finished_run_can_be_given_back(model, tmp_path, capsys, output):
    csv = make_csv(tmp_path, 4)
    done = train(train_options(csv, model, tmp_path / "run", eval_dataset=str(csv)))
    checkpoint = tmp_path / "run/checkpoint-1"
    options = train_options(csv, model, tmp_path / output, eval_dataset=str(csv))
    again = train(replace(options, resume_from_checkpoint=str(checkpoint)))
    assert "nothing is left to train" in capsys.readouterr().err
    assert again.eval_loss == pytest.approx(done.eval_loss, rel=1e-5)
    expected, got = weights(done.final), weights(again.final)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_what_a_killed_run_converted_is_not_used(model, tmp_path):
    """The private dataset of another CSV is there, as after kill -9."""
    output, csv = tmp_path / "run", make_csv(tmp_path / "new", 8)
    convert(make_csv(tmp_path / "old", 4, seed=70), model, output / training.PRIVATE / "train")
    left = weights(train(train_options(csv, model, output)).final)
    clean = weights(train(train_options(csv, model, tmp_path / "clean")).final)
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


def test_bad_evaluation_rows_are_known_before_the_training_rows_are_converted(model, tmp_path, monkeypatch):
    converted, real = [], training_data.convert_rows
    monkeypatch.setattr(
        training_data, "convert_rows", lambda *w, **m: converted.append(w[1].name) or real(*w, **m)
    )
    rows = make_rows(tmp_path / "audio", 2)
    rows[1]["audio"] = "missing.wav"
    bad = write_csv(tmp_path / "eval.csv", rows)
    with pytest.raises(RowsError, match=r"missing\.wav"):
        train(train_options(make_csv(tmp_path, 4), model, tmp_path / "run", eval_dataset=str(bad)))
    assert converted == ["eval"]
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


# --- dtype and quantisation -----------------------------------------------------------------------------


def test_bf16_on_a_cpu_keeps_the_bases_format(model, tmp_path):
    csv = make_csv(tmp_path, 8)
    done = train(train_options(csv, model, tmp_path / "run", bf16=True, num_epochs=20, eval_dataset=str(csv)))
    assert done.eval_loss < 3
    adapter = weights(tmp_path / f"run/checkpoint-{done.steps}")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert {n: t.dtype for n, t in weights(done.final).items()} == {
        n: t.dtype for n, t in weights(model).items()
    }


# --- the result loads elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A-small", "B-small", "B-small-tied"])
@pytest.mark.parametrize("targets", [("encoder", "projector", "decoder"), ALL])
def test_adapter_and_merged_folder_give_the_trained_models_logits(
    golden, tmp_path, monkeypatch, name, targets
):
    seen = {}
    monkeypatch.setattr(training, "add_adapters", keeping(seen, training.add_adapters))
    model = copy_checkpoint(golden, name, tmp_path)
    csv = make_csv(tmp_path, 8)
    settings = {"train_target": targets, "num_epochs": 5}
    train(train_options(csv, model, tmp_path / "adapter", merge_lora=False, **settings))
    dataset = ConvertedDataset(convert(csv, model, tmp_path / "data"))
    batch = dict(Collator(0)([dataset[index] for index in range(8)]))
    del batch["labels"]
    trained = logits(seen["model"], batch)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert (trained - logits(base, batch)).abs().max() > 0.1  # the adapter does something
    with quiet_peft():
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter/final", torch_device="cpu")
    assert (logits(adapted, batch) - trained).abs().max() < 1e-4
    train(train_options(csv, model, tmp_path / "merged", **settings))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/final")
    assert (logits(merged, batch) - trained).abs().max() < 1e-4


def keeping(seen, make):
    def made(*args, **settings):
        seen["model"], counts = make(*args, **settings)
        return seen["model"], counts

    return made


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


# --- what is refused, and when --------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is an error: what is refused must be refused before."""

    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(training, "load_model", fail)


@pytest.mark.usefixtures("no_weights")
class TestRefusals:
    def test_an_adapter_as_the_base(self, model, tmp_path):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (model / name).write_text("{}")
        with pytest.raises(ModelError, match="an adapter; train the base model"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run"))

    @pytest.mark.parametrize("names", [("wandbb",), ("none", "tensorboard"), ("all", "wandb")])
    def test_trackers(self, model, tmp_path, names):
        with pytest.raises(UsageError, match="--report-to"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", report_to=names))
        assert not (tmp_path / "run").exists()

    def test_a_tracker_that_is_not_installed(self, model, tmp_path):
        with pytest.raises(ToolkitError, match="neptune: not installed"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", report_to=("neptune",)))

    def test_data_that_are_not_there(self, model, tmp_path):
        with pytest.raises(InputError, match="--train-dataset .*nowhere.csv: no such file"):
            train(train_options(tmp_path / "nowhere.csv", model, tmp_path / "run"))
        with pytest.raises(InputError, match="--eval-dataset .*nowhere: no such file"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", eval_dataset="nowhere"))

    def test_bad_rows_of_the_evaluation_set(self, model, tmp_path):
        rows = make_rows(tmp_path / "audio", 3)
        rows[1]["audio"] = "missing.wav"
        bad = write_csv(tmp_path / "eval.csv", rows)
        with pytest.raises(InputError, match=r"line 3.*missing\.wav"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", eval_dataset=str(bad)))
        assert not list((tmp_path / "run").glob("**/*"))

    def test_an_output_in_a_dataset_or_model(self, model, tmp_path):
        csv = make_csv(tmp_path, 2)
        data = convert(csv, model, tmp_path / "data")
        for output in (data, data / "run", model, model / "run", tmp_path):
            source = data if output != tmp_path else csv
            with pytest.raises(InputError, match="--output"):
                train(train_options(source, model, output))

    def test_a_dataset_of_another_tokenizer(self, model, tmp_path):
        data = convert(make_csv(tmp_path, 2), model, tmp_path / "data")
        template = model / "chat_template.jinja"
        template.write_text(template.read_text() + "{# changed #}")
        with pytest.raises(DatasetError, match="another chat template"):
            train(train_options(data, model, tmp_path / "run"))

    def test_a_model_without_weights(self, model, tmp_path):
        (model / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="no weights"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run"))

    def test_an_incomplete_checkpoint(self, model, tmp_path):
        options = train_options(make_csv(tmp_path, 2), model, tmp_path / "run")
        with pytest.raises(ModelError, match="not a complete checkpoint"):
            train(replace(options, resume_from_checkpoint=str(tmp_path)))

    def test_quantisation_without_its_package(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(ModelError, match=r"mdl-toolkit\[quantization\]"):
            train(
                train_options(
                    tmp_path / "not-even-looked-at", "nor/this", tmp_path / "run", quantization="4bit"
                )
            )


def test_conversion_options_with_converted_data_are_warned_of(model, tmp_path, capsys):
    data = convert(make_csv(tmp_path, 4), model, tmp_path / "data")
    train(train_options(data, model, tmp_path / "run", user_prompt="ignored", base_dir=str(tmp_path)))
    assert "converted already: --user-prompt, --base-dir ignored" in capsys.readouterr().err


def test_evaluation_options_without_evaluation_data_are_warned_of(model, tmp_path, capsys):
    options = train_options(make_csv(tmp_path, 4), model, tmp_path / "run", report_to=("tensorboard",))
    train(options)
    assert "ignored" not in capsys.readouterr().err
    train(replace(options, keep_best=True, early_stopping_patience=2, eval_steps=1))
    told = "there is no --eval-dataset: --eval-steps, --keep-best, --early-stopping-patience ignored"
    assert f"warning: {told}" in capsys.readouterr().err.splitlines()


def test_answers_of_the_fixture_differ_in_length():
    assert len({len(answer) for answer in ANSWERS}) > 3
