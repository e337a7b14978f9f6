"""What a GPU allows a training at most: the time for its products, and for its memory's traffic beside them.

A product takes as long as its operations, four a number and token as in MFU, or as reading its matrix. What
moves beside products was counted on the pretended GPU, whose own roofline, operation by operation, a test
compares with this one. Nothing here was measured on a GPU.
"""

from dataclasses import dataclass

from mdl_toolkit.training.summary import OPERATIONS
from mdl_toolkit.utils.device import peak_of

# Bytes a second of a card's memory, from the makers' data sheets.
BANDWIDTHS = {"RTX 4080": 717e9, "RTX 4090": 1008e9, "A100": 1555e9, "H100": 3350e9}
# Bytes of a number in a product, and those that are moved before to make it of 4 bits.
NUMBER, UNPACKING = 2.0, {"bfloat16": 0.0, "4bit": 2.5}
# How often what blocks keep for the backward pass is moved forward and back, and how often more where it is
# computed again.
MOVED, MOVED_AGAIN = 10, 3


@dataclass(frozen=True)
class Work:
    """What a step on some rows takes, whatever the card.

    Attributes:
        operations: of the blocks' matrices, forward and back. What adapters, attention and head take beside
            them is about what a shared prefix and tokens that nobody needs save.
        matrices: bytes of these, read in a pass.
        unpacking: bytes that are moved in a pass to make these of fewer bits.
        activations: bytes that blocks keep for the backward pass if all is kept.
        trained: bytes of adapters, gradients and the optimizer's states.
    """

    operations: float
    matrices: float
    unpacking: float
    activations: float
    trained: float

    def seconds(self, card: str, again: float) -> float:
        """The least that a card takes if gradient checkpointing computes a share of the blocks again."""
        peak, bandwidth, passes = peak_of(card), BANDWIDTHS[card], 2 + again
        assert peak is not None
        products = passes / 2 * self.operations / peak
        moved = (MOVED + again * MOVED_AGAIN) * self.activations + 2 * self.trained + passes * self.unpacking
        return max(products, passes * self.matrices / bandwidth) + moved / bandwidth


def matrix_bytes(decoder: float, encoder: float, form: str) -> tuple[float, float]:
    """Bytes of matrices, and of unpacking them, whose operations for a token or a patch are given."""
    return NUMBER * (decoder + encoder) / OPERATIONS, UNPACKING[form] * decoder / OPERATIONS
