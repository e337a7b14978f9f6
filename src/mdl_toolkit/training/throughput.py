"""Tell how well a run used its accelerator: tokens and operations in a second, the most memory."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training.log import Pace
from mdl_toolkit.utils.console import say, size
from mdl_toolkit.utils.device import device_name, peak_memory

# TFLOP/s of dense products in 16 bits, from the makers' data sheets, by a part of a device's name. The first
# that fits counts.
PEAKS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "RTX 4090": 165,
    "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip
# For each parameter of a matrix and token: two forward, two for the gradient of its input. Those of LoRA are
# few, and what gradient checkpointing computes again is no use.
OPERATIONS = 4
PATCHES_PER_TOKEN = 5


def operations_of(
    model: Any, token_counts: NDArray[np.int64], samples: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Count the floating-point operations that learning from each example takes, `[examples]`.

    Args:
        model: a MiDashengLM.
        token_counts: decoder tokens of every example, `[examples]`.
        samples: of every example's audio, `[examples]`.
    """
    blocks = (model.decoder.model.layers, model.audio_encoder.blocks)
    decoder, encoder = (sum(_numbers(part) for part in each.modules()) for each in blocks)
    patches = PATCHES_PER_TOKEN * np.array([audio_token_count(each) for each in samples.tolist()])
    return OPERATIONS * (float(decoder) * token_counts + float(encoder) * patches)


def _numbers(module: Any) -> int:
    """Return the numbers in a frozen linear layer, also where they are packed; 0 for anything else."""
    is_counted = isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
    return int(module.in_features * module.out_features) if is_counted else 0


def peak_of(name: str) -> float | None:
    """Return the operations in a second that a device of this name can make at most; None if not known."""
    found = next((peak for part, peak in PEAKS.items() if part in name), None)
    return None if found is None else 1e12 * found


def say_throughput(pace: Pace, device: torch.device, planned: int) -> None:
    """Say how well an accelerator was used, of what is known of it; nothing of a CPU.

    Args:
        pace: of the run.
        device: of this process.
        planned: bytes that were predicted.
    """
    most = peak_memory(device)
    if most is None or not pace.examples:
        return
    name, seconds = device_name(device), max(pace.seconds, 1e-9)
    parts = [Localized("{tokens:,.0f} tokens/s", tokens=pace.tokens / seconds)]
    if peak := peak_of(name):
        parts.append(
            Localized(
                "MFU {share:.1%} of {peak:.0f} TFLOP/s (4 operations a parameter and token)",
                share=pace.operations / seconds / peak,
                peak=peak / 1e12,
            )
        )
    parts.append(Localized("most memory {most}, planned {planned}", most=size(most), planned=size(planned)))
    say("{device}: {parts}", device=name, parts=join_messages(parts, "{left}; {right}"))
