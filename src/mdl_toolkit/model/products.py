"""Products with a large matrix on a CPU, float32, of few rows.

torch hands float32 products to MKL, which first copies the matrix as it wants it. Of 249 rows against a head
of 32,768 x 512 that costs half as much again as the product itself; oneDNN, given the matrix as it lies,
takes 0.6 of the time forwards and 0.85 backwards (Zen 4, `benchmarks/HISTORY.md`). It keeps 0.3 MB of code
for each number of rows that it has met, so it is for those who have few such numbers.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`, without a gradient: `[rows, width]` and `[columns, width]` to `[rows, columns]`."""
    is_plain = left.dtype == right.dtype == torch.float32 and left.device.type == right.device.type == "cpu"
    if not is_plain or torch.is_autocast_enabled("cpu") or not has_onednn():
        return functional.linear(left, right)
    return _by_onednn(left, right)


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return found


@cache
def has_onednn() -> bool:
    """Tell whether this PyTorch has the operation, which it does not promise, and gets it right."""
    left, right = torch.linspace(-1, 1, 3 * 48).view(3, 48), torch.linspace(-2, 1, 80 * 48).view(80, 48)
    wanted, turned = functional.linear(left, right), right.T.contiguous().T
    return all(gets_right(partial(_by_onednn, left, each), wanted) for each in (right, turned))


def gets_right(attempt: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Tell whether an operation that this PyTorch may not have is there and gives what is wanted."""
    try:
        return torch.allclose(attempt(), wanted, rtol=1e-4, atol=1e-5)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
