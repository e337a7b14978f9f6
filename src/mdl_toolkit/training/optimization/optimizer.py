"""Make the optimizer that a run asks for; save and restore its state, and tell how large it is."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import UsageError
from mdl_toolkit.training.lora import FULL_TARGETS, LORA_TARGETS
from mdl_toolkit.weights.config_files import is_tied, read_json
from mdl_toolkit.weights.resolve import find_model
from mdl_toolkit.weights.schemas import MODEL_CONFIG

# Tables of bitsandbytes, the same for all parameters: nothing to save.
TABLES = {"qmap1", "qmap2"}
# A group's learning rate, of which a step has a share.
FULL_RATE = "full_rate"
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
        rates: learning rates by target.
        lora_plus_ratio: of the learning rate of each B to that of its A.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    beta2: float = 0.999
    rates: Mapping[str, float] = field(default_factory=dict)
    lora_plus_ratio: float = 1.0

    @staticmethod
    def of(options: TrainOptions) -> "OptimizerConfig":
        """Return what a run's options choose."""
        rates = learning_rates(options)
        return OptimizerConfig(
            options.optimizer, options.weight_decay, options.adam_beta2, rates, options.lora_plus_ratio
        )

    def make(self, named: Mapping[str, nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        """Make the optimizer of named parameters on a device, a group for each learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named.items():
            ratio = self.lora_plus_ratio if ".lora_B." in name else 1.0
            groups.setdefault(self.rates.get(target_of(name), 1.0) * ratio, []).append(parameter)
        parameters = [{"params": group, "lr": rate, FULL_RATE: rate} for rate, group in groups.items()]
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


def target_of(name: str) -> str:
    """Return the word of `--train-target` that a parameter of a `PeftModel` belongs to."""
    full = {target for target, module in FULL_TARGETS.items() if f".{module}." in name}
    lora = {target for target, pattern in LORA_TARGETS.items() if re.search(rf"\.{pattern}\.", name)}
    return next(iter(full | lora), "")


def learning_rates(options: TrainOptions) -> dict[str, float]:
    """Return the learning rate of each train target.

    Raises:
        UsageError: one has none, or a rate is of a target that is not trained; all of them named.
    """
    words = options.lr if isinstance(options.lr, tuple) else (f"{options.lr!r}",)
    given = {target: float(rate) for target, _, rate in (word.rpartition("=") for word in words)}
    lacking = [target for target in options.train_target if target not in given] if "" not in given else []
    idle = [target for target in given if target not in ("", *options.train_target)]
    if lacking:
        raise UsageError(
            "--lr: no learning rate for {targets}; give TARGET=X for each, or X for the others",
            targets=", ".join(lacking),
        )
    if idle:
        raise UsageError("--lr: {targets}: not among the --train-target of this run", targets=", ".join(idle))
    rates = {target: given.get(target, given.get("", 0.0)) for target in options.train_target}
    # Tied embeddings are one, whichever of the two is named.
    full = [rates[target] for target in FULL_TARGETS if target in rates]
    return {**dict.fromkeys(FULL_TARGETS if full else (), *full[:1]), **rates}


def check_tied_rates(options: TrainOptions) -> None:
    """Refuse two learning rates for embeddings and head of a model in which they are one matrix.

    Raises:
        UsageError: `--lr` gives them two.
        ModelError: the model is not to be had.
    """
    rates = learning_rates(options)
    if {*FULL_TARGETS} <= {*options.train_target} and len({rates[target] for target in FULL_TARGETS}) > 1:
        name, hub = options.model_name, options.from_modelscope
        if is_tied(read_json(find_model(name, from_modelscope=hub, weights=False) / MODEL_CONFIG)):
            raise UsageError(
                "--lr: {targets} are one matrix in {model}; give both the same learning rate",
                targets=" / ".join(FULL_TARGETS),
                model=name,
            )


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
