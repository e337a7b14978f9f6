"""Attend within chunks of different lengths: one by one on a CPU, padded to the longest elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mdl_toolkit.model.packing import TokenLayout


def chunked_attention(qkv: Tensor, chunks: Sequence[int], keys: Sequence[int], scaling: float) -> Tensor:
    """Attend in both directions within each chunk, one chunk after the other.

    On a CPU the calls are cheap; padding would cost 5 % of a training step (`benchmarks/HISTORY.md`).

    Args:
        qkv: queries, keys and values, `[patches, 3, heads, head_dim]`, chunk after chunk.
        chunks: patches of each chunk.
        keys: patches of each chunk that can be seen, its first ones; at least one.
        scaling: multiplies the scores.

    Returns:
        `[patches, heads, head_dim]`.
    """
    parts = (part.transpose(0, 1).unsqueeze(0).split([*chunks], 2) for part in qkv.unbind(1))
    outputs = []
    for q, k, v, count in zip(*parts, keys, strict=True):
        seen = (k, v) if count == k.shape[2] else (k[:, :, :count], v[:, :, :count])
        out = functional.scaled_dot_product_attention(q, *seen, scale=scaling)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def padded_attention(
    qkv: Tensor, gather: Tensor, scatter: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attend as `chunked_attention` does, in one call over chunks that are padded to the longest.

    Args:
        qkv: queries, keys and values, `[patches, 3, heads, head_dim]`, chunk after chunk.
        gather: index of each chunk's patches, `[chunks, longest]`.
        scatter: index of each patch in a flattened `gather`, `[patches]`.
        mask: true where a key can be seen, `[chunks, 1, 1, longest]`; None if all can.
        scaling: multiplies the scores.

    Returns:
        `[patches, heads, head_dim]`.
    """
    # Its gradients are taken where they lie; those of a plain index are added up, from zeros.
    layout = TokenLayout(gather, scatter, None)
    q, k, v = layout.pad(qkv).permute(2, 0, 3, 1, 4)
    out = functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    return layout.unpad(out.transpose(1, 2))
