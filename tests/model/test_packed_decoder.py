"""The decoder over packed tokens, and its functions with gradients of their own, against transformers'."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, apply_rotary_pos_emb

from mdl_toolkit.model import modeling
from mdl_toolkit.model import packed_decoder as packed
from mdl_toolkit.training.gradient_checkpointing import checkpoint_gradients, is_recomputing
from tests.support.lora_models import (
    CHECKPOINTS,
    CHOICES,
    adapted,
    assert_same,
    batch_of,
    distance,
    learnt,
)

BF16, F32 = torch.bfloat16, torch.float32


def padded(monkeypatch):
    """Let transformers compute padded sequences, and torch the loss of all their logits."""
    plain = modeling.MiDashengLMModel.forward

    def forward(self, labels, **inputs):
        logits = plain(self, **inputs).logits[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits.float(), labels[:, 1:].flatten())
        return modeling.MiDashengLMOutput(loss=loss)

    monkeypatch.setattr(modeling.MiDashengLMModel, "forward", forward)


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_transformers(golden, name, targets, checkpointing, monkeypatch):
    model = adapted(golden, name, targets)
    batch = batch_of(model)
    # Supervised tokens are not only at the end.
    batch["labels"][1, -25:-20] = batch["input_ids"][1, -25:-20]
    if checkpointing:
        checkpoint_gradients(model)
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


def test_a_sequence_is_computed_as_if_alone(golden):
    model = adapted(golden, "B-small")
    batch = batch_of(model)
    alone = {name: tensor[:1] for name, tensor in batch.items()}
    others = {**batch, "labels": batch["labels"].clone()}
    others["labels"][1:] = -100
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        others[name] = torch.nn.functional.pad(others[name], (7, 0), value=filler)
    assert_same(learnt(model, others), learnt(model, alone), 1e-5)


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_prefix_is_computed_once(golden, name, targets, checkpointing, monkeypatch):
    model = adapted(golden, name, targets)
    batch, counts = prompted(model), token_counts(model)
    if checkpointing:
        checkpoint_gradients(model)
    ours = learnt(model, batch)
    # 7 tokens are shared by all four sequences, 5 more by the first and the last.
    assert counts[0] == needed(batch) - 3 * 7 - 5
    monkeypatch.setattr(modeling, "can_drop", lambda _: True)
    apart = learnt(model, batch)
    assert counts[-1] == needed(batch)
    padded(monkeypatch)
    theirs = learnt(model, batch)
    assert_same(ours, apart, 1e-5)
    assert_same(ours, theirs, 1e-5)


def test_with_dropout_no_prefix_is_shared(golden):
    model = adapted(golden, "A-small", dropout=0.1)
    batch, counts = prompted(model), token_counts(model)
    learnt(model, batch)
    learnt(model.eval(), batch)
    model.train().get_base_model().decoder.config.attention_dropout = 0.1
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    learnt(model, batch)
    every = needed(batch)
    assert counts == [every, every - 26, every]


def test_embeddings_that_are_given_share_no_prefix(golden):
    model = adapted(golden, "A-small")
    batch, counts = prompted(model), token_counts(model)
    inner = model.get_base_model()
    embeddings = inner.fuse(batch["input_ids"], batch["input_values"], batch["audio_length"]).detach()
    embeddings[0, batch["attention_mask"][0].argmax()] += 1
    inner(inputs_embeds=embeddings, **batch).loss.backward()
    assert counts == [needed(batch)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_after_the_answer_are_not_computed(golden, side, monkeypatch):
    model = adapted(golden, "A-small", ("encoder", "decoder"))
    batch, counts = prompted(model), token_counts(model)
    if side == "right":
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name] = torch.stack(
                [
                    row.roll(int(mask.sum()) - len(row))
                    for row, mask in zip(batch[name], batch["attention_mask"].clone(), strict=True)
                ]
            )
    ours = learnt(model, batch)
    ends = {"input_ids": 77, "attention_mask": 1, "labels": -100}
    longer = {
        **batch,
        **{name: torch.nn.functional.pad(batch[name], (0, 3), value=value) for name, value in ends.items()},
    }
    assert_same(learnt(model, longer), ours, 1e-5)
    assert counts == [needed(batch) - 26] * 2
    padded(monkeypatch)
    assert_same(learnt(model, longer), ours, 1e-5)


def test_nothing_supervised_is_a_loss_of_nothing(golden):
    model = adapted(golden, "A-small")
    batch = prompted(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = learnt(model, batch)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def needed(batch):
    """Tokens that the loss depends on: all but the last of each sequence, the end of its answer."""
    return int(batch["attention_mask"].sum()) - len(batch["input_ids"])


def prompted(model):
    """Four sequences of different lengths: ids that all share, ids that two share, audio, own ids."""
    one, random = batch_of(model), torch.Generator().manual_seed(1)
    audio, ids, start = model.get_base_model().config.audio_token_id, [], torch.arange(10, 17)
    for row, more in enumerate((range(30, 35), range(40, 47), (), range(30, 35))):
        count = int((one["input_ids"][row % 3] == audio).sum())
        words = torch.randint(50, 200, (6 + 3 * row,), generator=random)
        ids.append(torch.cat([start, torch.tensor([*more]).long(), torch.full((count,), audio), words]))
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        for rows in (ids, [torch.ones_like(row) for row in ids])
    )
    labels = torch.full_like(ids, -100)
    labels[:, -5:] = ids[:, -5:]
    again = [0, 1, 2, 0]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "input_values": one["input_values"][again],
        "audio_length": one["audio_length"][again],
    }


def token_counts(model):
    """Count the tokens of the first decoder layer each time it does not compute again."""
    counts = []
    first = model.get_base_model().decoder.model.layers[0]
    first.register_forward_pre_hook(
        lambda _, words: None if is_recomputing() else counts.append(len(words[0]))
    )
    return counts


def test_in_bfloat16_no_further_from_the_truth(golden):
    ours, theirs = zip(*(distances(golden, seed) for seed in range(6)), strict=True)
    assert sum(ours) < min(1.2 * sum(theirs), 0.6)


def distances(golden, seed):
    """Of gradients in bfloat16 from those in float32: of ours, and of transformers'."""
    model = adapted(golden, "A-small", dtype=BF16)
    batch = (prompted if seed % 2 else batch_of)(model)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    with torch.autocast("cpu", BF16):
        _, ours = learnt(model, batch)
        with pytest.MonkeyPatch.context() as patch:
            padded(patch)
            _, theirs = learnt(model, batch)
    _, exact = learnt(model.float(), batch)
    return distance(ours, exact), distance(theirs, exact)


