"""What `check` says of a training before it is run: memory, steps and arithmetic."""

import math
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.check.findings import Figures, audio_tokens
from mdl_toolkit.data.check.rows import Facts
from mdl_toolkit.errors import ModelError
from mdl_toolkit.training.memory.activations import shared_positions
from mdl_toolkit.training.memory.plan import on_paper, plan_memory
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.schedule import Schedule
from mdl_toolkit.weights.resolve import check_trainable

PLANNED = ("total", "weights", "trained", "activations", "free")  # bytes of a `MemoryPlan`


def forecast_training(folder: Path, options: TrainOptions, facts: Facts, beginning: int) -> Figures | None:
    """Memory, steps and arithmetic of a training; on a machine without a GPU, of one with a GPU.

    How fast the GPU computes is not guessed: the arithmetic is given, and hours at a round speed.
    All rows begin with so many positions, which are computed once a batch.
    """
    if not len(facts):
        return None
    try:
        check_trainable(folder, quantization=options.quantization, merge=options.merge_lora)
        return _predicted(folder, options, facts, beginning)
    except ModelError as problem:
        return {"problem": problem.message.to_json()}


def _predicted(folder: Path, options: TrainOptions, facts: Facts, beginning: int) -> Figures:
    lengths = (audio_tokens(facts) + facts["text"]).astype("int64")
    sampler = BatchSampler(
        lengths, facts["supervised"].astype("int64"), options.batch_size,
        options.gradient_accumulation_steps, 1, options.seed,
    )  # fmt: skip
    dtype = torch.float32 if options.bf16 is False else torch.bfloat16
    device = torch.device("cuda")
    plan = plan_memory(folder, options, sampler, facts["samples"], beginning, device, dtype)
    schedule, model = Schedule.of(sampler.steps_per_epoch, options), on_paper(folder)
    shared = shared_positions(model.config, options, beginning)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": {name: getattr(plan, name) for name in PLANNED},
        "memory": [line.to_json() for line in plan.lines()],
        "warning": None if (line := plan.warning()) is None else line.to_json(),
        "steps": schedule.total, "steps_per_epoch": schedule.per_epoch, "epochs": options.num_epochs,
        "effective_batch": sampler.effective,
        "operations": _operations(model, facts, options, shared),
    }  # fmt: skip


def _operations(model: Any, facts: Facts, options: TrainOptions, shared: int) -> float:
    """Floating-point operations of a training in the blocks' matrices, of which almost all consist.

    A frozen matrix takes two for each number and position forwards, as many for the gradient of its input,
    and as many again where checkpointing computes it anew. The encoder has five patches to a token. So many
    positions are `shared` by the rows of a batch.
    """
    blocks = (model.decoder.model.layers, model.audio_encoder.blocks)
    decoder, encoder = (sum(p.numel() for p in each.parameters() if p.ndim == 2) for each in blocks)
    audio = audio_tokens(facts)
    others = len(facts) - math.ceil(len(facts) / options.batch_size)  # rows that are not their batch's first
    positions, patches = int((audio + facts["text"]).sum()) - shared * others, 5 * int(audio.sum())
    passes = 3 if options.gradient_checkpointing else 2
    return float(options.num_epochs * 2 * passes * (decoder * positions + encoder * patches))
