"""An adapter of ours in a process that imports nothing but the model classes and PEFT."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl_toolkit.card import About
from mdl_toolkit.export import export_adapter
from mdl_toolkit.loading import load_model
from mdl_toolkit.lora import add_adapters
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.provenance import Provenance
from runs import copy_checkpoint
from waves import wave

PLAIN = """
import sys
import torch
from mdl_toolkit.model import MiDashengLMModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

base, adapter, inputs, output = sys.argv[1:]
model = PeftModel.from_pretrained(MiDashengLMModel.from_pretrained(base), adapter).eval()
with torch.inference_mode():
    save_file({"logits": model(**load_file(inputs)).logits}, output)
ours = {name for name in sys.modules if name.startswith("mdl_toolkit.")}
below = ("mdl_toolkit.model", "mdl_toolkit.errors", "mdl_toolkit.language")
assert all(name.startswith(below) for name in ours), ours
"""
TARGETS = {
    "lora": ("encoder", "projector", "decoder"),
    "head": ("decoder", "lm_head"),
    "all": ("encoder", "projector", "decoder", "embed_tokens", "lm_head"),
    "copies alone": ("embed_tokens",),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", ["A-small", "B-small-tied"])
def test_its_logits_are_those_of_the_trained_model(golden, tmp_path, name, kind):
    base = copy_checkpoint(golden, name, tmp_path)
    torch.manual_seed(0)
    model, _ = add_adapters(
        load_model(base, dtype=torch.float32, device=torch.device("cpu")), TARGETS[kind], rank=4, alpha=6.0,
        dropout=0.0, base_name=str(base),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "checkpoint", save_embedding_layers=False)
    export_adapter(base, tmp_path / "checkpoint", tmp_path / "final", About(Provenance(), None, ""))
    audio = model.get_base_model().config.audio_token_id
    inputs = {
        "input_ids": torch.tensor([[5, 6, *[audio] * 5, 7, 8, 9]]),
        "input_values": torch.from_numpy(wave(16_000, 1))[None],
        "audio_length": torch.tensor([16_000]),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")
    words = (base, tmp_path / "final", tmp_path / "inputs.safetensors", tmp_path / "logits.safetensors")
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, words)], check=True)
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    with torch.inference_mode():
        expected = model.eval()(**inputs).logits
        plain = MiDashengLMModel.from_pretrained(base)(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(found, plain, atol=1e-2)
