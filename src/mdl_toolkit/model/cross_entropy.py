"""Cross entropy over a large vocabulary, in the memory of a few logits.

loss = logsumexp(z) - z[target]; its gradient is softmax(z) - onehot(target). torch keeps log-probabilities,
makes a dense gradient of them, then one of the logits; here the logits become the gradient in place. With a
frozen head the gradient goes on to the states at once, so that one slice of logits exists at a time. On a CPU
that slice is several tensors, each of some of the words: passes over a few megabytes meet them in the cache,
and what is smaller than 32 MiB is memory that glibc keeps, while larger tensors come page by page from the
system every time: together 1.5 to 2 % of a step (Zen 4, `benchmarks/HISTORY.md`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdl_toolkit.model.constants import MOST_LOGITS
from mdl_toolkit.model.products import product

MOST_ON_CPU = 512  # positions of a slice
IN_CACHE = 2**22  # logits of one tensor on a CPU, 16 MiB


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
    most = max(1, MOST_LOGITS // vocabulary)
    count = math.ceil(positions / (min(most, MOST_ON_CPU) if on_cpu else most))
    return math.ceil(positions / max(count, 1))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, slice_rows(len(states), len(head), on_cpu=states.device.type == "cpu"))
        losses, to_states = [], []
        for part, place in zip(states.split(rows), targets.unsqueeze(1).split(rows), strict=True):
            loss, slope = _of_slice(part.to(head.dtype), head, place, with_slope=ctx.needs_input_grad[0])
            losses.append(loss)
            to_states += slope
        if to_states:
            ctx.save_for_backward(torch.cat(to_states))
        ctx.dtype = states.dtype
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (to_states,) = ctx.saved_tensors
        return (to_states.float() * gradient).to(ctx.dtype), None, None


def _of_slice(
    states: Tensor, head: Tensor, place: Tensor, *, with_slope: bool
) -> tuple[Tensor, list[Tensor]]:
    """Losses `[rows, 1]` and, if asked for, the gradient of states; its logits are gone when it returns."""
    blocks = head.split(_block_words(len(states), head))
    targets = [*_targets(place, map(len, blocks))]
    loss, powers, total = _loss([product(states, block).float() for block in blocks], targets)
    if not with_slope:
        return loss, []
    slopes = (
        part.div_(total).scatter_add_(1, index, -is_there.float())
        for part, (index, is_there) in zip(powers, targets, strict=True)
    )
    parts = [product(slope.to(head.dtype), block.T) for slope, block in zip(slopes, blocks, strict=True)]
    return loss, [_sum(parts)]


def _block_words(rows: int, head: Tensor) -> int:
    """Words whose logits are one tensor: even parts of all, in float32 on a CPU; else all."""
    if head.device.type != "cpu" or head.dtype != torch.float32:
        return max(1, len(head))
    return max(1, math.ceil(len(head) / max(1, round(rows * len(head) / IN_CACHE))))


def _targets(place: Tensor, widths: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Where each row's target is in blocks of so many words, and whether it is there; each `[rows, 1]`."""
    for width in widths:
        yield place.clamp(0, width - 1), (place >= 0) & (place < width)
        place = place - width


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total, *others = parts
    for part in others:
        total += part
    return total


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
        loss, (powers,), total = _loss([logits], [(place, torch.ones_like(place, dtype=torch.bool))])
        ctx.save_for_backward(powers, total, place)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found, total, place = ctx.saved_tensors  # become the gradient: good for one pass
        found.mul_(gradient / total)
        return found.scatter_add_(-1, place, -gradient.expand(place.shape)), None


def _loss(
    blocks: Sequence[Tensor], targets: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    """Of each row, `[rows, 1]`; then e^(z - highest z), in place of the logits, and the sum of these."""
    highest = torch.cat([block.amax(-1, keepdim=True) for block in blocks], -1).amax(-1, keepdim=True)
    right = [
        torch.where(is_there, block.gather(-1, index) - highest, 0)
        for block, (index, is_there) in zip(blocks, targets, strict=True)
    ]
    powers = [block.sub_(highest).exp_() for block in blocks]
    total = _sum([block.sum(-1, keepdim=True) for block in powers])
    return total.log() - _sum(right), powers, total
