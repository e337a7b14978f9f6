"""Ask torch about this process's accelerator, of whatever kind: CUDA or ROCm, XPU, Ascend NPU.

Nothing else here names a kind. torch's module of a kind (`torch.cuda`, `torch.npu`) has the same functions
under the same names; one that it lacks counts as nothing known.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CPU = torch.device("cpu")
# Kinds that are not used, as nothing here was ever tried on one.
UNTRIED = {"mps": "Apple GPU (MPS)"}

# TFLOP/s of dense products in 16 bits, from the makers' data sheets, by a part of a device's name. The first
# that fits counts.
PEAKS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "RTX 4090": 165,
    "RTX 4080": 97, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def accelerator() -> torch.device | None:
    """Return the kind of accelerator that is used here, as a device without a number; None for the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type in UNTRIED else found


def untried_accelerator() -> str | None:
    """Return the name of an accelerator that is here and not used."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else UNTRIED.get(found.type)


def best_device() -> torch.device:
    """Choose the accelerator of this process, or the CPU.

    Launchers may not set the local rank, or may show each process its own accelerator alone.
    """
    found = accelerator()
    if found is None:
        return CPU
    # Without it, activations of changing sizes leave holes that are too small. It counts if set before the
    # first tensor is made there.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    number = os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or "0"
    return torch.device(found.type, int(number) % device_count())


def device_count() -> int:
    """Count the accelerators that this process may use."""
    found = accelerator()
    return 0 if found is None else int(torch.get_device_module(found).device_count())


def device_name(device: torch.device) -> str:
    """Return a device with the name that its maker gave it, `cuda:0 (NVIDIA H200)`."""
    name = _ask(device, "get_device_name", device)
    return str(device) if name is None else f"{device} ({name})"


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16 natively, and so fast; a CPU does not count."""
    # Only CUDA also tells of what it emulates.
    options = {"including_emulation": False} if device.type in ("cuda", "xpu") else {}
    return bool(_ask(device, "is_bf16_supported", **options))


def summing_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which a device sums losses: float64, or float32 where there is nothing wider."""
    # Of Intel's GPUs some have it and some have not, and say so.
    properties = _ask(device, "get_device_properties", device)
    return torch.float64 if getattr(properties, "has_fp64", device.type != "mps") else torch.float32


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Return the free and all bytes of an accelerator's memory; None where nothing tells."""
    found = _ask(device, "mem_get_info", device)
    return None if found is None else (int(found[0]), int(found[1]))


def total_memory(device: torch.device) -> int | None:
    """Return all bytes of an accelerator's memory, free or not."""
    found = device_memory(device)
    return None if found is None else found[1]


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors took on an accelerator since `reset_peak_memory`."""
    found = _ask(device, "max_memory_allocated", device)
    return None if found is None else int(found)


def reset_peak_memory(device: torch.device) -> None:
    """Forget how much memory tensors took until now."""
    _ask(device, "reset_peak_memory_stats", device)


def empty_cache(device: torch.device) -> None:
    """Give memory back that torch keeps for later and that nothing uses."""
    _ask(device, "empty_cache")


def peak_of(name: str) -> float | None:
    """Return the operations in a second that a device of this name can make at most; None if not known."""
    found = next((peak for part, peak in PEAKS.items() if part in name), None)
    return None if found is None else 1e12 * found


@contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Let CUDA round the factors of float32 products to TF32 in the context: ten times the speed."""
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def _ask(device: torch.device, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of the module of a device's kind; None where there is none."""
    found = accelerator()
    if found is None or found.type != device.type:
        return None
    function = getattr(torch.get_device_module(device), name, None)
    return None if function is None else function(*args, **kwargs)
