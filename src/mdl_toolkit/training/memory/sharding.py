"""Shard the frozen weights of encoder blocks and decoder layers over a run's processes, by torch's FSDP2.

Each process keeps an equal share of every block. Right before a block is computed, forward or backward, all
processes gather it, and after that they free what is not theirs. Everything else stays whole on each process:
adapters and full copies, whose gradients are summed as without sharding; embeddings, output head, norms and
projector. As no process can compute a block alone, all make equally many passes.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import UsageError
from mdl_toolkit.utils.console import say, size
from mdl_toolkit.utils.device import CPU
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.safetensors_stream import stored_dtype

# A part of the names of weights beside which PEFT keeps a full copy that trains.
ORIGINAL = ".original_module."


def check_sharding(options: TrainOptions, quantization: str | None) -> None:
    """Refuse what does not go with weights that are sharded.

    Args:
        options: the run's.
        quantization: of the base's weights, as they are stored or are to be loaded.

    Raises:
        UsageError: they are quantised, or answers are to be generated.
    """
    if not options.shard_weights:
        return
    if quantization is not None:
        raise UsageError(
            "--shard-weights: quantised weights cannot be divided among processes; leave --quantization out, "
            "and take a base that is not quantised"
        )
    if options.eval_metric is not None:
        raise UsageError(
            "--shard-weights: not with --eval-metric, as every token of an answer would gather all weights "
            "again; leave one of the two out (without, the evaluation loss is what is compared)"
        )


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """Return the encoder blocks and decoder layers of a `PeftModel`."""
    base = model.get_base_model()
    return [*base.audio_encoder.blocks, *base.decoder.model.layers]


def load_to_shard(base: Path, options: TrainOptions, dtype: torch.dtype) -> Any:
    """Load a base model onto the host, in a dtype but for the decoder's layers.

    These stay in float32 if they are stored so, unless adapters begin with what DoRA or PiSSA makes of them.
    What is as it is stored is mapped from its file: processes of one machine share that memory, and the
    system takes it back when it needs it.
    """
    is_float32 = stored_dtype(base) == torch.float32 and options.lora_variant not in ("dora", "pissa")
    model = load_model(base, dtype=torch.float32 if is_float32 else dtype, device=CPU)
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder.model.layers.") and ".init_bn." not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def shard_blocks(model: Any, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Put a `PeftModel` from the host onto a device: of each block this process's share, and all the rest.

    At most one block is whole on the device at once.
    """
    group, blocks = world.devices or world.group, blocks_of(model)
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    # The whole model, last, has no share, but knows the order of blocks: the next is gathered meanwhile.
    for part in (*blocks, model):
        whole = set()
        for name, parameter in part.named_parameters():
            if isinstance(parameter, DTensor):
                continue
            own = parameter.dtype if parameter.requires_grad or ".init_bn." in name else dtype
            # What a full copy is a copy of is never computed; tied, it may be the head too.
            is_idle = ORIGINAL in name and not model.config.tie_word_embeddings
            parameter.data = parameter.data.to(CPU if is_idle else device, own)
            if parameter.requires_grad or part is model:
                whole.add(parameter)
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    shares = [p for block in blocks for p in block.parameters() if isinstance(p, DTensor)]
    say(
        "weights sharded: each of {count} processes keeps {own} of the {total} in {blocks} blocks",
        count=world.size,
        own=size(sum(share.to_local().nbytes for share in shares)),
        total=size(sum(share.numel() * share.element_size() for share in shares)),
        blocks=len(blocks),
    )
