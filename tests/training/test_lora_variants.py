"""`--lora-variant`: rsLoRA and DoRA as PEFT computes and merges them, from the first step to the answer."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import read_settings
from mdl_toolkit.errors import ModelError, UsageError
from mdl_toolkit.training.lora import LORA_TARGETS, add_adapters
from mdl_toolkit.training.lora_layer import FastLoraLinear
from mdl_toolkit.training.run import train
from mdl_toolkit.training.warm_start import take_over
from mdl_toolkit.weights.adapter import AdapterDelta
from mdl_toolkit.weights.loading import load_model, quiet_peft
from tests.support.lora_models import TARGETS, assert_same, batch_of, learnt
from tests.support.paths import MODEL
from tests.support.runs import make_csv, train_options

CPU = torch.device("cpu")
FLAGS = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
VARIANTS = [*FLAGS, "pissa"]


def options_of(csv, output, variant, **changes):
    """Four steps."""
    settings = {"lora_variant": variant, "num_epochs": 2, "gradient_checkpointing": True, "seed": 3}
    return train_options(csv, MODEL, output, **{**settings, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", FLAGS)
def test_loss_and_gradients_are_those_of_peft(variant, dtype):
    model, counts = add_adapters(
        load_model(MODEL, dtype=dtype, device=CPU), TARGETS, rank=4, alpha=6.0, dropout=0.0, base_name="b",
        variant=variant,
    )  # fmt: skip
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6.0, **FLAGS[variant],
        target_modules="|".join(f"(?:{LORA_TARGETS[target]})" for target in TARGETS),
    )  # fmt: skip
    with quiet_peft():
        theirs = get_peft_model(load_model(MODEL, dtype=dtype, device=CPU), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert sum(count.parameters for count in counts) == sum(map(torch.numel, named.values()))
    theirs.load_state_dict(model.state_dict())
    batch = batch_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, expected = (learnt(each.train(), batch) for each in (model, theirs))
    assert_same(ours, expected, 1e-4 if dtype == torch.float32 else 0.05)
    # The fast layer computes what it knows.
    is_fast = any(isinstance(module, FastLoraLinear) for module in model.modules())
    assert is_fast == (variant == "rslora")


def test_pissa_is_that_of_peft():
    """Its loss and gradients, at the start and after a change; half of our adapter does not train."""
    model, _ = add_adapters(
        load_model(MODEL, dtype=torch.float32, device=CPU), TARGETS, rank=4, alpha=6.0, dropout=0.0,
        base_name="b", variant="pissa",
    )  # fmt: skip
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6.0, init_lora_weights="pissa",
        target_modules="|".join(f"(?:{LORA_TARGETS[target]})" for target in TARGETS),
    )  # fmt: skip
    with quiet_peft():
        theirs = get_peft_model(load_model(MODEL, dtype=torch.float32, device=CPU), config)
    batch, changed = batch_of(model), dict(theirs.named_parameters())
    plain = load_model(MODEL, dtype=torch.float32, device=CPU).train()(**batch).loss.item()
    for is_changed in (False, True):
        loss, gradients = learnt(model.train(), batch)
        expected = learnt(theirs.train(), batch)
        halves = {name: gradient.split(4, int("lora_B" in name)) for name, gradient in gradients.items()}
        assert_same((loss, {name: half[0] for name, half in halves.items()}), expected, 1e-3)
        assert not any(half[1].any() for half in halves.values())
        assert (loss == pytest.approx(plain, rel=1e-5)) != is_changed
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                change = 0.05 * torch.randn_like(changed[name])
                changed[name].data += change
                parameter.data.split(4, int("lora_B" in name))[0].add_(change)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_trained_merges_as_peft_merges_it(tmp_path, variant, capsys):
    csv = make_csv(tmp_path, 8)
    options = options_of(csv, tmp_path / "run", variant)
    final = train(options).final
    assert f"adapters: {variant}" in capsys.readouterr().err
    checkpoint = tmp_path / "run/checkpoint-4"
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert {name: config[name] for name in ("use_rslora", "use_dora")} == {
        "use_rslora": variant == "rslora",
        "use_dora": variant == "dora",
    }
    with quiet_peft():
        base = load_model(MODEL, dtype=torch.float32, device=CPU)
        merged = PeftModel.from_pretrained(base, checkpoint, torch_device="cpu").merge_and_unload()
    expected, found, plain = (
        merged.state_dict(),
        load_file(final / "model.safetensors"),
        load_file(MODEL / "model.safetensors"),
    )
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)
    changed = [name for name in found if not torch.equal(found[name], plain[name])]
    assert len(changed) > 20
    # What inference makes of base and adapter.
    answering = load_model(MODEL, dtype=torch.float32, device=CPU)
    AdapterDelta.read(checkpoint, MODEL).merge_into(answering, MODEL)
    assert all(
        torch.allclose(tensor, expected[name], atol=1e-5) for name, tensor in answering.state_dict().items()
    )
    settings = read_settings(tmp_path / "run/mdl-toolkit.yaml", TrainOptions)
    assert settings["lora_variant"] == variant
    assert re.search(rf"lora.variant.*\b{variant}\b", (final / "README.md").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_it_ends_as_unbroken_bit_for_bit(tmp_path, variant, monkeypatch):
    csv = make_csv(tmp_path, 8)
    changes = {"save_steps": 1, "lora_dropout": 0.1 * (variant != "pissa"), "merge_lora": False}
    options = options_of(csv, tmp_path / "run", variant, **changes)
    train(options)
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "again/checkpoint-2")
    again = replace(options, output=str(tmp_path / "again"), resume_from_checkpoint=True)
    with pytest.raises(ModelError, match=f"trained with --lora-variant {variant}; give the same"):
        train(replace(again, lora_variant="lora"))
    # Weights are not decomposed again for what is read.
    monkeypatch.setattr(torch.linalg, "svd", None)
    train(again)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        whole, resumed = ((tmp_path / run / "checkpoint-4" / name).read_bytes() for run in ("run", "again"))
        assert whole == resumed
    # A training that goes on from it has its variant; PiSSA's is plain LoRA of twice the rank.
    saved = "lora" if variant == "pissa" else variant
    onward = train_options(
        csv, MODEL, tmp_path / "onward", adapter=str(tmp_path / "run/final"), lora_rank=32, lora_alpha=32
    )
    assert take_over(onward)[0].lora_variant == saved
    assert take_over(onward)[0].lora_rank == (8 if variant == "pissa" else 4)
    other = {"lora": "rslora", "rslora": "dora", "dora": "rslora"}[saved]
    with pytest.raises(UsageError, match=rf"--lora-variant: not as in .*which has .*--lora-variant {saved};"):
        take_over(replace(onward, lora_variant=other))


def test_half_of_a_pissa_adapter_stays(tmp_path):
    train(options_of(make_csv(tmp_path, 8), tmp_path / "run", "pissa", save_steps=1, optimizer="adamw_8bit"))
    first, last = (
        load_file(tmp_path / f"run/checkpoint-{step}/adapter_model.safetensors") for step in (1, 4)
    )
    for name, tensor in last.items():
        (moves, stays), (moved, stayed) = (
            each.split(4, int("lora_B" in name)) for each in (first[name], tensor)
        )
        assert torch.equal(stays, stayed)
        assert not torch.equal(moves, moved)


@pytest.mark.parametrize(
    "changes", [{"quantization": "4bit"}, {"lora_dropout": 0.1}, {"weight_decay": 0.1}], ids=str
)
def test_what_would_change_the_half_that_stays_is_refused(tmp_path, changes):
    options = options_of(make_csv(tmp_path, 4), tmp_path / "run", "pissa", **changes)
    (name,) = changes
    with pytest.raises(UsageError, match=f"--lora-variant pissa: not with --{name.replace('_', '-')}"):
        train(options)
    assert not (tmp_path / "run").exists()


def test_what_peft_cannot_compute_is_refused_before_anything_is_loaded(tmp_path):
    options = options_of(make_csv(tmp_path, 4), tmp_path / "run", "dora", quantization="8bit")
    with pytest.raises(
        UsageError, match="PEFT cannot compute it over weights in 8 bits; take --quantization 4bit"
    ):
        train(options)
    assert not (tmp_path / "run").exists()
    # In 4 bits it can, and the result is a whole model.
    assert train(replace(options, quantization="4bit", num_epochs=1)).steps == 1
