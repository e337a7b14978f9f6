"""Memory of this machine: how much a process may still take, and which errors say that it ran out."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.worker_pool import CGROUP

if TYPE_CHECKING:
    import torch

# The kinds of errors that tell of a lack of memory, and words of those that also tell of other things.
OUT_OF_MEMORY = (RuntimeError, MemoryError)
_GPU_LACKS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
_CPU_LACKS = ("DefaultCPUAllocator: ", "std::bad_alloc")
PROC = Path("/proc")
# Of a cgroup: its limit, what it uses, and in its memory.stat what of that are files that can be dropped.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def free_memory(device: "torch.device") -> int | None:
    """Bytes that this process may still take on a device; None where that cannot be told or there is none.

    On a CPU: what the system calls available, and what the limits of cgroups leave, in equal shares for the
    processes that a launcher has started on this machine.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else None
    found = [*_available(), *_granted()]
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None


def _available() -> Iterator[int]:
    with suppress(OSError, ValueError):
        lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
        yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _granted() -> Iterator[int]:
    """What the limits of this process's cgroups and those around them leave; cached files count as free."""
    for folder, (limit, used, cached) in _cgroups():
        with suppress(OSError, ValueError):  # no such file, or the word `max`
            most, now = (int((folder / file).read_text(encoding="ascii")) for file in (limit, used))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            files = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cached} "))
            yield max(0, most - now + files)


def _cgroups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders with limits, and the names in them, by version 2 and version 1 of cgroups."""
    with suppress(OSError):
        for line in (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, inside = line.split(":", 2)
            path = PurePosixPath(inside.lstrip("/"))
            if not controllers:
                yield from ((CGROUP / each, VERSION_2) for each in (path, *path.parents))
            elif "memory" in controllers.split(","):
                yield from ((CGROUP / "memory" / each, VERSION_1) for each in (path, *path.parents))


def lack_of_memory(problem: BaseException) -> Localized | None:
    """Return what ran out of memory, the GPU or the machine, in words; None for any other error.

    Args:
        problem: an error of torch, of a library that it calls, or of Python or numpy.
    """
    import torch

    is_error, said = isinstance(problem, RuntimeError), str(problem)
    if isinstance(problem, torch.OutOfMemoryError) or (is_error and any(each in said for each in _GPU_LACKS)):
        return Localized("the GPU ran out of memory")
    if isinstance(problem, MemoryError) or (is_error and any(each in said for each in _CPU_LACKS)):
        return Localized("the machine ran out of memory")
    return None
