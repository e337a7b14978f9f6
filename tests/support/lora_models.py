"""Small models with adapters, batches for them, and the gradients that they learn: to compare two ways."""

import pytest
import torch
from peft.tuners.lora.layer import Linear

from mdl_toolkit.training.lora import add_adapters
from mdl_toolkit.training.lora_layer import FastLoraLinear
from mdl_toolkit.weights.loading import load_model

TARGETS = ("encoder", "projector", "decoder")
CHOICES = [TARGETS, ("encoder",), ("decoder", "lm_head"), ("projector", "embed_tokens")]
CHECKPOINTS = ["A-small", "B-small", "B-small-tied"]


def adapted(golden, name, targets=TARGETS, *, dtype=torch.float32, dropout=0.0):
    """A model whose adapters already do something: B is not zero."""
    model = load_model(golden / "checkpoints" / name, dtype=dtype, device=torch.device("cpu"))
    model, _ = add_adapters(model, targets, rank=4, alpha=8.0, dropout=dropout, base_name="base")
    torch.manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.05)
    return model.train()


def plainly(model):
    """The same model with PEFT's own layers."""
    for module in model.modules():
        if isinstance(module, FastLoraLinear):
            module.__class__ = Linear
    return model


def batch_of(model, seed=0):
    """Three rows of noise and random words, padded on the left."""
    random = torch.Generator().manual_seed(seed)
    config = model.base_model.model.config
    ids = torch.randint(10, 200, (3, 24), generator=random)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 9)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    lengths = torch.tensor([32_000, 16_000, 9_600])
    waves = 0.1 * torch.randn(3, 32_000, generator=random)
    counts = [
        len(model.base_model.model.audio_features(w[None, :n])) for w, n in zip(waves, lengths, strict=True)
    ]
    prompt = torch.cat([torch.full((3, max(counts)), config.audio_token_id), ids], 1)
    for row, count in enumerate(counts):
        prompt[row, : max(counts) - count] = 0
    mask = torch.cat([(prompt[:, : max(counts)] != 0).long(), torch.ones_like(ids)], 1)
    labels = torch.full_like(prompt, -100)
    labels[:, -10:] = prompt[:, -10:]
    return {
        "input_ids": prompt, "attention_mask": mask, "labels": labels, "input_values": waves,
        "audio_length": lengths,
    }  # fmt: skip


def learnt(model, batch):
    """The loss and every gradient."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance):
    (loss, gradients), (other_loss, other_gradients) = ours, theirs
    assert loss == pytest.approx(other_loss, rel=tolerance)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == other_gradients[name].dtype
        difference = (gradient - other_gradients[name]).norm() / other_gradients[name].norm()
        assert difference < tolerance, name


def distance(gradients, exact):
    """Mean over parameters of the relative deviation."""
    return sum(float((gradients[n] - g).norm() / g.norm()) for n, g in exact.items()) / len(exact)
