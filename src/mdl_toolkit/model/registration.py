"""Make the model's classes known to transformers' Auto classes.

A registered class comes before a folder's `auto_map`, so remote code is neither needed nor asked for.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, Qwen2Tokenizer

from mdl_toolkit.model.configuration import MiDashengEncoderConfig, MiDashengLMConfig
from mdl_toolkit.model.modeling import CheckpointError, MiDashengLMModel, MiDashengLMOutput
from mdl_toolkit.model.processing import MiDashengLMProcessor

__all__ = [
    "CheckpointError",
    "MiDashengEncoderConfig",
    "MiDashengLMConfig",
    "MiDashengLMModel",
    "MiDashengLMOutput",
    "MiDashengLMProcessor",
    "register",
]


def register() -> None:
    """Register the classes; importing this module has done so already.

    Example:
        ```python
        from transformers import AutoModelForCausalLM

        from mdl_toolkit.model.registration import register

        register()
        model = AutoModelForCausalLM.from_pretrained("midashenglm-7b", dtype="auto")
        ```
    """
    AutoConfig.register(MiDashengEncoderConfig.model_type, MiDashengEncoderConfig, exist_ok=True)
    AutoConfig.register(MiDashengLMConfig.model_type, MiDashengLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiDashengLMConfig, MiDashengLMModel, exist_ok=True)
    AutoProcessor.register(MiDashengLMConfig, MiDashengLMProcessor, exist_ok=True)
    AutoTokenizer.register(MiDashengLMConfig, tokenizer_class=Qwen2Tokenizer, exist_ok=True)


register()
