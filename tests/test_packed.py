"""The decoder over real positions, and its functions with their own gradients, against transformers' way."""

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, apply_rotary_pos_emb

from mdl_toolkit.model import encoder, modeling, packed
from mdl_toolkit.recomputing import recompute
from test_low_rank import CHECKPOINTS, CHOICES, adapted, assert_same, batch_of, distance, learnt

BF16 = torch.bfloat16


def padded(monkeypatch):
    """Let transformers compute rows, and attention of the encoder see padded chunks."""
    monkeypatch.setattr(modeling, "can_pack", lambda _: False)
    attend = encoder.Attention._attend_padded
    monkeypatch.setattr(encoder.Attention, "_attend_apart", lambda *words: attend(*words, "sdpa"))


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_as_transformers_computes_rows(golden, name, targets, checkpointing, monkeypatch):
    model = adapted(golden, name, targets)
    batch = batch_of(model)
    batch["labels"][1, -25:-20] = batch["input_ids"][1, -25:-20]  # not only at the end
    if checkpointing:
        recompute(model)
    calls, plain = [], packed.packed_states
    monkeypatch.setattr(modeling, "packed_states", lambda *words: calls.append(words) or plain(*words))
    ours = learnt(model, batch)
    assert calls
    padded(monkeypatch)
    assert_same(ours, learnt(model, batch), 1e-5)
    assert len(calls) == 1


def test_without_padding_and_with_dropout(golden, monkeypatch):
    model = adapted(golden, "A-small")
    batch = batch_of(model)
    whole = {name: tensor[:1] for name, tensor in batch.items()}
    del whole["attention_mask"]
    ours = learnt(model, whole)
    dropped = adapted(golden, "A-small", dropout=0.3)
    assert learnt(dropped, batch)[0] != learnt(dropped, batch)[0]
    padded(monkeypatch)
    assert_same(ours, learnt(model, whole), 1e-5)


def test_a_row_is_computed_as_if_alone(golden):
    model = adapted(golden, "B-small")
    batch = batch_of(model)
    alone = {name: tensor[:1] for name, tensor in batch.items()}
    others = {**batch, "labels": batch["labels"].clone()}
    others["labels"][1:] = -100
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        others[name] = torch.nn.functional.pad(others[name], (7, 0), value=filler)
    assert_same(learnt(model, others), learnt(model, alone), 1e-5)


def test_in_bfloat16_no_further_from_the_truth(golden, monkeypatch):
    model = adapted(golden, "A-small", dtype=BF16)
    batch = batch_of(model)
    with torch.autocast("cpu", BF16):
        _, ours = learnt(model, batch)
        padded(monkeypatch)
        _, theirs = learnt(model, batch)
    _, exact = learnt(model.float(), batch)
    assert distance(ours, exact) < min(1.2 * distance(theirs, exact), 0.1)


def test_what_transformers_must_compute_itself(golden):
    model = adapted(golden, "A-small").get_base_model()
    batch = batch_of(adapted(golden, "A-small"))
    loss = model(**batch).loss
    for more in ({"output_hidden_states": True}, {"return_logits": True}):
        found = model(**batch, **more)
        assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert found.hidden_states is not None or found.logits is not None


# --- parts ---------------------------------------------------------------------------------------------


def gradients(function, *leaves):
    """The result, and the gradients of leaves for one that is random."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    found = function(*leaves)
    torch.manual_seed(7)
    return found, *torch.autograd.grad(found, leaves, torch.randn_like(found))


def assert_agree(ours, theirs, *leaves):
    for mine, other in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm()


def test_the_norm_is_transformers():
    torch.manual_seed(0)
    norm = Qwen2RMSNorm(96, eps=1e-5)
    norm.weight.data.normal_(1, 0.3)
    x = 3 * torch.randn(4, 5, 96)
    trained = packed.normed(norm, x)
    assert trained.requires_grad  # the plain way
    norm.requires_grad_(False)
    assert_agree(lambda x: packed.normed(norm, x), norm, x)
    torch.testing.assert_close(packed.normed(norm, x.to(BF16)), norm(x.to(BF16)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_gate_is_transformers(activation):
    torch.manual_seed(0)
    config = type("Config", (), {"hidden_size": 8, "intermediate_size": 16, "hidden_act": activation})
    act = Qwen2MLP(config).act_fn
    gate, up = torch.randn(2, 7, 16)
    assert_agree(lambda g, u: packed.gated(act, g, u), lambda g, u: act(g) * u, gate, up)


def test_the_rotation_is_transformers():
    torch.manual_seed(0)
    x, angle = torch.randn(11, 3, 16), torch.rand(11, 8)
    cos, sin = (torch.cat([part, part], -1).unsqueeze(1) for part in (angle.cos(), angle.sin()))
    assert_agree(
        lambda x: packed._Rotated.apply(x, cos, sin),
        lambda x: apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=0)[0][0],
        x,
    )


def test_rows_are_gathered_from_the_left_and_scattered_back():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]])
    rows = packed.Rows.of(mask.bool())
    assert rows.real.tolist() == [2, 3, 4, 5, 6, 7, 9, 11]
    assert rows.gather.tolist() == [[0, 1, 0, 0], [2, 3, 4, 5], [6, 7, 0, 0]]
    assert rows.scatter.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    x = torch.randn(8, 2, 3)
    placed = packed._Placed.apply(x, rows.gather, rows.scatter)
    assert torch.equal(packed._Taken.apply(placed.flatten(2), rows.scatter), x.flatten(1))
    assert_agree(
        lambda x: packed._Placed.apply(x, rows.gather, rows.scatter) * there(rows),
        lambda x: x[rows.gather] * there(rows), x,
    )  # fmt: skip
    wide = torch.randn(3, 4, 5)
    assert_agree(
        lambda x: packed._Taken.apply(x, rows.scatter), lambda x: x.flatten(0, 1)[rows.scatter], wide
    )


def there(rows):
    """1 where a position is, `[rows, longest, 1, 1]`."""
    found = torch.zeros(rows.gather.numel())
    found[rows.scatter] = 1
    return found.view(*rows.gather.shape, 1, 1)
