"""The fast LoRA layer and the loss in place, against PEFT's own layer and torch's own loss."""

import copy

import pytest
import torch
from torch.nn import functional

from mdl_toolkit.model.kernels import cross_entropy
from mdl_toolkit.model.kernels.cross_entropy import head_loss, slice_size
from mdl_toolkit.training.gradient_checkpointing import KeptBlocks, checkpoint_gradients
from mdl_toolkit.training.lora_layer import FastLoraLinear
from tests.support.lora_models import (
    CHECKPOINTS,
    CHOICES,
    adapted,
    assert_same,
    batch_of,
    distance,
    learnt,
    plainly,
)
from tests.support.memory import peak_bytes


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_as_pefts_own_layer(golden, name, targets):
    model = adapted(golden, name, targets)
    batch = batch_of(model)
    fast = learnt(model, batch)
    assert any(isinstance(module, FastLoraLinear) for module in model.modules())
    assert_same(fast, learnt(plainly(model), batch), 1e-5)


def test_as_pefts_own_layer_under_checkpointing(golden):
    model = adapted(golden, "A-small")
    batch = batch_of(model)
    checkpoint_gradients(model)
    fast = learnt(model, batch)
    assert_same(fast, learnt(plainly(model), batch), 1e-5)


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpointing_changes_no_gradient(golden, name, targets):
    """The last layer of a block is not computed again, and nothing misses it."""
    model = adapted(golden, name, targets)
    batch = batch_of(model)
    without = learnt(model, batch)
    checkpoint_gradients(model)
    assert_same(learnt(model, batch), without, 1e-6)


def test_no_gradient_goes_through_a_frozen_decoder(golden):
    model = adapted(golden, "A-small", ("lm_head",))
    batch, needed = batch_of(model), []
    without = learnt(model, batch)
    checkpoint_gradients(model)
    for layer in model.get_base_model().decoder.model.layers:
        layer.register_forward_hook(lambda *given: needed.append(given[2].requires_grad))
    assert_same(learnt(model, batch), without, 1e-6)
    assert needed
    assert not any(needed)


@pytest.mark.parametrize(
    "kept", [KeptBlocks(), KeptBlocks(1, 0), KeptBlocks(0, 1), KeptBlocks(1, 1)], ids=str
)
def test_what_is_kept_changes_no_bit(golden, kept):
    model = adapted(golden, "A-small")
    batch = batch_of(model)
    with_all = learnt(model, batch)
    checkpoint_gradients(model, kept)
    loss, gradients = learnt(model, batch)
    assert loss == with_all[0]
    assert all(torch.equal(gradient, with_all[1][name]) for name, gradient in gradients.items())


def test_the_last_blocks_are_those_that_are_kept(golden):
    model = adapted(golden, "A-small")
    checkpoint_gradients(model, KeptBlocks(1, 1))
    base = model.get_base_model()
    for blocks in (base.audio_encoder.blocks, base.decoder.model.layers):
        assert [block.gradient_checkpointing for block in blocks] == [True] * (len(blocks) - 1) + [False]
    checkpoint_gradients(model)
    assert all(block.gradient_checkpointing for block in blocks)


def test_what_is_not_computed_again(golden, monkeypatch):
    model = adapted(golden, "A-small")
    batch, calls = batch_of(model), []
    plain = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, *w: calls.append(x.shape) or plain(x, *w))
    learnt(model, batch)
    once = len(calls)
    checkpoint_gradients(model)
    calls.clear()
    learnt(model, batch)
    config = model.base_model.model.config
    decoder, encoder = config.text_config.num_hidden_layers, config.audio_encoder_config.depth
    assert len(calls) - once == 6 * decoder + 3 * encoder  # of 7 and 4 layers in a block


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bfloat16_no_further_from_the_truth_than_autocast(golden, checkpointing):
    model = adapted(golden, "A-small", dtype=torch.bfloat16)
    if checkpointing:
        checkpoint_gradients(model)
    ours, theirs = zip(*(distances(model, batch_of(model, seed)) for seed in range(6)), strict=True)
    assert sum(ours) < min(1.2 * sum(theirs), 0.6)


