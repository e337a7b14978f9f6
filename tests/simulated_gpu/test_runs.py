"""Whole runs on a pretended GPU: they come to what a CPU comes to; devices are not mixed; memory ends."""

import re

import pytest
import torch

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.memory import plan
from mdl_toolkit.training.run import train
from mdl_toolkit.weights.loading import choose_dtype
from tests.support.paths import MODEL
from tests.support.pretended_device import NAME, pretending
from tests.support.runs import ANSWERS, history, make_csv, train_options

DEVICE = f"{NAME}:0"


def losses(folder):
    return [line.get("loss", line.get("eval_loss")) for line in history(folder)]


def test_a_training_with_evaluations_and_answers_is_that_of_the_cpu(tmp_path, monkeypatch):
    # Nobody knows what is free: every block is computed again.
    monkeypatch.setattr(plan, "free_memory", lambda _: None)
    csv, answers = make_csv(tmp_path, 8), []

    def run(name):
        options = train_options(
            csv, MODEL, tmp_path / name, num_epochs=2, eval_dataset=str(csv), eval_metric="accuracy",
            eval_steps=2, gradient_checkpointing=True, bf16=False, save_steps=2,
        )  # fmt: skip
        done = train(options)
        asked = {"input": str(csv), "model_name": str(done.final), "max_new_tokens": 6, "bf16": False}
        answers.append(infer(InferenceOptions(output=str(tmp_path / f"{name}.csv"), **asked)))

    run("cpu")
    with pretending() as device:
        run("pretended")
        assert device.products[torch.float32] > 0
        assert device.operations["aten::_fused_adamw_"] == 4
    assert len(losses(tmp_path / "cpu")) == 6
    assert losses(tmp_path / "pretended") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    assert answers[0] == answers[1]


def test_a_gpu_with_bfloat16_trains_in_it(tmp_path, capfd):
    with pretending() as device:
        options = train_options(
            make_csv(tmp_path, 6), MODEL, tmp_path / "run", num_epochs=10, merge_lora=False,
            train_target=("decoder",), cache_audio_features=True,
        )  # fmt: skip
        done = train(options)
        # The front end has no weights and stays in float32.
        assert device.products[torch.bfloat16] > device.products[torch.float32]
    assert done.train_loss < losses(tmp_path / "run")[0]
    said = capfd.readouterr().err
    assert f"device: {DEVICE} (Pretended); base weights: bfloat16" in said
    assert re.search(r"\(Pretended\): [\d,]+ tokens/s; most memory [\d.]+ MB, planned [\d.]+ MB", said)


def test_a_gpu_without_float64_trains_and_evaluates(tmp_path):
    csv = make_csv(tmp_path, 6)
    options = {"eval_dataset": str(csv), "eval_steps": 1, "eval_accumulation_steps": 2, "merge_lora": False}
    evaluated = []
    for has_float64 in (True, False):
        with pretending(has_float64=has_float64):
            output = tmp_path / str(has_float64)
            train(train_options(csv, MODEL, output, num_epochs=1, bf16=False, **options))
            if not has_float64:
                with pytest.raises(RuntimeError, match="fp64"):
                    torch.ones(3, dtype=torch.float64, device=DEVICE)
        evaluated.append(losses(output))
    assert len(evaluated[0]) > 1
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6)


def test_a_lack_of_memory_halves_the_rows_and_changes_nothing_else(tmp_path, capfd):
    csv = make_csv(tmp_path, 8)
    options = {"num_epochs": 2, "batch_size": 8, "bf16": False, "merge_lora": False, "save_steps": 1}
    with pretending() as device:
        train(train_options(csv, MODEL, tmp_path / "whole", **options))
        whole = device.peak
    assert "ran out of memory" not in capfd.readouterr().err
    with pretending(total=int(0.7 * whole)) as device:
        train(train_options(csv, MODEL, tmp_path / "halved", **options))
        assert device.peak <= 0.7 * whole
    assert re.search("the GPU ran out of memory: [24] rows at once from now on", capfd.readouterr().err)
    assert losses(tmp_path / "halved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    resumed = {**options, "resume_from_checkpoint": str(tmp_path / "halved/checkpoint-1")}
    for name, total, is_whole in (("same", int(0.7 * whole), False), ("larger", 24 * 10**9, True)):
        with pretending(total=total) as device:
            train(train_options(csv, MODEL, tmp_path / name, **resumed))
            assert (device.peak > 0.7 * whole) == is_whole
        assert "ran out of memory" not in capfd.readouterr().err


def test_answers_that_are_learnt_on_it_are_given_on_it(tmp_path):
    csv = make_csv(tmp_path, 6)
    with pretending():
        done = train(
            train_options(csv, MODEL, tmp_path / "run", num_epochs=25, batch_size=6, merge_lora=False)
        )
        asked = InferenceOptions(
            input=str(csv), output=str(tmp_path / "answers.csv"), model_name=str(done.final)
        )
        assert infer(asked) == [*ANSWERS]


# --- the pretended device itself ---------------------------------------------------------------------------


def test_devices_are_not_mixed():
    with pretending():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        for mix in (torch.add, torch.dot, torch.maximum):
            with pytest.raises(RuntimeError, match="on the same device"):
                mix(there, here)
            with pytest.raises(RuntimeError, match="on the same device"):
                mix(here, there)
        assert (there + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]


def test_products_of_two_dtypes_are_refused():
    with pretending():
        wide = torch.ones(3, 3, device=DEVICE)
        with pytest.raises(RuntimeError, match="same dtype"):
            torch.mm(wide, wide.bfloat16())


def test_memory_is_counted_and_limited():
    with pretending() as device:
        before = device.used
        device.total = before + 10_000
        some = torch.ones(1000, device=DEVICE)
        assert device.used - before == 4096
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(2000, device=DEVICE)
        view = some[10:].view(-1, 2)
        del some
        assert device.used - before == 4096
        del view
        assert device.used == before


def test_it_is_there_only_while_it_is_pretended():
    assert choose_dtype(None) == torch.float32
    with pretending(has_bfloat16=False):
        assert choose_dtype(None) == torch.float32
    with pretending():
        assert choose_dtype(None) == torch.bfloat16
    assert torch.accelerator.current_accelerator(check_available=True) is None
