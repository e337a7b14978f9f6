"""Cross entropy over a large vocabulary, in the memory of the logits instead of four times as much.

loss = logsumexp(z) - z[target]; its gradient is softmax(z) - onehot(target). torch keeps log-probabilities,
makes a dense gradient of them, then one of the logits; here the logits become the gradient in place.
"""

from typing import Any

import torch
from torch import Tensor


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of the cross entropy, a float32 scalar.

    Args:
        logits: `[positions, vocabulary]`; computed with in float32, and used up if they are that.
        targets: `[positions]` ids.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits.float(), targets)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        highest, place = logits.amax(-1, keepdim=True), targets.unsqueeze(-1)
        right = logits.gather(-1, place) - highest
        powers = logits.sub_(highest).exp_()
        total = powers.sum(-1, keepdim=True)
        ctx.save_for_backward(powers, total, place)
        return (total.log() - right).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found, total, place = ctx.saved_tensors  # become the gradient: good for one pass
        found.mul_(gradient / total)
        return found.scatter_add_(-1, place, -gradient.expand(place.shape)), None
