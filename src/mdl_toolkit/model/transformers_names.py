"""Name what transformers has renamed within the versions that the toolkit runs with: 5.18 to 5.24."""

from typing import Any

# The decoder's cache, as an argument and as an output: the second name from 5.24 on.
CACHE_NAMES = ("past_key_values", "cache")


def checkpoint_activations(model: Any, settings: dict[str, Any]) -> None:
    """Let a model, with PEFT's wrapper or without, compute its blocks again in the backward pass.

    transformers lets the embeddings of models with adapters need a gradient, for the reentrant kind alone.
    Below a trained head, the whole frozen decoder would then have one.

    Args:
        model: whose blocks they are.
        settings: keywords for `torch.utils.checkpoint.checkpoint`.
    """
    # The first name from 5.23 on.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))(settings)
    model.disable_input_require_grads()
