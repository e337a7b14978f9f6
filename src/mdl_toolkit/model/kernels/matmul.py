"""Lay the weights of linear layers out once, as oneDNN's matrix product wants them, for inference on a CPU.

Of a weight as it is stored, oneDNN and MKL make such a copy at every call. For the few tokens of a decoding
step that costs more than the product itself: with 16 tokens, laid out once is 1.6 to 2.6 times as fast, with
300 tokens 1.15 to 1.4 times (`benchmarks/answering.py`). The weights cannot be trained or saved any more.
"""

import os

import torch
from torch import Tensor, nn
from torch.nn import functional

# Any number of tokens may come; the layout is the best one for about this many.
USUAL_TOKENS = 16
# torch and oneDNN keep code for so many numbers of tokens. They would keep 1,024 each, 0.4 MB a piece, and
# scattered among other tensors these were found to hold back two gigabytes of freed memory.
CAPACITY = 64
CAPACITY_VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def prepack(model: nn.Module) -> None:
    """Lay out all float32 linear layers of a model that will only answer, where this PyTorch can.

    One layer after the other gives up its own weight, so that no more memory is needed than for the model,
    the output head of tied embeddings aside. What oneDNN keeps is limited for the whole process, unless it
    has been used before or the environment says otherwise.
    """
    for variable in CAPACITY_VARIABLES:
        os.environ.setdefault(variable, str(CAPACITY))
    if not can_prepack():
        return
    for module in [*model.modules()]:
        # Of its own matrices PEFT reads the dtype.
        if isinstance(module, nn.ModuleDict):
            continue
        for name, child in [*module.named_children()]:
            if type(child) is nn.Linear and child.weight.dtype == torch.float32:
                setattr(module, name, PrepackedLinear(child))


def can_prepack() -> bool:
    """Tell whether this PyTorch has the operations, which it does not promise, and gets them right."""
    linear = nn.Linear(48, 80)
    x = torch.randn(3, 48)
    expected = functional.linear(x, linear.weight, linear.bias)
    try:
        return torch.allclose(PrepackedLinear(linear)(x), expected, rtol=1e-4, atol=1e-5)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


class PrepackedLinear(nn.Module):
    """Compute a float32 linear layer whose weight is laid out once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), USUAL_TOKENS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out
