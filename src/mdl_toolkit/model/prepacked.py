"""Linear layers whose weights lie as oneDNN's matrix product wants them, for answering on a CPU.

Of a weight as it is stored, oneDNN and MKL make such a copy at every call. For the few rows of a decoding
step that costs more than the product itself: with 16 rows, laid out once is 1.6 to 2.6 times as fast, with
300 rows 1.15 to 1.4 times (`benchmarks/answering.py`). The weights cannot be trained or saved any more.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdl_toolkit.model.products import gets_right

USUAL_ROWS = 16  # any number may come; the layout is the best one for about this many


class PrepackedLinear(nn.Module):
    """A float32 linear layer, laid out once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), USUAL_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def prepack(model: nn.Module) -> None:
    """Lay out all float32 linear layers of a model that will only answer, where this PyTorch can.

    One layer after the other gives up its own weight, so that no more memory is needed than for the model,
    the output head of tied embeddings aside.
    """
    if not is_possible():
        return
    for module in [*model.modules()]:
        if isinstance(module, nn.ModuleDict):  # PEFT's own matrices, whose dtype it looks at
            continue
        for name, child in [*module.named_children()]:
            if type(child) is nn.Linear and child.weight.dtype == torch.float32:
                setattr(module, name, PrepackedLinear(child))


def is_possible() -> bool:
    """Tell whether this PyTorch has the operations, which it does not promise, and gets them right."""
    linear = nn.Linear(48, 80)
    x = torch.randn(3, 48)
    wanted = functional.linear(x, linear.weight, linear.bias)
    return gets_right(lambda: PrepackedLinear(linear)(x), wanted)
