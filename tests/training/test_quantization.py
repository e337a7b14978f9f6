"""Training on quantised weights: quantised for the run, or quantised already by bitsandbytes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import ModelError
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training import run as training
from mdl_toolkit.training.run import train
from mdl_toolkit.weights.loading import load_model, quiet_peft
from tests.support.runs import ANSWERS, copy_checkpoint, files_below, make_csv, train_options

CPU = torch.device("cpu")
BITS = pytest.mark.parametrize("bits", ["4bit", "8bit"])


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_training_merges_into_the_unquantised_weights(model, tmp_path, bits):
    csv = make_csv(tmp_path, 8)
    done = train(train_options(csv, model, tmp_path / "run", quantization=bits, num_epochs=10))
    base, final = weights(model), weights(done.final)
    adapter = weights(tmp_path / f"run/checkpoint-{done.steps}")
    name = "decoder.model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    assert b.abs().max() > 0
    assert torch.allclose(final[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a, atol=1e-6)
    assert {n: (t.dtype, t.shape) for n, t in final.items()} == {
        n: (t.dtype, t.shape) for n, t in base.items()
    }


# --- bases that are quantised already --------------------------------------------------------------------


def quantised_base(model: Path, bits: str) -> Path:
    """The folder that a user has who saved a model with bitsandbytes' weights."""
    folder = model.with_name(f"base-{bits}")
    load_model(model, dtype=torch.float32, device=CPU, quantization=bits).save_pretrained(folder)
    for file in model.iterdir():
        if file.suffix != ".safetensors" and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


@BITS
def test_a_base_quantised_by_bitsandbytes_trains_as_it_is(model, tmp_path, bits):
    base, csv = quantised_base(model, bits), make_csv(tmp_path, 6)
    before = {name: (base / name).read_bytes() for name in files_below(base)}
    options = train_options(
        csv, base, tmp_path / "run", num_epochs=20, eval_dataset=str(csv), merge_lora=False
    )
    done = train(options)
    assert done.eval_loss < 0.2
    assert {name: (base / name).read_bytes() for name in files_below(base)} == before
    answers = infer(
        InferenceOptions(input=str(csv), output=str(tmp_path / "p.csv"), model_name=str(done.final))
    )
    assert answers == [*ANSWERS]


def test_evaluating_leaves_four_bit_weights_as_they_are(model, tmp_path):
    """bitsandbytes would repack them in bfloat16 at the first evaluation, for the rest of the run."""
    base, csv = quantised_base(model, "4bit"), make_csv(tmp_path, 6)
    results = []
    for name, steps in (("often", 1), ("never", 0)):
        options = train_options(
            csv, base, tmp_path / name, num_epochs=4, eval_dataset=str(csv), merge_lora=False
        )
        results.append(weights(train(replace(options, eval_steps=steps)).final))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_plain_peft_loads_the_adapter_of_a_quantised_base(model, tmp_path):
    base, csv = quantised_base(model, "8bit"), make_csv(tmp_path, 6)
    done = train(train_options(csv, base, tmp_path / "run", num_epochs=5, merge_lora=False))
    convert_dataset(ConvertOptions(input=str(csv), output=str(tmp_path / "data"), model_name=str(base)))
    dataset = ConvertedDataset(tmp_path / "data")
    batch = dict(Collator(0)([dataset[0]]))
    loaded = load_model(base, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        plain = float(loaded(**batch).loss)
        with quiet_peft():
            adapted = float(PeftModel.from_pretrained(loaded, done.final, torch_device="cpu")(**batch).loss)
    assert adapted < plain


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever is refused is refused before any weight is loaded."""

    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(training, "load_model", fail)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("fp8", {}, r"quantised already \(fp8\), and no gradients go through that; train the bfloat16"),
        ("gptq", {"merge_lora": False}, r"quantised already \(gptq\)"),
        ("bitsandbytes", {}, "--merge-lora false, as there are no unquantised weights"),
        ("bitsandbytes", {"merge_lora": False, "quantization": "4bit"}, "leave out --quantization"),
    ],
)
def test_quantised_bases_that_cannot_be_trained_so(model, tmp_path, method, changes, said):
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        train(train_options(make_csv(tmp_path, 2), model, tmp_path / "a/b/run", **changes))
    assert not (tmp_path / "a").exists()
