"""Offer MiDashengLM natively; taking any name from here registers it with transformers' Auto classes.

`AutoConfig`, `AutoModelForCausalLM`, `AutoProcessor` and `AutoTokenizer` then open a published folder
without remote code. Until then nothing is loaded: `lengths` can be imported without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
]


def __getattr__(name: str) -> Any:
    """Bring the model along when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mdl_toolkit.model import registration

    return getattr(registration, name)
