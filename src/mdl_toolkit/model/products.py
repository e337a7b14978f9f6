"""Products of large float32 matrices on a CPU, by oneDNN.

torch hands float32 products to MKL. oneDNN takes 0.8 to 0.95 of the time, alone and warm, and 0.6 where MKL
first copies a large matrix, such as a head of 32,768 x 512 for 250 rows (Zen 4, `benchmarks/HISTORY.md`).
It makes code for each number of rows that it meets, in about a millisecond, so small products stay with MKL.
"""

import os
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

LARGE = 2**28  # operations of each thread, some 3 ms: a tenth of them pays for the code in a few layers
# For so many shapes the code is kept, a step's worth. A shape takes 0.4 MB; torch and oneDNN would keep 1,024
# each, and scattered among a step's tensors these were found to hold back two gigabytes of freed memory.
KEPT = 64
CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # read when an operation first runs


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right.T + bias`, without a gradient.

    Args:
        left: `[rows, width]`.
        right: `[columns, width]`.
        bias: `[columns]`.

    Returns:
        `[rows, columns]`.
    """
    return _by_onednn(left, right, bias) if is_large(left, right) else functional.linear(left, right, bias)


def add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right.T` to `[rows, columns]`."""
    if is_large(left, right):
        to += _by_onednn(left, right)
    else:
        to.addmm_(left, right.T)


def is_large(left: Tensor, right: Tensor) -> bool:
    """Tell whether `left @ right.T` is one for oneDNN: by kind, shape and threads, as steps are repeated."""
    is_plain = left.dtype == right.dtype == torch.float32 and left.device.type == right.device.type == "cpu"
    if not is_plain or 2 * len(left) * right.numel() < LARGE * torch.get_num_threads():
        return False
    return not torch.is_autocast_enabled("cpu") and has_onednn()


def _by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return found


@cache
def has_onednn() -> bool:
    """Tell whether this PyTorch has the operation, which it does not promise, and gets it right."""
    left, right = torch.linspace(-1, 1, 3 * 48).view(3, 48), torch.linspace(-2, 1, 80 * 48).view(80, 48)
    bias, turned = torch.linspace(-1, 2, 80), right.T.contiguous().T
    wanted = functional.linear(left, right, bias)
    return all(gets_right(partial(_by_onednn, left, each, bias), wanted) for each in (right, turned))


def gets_right(attempt: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Tell whether an operation that this PyTorch may not have is there and gives what is wanted."""
    for capacity in CAPACITIES:
        os.environ.setdefault(capacity, str(KEPT))
    try:
        return torch.allclose(attempt(), wanted, rtol=1e-4, atol=1e-5)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