def test_what_the_loss_does_not_heed_is_refused(golden):
    model = adapted(golden, "A-small").get_base_model()
    batch = batch_of(adapted(golden, "A-small"))
    with pytest.raises(ValueError, match="labels do not go with position_ids"):
        model(**batch, position_ids=torch.zeros_like(batch["input_ids"]))


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


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_gate_is_transformers(activation):
    torch.manual_seed(0)
    config = type("Config", (), {"hidden_size": 8, "intermediate_size": 16, "hidden_act": activation})
    act = Qwen2MLP(config).act_fn
    gate, up = torch.randn(2, 7, 16)
    assert_agree(lambda g, u: packed.gated_linear_unit(act, g, u), lambda g, u: act(g) * u, gate, up)


@pytest.mark.parametrize(("dtype", "angles"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_the_rotation_is_transformers_bit_for_bit(dtype, angles):
    torch.manual_seed(0)
    x, angle = torch.randn(11, 3, 16, dtype=dtype), torch.rand(11, 8)
    cos, sin = (torch.cat([part, part], -1).unsqueeze(1).to(angles) for part in (angle.cos(), angle.sin()))
    ours = gradients(lambda x: packed.rotate(x, cos, sin), x)
    theirs = gradients(lambda x: apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=0)[0][0], x)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_sequences_are_padded_on_the_right_and_unpadded():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]])
    tokens = packed.PackedTokens.of(mask.bool())
    assert tokens.source.tolist() == [2, 3, 4, 5, 6, 7, 9, 11]
    assert tokens.gather.tolist() == [[0, 1, 0, 0], [2, 3, 4, 5], [6, 7, 0, 0]]
    assert tokens.scatter.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert tokens.positions.tolist() == [0, 1, 0, 1, 2, 3, 0, 2]
    assert_gradient_of_pad(tokens, 8)
    wide = torch.randn(3, 4, 5)
    assert_agree(tokens.unpad, lambda x: x.flatten(0, 1)[tokens.scatter], wide)


