"""Models of the published shapes on a dry device: steps and tokens of them, and what these take."""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
from benchmarks.gpu_model import Rows, config_of, options_of, plan_of, random_model, trainer_of
from benchmarks.roofline import Work, matrix_bytes
from bitsandbytes.functional import QuantState
from torch import nn

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training.lora import LORA_TARGETS
from mdl_toolkit.training.memory.plan import BLOCK, BLOCKS, MemoryPlan
from mdl_toolkit.training.summary import PATCHES_PER_TOKEN, operations_of
from tests.support.pretended_device import META, NAME, Device, PretendedTensor, pretending

DEVICE = f"{NAME}:0"
RATE = 16_000


@dataclass
class Stepped:
    """What the second step of a training took; the first one makes the optimizer's states.

    Attributes:
        device: with what it has seen.
        plan: of the memory.
        work: what the roofline counts.
        again: share of the operations that gradient checkpointing makes again.
    """

    device: Device
    plan: MemoryPlan
    work: Work
    again: float


@contextmanager
def a_step(
    folder: Path,
    shape: str,
    seconds: list[float],
    dtype: torch.dtype,
    *,
    total: int = 80 * 10**9,
    **changes: Any,
) -> Iterator[Stepped]:
    """Make two steps of a training as the command would make them, and count during the second."""
    with pretending(is_dry=True, total=total) as device:
        config, where = config_of(shape), torch.device(DEVICE)
        options = options_of(folder, **{"batch_size": len(seconds), **changes})
        rows = Rows(config, seconds)
        plan = plan_of(config, rows, options, dtype, where)
        model = random_model(config, dtype, where)
        work, again = work_of(model, rows, options, plan, dtype)
        if options.quantization is not None:
            quantise_dry(model, dtype)
        trainer, _ = trainer_of(model, rows, options, dtype, where, plan.kept)
        wanted = [each for step in range(2) for each in trainer.sampler.batches(step, 0)]
        with closing(trainer.loader.batches(wanted)) as batches:
            trainer.make_step(batches)
            device.forget()
            trainer.make_step(batches)
        yield Stepped(device, plan, work, again)


def work_of(
    model: Any, rows: Rows, options: TrainOptions, plan: MemoryPlan, dtype: torch.dtype
) -> tuple[Work, float]:
    """Return what a step takes, and the share that gradient checkpointing computes again."""
    samples, nothing = rows.audio_lengths, 0 * rows.audio_lengths
    token, second = operations_of(model, np.array([1, 0]), np.array([0, RATE]))
    patch = second / (PATCHES_PER_TOKEN * audio_token_count(RATE))
    decoder = operations_of(model, rows.token_counts, nothing).sum()
    encoder = operations_of(model, nothing, samples).sum()
    again = 0.0
    if (every := plan.blocks) is not None:
        left = 1 - plan.kept.decoder / every.decoder, 1 - plan.kept.encoder / every.encoder
        again = (decoder * left[0] + encoder * left[1]) / (decoder + encoder)
    wide = replace(options, gradient_checkpointing=False)
    activations = plan_of(model.config, rows, wide, dtype, torch.device(DEVICE)).activations
    matrices = matrix_bytes(token, patch, options.quantization or "bfloat16")
    return Work(decoder + encoder, *matrices, activations, plan.trained), again


def quantise_dry(model: Any, dtype: torch.dtype) -> None:
    """Give a dry model's decoder 4-bit layers as bitsandbytes makes them, without numbers."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and re.fullmatch(LORA_TARGETS["decoder"], name):
            new = bitsandbytes.nn.Linear4bit(1, 1, bias=False, compute_dtype=dtype, quant_type="nf4")
            new.in_features, new.out_features, new.bias = module.in_features, module.out_features, module.bias
            new.weight = _packed(module.weight)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)
    model.is_loaded_in_4bit = True


def _packed(weight: torch.Tensor) -> nn.Parameter:
    """Return a packed weight with its state: two numbers a byte, scales of blocks, and scales of these."""
    blocks = weight.numel() // BLOCK

    def made(dtype: torch.dtype, *size: int) -> PretendedTensor:
        return PretendedTensor(torch.empty(size, dtype=dtype, device=META))

    outer = QuantState(
        made(torch.float32, -(-blocks // BLOCKS)),
        blocksize=256,
        code=made(torch.float32, 256),
        dtype=torch.float32,
    )
    state = QuantState(
        made(torch.uint8, blocks), shape=weight.shape, code=made(torch.float32, 16), blocksize=BLOCK,
        quant_type="nf4", dtype=weight.dtype, offset=made(torch.float32), state2=outer,
    )  # fmt: skip
    packed: Any = nn.Parameter(made(torch.uint8, weight.numel() // 2, 1), requires_grad=False)
    packed.quant_state, packed.quant_type, packed.compress_statistics = state, "nf4", True
    packed.bnb_quantized = True
    return packed
