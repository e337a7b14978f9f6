"""Training: what changes and what does not, which curve it follows, and that the result loads elsewhere."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.training import run as training
from mdl_toolkit.training.memory import plan as memory
from mdl_toolkit.training.run import train
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.utils.run_folder import read_log
from mdl_toolkit.weights.loading import load_model, quiet_peft
from tests.support.runs import (
    convert,
    copy_checkpoint,
    make_csv,
    train_options,
)
from tests.support.weight_files import tensors_of

ALL = ("encoder", "projector", "decoder", "embed_tokens", "lm_head")
CPU = torch.device("cpu")


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def history(output, steps):
    lines = [line for line in read_log(output / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, steps + 1)]
    return [(line["loss"], line["grad_norm"]) for line in lines]


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
    before, after = tensors_of(model), tensors_of(tmp_path / "run/final")
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
        results.append(tensors_of(done.final))
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
        results.append(tensors_of(train(options).final))
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
        tensors_of(train(train_options(source, model, tmp_path / f"run-{i}")).final)
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
    assert close(tensors_of(tmp_path / "two/final"), tensors_of(alone.final), 1e-4)
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


# --- dtype and quantisation -----------------------------------------------------------------------------


def test_bf16_on_a_cpu_keeps_the_bases_format(model, tmp_path):
    csv = make_csv(tmp_path, 8)
    done = train(train_options(csv, model, tmp_path / "run", bf16=True, num_epochs=20, eval_dataset=str(csv)))
    assert done.eval_loss < 3
    adapter = tensors_of(tmp_path / f"run/checkpoint-{done.steps}")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert {n: t.dtype for n, t in tensors_of(done.final).items()} == {
        n: t.dtype for n, t in tensors_of(model).items()
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
