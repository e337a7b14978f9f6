"""What PEFT can write for this model: merged as PEFT itself merges it, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl_toolkit.errors import ModelError
from mdl_toolkit.weights.loading import load_for_inference, quiet_peft
from mdl_toolkit.weights.merge import merge
from tests.support.adapters import adapted
from tests.support.runs import copy_checkpoint
from tests.support.weight_files import tensors_of

DECODER = ["q_proj", "down_proj"]
KINDS = {
    "rslora": {"use_rslora": True, "target_modules": DECODER},
    "patterns": {
        "target_modules": ["q_proj", "down_proj", "fc1", "qkv"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"fc1": 1, r"audio_encoder\.blocks\.0\.attn\.qkv": 9, "decoder.model.layers.0.*": 5},
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "convolution": {"target_modules": ["patch_embed.proj"]},
    "copies": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens", "audio_projector"],
    },
    "dora": {"use_dora": True, "target_modules": [*DECODER, "patch_embed.proj"]},
    "dora of embeddings": {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": DECODER},
}


@pytest.fixture
def base(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_that_of_pefts_own_merging(base, tmp_path, kind):
    model = adapted(base, tmp_path / "adapter", **KINDS[kind])
    (output := tmp_path / "merged").mkdir()
    merge(base, tmp_path / "adapter", output)
    with quiet_peft():
        expected = model.merge_and_unload().state_dict()
    before, found = tensors_of(base), tensors_of(output)
    changed = [name for name in found if not torch.equal(before[name], found[name])]
    assert len(changed) >= 1
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_an_adapter_of_the_patches_is_heard_before_it_is_merged(base, tmp_path):
    model = adapted(base, tmp_path / "adapter", **KINDS["convolution"]).eval()
    waves, lengths = 0.1 * torch.randn(1, 16_000), torch.tensor([16_000])
    with torch.no_grad():
        heard = model.audio_features(waves, lengths)
        with model.disable_adapter():
            without = model.audio_features(waves, lengths)
        model.merge_adapter()
        merged = model.audio_features(waves, lengths)
    assert (heard - without).abs().max() > 0.01
    torch.testing.assert_close(heard, merged, atol=1e-4, rtol=1e-3)


def test_a_bfloat16_base_gets_the_sum_of_float32_rounded_once(base, tmp_path):
    tensors = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors_of(base).items()}
    save_file(tensors, base / "model.safetensors")
    adapted(base, tmp_path / "adapter", target_modules=DECODER)
    (output := tmp_path / "merged").mkdir()
    merge(base, tmp_path / "adapter", output)
    name, state = (
        "decoder.model.layers.1.mlp.down_proj",
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
    )
    a, b = (state[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact = tensors[f"{name}.weight"].double() + 1.5 * b @ a
    found = tensors_of(output)[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()  # half of the last place


REFUSED = {
    "biases": ({"bias": "lora_only", "target_modules": DECODER}, "with bias lora_only cannot be merged"),
    "words": (
        {"trainable_token_indices": {"embed_tokens": [1, 2]}, "target_modules": DECODER},
        "with trainable_token_indices cannot be merged",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_lora_is_refused_by_name(base, tmp_path, kind):
    config, said = REFUSED[kind]
    adapted(base, tmp_path / "adapter", **config)
    (output := tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=said):
        merge(base, tmp_path / "adapter", output)
    assert not list(output.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "with peft_type LOHA"),
        ({"lora_bias": True}, "with lora_bias"),
        ({"fan_in_fan_out": True}, "with fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "with init_lora_weights pissa_niter_4"),
    ],
)
def test_other_kinds_are_refused_by_name(base, tmp_path, changes, said):
    adapted(base, tmp_path / "adapter", target_modules=DECODER)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    (output := tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=said):
        merge(base, tmp_path / "adapter", output)


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_lora_on_tied_embeddings_answers_unmerged_as_peft_does(golden, tmp_path, targets, ensured):
    """PEFT adds both changes to the one matrix when it merges, and then answers otherwise."""
    base, folder = copy_checkpoint(golden, "B-small-tied", tmp_path), tmp_path / "adapter"
    model = adapted(base, folder, target_modules=targets, ensure_weight_tying=ensured).eval()
    (output := tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="no merged model answers as base and adapter do; use the adapter"):
        merge(base, folder, output)
    assert not list(output.iterdir())
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = load_for_inference(folder, base, bf16=False)(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    assert (merged - expected).abs().max() > 1


def test_a_quantised_base_is_refused(base, tmp_path):
    adapted(base, tmp_path / "adapter", target_modules=DECODER)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    (output := tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"its weights are quantised \(fp8\); merge into the unquantised"):
        merge(base, tmp_path / "adapter", output)


def test_a_shard_that_was_cut_off_is_named(base, tmp_path):
    adapted(base, tmp_path / "adapter", target_modules=DECODER)
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1])
    (output := tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors: no whole safetensors file"):
        merge(base, tmp_path / "adapter", output)
