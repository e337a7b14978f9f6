"""Shard the frozen weights of encoder blocks and decoder layers over the processes of a run, by torch's FSDP2.

Each process keeps an equal share of every block. All processes gather a block right before one of them, and so
all, computes it, forward or backward, and free what is not theirs after it. Everything else stays whole on
each process: adapters and full copies, whose gradients are summed as without sharding; embeddings, output
head, norms and projector. As no process can compute a block alone, all make equally many passes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import UsageError
from mdl_toolkit.utils.console import say, size, warn
from mdl_toolkit.utils.distributed import World


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


def sharding_world(world: World, options: TrainOptions) -> World:
    """Return the processes of a run, sharding weights if that is asked for and there are several."""
    if options.shard_weights and world.size == 1:
        warn("--shard-weights: this run has one process, which holds all weights; ignored")
    return replace(world, is_sharding=options.shard_weights and world.size > 1)


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """Return the encoder blocks and decoder layers of a `PeftModel`."""
    base = model.get_base_model()
    return [*base.audio_encoder.blocks, *base.decoder.model.layers]


def shard_blocks(model: Any, world: World, device: torch.device) -> None:
    """Put a `PeftModel` from the host onto a device: of each block this process's share, and all the rest.

    At most one block is whole on the device at once.
    """
    group, blocks = world.devices or world.group, blocks_of(model)
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
            whole.add(parameter)
    # It has no share itself, but knows the order of the blocks: the next is gathered while one is computed.
    fully_shard(model, mesh=mesh, ignored_params=whole)
    shares = [p for block in blocks for p in block.parameters() if isinstance(p, DTensor)]
    say(
        "weights sharded: each of {count} processes keeps {own} of the {total} in {blocks} blocks",
        count=world.size,
        own=size(sum(share.to_local().nbytes for share in shares)),
        total=size(sum(share.numel() * share.element_size() for share in shares)),
        blocks=len(blocks),
    )
