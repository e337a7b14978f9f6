"""Checkpoint gradients by blocks: those whose activations fit keep them, the others are computed again.

A block that is computed again keeps its input alone. What comes of it is the same, bit for bit.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from mdl_toolkit.model.transformers_names import checkpoint_activations

# Of the thread that is computing a block again.
_state = threading.local()


@dataclass(frozen=True)
class KeptBlocks:
    """Count the blocks that keep their activations: the last ones, which the backward pass needs first.

    Attributes:
        encoder: of its blocks.
        decoder: of its layers.
    """

    encoder: int = 0
    decoder: int = 0


NONE = KeptBlocks()


def checkpoint_gradients(model: Any, kept: KeptBlocks = NONE) -> None:
    """Let all blocks of a `PeftModel` but those kept be computed again in the backward pass."""
    settings = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _recomputing())}
    checkpoint_activations(model, settings)
    base = model.get_base_model()
    for blocks, count in (
        (base.audio_encoder.blocks, kept.encoder),
        (base.decoder.model.layers, kept.decoder),
    ):
        for block in blocks[len(blocks) - count :]:
            block.gradient_checkpointing = False


def is_recomputing() -> bool:
    """Tell whether this thread is computing a block again."""
    return getattr(_state, "is_recomputing", False)


@contextmanager
def _recomputing() -> Iterator[None]:
    """Mark this thread as computing a block again."""
    _state.is_recomputing = True
    try:
        yield
    finally:
        _state.is_recomputing = False
