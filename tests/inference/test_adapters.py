"""Adapters that are answered from without being merged first: ours, and any that PEFT has written."""

import shutil
import warnings

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mdl_toolkit.errors import ModelError
from mdl_toolkit.inference import engines
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.run import train
from mdl_toolkit.weights.loading import load_for_inference, load_model, quiet_peft
from mdl_toolkit.weights.merge import merge
from tests.support.adapters import make_adapter
from tests.support.inferences import infer_options as options
from tests.support.runs import copy_checkpoint, make_csv, train_options
from tests.support.weight_files import tensors_of

DECODER = ["q_proj", "down_proj"]
KINDS = {
    "LoRA": LoraConfig(r=4, lora_alpha=64, target_modules=DECODER),
    "DoRA": LoraConfig(r=4, lora_alpha=64, target_modules=DECODER, use_dora=True),
    "LoRA of embeddings and head": LoraConfig(r=4, lora_alpha=64, target_modules=["embed_tokens", "lm_head"]),
    "LoHa": LoHaConfig(r=4, alpha=64, target_modules=DECODER),
    "LoHa of the encoder": LoHaConfig(r=4, alpha=64, target_modules=["fc1", "fc2"]),
}


@pytest.fixture
def base(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def adapted(base, folder, config):
    """Save an adapter as PEFT does by default: without a tokenizer, with embeddings that LoRA is on."""
    torch.manual_seed(0)
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    with quiet_peft():
        model = get_peft_model(model, config)
        model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        # It says that it saves the embeddings too.
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_from_elsewhere_answers_as_what_peft_merges(base, tmp_path, kind):
    model = adapted(base, tmp_path / "adapter", KINDS[kind])
    assert {file.suffix for file in (tmp_path / "adapter").iterdir()} == {".json", ".md", ".safetensors"}
    expected = shutil.copytree(base, tmp_path / "merged")
    with quiet_peft():
        save_file(model.merge_and_unload().state_dict(), expected / "model.safetensors", {"format": "pt"})
    source = make_csv(tmp_path, 6)
    found = infer(options(source, tmp_path / "adapter", tmp_path / "out.csv"))
    assert found == infer(options(source, expected, tmp_path / "other.csv"))
    assert found != infer(options(source, base, tmp_path / "base.csv"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_weights_are_those_of_the_merged_model(base, tmp_path, dtype):
    """Bit for bit, so that its answers and its speed are those of the merged model too."""
    stored = {name: t.to(dtype) if "init_bn" not in name else t for name, t in tensors_of(base).items()}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter")
    (merged := tmp_path / "merged").mkdir()
    merge(base, adapter, merged)
    loaded = load_for_inference(adapter, base, bf16=dtype == torch.bfloat16)
    expected, before = tensors_of(merged), tensors_of(base)
    assert type(loaded).__name__ == "MiDashengLMModel"
    assert sum(not torch.equal(before[name], tensor) for name, tensor in expected.items()) == 30
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_a_run_answers_with_the_prompts_of_its_training(base, tmp_path, capsys):
    source = make_csv(tmp_path, 4)
    train(train_options(source, base, tmp_path / "run", num_epochs=2, save_steps=1))
    (checkpoint, _) = sorted((tmp_path / "run").glob("checkpoint-*"))
    (merged := tmp_path / "merged").mkdir()
    merge(base, checkpoint, merged)
    bare = tmp_path / "bare.csv"
    bare.write_text(
        "audio\n" + "".join(f"{line.split(',')[0]}\n" for line in source.read_text().splitlines()[1:])
    )
    expected = infer(options(source, merged, tmp_path / "merged.csv"))
    assert infer(options(source, checkpoint, tmp_path / "out.csv")) == expected
    capsys.readouterr()
    infer(options(bare, checkpoint, tmp_path / "bare-out.csv"))
    assert "user prompt: that of the training is used" in capsys.readouterr().err


def refused(base, tmp_path, change):
    """What is said of an adapter whose tensors were changed, by inference and by a merge."""
    adapted(base, tmp_path / "adapter", KINDS["LoRA"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    source = make_csv(tmp_path, 2)
    with pytest.raises(ModelError) as asked:
        infer(options(source, tmp_path / "adapter", tmp_path / "out.csv"))
    (output := tmp_path / "merged").mkdir()
    with pytest.raises(ModelError) as merged:
        merge(base, tmp_path / "adapter", output)
    assert str(asked.value) == str(merged.value)
    return str(asked.value)


def test_an_adapter_that_matches_nothing_is_an_error(base, tmp_path):
    said = refused(base, tmp_path, lambda state: {f"other.{name}": t for name, t in state.items()})
    assert "has no tensors other." in said


def test_an_adapter_without_weights_is_an_error(base, tmp_path):
    assert "the adapter holds no weights" in refused(base, tmp_path, lambda _: {})


def test_an_adapter_that_peft_alone_knows_and_that_matches_nothing(base, tmp_path):
    adapted(base, tmp_path / "adapter", KINDS["LoHa"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="does not fit its base: Found missing adapter keys"):
        infer(options(make_csv(tmp_path, 2), tmp_path / "adapter", tmp_path / "out.csv"))


def test_a_quantised_base_keeps_its_adapter_beside_it(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", ("decoder",))
    loaded = load_for_inference(adapter, base, quantization="8bit")
    names = {type(module).__name__ for module in loaded.modules()}
    assert {"PeftModel", "Linear8bitLt"} <= names or {"PeftModelForCausalLM", "Linear8bitLt"} <= names


@pytest.mark.parametrize("changes", [{"bf16": True}, {"quantization": "8bit"}], ids=str)
def test_dtype_and_quantisation_are_those_that_are_asked_for(base, tmp_path, monkeypatch, changes):
    kept = []

    def keep(*words, **more):
        kept.append(load_for_inference(*words, **more))
        return kept[-1]

    monkeypatch.setattr(engines, "load_for_inference", keep)
    assert len(infer(options(make_csv(tmp_path, 2), base, tmp_path / "out.csv", **changes))) == 2
    (model,) = kept
    weight = model.get_submodule("decoder.model.layers.0.mlp.up_proj").weight
    assert weight.dtype == (torch.bfloat16 if "bf16" in changes else torch.int8)


def test_a_lack_of_memory_names_what_helps(base, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engines, "load_for_inference", fail)
    with pytest.raises(ModelError, match="lower --batch-size, or give --bf16 true or --quantization 4bit"):
        infer(options(make_csv(tmp_path, 2), base, tmp_path / "out.csv"))
