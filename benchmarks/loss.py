"""The loss: logits at supervised positions alone, against the logits of every position.

A batch of 8 x 200 positions of which 10 in each row are answer, and a vocabulary of 32,000. The decoder in
front has one small layer, so that what is measured is the head and the cross entropy.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.nn import functional

from benchmarks import Figure, timed
from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel

RUNS = 5
BATCH, POSITIONS, SUPERVISED = 8, 200, 10
VOCABULARY, HIDDEN = 32_000, 256


def figures() -> list[Figure]:
    """Two lines: time and peak memory of a forward and backward pass."""
    model = _model()
    hidden, labels = _batch()

    def ours() -> None:
        model(inputs_embeds=hidden, labels=labels).loss.backward()

    def whole() -> None:
        _whole_loss(model, hidden, labels).backward()

    what = f"loss, {BATCH} x {POSITIONS} positions, {SUPERVISED} supervised; other: all logits"
    time = timed(f"{what}; time", ours, whole, RUNS)
    here, there = peak_bytes(ours), peak_bytes(whole)
    memory = Figure(f"{what}; peak memory (one run)", _megabytes(here), _megabytes(there), there / here)
    return [time, memory]


def _model() -> MiDashengLMModel:
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": [64, 4], "patch_stride": [64, 4]}
    text = {
        "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    model = MiDashengLMModel(MiDashengLMConfig(audio_encoder_config=small, text_config=text))
    return model.requires_grad_(False)  # as in LoRA training: the head itself is not trained


def _batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.full((BATCH, POSITIONS), -100)
    labels[:, -SUPERVISED:] = torch.randint(VOCABULARY, (BATCH, SUPERVISED))
    return torch.randn(BATCH, POSITIONS, HIDDEN, requires_grad=True), labels


def _whole_loss(model: MiDashengLMModel, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = model(inputs_embeds=hidden).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that torch held at once for `work`, beyond what it held before."""
    with profile(profile_memory=True) as profiler:
        work()
    held = most = 0
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
