"""Compute MiDashengLM as a transformers model: audio encoder, projector and Qwen decoder.

Modules:
    configuration    configurations of encoder, projector and decoder, with the published defaults
    constants        numbers that the model and the toolkit must agree on; no torch
    lengths          a clip's frames, patches and audio tokens, from its samples; no torch
    mel              waveforms to log-mel spectrograms, in float32
    encoder          the Dasheng encoder and the projector, over real patches only
    modeling         the whole model: fusion, loss, generation, strict loading
    packed_decoder   the decoder's states for the loss, without padding and with shared prefixes once
    packing          which tokens of a batch are computed, planned on the CPU
    decoding_batch   sequences decoded together over one key-value store
    processing       text and audio to tensors, for use through transformers
    registration     register the classes with transformers' Auto classes
    transformers_names   what transformers has renamed
    kernels/         operations at which torch's plain ones are slow or large

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
    """Import a name of `__all__` when it is first used, and with it the model."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mdl_toolkit.model import registration

    return getattr(registration, name)
