"""Forecast memory, steps and arithmetic of a training before it is run, for `check`."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.data.check.findings import LEAST_ROWS, MOST_CLASSES, Figures, audio_tokens
from mdl_toolkit.data.check.rows import Facts
from mdl_toolkit.errors import ModelError
from mdl_toolkit.training.memory.activations import shared_tokens
from mdl_toolkit.training.memory.plan import (
    MemoryPlan,
    is_accepted,
    may_quantize,
    meta_model,
    plan_memory,
    stored_quantization,
)
from mdl_toolkit.training.optimization.expectation import is_too_short, longer_run, what_to_expect
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.utils.device import accelerator
from mdl_toolkit.weights.resolve import check_trainable

# A cadence by default, in steps; of a run with fewer than so many of these it is one in epochs. Checkpoints
# that are kept then.
CADENCE, FEW_CADENCES, KEPT = 500, 4, 2
# Forecast for, where there is no accelerator.
GPU = torch.device("cuda")
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
    dtype = torch.float32 if options.bf16 is False else torch.bfloat16
    lengths, supervised = (audio_tokens(facts) + facts["text"]).astype("int64"), facts["supervised"]

    def plan(options: TrainOptions) -> tuple[BatchSampler, MemoryPlan]:
        sizes = options.batch_size, options.gradient_accumulation_steps, 1, options.seed
        sampler, device = BatchSampler(lengths, supervised.astype("int64"), *sizes), accelerator() or GPU
        return sampler, plan_memory(folder, options, sampler, facts["samples"], shared_prefix, device, dtype)

    try:
        check_trainable(folder, quantization=options.quantization, merge=options.merge_lora)
        sampler, memory = plan(options)
        model, stored = meta_model(folder), stored_quantization(folder)
    except ModelError as problem:
        return {"problem": problem.message.to_json()}
    schedule, warning = Schedule.of(sampler.steps_per_epoch, options), memory.warning()
    fits = warning is None
    fitting = options if fits else fit_memory(options, stored, lambda other: plan(other)[1].warning() is None)
    epochs = options.num_epochs if options.max_steps is None else schedule.total / schedule.per_epoch
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": {name: getattr(memory, name) for name in PLANNED},
        "memory": [line.to_json() for line in memory.lines()],
        "warning": None if warning is None else warning.to_json(),
        **advice(options, fitting, schedule, facts),
        "steps": schedule.total,
        "steps_per_epoch": schedule.per_epoch,
        "epochs": epochs,
        "effective_batch": sampler.effective,
        "operations": count_operations(
            model, facts, options, epochs, shared_tokens(model.config, options, shared_prefix)
        ),
    }


def advice(options: TrainOptions, fitting: TrainOptions, schedule: Schedule, facts: Facts) -> Figures:
    """Say what to expect of a training, and the command of one that fits memory and rows.

    Args:
        options: of the training.
        fitting: the same with a batch that fits.
        schedule: its steps.
        facts: of the training set's rows.
    """
    answers, rows = len(np.unique(facts["answer"])), len(facts)
    expectation = None
    if is_too_short(options, schedule):
        expectation = what_to_expect(options, schedule, rows, answers).to_json()
    are_classes = answers <= MOST_CLASSES and rows >= LEAST_ROWS * answers
    command = as_command(recommend(options, fitting, schedule.per_epoch, are_classes=are_classes))
    return {"expectation": expectation, "command": command}


def fit_memory(
    options: TrainOptions, stored: str | None, fits: Callable[[TrainOptions], bool]
) -> TrainOptions:
    """Return options with the largest batch that fits, accumulated to the same effective one; else the same.

    Args:
        options: of a training.
        stored: the quantization of the base's weights, if they are stored so.
        fits: tells whether a training's memory suffices, as far as that is known.
    """
    batch, effective = options.batch_size, options.batch_size * options.gradient_accumulation_steps
    sizes = [size for size in range(batch, 0, -1) if batch % size == 0]
    tries = [
        replace(options, batch_size=size, gradient_accumulation_steps=effective // size) for size in sizes
    ]
    tries = [options, *(replace(each, gradient_checkpointing=True) for each in tries)]
    if may_quantize(options, stored):
        tries.append(replace(tries[-1], quantization="4bit"))
    return next(filter(fits, tries), options)


def recommend(
    chosen: TrainOptions, options: TrainOptions, per_epoch: int, *, are_classes: bool
) -> TrainOptions:
    """Return options with steps that teach a task, evaluated and saved several times; what was chosen stays.

    Args:
        chosen: options as they were asked for.
        options: the same, or others that fit.
        per_epoch: its steps in an epoch.
        are_classes: answers are few, each of several rows.
    """
    if not chosen.given({"num_epochs", "max_steps", "lr"}):
        options = longer_run(options, per_epoch)
    epochs = Schedule.of(per_epoch, options).total / per_epoch
    changes: dict[str, Any] = {}
    if epochs * per_epoch < FEW_CADENCES * CADENCE:
        changes |= (
            {"eval_steps": "epoch", "save_steps": "epoch"}
            if epochs >= 2
            else {"eval_steps": 0.5, "save_steps": 0.5}
        )
        changes |= {"save_total_limit": KEPT}
    if options.eval_dataset is None:
        changes.pop("eval_steps", None)
    else:
        may_generate = are_classes and is_accepted(replace(options, eval_metric="accuracy"), None)
        changes |= {"keep_best": True, **({"eval_metric": "accuracy"} if may_generate else {})}
    free = {name: value for name, value in changes.items() if not chosen.given({name})}
    return replace(options, **free)


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
