"""Cross entropy over a large vocabulary, in the memory of a few logits.

loss = logsumexp(z) - z[target]; its gradient is softmax(z) - onehot(target). torch keeps log-probabilities,
makes a dense gradient of them, then one of the logits; here the logits become the gradient in place. With a
frozen head the gradient goes on to the states at once, so that one slice of logits exists at a time.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mdl_toolkit.model.products import product

# Logits that exist at once: 2**26 float32 are 256 MiB, or 441 positions of 152,064 words.
MOST_LOGITS = 2**26
MOST_ON_CPU = 512  # positions of a slice
ROUND = 16  # positions of a slice are a multiple of it: see `products` for why there should be few sizes


def head_loss(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of the cross entropy of a frozen head's logits, a float32 scalar.

    Args:
        states: `[positions, hidden_size]`.
        head: `[vocabulary, hidden_size]`, in whose dtype logits are made; the loss is computed in float32.
        targets: `[positions]` ids.
    """
    loss: Tensor = _HeadLoss.apply(states, head, targets)
    return loss


def slice_rows(positions: int, vocabulary: int, *, on_cpu: bool) -> int:
    """Positions of each slice: even ones, whose logits are not too many."""
    most = max(ROUND, MOST_LOGITS // vocabulary // ROUND * ROUND)
    count = math.ceil(positions / (min(most, MOST_ON_CPU) if on_cpu else most))
    return math.ceil(positions / max(count, 1) / ROUND) * ROUND


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, slice_rows(len(states), len(head), on_cpu=states.device.type == "cpu"))
        ends = (0, -len(states) % rows)
        wide, places = functional.pad(states, (0, 0, *ends)), functional.pad(targets, ends).unsqueeze(1)
        losses, to_states = [], []
        for part, place in zip(wide.split(rows), places.split(rows), strict=True):
            loss, slope = _of_slice(part.to(head.dtype), head, place, with_slope=ctx.needs_input_grad[0])
            losses.append(loss)
            to_states += slope
        if to_states:
            ctx.save_for_backward(torch.cat(to_states)[: len(states)])
        ctx.dtype = states.dtype
        return torch.cat([*losses, states.new_zeros(0, 1, dtype=torch.float32)])[: len(states)].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (to_states,) = ctx.saved_tensors
        return (to_states.float() * gradient).to(ctx.dtype), None, None


def _of_slice(
    states: Tensor, head: Tensor, place: Tensor, *, with_slope: bool
) -> tuple[Tensor, list[Tensor]]:
    """Losses `[rows, 1]` and, if asked for, the gradient of states; its logits are gone when it returns."""
    loss, powers, total = _loss(product(states, head).float(), place)
    if not with_slope:
        return loss, []
    slope = powers.div_(total).scatter_add_(1, place, -torch.ones_like(total))
    return loss, [product(slope.to(head.dtype), head.T)]


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of the cross entropy, a float32 scalar: for a head of any kind.

    Args:
        logits: `[positions, vocabulary]`; computed with in float32, and used up if they are that.
        targets: `[positions]` ids.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits.float(), targets)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        place = targets.unsqueeze(-1)
        loss, powers, total = _loss(logits, place)
        ctx.save_for_backward(powers, total, place)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found, total, place = ctx.saved_tensors  # become the gradient: good for one pass
        found.mul_(gradient / total)
        return found.scatter_add_(-1, place, -gradient.expand(place.shape)), None


def _loss(logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, `[rows, 1]`; then e^(z - highest z), in place of the logits, and the sum of these."""
    highest = logits.amax(-1, keepdim=True)
    right = logits.gather(-1, place) - highest
    powers = logits.sub_(highest).exp_()
    total = powers.sum(-1, keepdim=True)
    return total.log() - right, powers, total
