"""What vLLM is told of an adapter, and which adapters are refused because it cannot apply them."""

import pytest

from mdl_toolkit.weights.vllm_lora import VllmLora, read_vllm_lora
from tests.support.adapters import adapted, make_adapter
from tests.support.model_folders import refused
from tests.support.runs import copy_checkpoint


@pytest.fixture
def base(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


@pytest.mark.parametrize(
    ("targets", "rank", "wanted"),
    [
        (("decoder",), 4, VllmLora(8, False)),
        (("decoder",), 8, VllmLora(8, False)),
        (("decoder",), 9, VllmLora(16, False)),
        (("projector", "decoder"), 1, VllmLora(1, True)),
        (("encoder",), 33, VllmLora(64, True)),
    ],
)
def test_the_least_rank_that_is_enough_and_whether_towers_change(base, tmp_path, targets, rank, wanted):
    assert read_vllm_lora(make_adapter(base, tmp_path / "adapter", targets, rank=rank), base) == wanted


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "decoder.lm_head"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "self_attn.q_proj"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "decoder.model.embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "decoder.lm_head"),
        ({"target_modules": ["q_proj", "patch_embed.proj"]}, "audio_encoder.patch_embed.proj"),
    ],
)
def test_what_vllm_cannot_apply_is_refused_by_name(base, tmp_path, config, named):
    adapted(base, tmp_path / "adapter", **config)
    message = refused(read_vllm_lora, tmp_path / "adapter", base)
    assert named in message
    assert "mdl-toolkit merge" in message


def test_a_rank_beyond_vllms_is_refused(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", ("projector",), rank=513)
    assert "513" in refused(read_vllm_lora, adapter, base)
