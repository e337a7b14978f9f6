"""Compute the cross entropy over a large vocabulary in the memory of a few logits.

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

from mdl_toolkit.model.constants import MOST_LOGITS


def head_loss(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross entropy of a frozen head's logits over positions.

    Args:
        states: `[positions, hidden_size]`.
        head: `[vocabulary, hidden_size]`, in whose dtype logits are made; the loss is computed in float32.
        targets: `[positions]` ids.

    Returns:
        A float32 scalar.
    """
    loss: Tensor = _HeadLoss.apply(states, head, targets)
    return loss


def slice_rows(positions: int, vocabulary: int) -> int:
    """Return the positions of each slice: even ones, whose logits are not too many; at least one."""
    count = math.ceil(positions / max(1, MOST_LOGITS // vocabulary))
    return max(1, math.ceil(positions / max(count, 1)))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        rows = slice_rows(len(states), len(head))
        needs_gradient = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for part, place in zip(states.split(rows), targets.unsqueeze(1).split(rows), strict=True):
            loss, gradient = _of_slice(part.to(head.dtype), head, place, needs_gradient)
            losses.append(loss)
            gradients.append(gradient)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        ctx.dtype = states.dtype
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (to_states,) = ctx.saved_tensors
        return (to_states.float() * gradient).to(ctx.dtype), None, None


def _of_slice(states: Tensor, head: Tensor, place: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return losses `[rows, 1]` and the gradient of states; the logits are gone when it returns."""
    loss, powers, total = _losses(functional.linear(states, head).float(), place)
    if not needs_gradient:
        return loss, states
    to_logits = powers.div_(total).scatter_add_(1, place, torch.full_like(total, -1.0))
    return loss, to_logits.to(head.dtype) @ head


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross entropy over positions, for a head of any kind.

    Args:
        logits: `[positions, vocabulary]`; computed with in float32, and used up if they are that.
        targets: `[positions]` ids.

    Returns:
        A float32 scalar.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits.float(), targets)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        place = targets.unsqueeze(-1)
        loss, powers, total = _losses(logits, place)
        ctx.save_for_backward(powers, total, place)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # The saved powers become the gradient: good for one pass.
        powers, total, place = ctx.saved_tensors
        powers.mul_(gradient / total)
        return powers.scatter_add_(-1, place, -gradient.expand(place.shape)), None


def _losses(logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses `[rows, 1]`, e^(z - highest z) in place of the logits, and the sums of these."""
    logits -= logits.amax(-1, keepdim=True)
    right = logits.gather(-1, place)
    powers = logits.exp_()
    total = powers.sum(-1, keepdim=True)
    return total.log() - right, powers, total
