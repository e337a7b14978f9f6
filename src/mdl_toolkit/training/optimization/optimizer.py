"""Make the optimizer that a run asks for; save and restore its state, and tell how large it is."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mdl_toolkit.config.train import TrainOptions

# Tables of bitsandbytes, the same for all parameters: nothing to save.
TABLES = {"qmap1", "qmap2"}
# In bitsandbytes, numbers of the smallest tensor with 8-bit states, and numbers that share a float32 scale.
LEAST, BLOCK = 4096, 256
FLOAT = 4


@dataclass(frozen=True)
class OptimizerConfig:
    """Choose an optimizer.

    Attributes:
        name: as `--optimizer` spells it.
        weight_decay: of all parameters.
        beta2: AdamW's.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    beta2: float = 0.999

    @staticmethod
    def of(options: TrainOptions) -> "OptimizerConfig":
        """Return what a run's options choose."""
        return OptimizerConfig(options.optimizer, options.weight_decay, options.adam_beta2)

    def make(self, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        """Make the optimizer of parameters on a device."""
        settings: dict[str, Any] = {"betas": (0.9, self.beta2), "weight_decay": self.weight_decay}
        if self.name == "adamw":
            return torch.optim.AdamW(parameters, fused=True, **settings)
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        # A CPU has no other memory to page to.
        is_paged = self.name == "paged_adamw_8bit" and device.type != "cpu"
        optimizer: torch.optim.Optimizer = (PagedAdamW8bit if is_paged else AdamW8bit)(parameters, **settings)
        return optimizer

    def state_bytes(self, sizes: Iterable[int]) -> int:
        """Return bytes of the two states of tensors with so many numbers."""
        total = 0
        for size in sizes:
            is_8bit = self.name != "adamw" and size >= LEAST
            total += 2 * (size + FLOAT * math.ceil(size / BLOCK) if is_8bit else FLOAT * size)
        return total


ADAMW = OptimizerConfig()


def saved_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return an optimizer's tensors, named `PARAMETER/STATE`."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in TABLES
    }


def restore_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Give a new optimizer the tensors of `saved_state`.

    Raises:
        KeyError: they are of other parameters.
        ValueError: they are no states of this optimizer.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        saved.setdefault(name, {})[key] = tensor
    for name, values in saved.items():
        state = init_state(optimizer, named[name])
        if values.keys() != state.keys() - TABLES:
            raise ValueError(f"{name}: {sorted(values)} are no states of {type(optimizer).__name__}")
        for key, tensor in values.items():
            if not isinstance(state[key], Tensor):
                state[key] = int(tensor)
                continue
            if tensor.shape != state[key].shape:
                raise KeyError(name)
            if tensor.dtype != state[key].dtype:
                raise ValueError(f"{name}/{key} is of type {tensor.dtype}")
            state[key].copy_(tensor)


def init_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Make the state of a parameter as it is before the first step; return it."""
    state: dict[str, Any] = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state
    for number, group in enumerate(optimizer.param_groups):
        for index, each in enumerate(group["params"]):
            if each is parameter:
                optimizer.init_state(group, parameter, number, index)  # type: ignore[attr-defined]
    return state
