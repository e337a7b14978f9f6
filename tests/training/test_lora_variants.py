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


@pytest.mark.parametrize("variant", FLAGS)
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


@pytest.mark.parametrize("variant", FLAGS)
def test_resumed_it_ends_as_unbroken_bit_for_bit(tmp_path, variant):
    csv = make_csv(tmp_path, 8)
    changes = {"save_steps": 1, "lora_dropout": 0.1, "merge_lora": False}
    options = options_of(csv, tmp_path / "run", variant, **changes)
    train(options)
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "again/checkpoint-2")
    again = replace(options, output=str(tmp_path / "again"), resume_from_checkpoint=True)
    with pytest.raises(ModelError, match=f"trained with --lora-variant {variant}; give the same"):
        train(replace(again, lora_variant="lora"))
    train(again)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        whole, resumed = ((tmp_path / run / "checkpoint-4" / name).read_bytes() for run in ("run", "again"))
        assert whole == resumed
    # A training that goes on from it has its variant.
    onward = train_options(
        csv, MODEL, tmp_path / "onward", adapter=str(tmp_path / "run/final"), lora_rank=32, lora_alpha=32
    )
    assert take_over(onward)[0].lora_variant == variant
    other = {"lora": "rslora", "rslora": "dora", "dora": "rslora"}[variant]
    with pytest.raises(
        UsageError, match=rf"--lora-variant: not as in .*which has .*--lora-variant {variant};"
    ):
        take_over(replace(onward, lora_variant=other))


def test_what_peft_cannot_compute_is_refused_before_anything_is_loaded(tmp_path):
    options = options_of(make_csv(tmp_path, 4), tmp_path / "run", "dora", quantization="8bit")
    with pytest.raises(
        UsageError, match="PEFT cannot compute it over weights in 8 bits; take --quantization 4bit"
    ):
        train(options)
    assert not (tmp_path / "run").exists()
    # In 4 bits it can, and the result is a whole model.
    assert train(replace(options, quantization="4bit", num_epochs=1)).steps == 1
