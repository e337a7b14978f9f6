"""Tell how many CPUs and how much memory this process may use, and which errors say that memory ran out."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mdl_toolkit.i18n import Localized

if TYPE_CHECKING:
    import torch

MOST_WORKERS = 32
CGROUP, PROC = Path("/sys/fs/cgroup"), Path("/proc")
# By version of cgroups: files with microseconds of CPU time per period of so many; files with the limit of
# memory and its use, and the line of memory.stat for files that can be dropped.
CPU_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}
MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}

# The kinds of errors that tell of a lack of memory, and parts of the texts of those that also tell of others.
OOM_ERRORS = (RuntimeError, MemoryError)
_GPU_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
_CPU_TEXTS = ("DefaultCPUAllocator: ", "std::bad_alloc")


def default_workers() -> int:
    """Return half the CPUs that this process may use, at least 1 and at most 32."""
    return max(1, min(MOST_WORKERS, available_cpus() // 2))


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, by affinity and cgroup quota."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for folder, version in _cgroups("cpu"):
        # There is no such file, or it holds the word `max`.
        with suppress(OSError, ValueError):
            text = " ".join((folder / file).read_text(encoding="ascii") for file in CPU_FILES[version])
            quota, period = map(int, text.split())
            if quota > 0:
                counts.append(quota // period)
    return max(1, min(counts))


def free_memory(device: "torch.device") -> int | None:
    """Return the bytes that this process may still take on a device; None where nothing tells.

    On a CPU: the least of what the system calls available and what the limits of cgroups leave, in equal
    shares for the processes that a launcher has started on this machine.
    """
    if device.type != "cpu":
        from mdl_toolkit.utils.device import device_memory

        found = device_memory(device)
        return None if found is None else found[0]
    free = []
    # The bytes that the limits of this process's cgroups and their parents leave, caches as free.
    for folder, version in _cgroups("memory"):
        limit, used, cached = MEMORY_FILES[version]
        # There is no such file, or it holds the word `max`.
        with suppress(OSError, ValueError):
            most, now = (int((folder / file).read_text(encoding="ascii")) for file in (limit, used))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            files = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cached} "))
            free.append(max(0, most - now + files))
    with suppress(OSError, ValueError):
        lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if free else None


def _cgroups(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's cgroups and their parents for a controller, with the version."""
    with suppress(OSError):
        for line in (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, inside = line.split(":", 2)
            path = PurePosixPath(inside.lstrip("/"))
            if not controllers:
                yield from ((CGROUP / each, 2) for each in (path, *path.parents))
            elif controller in controllers.split(","):
                yield from ((CGROUP / controller / each, 1) for each in (path, *path.parents))


def describe_oom(problem: BaseException) -> Localized | None:
    """Say whose memory ran out, the GPU's or the machine's; None for any other error.

    Args:
        problem: an error of torch, of a library that it calls, or of Python or numpy.
    """
    import torch

    text = str(problem) if isinstance(problem, RuntimeError) else ""
    if isinstance(problem, torch.OutOfMemoryError) or any(part in text for part in _GPU_TEXTS):
        return Localized("the GPU ran out of memory")
    if isinstance(problem, MemoryError) or any(part in text for part in _CPU_TEXTS):
        return Localized("the machine ran out of memory")
    return None
