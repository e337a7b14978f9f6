"""Causal attention by plain products, against torch's own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mdl_toolkit.model import attention, packed
from test_low_rank import CHECKPOINTS, adapted, assert_same, learnt
from test_packed import prompted

SHAPES = [  # rows, query heads, key heads, positions, head_dim
    (1, 1, 1, 1, 8), (3, 4, 2, 7, 8), (8, 8, 2, 119, 16), (2, 6, 6, 48, 4), (5, 28, 4, 73, 8),
    (2, 8, 2, 300, 8),
]  # fmt: skip


def grouped(x, heads):
    """`[rows, positions, heads * more, width]` with the heads among the rows."""
    rows, positions, _, width = x.shape
    return x.view(rows, positions, heads, -1, width).transpose(1, 2).reshape(rows * heads, positions, -1)


def by_torch(q, k, v, scaling):
    words = (part.transpose(1, 2) for part in (q, k, v))
    found = scaled_dot_product_attention(*words, is_causal=True, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scores", [1, 2**11, 2**18])
def test_as_torch(shape, scores, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", scores)
    rows, heads, keys, positions, width = shape
    torch.manual_seed(0)
    leaves = [torch.randn(rows, positions, count, width).requires_grad_() for count in (heads, keys, keys)]
    ours = attention.causal_attention(*(grouped(leaf, keys) for leaf in leaves), 0.4)
    exact = by_torch(*(leaf.double() for leaf in leaves), 0.4)
    assert_close(ours, grouped(exact, keys))
    given = torch.randn(rows, positions, heads, width)
    mine = torch.autograd.grad(ours, leaves, grouped(given, keys))
    for one, other in zip(mine, torch.autograd.grad(exact, leaves, given.double()), strict=True):
        assert_close(one, other)


def assert_close(ours, exact):
    assert (ours - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_model_learns_the_same_either_way(golden, name, monkeypatch):
    model = adapted(golden, name)
    batch, calls = prompted(model), []
    monkeypatch.setattr(
        packed, "causal_attention", lambda *words: calls.append(1) or attention.causal_attention(*words)
    )
    ours = learnt(model, batch)
    assert len(calls) == len(model.get_base_model().decoder.model.layers)
    monkeypatch.setattr(packed, "by_products", lambda *_: False)
    assert_same(ours, learnt(model, batch), 1e-5)
    assert len(calls) == len(model.get_base_model().decoder.model.layers)


def test_who_computes_so():
    x = torch.zeros(1)
    assert attention.by_products(x, attention.LONGEST)
    assert not attention.by_products(x, attention.LONGEST + 1)
    assert not attention.by_products(x.bfloat16(), 9)
    assert not attention.by_products(x.to("meta"), 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert not attention.by_products(x, 9)


@pytest.mark.parametrize("positions", [1, 30, 71, 72, 119, 512])
def test_what_is_kept_is_what_the_forecast_counts(positions):
    kept = []
    x = torch.randn(2, positions, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        attention.causal_attention(x, x, x, 1.0)
    scores = sum(shape.numel() for shape in kept[3:])
    assert scores == 2 * attention.kept_scores(positions)
    assert positions < 72 or scores < 0.8 * 2 * positions**2


def test_a_position_that_sees_nothing_later():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 100, 4)
    before = attention.causal_attention(q, k, v, 1.0)
    k[:, 60:] += 5
    v[:, 60:] -= 5
    after = attention.causal_attention(q, k, v, 1.0)
    assert torch.equal(before[:, :60], after[:, :60])
    assert not torch.isclose(before[:, 60:], after[:, 60:]).any()


def test_places_of_heads():
    words = torch.tensor([[5, 6, 8, -2], [5, 6, -3, -4]])
    rows = packed.Rows.of(torch.ones(2, 4, dtype=torch.bool), words)
    x = torch.randn(len(rows.real), 3, 5)
    apart = packed._placed(x, rows).transpose(1, 2).flatten(0, 1)
    heads = rows.of_heads(3)
    together = packed._placed(x.flatten(0, 1), heads)
    assert torch.equal(together, apart)
    assert torch.equal(together.flatten(0, 1)[heads.scatter], x.flatten(0, 1))
    shared = x[rows.gather.flatten()[rows.again]]
    assert len(shared) == 2
    assert torch.equal(together.flatten(0, 1)[heads.again], shared.flatten(0, 1))