def distances(model, batch):
    """Of gradients in bfloat16 from those in float32: of ours, and of PEFT's layer."""
    _, exact = learnt(plainly(copy.deepcopy(model).float()), batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, fast = learnt(model, batch)
        _, plain = learnt(plainly(copy.deepcopy(model)), batch)
    assert {gradient.dtype for gradient in fast.values()} == {torch.float32}
    return distance(fast, exact), distance(plain, exact)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_pefts_own_with_the_same_random_numbers(golden, rate, checkpointing):
    model = adapted(golden, "A-small", dropout=rate)
    batch = batch_of(model)
    if checkpointing:
        checkpoint_gradients(model)

    def drawn(seed):
        torch.manual_seed(seed)
        return learnt(model, batch)

    fast, other = drawn(1), drawn(2)
    assert abs(fast[0] - other[0]) > 1e-3
    plainly(model)
    assert_same(fast, drawn(1), 1e-5)


def test_dropout_keeps_masks_and_no_copies(golden):
    """Of each adapter's input, a byte for each number in place of four."""
    batch = batch_of(adapted(golden, "A-small"))

    def kept(model):
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            # Held until the sum is made, so that no memory is used twice.
            loss = model(**batch).loss
            return sum(sizes.values()) * bool(loss.isfinite())

    without, with_dropout = (kept(adapted(golden, "A-small", dropout=rate)) for rate in (0.0, 0.1))
    plain = kept(plainly(adapted(golden, "A-small", dropout=0.1)))
    assert without < with_dropout < without + 0.3 * (plain - without)


def test_an_adapter_that_is_switched_off_or_merged(golden):
    model = adapted(golden, "A-small").eval()
    batch = batch_of(model)
    with torch.no_grad():
        with_adapter = model(**batch).loss
        with model.disable_adapter():
            off = model(**batch).loss
        model.merge_adapter()
        merged = model(**batch).loss
    assert abs(float(with_adapter - off)) > 1e-3
    assert float(merged) == pytest.approx(float(with_adapter), rel=1e-5)


# --- the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [0, 1, 17, 600])
@pytest.mark.parametrize("most", [2**26, 40 * 1000], ids=["in one", "in slices"])
def test_a_frozen_head_s_loss_and_gradient_are_torchs(positions, most, dtype, smoothing, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", most)
    torch.manual_seed(0)
    head, targets = torch.randn(1000, 64).to(dtype), torch.randint(0, 1000, (positions,))
    states, found = torch.randn(positions, 64).to(dtype), []
    for loss_of in (
        lambda s, h, t: head_loss(s, h, t, smoothing),
        lambda s, h, t: functional.cross_entropy(
            functional.linear(s.float(), h.float()), t, reduction="sum", label_smoothing=smoothing
        ),
    ):
        leaf = states.clone().requires_grad_()
        loss = loss_of(leaf, head, targets)
        (0.25 * loss).backward()
        with torch.no_grad():
            assert loss_of(states, head, targets) == loss
        found.append((loss.detach(), leaf.grad))
    (ours, to_ours), (theirs, to_theirs) = found
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-5)
    assert (to_ours.float() - to_theirs.float()).norm() <= tolerance * to_theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_slice_of_logits_exists_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 64 * 8000)
    head, targets = torch.randn(8000, 16).to(dtype), torch.randint(0, 8000, (256,))
    states, slice_bytes = torch.randn(256, 16, dtype=dtype, requires_grad=True), 64 * 8000 * 4
    # The first call makes what is kept for later ones.
    head_loss(states, head, targets)
    most = peak_bytes(lambda: head_loss(states, head, targets))
    # In bfloat16 a slice is there in both dtypes for a moment, 1.5 slices, and without bfloat16 products the
    # CPU adds a float32 copy of the head, 0.25. Two slices would be 2 in float32 alone.
    assert most < (1.2 if dtype == torch.float32 else 1.95) * slice_bytes


def test_slices_are_even_and_have_few_logits():
    for vocabulary in (100, 32_768, 152_064):
        sizes = {slice_size(positions, vocabulary) for positions in range(1, 3000)}
        assert max(sizes) * vocabulary <= 2**26
    assert [slice_size(positions, 2**17) for positions in (0, 1, 512, 513, 1025)] == [1, 1, 512, 257, 342]
    assert slice_size(3, 2**27) == 1
