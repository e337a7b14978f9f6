"""Join the processes that train or answer together, and sum tensors over them.

Launchers (torchrun, accelerate launch, or any other that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT)
start the processes. Every process holds the whole model, or with `--shard-weights` a share of its blocks;
gradients are summed once per step.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from mdl_toolkit.errors import ToolkitError
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.device import CPU, accelerator, best_device
from mdl_toolkit.utils.launcher import Ranks, check_launch
from mdl_toolkit.utils.machine import describe_oom

# The time within which all processes must have come: some machines begin later than others.
RENDEZVOUS_TIMEOUT = timedelta(minutes=15)
# The time that processes wait for the first one to convert; torch's ten minutes would not do.
GROUP_TIMEOUT = timedelta(days=2)

# The time within which all processes must bring their gradients, which they begin to do at once.
SUMMING_TIMEOUT = timedelta(minutes=30)
# Bytes of gradients that are summed at once: each sum has a latency. As many as in torch's DDP.
BUCKET = 25 << 20
# What NCCL says last is why.
LAST_ERROR = "Last error:"

# The time that a process with an error waits to hear whether another one has told it.
SAYING_TIMEOUT = timedelta(seconds=5)

# Values of a process that are compared at once, whatever its version.
MOST_COMPARED = 256

# Parts of the errors of gloo and the store that say nothing but that a process has ended.
CLOSED = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "onnection refused", "imeout")


class PeerLostError(ToolkitError):
    """Report that another process of the run has ended; that one says why."""

    def __init__(self, problem: RuntimeError) -> None:
        reason = _reason_of(problem)
        if any(word in reason for word in CLOSED):
            super().__init__("another process of this run has ended; its own message says why")
        else:
            super().__init__(
                "another process of this run has ended; its own message says why (here: {reason})",
                reason=reason,
            )


@dataclass(frozen=True)
class World:
    """Hold this process's rank among all processes, and sum tensors over them.

    Attributes:
        rank: of this process; 0 speaks and writes.
        size: number of processes.
        group: torch's process group for sums on the host; None for the default one.
        devices: for sums on the processes' accelerators; None where there are none.
        is_sharding: whether each process holds a share of the weights, so that none can compute alone.
    """

    rank: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None
    devices: distributed.ProcessGroup | None = None
    is_sharding: bool = False

    @property
    def is_first(self) -> bool:
        """Tell whether this process speaks and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor of any shape, on the host, over all processes, in place, and return it.

        Raises:
            PeerLostError: another process has ended.
        """
        if self.size > 1:
            with _peer_errors():
                distributed.all_reduce(tensor, group=self.group)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over all processes, in buckets; where a process has none, they count as zero."""
        if self.size == 1:
            return
        buckets: list[list[Tensor]] = []
        room = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            room -= parameter.grad.nbytes
            if room < 0:
                buckets.append([])
                room = BUCKET - parameter.grad.nbytes
            buckets[-1].append(parameter.grad)
        with _peer_errors():
            # What is in no bucket with others is summed where it lies.
            flats = [torch.cat([*map(torch.ravel, each)]) if each[1:] else each[0] for each in buckets]
            group = self.devices or self.group
            for work in [distributed.all_reduce(flat, group=group, async_op=True) for flat in flats]:
                work.wait()
        for bucket, flat in zip(buckets, flats, strict=True):
            if bucket[1:]:
                parts = torch.split(flat, [gradient.numel() for gradient in bucket])
                views = [part.view_as(each) for part, each in zip(parts, bucket, strict=True)]
                torch._foreach_copy_(bucket, views)

    def spread(self, parts: Sequence[Tensor]) -> None:
        """Give all processes the parts of a tensor, one of each process, in place."""
        with _peer_errors():
            for rank, part in enumerate(parts):
                distributed.broadcast(part, rank, group=self.devices or self.group)

    def any(self, is_so: bool) -> bool:
        """Tell whether something is so in this process; if none can compute alone, in any process."""
        return bool(self.sum(torch.tensor(float(is_so)))) if self.is_sharding else is_so

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Notice in the context that weights cannot be gathered, as another process has ended.

        Raises:
            PeerLostError: another process has ended.
        """
        try:
            yield
        except RuntimeError as problem:
            is_closed = any(word in str(problem) for word in CLOSED) and not describe_oom(problem)
            if not (self.is_sharding and is_closed):
                raise
            raise PeerLostError(problem) from problem

    def take_first(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give all processes the parameters of the first one, where others may have computed other ones."""
        for parameter in parameters if self.size > 1 else ():
            own = parameter.detach().to(CPU, copy=True)
            parameter.data.copy_(self.sum(own if self.is_first else own.zero_()))

    def agrees(self, text: str) -> bool:
        """Tell whether all processes give the same text."""
        hashes = torch.zeros(self.size, dtype=torch.float64)
        hashes[self.rank] = _number_of(text)
        return len(set(self.sum(hashes).tolist())) == 1

    def differences(self, values: Mapping[str, str]) -> dict[str, list[int]]:
        """Find the values that are not the same in all processes, which give them in the same order.

        Args:
            values: by name, at most `MOST_COMPARED`.

        Returns:
            The ranks that differ from the first one, by name.
        """
        if self.agrees(repr(values)):
            return {}
        hashes = torch.zeros(self.size, MOST_COMPARED, dtype=torch.float64)
        hashes[self.rank, : len(values)] = torch.tensor(
            [_number_of(value) for value in values.values()], dtype=torch.float64
        )
        is_other = self.sum(hashes) != hashes[0]
        ranks = {name: is_other[:, n].nonzero().flatten().tolist() for n, name in enumerate(values)}
        return {name: others for name, others in ranks.items() if others}

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            PeerLostError: another process has ended.
        """
        self.sum(torch.zeros(1))


# A process without others.
ALONE = World()


def _number_of(text: str) -> float:
    """Return a hash of a text as a number that float64 holds exactly: six bytes."""
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


@contextmanager
def join_world(*, on_devices: bool = True, is_sharding: bool = False) -> Iterator[World]:
    """Join the processes that a launcher started, and leave them when the context ends.

    Args:
        on_devices: let their accelerators meet too, where there are any.
        is_sharding: whether each is to hold a share of the weights.

    Raises:
        UsageError: the launcher's variables do not fit together.
        ToolkitError: not all processes came in time.
        PeerLostError: another process has ended.
    """
    if Ranks.from_environment().count == 1:
        if is_sharding:
            warn("--shard-weights: this run has one process, which holds all weights; ignored")
        yield World()
        return
    check_launch(is_sharding=is_sharding)
    try:
        store, rank, size = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except RuntimeError as problem:
        raise ToolkitError(
            "not all processes of this run met at {place} within {minutes} min; start them together",
            place=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            minutes=f"{RENDEZVOUS_TIMEOUT.total_seconds() / 60:g}",
        ) from problem
    # While processes connect the timeout is short: one that has ended since would be waited for in silence.
    with _peer_errors():
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=RENDEZVOUS_TIMEOUT
        )
        # A group's timeout is fixed when it is made: all that are here now make one with a longer timeout.
        group = distributed.new_group(timeout=GROUP_TIMEOUT)
        device = best_device()
        devices = join_devices(device) if on_devices and device != CPU else None
    store.set_timeout(GROUP_TIMEOUT)
    try:
        yield World(rank, size, group, devices, is_sharding)
    except BaseException:
        # It would wait here for processes that wait for this one, before the error is shown.
        if not must_leave_together():
            distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def join_devices(device: torch.device) -> distributed.ProcessGroup:
    """Let the accelerators of all processes meet and sum a number, before anything long begins.

    What they need of memory is then taken, and what they cannot do is said now.

    Raises:
        ToolkitError: they cannot work together.
    """
    backend, module = distributed.get_default_backend_for_device(device), torch.get_device_module(device)
    try:
        module.set_device(device)
        group: distributed.ProcessGroup = distributed.new_group(
            timeout=SUMMING_TIMEOUT, backend=backend, device_id=device
        )
        distributed.all_reduce(torch.zeros(1, device=device), group=group)
        module.synchronize(device)
    except RuntimeError as problem:
        if describe_oom(problem):
            raise
        raise ToolkitError(
            "{device}: the processes cannot sum over {backend}: {reason}; each process needs an accelerator "
            "of its own, torchrun's --nproc-per-node at most as many as there are",
            device=device,
            backend=backend,
            reason=_reason_of(problem),
        ) from problem
    return group


def _reason_of(problem: RuntimeError) -> str:
    """Return the line of an error that says why: of several, NCCL's comes last, others' first."""
    before, found, last = str(problem).strip().partition(LAST_ERROR)
    lines = (last if found else before).strip().splitlines()
    return lines[0].strip() if lines else type(problem).__name__


def is_first_to_say(text: str) -> bool:
    """Tell whether no other process of the run has said a text; yes where nobody can be asked.

    torchrun and its like keep a store that outlives the processes; otherwise the first process has it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, timeout=SAYING_TIMEOUT
        )
        return int(store.add(f"mdl-toolkit {attempt} {_number_of(text)}", 1)) == 1
    except (RuntimeError, KeyError, ValueError):
        return True


def must_leave_together() -> bool:
    """Tell whether a group can only be left by all processes at once, as NCCL's."""
    return accelerator() is not None


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn the RuntimeError of gloo and NCCL when a connection ends into a PeerLostError."""
    try:
        yield
    except RuntimeError as problem:
        if describe_oom(problem):
            raise
        raise PeerLostError(problem) from problem
