"""Register MiDashengLM with vLLM, which calls this in each of its processes (`vllm.general_plugins`).

vLLM has an implementation of its own. This one takes its place: no code of a model folder is run.
"""

from typing import Any

from mdl_toolkit.model.configuration import MiDashengLMConfig
from mdl_toolkit.model.registration import register as register_classes

ARCHITECTURE = "MiDashengLMModel"
MODEL = "mdl_toolkit.serving.vllm_model:VllmMiDashengLM"


class VllmMiDashengLMConfig(MiDashengLMConfig):
    """Configure the model for vLLM: RoPE with the configuration's theta, on one axis."""

    def __post_init__(self, **kwargs: Any) -> None:
        """Leave out the sections of Qwen2.5-Omni's RoPE, whose three axes are equal for text and audio."""
        super().__post_init__(**kwargs)
        _, text = self.parts
        text.rope_parameters = {
            name: value for name, value in text.rope_parameters.items() if name != "mrope_section"
        }


def register() -> None:
    """Register model, configuration and processor; the model is imported when it is needed."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    register_classes()
    # vLLM's own configuration knows neither Qwen3 nor another theta than 1e6.
    _CONFIG_REGISTRY[MiDashengLMConfig.model_type] = VllmMiDashengLMConfig
    ModelRegistry.register_model(ARCHITECTURE, MODEL)
