"""What vLLM is told when it loads the plugin; `make serving` runs vLLM itself."""

import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest
from transformers import AutoConfig

from mdl_toolkit.model import MiDashengLMConfig
from mdl_toolkit.serving.vllm_plugin import VllmMiDashengLMConfig
from tests.support.paths import CHECKPOINTS, ROOT


@pytest.fixture
def told(monkeypatch):
    """The models and configurations that a stand-in for vLLM gets."""
    models, configurations = {}, {"midashenglm": "its own"}
    package, configs = type(sys)("vllm"), type(sys)("vllm.transformers_utils.config")
    package.ModelRegistry = type("ModelRegistry", (), {"register_model": staticmethod(models.__setitem__)})
    configs._CONFIG_REGISTRY = configurations
    between = type(sys)("vllm.transformers_utils")
    for module in (package, between, configs):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return models, configurations


def test_vllm_finds_the_plugin_and_takes_our_model_and_configuration(told):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    value = project["entry-points"]["vllm.general_plugins"]["mdl_toolkit"]
    EntryPoint("mdl_toolkit", value, "vllm.general_plugins").load()()
    models, configurations = told
    assert models == {"MiDashengLMModel": "mdl_toolkit.serving.vllm_model:VllmMiDashengLM"}
    assert configurations == {"midashenglm": VllmMiDashengLMConfig}
    # In this process, transformers goes on with the plain one.
    assert type(AutoConfig.from_pretrained(CHECKPOINTS / "A-small")) is MiDashengLMConfig


@pytest.mark.parametrize("name", ["A-small", "B-small", "B-small-tied"])
def test_rope_keeps_its_theta_and_has_one_axis(name):
    plain = MiDashengLMConfig.from_pretrained(CHECKPOINTS / name)
    ours = VllmMiDashengLMConfig.from_pretrained(CHECKPOINTS / name)
    rope = ours.text_config.rope_parameters
    assert "mrope_section" not in rope
    assert {**plain.text_config.rope_parameters, **rope} == plain.text_config.rope_parameters
    assert rope["rope_theta"] == 1e6
    assert ours.tie_word_embeddings == plain.tie_word_embeddings


def test_another_theta_is_kept():
    text = {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert VllmMiDashengLMConfig(text_config=text).text_config.rope_parameters["rope_theta"] == 1e4
