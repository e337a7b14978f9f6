"""Attention chunk by chunk and padded, against one attention with a mask over everything."""

import pytest
import torch
from torch.nn import functional

from mdl_toolkit.model.encoder import PatchLayout
from mdl_toolkit.model.kernels.attention import chunked_attention, padded_attention


def masked_attention(qkv, chunks, keys, scaling):
    """All patches at once; each sees those of its own chunk that can be seen."""
    chunk = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(chunks))
    place = torch.cat([torch.arange(count) for count in chunks])
    mask = (chunk.unsqueeze(1) == chunk) & (place < torch.tensor(keys)[chunk])
    q, k, v = (part.transpose(0, 1) for part in qkv.unbind(1))
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(0, 1)


@pytest.mark.parametrize(
    ("chunks", "keys"),
    [([7], [7]), ([7, 7, 3], [7, 7, 2]), ([1], [1]), ([2, 5, 1], [1, 4, 1])],
    ids=["one", "a hidden patch", "one patch", "hidden ones everywhere"],
)
def test_as_with_a_mask(chunks, keys):
    torch.manual_seed(0)
    leaf = torch.randn(sum(chunks), 3, 2, 8, requires_grad=True)
    given = torch.randn(sum(chunks), 2, 8)
    expected = masked_attention(leaf, chunks, keys, 0.3)
    gradient = torch.autograd.grad(expected, leaf, given)[0]
    layout = PatchLayout((), tuple(chunks), tuple(keys), leaf.device)
    for found in (
        chunked_attention(leaf, chunks, keys, 0.3),
        padded_attention(leaf, layout.gather, layout.scatter, layout.mask, 0.3),
    ):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, leaf, given)[0], gradient)


def test_what_cannot_be_seen_changes_nothing():
    qkv = torch.randn(5, 3, 2, 8)
    before = chunked_attention(qkv, [5], [4], 0.3)
    qkv[4, 1:] += 1
    assert torch.equal(chunked_attention(qkv, [5], [4], 0.3), before)
