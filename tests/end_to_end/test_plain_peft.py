"""An adapter of ours in a process that imports nothing but the model classes and PEFT."""

import subprocess
import sys
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.training.lora import add_adapters
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.merge import export_adapter
from mdl_toolkit.weights.model_card import ResultMetadata
from mdl_toolkit.weights.provenance import Provenance
from tests.support.runs import copy_checkpoint
from tests.support.waves import wave

PLAIN = """
import sys
import torch
from mdl_toolkit.model import MiDashengLMModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

for place in sys.argv[1:]:
    base, inputs = MiDashengLMModel.from_pretrained(place + "/base"), load_file(place + "/inputs.safetensors")
    model = PeftModel.from_pretrained(base, place + "/final").eval()
    with torch.inference_mode():
        save_file({"logits": model(**inputs).logits}, place + "/logits.safetensors")
ours = {name for name in sys.modules if name.startswith("mdl_toolkit.")}
below = ("mdl_toolkit.model", "mdl_toolkit.errors", "mdl_toolkit.i18n")
assert all(name.startswith(below) for name in ours), ours
"""
TARGETS = {
    "lora": ("encoder", "projector", "decoder"),
    "head": ("decoder", "lm_head"),
    "all": ("encoder", "projector", "decoder", "embed_tokens", "lm_head"),
    "copies alone": ("embed_tokens",),
}
BASES = ("A-small", "B-small-tied")


def train_a_little(base, place, kind):
    """A model with adapters that change something, and its adapter as `train` leaves it in `final`."""
    torch.manual_seed(0)
    model, _ = add_adapters(
        load_model(base, dtype=torch.float32, device=torch.device("cpu")), TARGETS[kind], rank=4, alpha=6.0,
        dropout=0.0, base_name=str(base),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(place / "checkpoint", save_embedding_layers=False)
    export_adapter(base, place / "checkpoint", place / "final", ResultMetadata(Provenance(), None, ""))
    return model.eval()


@pytest.fixture(scope="module")
def logits(golden, tmp_path_factory):
    """By base and kind: logits of the plain process, of the trained model, and of the base alone."""
    folder, expected = tmp_path_factory.mktemp("plain"), {}
    for name, kind in product(BASES, TARGETS):
        place = folder / name / kind
        place.mkdir(parents=True)
        base = copy_checkpoint(golden, name, place).rename(place / "base")
        model = train_a_little(base, place, kind)
        inputs = {
            "input_ids": torch.tensor([[5, 6, *[model.get_base_model().config.audio_token_id] * 5, 7, 8, 9]]),
            "input_values": torch.from_numpy(wave(16_000, 1))[None],
            "audio_length": torch.tensor([16_000]),
        }
        save_file(inputs, place / "inputs.safetensors")
        with torch.inference_mode():
            trained = model(**inputs).logits
            expected[name, kind] = (trained, MiDashengLMModel.from_pretrained(base)(**inputs).logits)
    subprocess.run(
        [sys.executable, "-c", PLAIN, *(str(folder.joinpath(*case)) for case in expected)], check=True
    )
    return {
        case: (load_file(folder.joinpath(*case, "logits.safetensors"))["logits"], *more)
        for case, more in expected.items()
    }


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", BASES)
def test_its_logits_are_those_of_the_trained_model(logits, name, kind):
    found, trained, plain = logits[name, kind]
    assert torch.allclose(found, trained, atol=1e-5 * float(trained.abs().max()))
    assert not torch.allclose(found, plain, atol=1e-2)
