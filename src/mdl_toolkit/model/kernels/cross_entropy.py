"""Compute the cross entropy over a large vocabulary in the memory of a few logits.

loss = logsumexp(z) - z[target]; its gradient is softmax(z) - onehot(target). With labels smoothed by e, the
target is (1 - e) onehot(target) + e / vocabulary. torch keeps log-probabilities,
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


def head_loss(states: Tensor, head: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum the cross entropy of a frozen head's logits over tokens.

    Args:
        states: `[tokens, hidden_size]`.
        head: `[vocabulary, hidden_size]`, in whose dtype logits are made; the loss is computed in float32.
        targets: `[tokens]` ids.
        smoothing: share of each target that goes to all ids alike.

    Returns:
        A float32 scalar.
    """
    loss: Tensor = _HeadLoss.apply(states, head, targets, smoothing)
    return loss


def slice_size(tokens: int, vocabulary: int) -> int:
    """Return the tokens of each slice: slices are even, and none but of one token exceeds MOST_LOGITS."""
    count = math.ceil(tokens / max(1, MOST_LOGITS // vocabulary))
    return max(1, math.ceil(tokens / max(count, 1)))


class _HeadLoss(torch.autograd.Function):
    """Compute the loss slice by slice, and the gradient of the states with it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        size = slice_size(len(states), len(head))
        needs_gradient = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for part, ids in zip(states.split(size), targets.unsqueeze(1).split(size), strict=True):
            loss, gradient = _slice_loss(part.to(head.dtype), head, ids, smoothing, needs_gradient)
            losses.append(loss)
            gradients.append(gradient)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        ctx.dtype = states.dtype
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (to_states,) = ctx.saved_tensors
        return (to_states.float() * gradient).to(ctx.dtype), None, None, None


# Not in line: when it returns the logits are freed.
def _slice_loss(
    states: Tensor, head: Tensor, targets: Tensor, smoothing: float, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the losses `[tokens, 1]` of targets `[tokens, 1]`, and the gradient of the states."""
    loss, powers, total = _losses(functional.linear(states, head).float(), targets, smoothing)
    if not needs_gradient:
        return loss, states
    to_logits = powers.div_(total).scatter_add_(1, targets, torch.full_like(total, smoothing - 1.0))
    if smoothing:
        to_logits -= smoothing / len(head)
    return loss, to_logits.to(head.dtype) @ head


def _losses(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses `[tokens, 1]`, e^(z - highest z) in place of the logits, and the sums of these."""
    logits -= logits.amax(-1, keepdim=True)
    of_targets = logits.gather(-1, targets)
    if smoothing:
        of_targets.lerp_(logits.mean(-1, keepdim=True), smoothing)
    powers = logits.exp_()
    total = powers.sum(-1, keepdim=True)
    return total.log() - of_targets, powers, total
