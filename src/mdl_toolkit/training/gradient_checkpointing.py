"""Checkpoint gradients by blocks: those whose activations fit keep them, the others are computed again.

A block that is computed again keeps its input alone. What comes of it is the same, bit for bit.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

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


def recompute(model: Any, kept: KeptBlocks = NONE) -> None:
    """Let all other blocks of a `PeftModel` be computed again in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": _contexts})
    base = model.get_base_model()
    parts = ((base.audio_encoder.blocks, kept.encoder), (base.decoder.model.layers, kept.decoder))
    for blocks, count in parts:
        for block in blocks[len(blocks) - count :]:
            block.gradient_checkpointing = False


def is_again() -> bool:
    """Tell whether this thread is computing a block again."""
    return getattr(_state, "is_again", False)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts in which `torch.utils.checkpoint` computes a block, and computes it again."""
    return nullcontext(), _again()


@contextmanager
def _again() -> Iterator[None]:
    _state.is_again = True
    try:
        yield
    finally:
        _state.is_again = False
