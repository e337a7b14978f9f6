"""Join the processes that train together, and sum tensors over them.

Launchers (torchrun, accelerate launch, or any other that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT)
start the processes. Every process holds the whole model; gradients are summed once per step.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from mdl_toolkit.errors import ToolkitError, UsageError
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.machine import lack_of_memory
from mdl_toolkit.utils.worker_pool import Ranks

# So many numbers travel together: 64 MiB of float32.
BUCKET = 2**24
# Time for all processes to be there: some machines begin later than others.
MEETING = timedelta(minutes=15)
# Time for the first process to convert; the usual ten minutes would not do.
PATIENCE = timedelta(days=2)

# What gloo and the store say of a process that has gone.
CLOSED = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "onnection refused", "imeout")

# Of an accelerate configuration: set where the model is to be divided among the processes.
DIVIDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


class PeerLostError(ToolkitError):
    """Report that another process of the run has ended; that one says why."""

    def __init__(self, problem: RuntimeError) -> None:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        if any(word in reason for word in CLOSED):
            super().__init__("another process of this run has ended; its own message says why")
        else:
            super().__init__(
                "another process of this run has ended; its own message says why (here: {reason})",
                reason=reason,
            )


@dataclass(frozen=True)
class World:
    """Hold this process's place among all, and sum over them.

    Attributes:
        rank: of this process; 0 speaks and writes.
        size: number of processes.
        group: the process group of torch that sums travel in; None for the default one.
    """

    rank: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Tell whether this process speaks and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place.

        Raises:
            PeerLostError: another process has ended.
        """
        if self.size > 1:
            with _noticing_loss():
                distributed.all_reduce(tensor, group=self.group)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over all processes; where a process has none, they count as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(parameters):
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            flat = self.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def agrees(self, text: str) -> bool:
        """Tell whether all processes give the same text."""
        said = torch.zeros(self.size, dtype=torch.float64)
        # Six bytes are exact in float64.
        said[self.rank] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        return len(set(self.sum(said).tolist())) == 1

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            PeerLostError: another process has ended.
        """
        self.sum(torch.zeros(1))


@contextmanager
def joined() -> Iterator[World]:
    """Join the others that a launcher started, for as long as the context lasts.

    Raises:
        UsageError: what the launcher says makes no sense.
    """
    if Ranks.from_environment().count == 1:
        yield World()
        return
    _check_environment()
    _warn_dividing()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = _meet()
    with _noticing_loss():
        # Connecting is a part of the meeting: who has ended since would be waited for without a word.
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=MEETING)
        # A group's patience is fixed when it is made: all that are here now make one with more.
        group = distributed.new_group(timeout=PATIENCE)
    store.set_timeout(PATIENCE)
    try:
        yield World(rank, size, group)
    except BaseException:
        # NCCL would wait here for others that wait for this one, before it has said why.
        if not _end_together():
            distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def _end_together() -> bool:
    """Tell whether a group can only be left by all processes at once, as NCCL's."""
    return torch.cuda.is_available()


def _check_environment() -> None:
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        names, size = ", ".join(missing), os.environ["WORLD_SIZE"]
        raise UsageError(
            "WORLD_SIZE={size} in the environment, but no {names}; start with torchrun, or unset WORLD_SIZE",
            size=size,
            names=names,
        )


def _meet() -> tuple[Any, int, int]:
    """Meet all processes, and return their store, the rank of this one and their number."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
    except RuntimeError as problem:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        minutes = f"{MEETING.total_seconds() / 60:g}"
        raise ToolkitError(
            "not all processes of this run met at {place} within {minutes} min; start them together",
            place=place,
            minutes=minutes,
        ) from problem
    return store, rank, size


def _warn_dividing() -> None:
    for name in [name for variable, name in DIVIDING.items() if os.environ.get(variable) == "true"]:
        warn(
            "the launcher asks for {name}, which is not used: every process holds the whole model; where "
            "memory is short, use --quantization 4bit",
            name=name,
        )


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    # Gloo and NCCL raise this when a connection ends.
    except RuntimeError as problem:
        if lack_of_memory(problem):
            raise
        raise PeerLostError(problem) from problem


def warn_of_idle_gpus(processes: int, command: str) -> None:
    """Say how to use all GPUs if one process, which uses one, is all there is."""
    count = torch.cuda.device_count()
    if processes == 1 and count > 1:
        warn(
            "{count} GPUs are here and one is used; to use all: torchrun --nproc-per-node {count} "
            "--no-python mdl-toolkit {command} ...",
            count=count,
            command=command,
        )
