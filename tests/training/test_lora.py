"""Which modules each word of --train-target trains."""

import itertools
import json
import re

import pytest
import torch

from mdl_toolkit.config.types import TRAIN_TARGETS
from mdl_toolkit.errors import ModelError
from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel
from mdl_toolkit.training import lora
from mdl_toolkit.training.lora import add_adapters
from mdl_toolkit.weights.loading import load_model
from tests.support.runs import copy_checkpoint

CPU = torch.device("cpu")


def adapt(model, targets, **changes):
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "base_name": "some/base", **changes}
    return add_adapters(model, targets, **settings)


def load(golden, name, dtype=torch.float32):
    return load_model(golden / "checkpoints" / name, dtype=dtype, device=CPU)


def config_7b(golden):
    config = json.loads((golden / "checkpoints/A-small/config.json").read_text())
    config["audio_encoder_config"] |= {"embed_dim": 1280, "depth": 32, "num_heads": 16}
    config["text_config"] |= {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "layer_types": ["full_attention"] * 28,
    }  # fmt: skip
    return MiDashengLMConfig(**config)


def test_counts_of_the_7b_shape_at_rank_32(golden):
    with torch.device("meta"):
        model = MiDashengLMModel(config_7b(golden))
        _, counts = adapt(model, ("encoder", "projector", "decoder"), rank=32)
    parameters = {count.target: count.parameters for count in counts}
    assert parameters == {"encoder": 20_971_520, "projector": 548_864, "decoder": 80_740_352}
    assert sum(parameters.values()) == 102_260_736
    assert {count.target: count.layers for count in counts} == {
        "encoder": 128,
        "projector": 2,
        "decoder": 196,
    }


# What each target may train, in words independent of the patterns under test.
BELONGS = {
    "encoder": lambda n: "audio_encoder.blocks." in n and ".lora_" in n,
    "projector": lambda n: "audio_projector." in n and ".lora_" in n,
    "decoder": lambda n: "decoder.model.layers." in n and ".lora_" in n,
    "embed_tokens": lambda n: n.endswith("embed_tokens.modules_to_save.default.weight"),
    "lm_head": lambda n: n.endswith("lm_head.modules_to_save.default.weight"),
}
EVERY_CHOICE = [c for size in range(1, 6) for c in itertools.combinations(TRAIN_TARGETS, size)]


@pytest.mark.parametrize("targets", EVERY_CHOICE, ids="+".join)
def test_every_combination_trains_exactly_its_targets(golden, targets):
    model, counts = adapt(load(golden, "A-small", torch.bfloat16), targets)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for target in TRAIN_TARGETS:
        assert any(map(BELONGS[target], trained)) == (target in targets)
    assert all(any(BELONGS[target](name) for target in targets) for name in trained)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert [count.target for count in counts] == list(targets)
    assert sum(c.parameters for c in counts) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_linear_layer_of_the_three_parts_is_matched(golden):
    model = load(golden, "B-small")
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"decoder.lm_head"}
    patterns = [re.compile(pattern) for pattern in lora.LORA_TARGETS.values()]
    assert linear == {n for n, _ in model.named_modules() if any(p.fullmatch(n) for p in patterns)}


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_tied_embeddings_are_trained_as_one(golden, targets):
    model, counts = adapt(load(golden, "B-small-tied"), targets)
    base = model.get_base_model()
    embedding = base.get_input_embeddings().modules_to_save["default"].weight
    assert base.get_output_embeddings().modules_to_save["default"].weight is embedding
    assert [p for p in model.parameters() if p.requires_grad] == [embedding]
    assert {count.parameters for count in counts} == {embedding.numel()}


def test_a_target_that_matches_nothing_is_an_error(golden, tmp_path, monkeypatch):
    folder = copy_checkpoint(golden, "A-small", tmp_path)
    model = load_model(folder, dtype=torch.float32, device=CPU)
    monkeypatch.setitem(lora.LORA_TARGETS, "encoder", "audio_encoder_of_another_kind")
    with pytest.raises(ModelError, match="--train-target encoder"):
        adapt(model, ("decoder", "encoder"))


def test_the_adapter_names_its_base(golden):
    model, _ = adapt(load(golden, "A-small"), ("projector",))
    assert model.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize(
    ("targets", "is_needed"), [(("decoder",), False), (("decoder", "lm_head"), False), (("projector",), True)]
)
def test_the_decoder_alone_computes_nothing_backwards_through_the_encoder(golden, targets, is_needed):
    model, _ = adapt(load(golden, "A-small"), targets)
    features = model.train().base_model.model.audio_features(torch.randn(2, 16_000))
    assert features.requires_grad == is_needed
