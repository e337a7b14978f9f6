"""Cross entropy over a large vocabulary, with one tensor of the logits' size instead of four.

loss = logsumexp(z) - z[target]; its gradient is softmax(z) - onehot(target). torch keeps log-probabilities,
makes a dense gradient of them, then one of the logits; here the probabilities become the gradient in place.
"""

from typing import Any

import torch
from torch import Tensor


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of the cross entropy, a float32 scalar.

    Args:
        logits: `[positions, vocabulary]`; computed with in float32.
        targets: `[positions]` ids.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits.float(), targets)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        # The largest probability is at least 1 / vocabulary: its logarithm is exact, others' may not be.
        highest, place = logits.max(-1, keepdim=True)
        total = highest - probabilities.gather(-1, place).log()
        ctx.save_for_backward(probabilities, targets.unsqueeze(-1))
        return (total - logits.gather(-1, targets.unsqueeze(-1))).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found, targets = ctx.saved_tensors  # become the gradient: good for one pass
        found.scatter_add_(-1, targets, found.new_full((), -1.0).expand(targets.shape))
        return found.mul_(gradient), None
