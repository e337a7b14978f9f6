"""MiDashengLM as a transformers model: audio encoder, projector and Qwen decoder.

Modules:
    configuration    of encoder, projector and decoder, with the published defaults
    constants        numbers that the model and everything around it must agree on; no torch
    lengths          how long a clip is at each stage: samples, frames, patches, audio tokens; no torch
    mel              waveforms to log-mel spectrograms, in float32
    encoder          the Dasheng encoder and the projector, over real patches only
    modeling         the whole model: fusion, loss, generation, strict loading
    packed_decoder   the decoder over real positions only, shared prefixes once
    decoding_batch   rows answered side by side over one key-value store
    processing       text and audio to tensors, for use through transformers
    registration     make the classes known to transformers' Auto classes
    kernels/         operations that torch's plain ones are much slower or larger at

Taking any name from this package registers the model: `AutoConfig`, `AutoModelForCausalLM`, `AutoProcessor`
and `AutoTokenizer` then open a published folder without remote code.
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
