"""Causal attention of short rows on a CPU, in float32, by plain matrix products.

torch's kernel for CPUs multiplies few queries of one head at a time. Here the query heads that share a key
head are one matrix, queries meet only the keys up to the end of their block, and the scores of a block stay
in the cache: 0.6 to 0.8 of the time, forwards and back, for 20 to 500 positions and 2, 4 or 7 query heads to
a key head (Zen 4, `benchmarks/HISTORY.md`). What softmax found is kept for the backward pass, about half of
`positions^2` numbers for each query head.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 512  # positions of a row: what is kept grows with their square
WIDTH = 48  # positions of a block, about: fewer compute less that nobody may see, more multiply faster
SCORES = 2**18  # of a block at most, 1 MiB, if one key head has not more


def by_products(query: Tensor, longest: int) -> bool:
    """Tell whether attention of rows of at most so many positions is computed in this way."""
    is_plain = query.device.type == "cpu" and query.dtype == torch.float32
    return is_plain and longest <= LONGEST and not torch.is_autocast_enabled("cpu")


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(query key' * scaling) value, where a position sees itself and those before it.

    Args:
        query: `[rows * key heads, positions, query heads of a key head * head_dim]`.
        key: `[rows * key heads, positions, head_dim]`.
        value: as `key`.
        scaling: what scores are multiplied by.

    Returns:
        As `query`.
    """
    found: Tensor = _Causal.apply(query, key, value, scaling)
    return found


def block_width(longest: int) -> int:
    """Positions of a block of queries."""
    return math.ceil(longest / max(1, round(longest / WIDTH)))


def kept_scores(longest: int) -> int:
    """Numbers that are kept for each query head of a row."""
    return sum((end - start) * end for start, end in _spans(longest))


def _spans(longest: int) -> Iterator[tuple[int, int]]:
    width = block_width(longest)
    return ((start, min(start + width, longest)) for start in range(0, longest, width))


def _blocks(rows: int, shared: int, longest: int) -> list[tuple[slice, int, int]]:
    """Rows, first and end of the queries' positions; all blocks of some rows before those of others."""
    most = max(1, SCORES // (shared * block_width(longest) * longest))
    count = math.ceil(rows / math.ceil(rows / most))
    parts = [slice(first, first + count) for first in range(0, rows, count)]
    return [(part, *span) for part in parts for span in _spans(longest)]


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rows, longest, width = key.shape
        shared = query.shape[2] // width
        ctx.blocks, ctx.scaling = _blocks(rows, shared, longest), scaling
        asking, found, kept = query.view(rows, -1, width), query.new_empty(rows, longest * shared, width), []
        unseen = _unseen(query, shared, block_width(longest))
        for part, start, end in ctx.blocks:
            place = slice(start * shared, end * shared)
            scores = _times(asking[part, place], key[part, :end].mT, scaling)
            scores[:, :, start:] += unseen[: (end - start) * shared, : end - start]
            kept.append(scores.softmax(-1))
            found[part, place] = torch.bmm(kept[-1], value[part, :end])
        ctx.save_for_backward(asking, key, value, *kept)
        return found.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        asking, key, value, *kept = ctx.saved_tensors
        shared, given = asking.shape[1] // key.shape[1], gradient.reshape(asking.shape)
        to_query, to_key, to_value = map(torch.empty_like, (asking, key, value))
        for (part, start, end), weights in zip(reversed(ctx.blocks), reversed(kept), strict=True):
            place = slice(start * shared, end * shared)
            is_more = end < key.shape[1]  # the last block of a row comes first, and sees all keys
            _add(to_value[part, :end], weights.mT, given[part, place], 1, is_more=is_more)
            to_weights = torch.bmm(given[part, place], value[part, :end].mT)
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            _add(to_query[part, place], to_scores, key[part, :end], ctx.scaling)
            _add(to_key[part, :end], to_scores.mT, asking[part, place], ctx.scaling, is_more=is_more)
        return to_query.view(gradient.shape), to_key, to_value, None


def _unseen(like: Tensor, shared: int, width: int) -> Tensor:
    """Minus infinity where a query of a block, `[width * shared, width]`, comes before a key of the same."""
    return like.new_full((width, width), -math.inf).triu_(1).repeat_interleave(shared, 0)


def _times(left: Tensor, right: Tensor, factor: float) -> Tensor:
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=factor)


def _add(to: Tensor, left: Tensor, right: Tensor, factor: float, *, is_more: bool = False) -> None:
    """Products, to what is there already or in its place.

    By way of a tensor of their own: into parts of another, torch multiplies matrix by matrix.
    """
    product = _times(left, right, factor)
    to.add_(product) if is_more else to.copy_(product)
