"""Forecast memory, steps and arithmetic of a training before it is run, for `check`."""

import math
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.check.findings import Figures, audio_tokens
from mdl_toolkit.data.check.rows import Facts
from mdl_toolkit.errors import ModelError
from mdl_toolkit.training.memory.activations import shared_tokens
from mdl_toolkit.training.memory.plan import meta_model, plan_memory
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.weights.resolve import check_trainable

# Bytes of a `MemoryPlan`.
PLANNED = ("total", "weights", "trained", "activations", "free")


def forecast_training(
    folder: Path, options: TrainOptions, facts: Facts, shared_prefix: int
) -> Figures | None:
    """Forecast a training on one GPU, also where there is none.

    The speed of the GPU is not guessed: the arithmetic is given.

    Args:
        folder: of the base model.
        options: of the training.
        facts: of the training set's rows.
        shared_prefix: tokens before the audio that all examples have in common.

    Returns:
        Figures for `check`, or the problem why there are none; None without rows.
    """
    if not len(facts):
        return None
    sampler = BatchSampler(
        (audio_tokens(facts) + facts["text"]).astype("int64"),
        facts["supervised"].astype("int64"),
        options.batch_size,
        options.gradient_accumulation_steps,
        1,
        options.seed,
    )
    dtype = torch.float32 if options.bf16 is False else torch.bfloat16
    samples, device = facts["samples"], torch.device("cuda")
    try:
        check_trainable(folder, quantization=options.quantization, merge=options.merge_lora)
        plan = plan_memory(folder, options, sampler, samples, shared_prefix, device, dtype)
        model = meta_model(folder)
    except ModelError as problem:
        return {"problem": problem.message.to_json()}
    schedule, warning = Schedule.of(sampler.steps_per_epoch, options), plan.warning()
    epochs = options.num_epochs if options.max_steps is None else schedule.total / schedule.per_epoch
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": {name: getattr(plan, name) for name in PLANNED},
        "memory": [line.to_json() for line in plan.lines()],
        "warning": None if warning is None else warning.to_json(),
        "steps": schedule.total,
        "steps_per_epoch": schedule.per_epoch,
        "epochs": epochs,
        "effective_batch": sampler.effective,
        "operations": count_operations(
            model, facts, options, epochs, shared_tokens(model.config, options, shared_prefix)
        ),
    }


def count_operations(model: Any, facts: Facts, options: TrainOptions, epochs: float, shared: int) -> float:
    """Count the floating-point operations of a training in the blocks' matrices, almost all there are.

    A frozen matrix takes two for each number and token forward, as many for the gradient of its input, and
    as many again where checkpointing computes it anew. The encoder has five patches to a token.

    Args:
        model: with shapes; its weights may be on the meta device.
        facts: of the training set's rows.
        options: of the training.
        epochs: passes over the rows.
        shared: prefix tokens that are computed once for a batch.
    """
    blocks = (model.decoder.model.layers, model.audio_encoder.blocks)
    decoder, encoder = (sum(p.numel() for p in each.parameters() if p.ndim == 2) for each in blocks)
    audio = audio_tokens(facts)
    # Examples that are not the first of their batch.
    others = len(facts) - math.ceil(len(facts) / options.batch_size)
    tokens, patches = int((audio + facts["text"]).sum()) - shared * others, 5 * int(audio.sum())
    passes = 3 if options.gradient_checkpointing else 2
    return float(epochs * 2 * passes * (decoder * tokens + encoder * patches))