def test_sequences_share_a_prefix():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
    ids = torch.tensor([[9, 9, 5, 6, -7], [5, 6, 8, 4, -2], [9, 5, 9, 6, -3], [9, 5, 6, 8, -4]])
    tokens = packed.PackedTokens.of(mask.bool(), ids)
    # 5, 6 and -7; 4 and -2 of the second; 6 and -3 of the third, which has a hole before 6; 8 and -4
    assert tokens.source.tolist() == [2, 3, 4, 8, 9, 13, 14, 18, 19]
    assert tokens.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 2, 3]
    assert tokens.gather.tolist() == [[0, 1, 2, 0, 0], [0, 1, 7, 3, 4], [0, 5, 6, 0, 0], [0, 1, 7, 8, 0]]
    assert tokens.scatter.tolist() == [0, 1, 2, 8, 9, 11, 12, 17, 18]
    assert tokens.duplicates.tolist() == [5, 6, 7, 10, 15, 16]
    assert_gradient_of_pad(tokens, 9)


@pytest.mark.parametrize("seed", range(40))
def test_there_are_as_many_tokens_as_prefixes(seed):
    random = np.random.default_rng(seed)
    counts = random.integers(1, 7, random.integers(1, 9))
    lines = [[*random.integers(0, 3, count)] for count in counts]
    # Where the unique tokens of each sequence begin.
    cut = [random.integers(0, count + 1) for count in counts]
    table = np.full((len(lines), 7), 9)
    for number, (line, unique) in enumerate(zip(lines, cut, strict=True)):
        line[unique:] = [-2 - 7 * number - place for place in range(unique, len(line))]
        table[number, 7 - len(line) :] = line
    mask = np.arange(7) >= 7 - counts[:, None]
    tokens = packed.PackedTokens.of(torch.from_numpy(mask), torch.from_numpy(table))
    assert len(tokens.source) == len({(*line[: end + 1],) for line in lines for end in range(len(line))})
    found = torch.from_numpy(table).flatten()[tokens.source][tokens.gather]
    for line, ids in zip(lines, found.tolist(), strict=True):
        assert ids[: len(line)] == line


def test_gradients_of_a_prefix_are_added_up_in_float32(monkeypatch):
    """One after the other, each sum rounded, as a GPU adds; a CPU rounds once."""
    monkeypatch.setattr(torch.Tensor, "index_add_", one_by_one)
    ids = torch.arange(3).repeat(200, 1)
    ids[:, 2] = -2 - torch.arange(200)
    tokens = packed.PackedTokens.of(torch.ones(200, 3, dtype=torch.bool), ids)
    x = torch.zeros(202, 1, 4, dtype=BF16, requires_grad=True)
    given = torch.rand(200, 3, 1, 4).to(BF16)
    tokens.pad(x).backward(given)
    assert x.grad.dtype == BF16
    torch.testing.assert_close(x.grad[:2].double(), given[:, :2].double().sum(0), rtol=2**-8, atol=0)


def one_by_one(self, _, index, source):
    for place, one in zip(index.tolist(), source, strict=True):
        self[place] += one


def test_equal_sequences_are_computed_once():
    tokens = packed.PackedTokens.of(torch.ones(3, 6, dtype=torch.bool), torch.arange(6).repeat(3, 1))
    assert tokens.source.tolist() == tokens.scatter.tolist() == [*range(6)]
    assert tokens.gather.tolist() == [[*range(6)]] * 3


def assert_gradient_of_pad(tokens, count):
    x = torch.randn(count, 2, 3)
    padded = tokens.pad(x)
    assert torch.equal(tokens.unpad(padded.flatten(2)), x.flatten(1))
    assert_agree(
        lambda x: tokens.pad(x) * is_real(tokens),
        lambda x: x[tokens.gather] * is_real(tokens),
        x,
    )


def is_real(tokens):
    """Return 1 where a token is and 0 at padding, `[sequences, longest, 1, 1]`."""
    found = torch.zeros(tokens.gather.numel())
    found[torch.cat([tokens.scatter, tokens.duplicates])] = 1
    return found.view(*tokens.gather.shape, 1, 1)
