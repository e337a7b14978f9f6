"""Read what a launcher such as torchrun says in the environment, and warn where it is used wrongly."""

import os
from dataclasses import dataclass

from mdl_toolkit.errors import UsageError
from mdl_toolkit.utils.console import warn

# Variables of accelerate, true where the model is to be divided among the processes.
MODEL_DIVISION = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


@dataclass(frozen=True)
class Ranks:
    """Hold the rank of this process among those that a launcher started.

    Attributes:
        rank: from 0.
        count: of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read RANK and WORLD_SIZE from the environment.

        Raises:
            UsageError: RANK or WORLD_SIZE is nonsense.
        """
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
            return cls(int(rank), int(size))
        raise UsageError(
            "RANK={rank} and WORLD_SIZE={size} in the environment do not fit; unset or correct them",
            rank=rank,
            size=size,
        )


def check_launch(*, is_sharding: bool = False) -> None:
    """Refuse a launch of several processes that cannot find each other; warn of one that divides the model.

    Args:
        is_sharding: whether the model is divided anyway, as FSDP does.

    Raises:
        UsageError: a variable is missing in the environment.
    """
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UsageError(
            "WORLD_SIZE={size} in the environment, but no {names}; start with torchrun, or unset WORLD_SIZE",
            size=os.environ["WORLD_SIZE"],
            names=", ".join(missing),
        )
    for variable, name in MODEL_DIVISION.items():
        if os.environ.get(variable) != "true":
            continue
        if not is_sharding:
            warn(
                "the launcher asks for {name}, which is not used: every process holds the whole model; where "
                "memory is short, use --quantization 4bit, or --shard-weights true to divide the model",
                name=name,
            )
        elif name != "FSDP":
            warn(
                "the launcher asks for {name}, which is not used: --shard-weights divides the model",
                name=name,
            )


def warn_of_idle_gpus(processes: int, command: str) -> None:
    """Say how to use all GPUs if a single process, which uses one, was started."""
    from mdl_toolkit.utils.device import device_count, untried_accelerator

    if name := untried_accelerator():
        warn("{name}: here and not used, as nothing was tried on one; the CPU is used", name=name)
    count = device_count()
    if processes == 1 and count > 1:
        warn(
            "{count} GPUs are here and one is used; to use all: torchrun --nproc-per-node {count} "
            "--no-python mdl-toolkit {command} ...",
            count=count,
            command=command,
        )
