"""Add LoRA adapters to a model: the modules of each `--train-target`, and full copies of embeddings.

encoder, projector and decoder are trained by LoRA; embed_tokens and lm_head as full float32 copies.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import ModelError, UsageError
from mdl_toolkit.utils.console import progress
from mdl_toolkit.weights.loading import quiet_peft

LORA_TARGETS = {
    "encoder": r"audio_encoder\.(?:\w+\.)?blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.fc[12])",
    "projector": r"audio_projector\.net\.[02]",
    "decoder": r"decoder\.model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)",
}
FULL_TARGETS = {"embed_tokens": "decoder.model.embed_tokens", "lm_head": "decoder.lm_head"}

# PiSSA decomposes weights of up to so many rows or columns exactly, larger ones in so many iterations.
EXACT, ITERATIONS = 2048, 16


@dataclass(frozen=True)
class TargetCount:
    """Count the layers that a `--train-target` matches, and the parameters that it trains.

    Attributes:
        target: as on the command line.
        layers: number of layers.
        parameters: number of trained numbers.
    """

    target: str
    layers: int
    parameters: int


def add_adapters(
    model: nn.Module,
    targets: tuple[str, ...],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    base_name: str,
    variant: str = "lora",
    start: Path | None = None,
    decomposes: bool = True,
) -> tuple[Any, list[TargetCount]]:
    """Wrap a MiDashengLM in PEFT so that exactly the targets train.

    Args:
        model: the base model; its own weights are frozen.
        targets: those of `--train-target`.
        rank: of the LoRA matrices.
        alpha: adapters are scaled by alpha / rank.
        dropout: on the adapters' input.
        base_name: recorded in the adapter, so that it finds its base again.
        variant: that of `--lora-variant`.
        start: folder of an adapter whose modules, ranks and scales, but no weights, replace these.
        decomposes: whether PiSSA's adapters are made of the weights, and not left to be filled.

    Returns:
        The `PeftModel`, and the count of each target.

    Raises:
        ModelError: a target matches nothing.
    """
    from peft import get_peft_model

    from mdl_toolkit.training.lora_layer import use_fast_lora

    check_targets(model, targets)
    tied = bool(model.config.tie_word_embeddings)  # type: ignore[union-attr]
    config = saved_config(start) if start else adapter_config(targets, rank, alpha, variant, tied=tied)
    config.lora_dropout, config.ensure_weight_tying = dropout, tied and bool(config.modules_to_save)
    with quiet_peft():
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    if variant == "pissa" and start is None:
        init_pissa(peft_model, rank, decomposes=decomposes)
    # PEFT leaves full copies in the dtype of the base.
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    use_fast_lora(peft_model)
    return peft_model, [count_target(peft_model, target, tied=tied) for target in targets]


def adapter_config(
    targets: tuple[str, ...], rank: int, alpha: float, variant: str = "lora", *, tied: bool
) -> Any:
    """Return PEFT's configuration of new adapters for targets; `tied` tells whether the embeddings are."""
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    patterns = [f"(?:{pattern})" for target, pattern in LORA_TARGETS.items() if target in targets]
    full = [module for target, module in FULL_TARGETS.items() if target in targets]
    if full and tied:
        # They are one, named as the input's.
        full = [FULL_TARGETS["embed_tokens"]]
    parts = 2 if variant == "pissa" else 1
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=parts * rank,
        lora_alpha=parts * alpha,
        target_modules="|".join(patterns) or str(DUMMY_TARGET_MODULES),
        modules_to_save=full or None,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
    )


def init_pissa(model: nn.Module, rank: int, *, decomposes: bool = True) -> None:
    """Begin new adapters of twice a rank with the weights' largest singular values; let half of each train.

    PiSSA takes B0 A0 out of each weight and trains B A from there. Here the weight stays, and the adapter is
    [B, -B0] [A; A0], as PEFT converts it to LoRA: any reader of LoRA, and the same base, will do.

    Args:
        model: the `PeftModel`.
        rank: of the half that trains.
        decomposes: whether they begin so; otherwise somebody fills them.
    """
    from peft.tuners.lora.layer import Linear

    modules = [each for each in model.modules() if isinstance(each, Linear) and not each.weight.is_meta]
    if modules and decomposes:
        with progress(len(modules), "decomposing weights for PiSSA") as shown:
            for module in modules:
                decompose(module, rank)
                shown.advance()
    for module in modules:
        a, b = (part["default"].weight for part in (module.lora_A, module.lora_B))
        a.register_hook(lambda gradient: torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])]))
        b.register_hook(
            lambda gradient: torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], 1)
        )


def decompose(module: Any, rank: int) -> None:
    """Fill the adapter of a PEFT layer with its weight's largest singular values: [B, -B] and [A; A]."""
    a, b = (part["default"].weight for part in (module.lora_A, module.lora_B))
    weight = module.weight.detach().to(torch.float32)
    if min(weight.shape) <= EXACT:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=ITERATIONS)
        v = v.T
    root, count = (s / module.scaling["default"]).sqrt(), len(s)
    with torch.no_grad():
        for start, sign in ((0, 1), (rank, -1)):
            a[start : start + rank] = functional.pad(root[:, None] * v, (0, 0, 0, rank - count))
            b[:, start : start + rank] = functional.pad(sign * u * root, (0, rank - count))


def check_variant(options: TrainOptions, quantization: str | None) -> None:
    """Refuse a variant of LoRA that does not go with other options, or with quantised weights.

    Raises:
        UsageError: DoRA with weights in 8 bits; PiSSA with quantised weights, dropout or weight decay.
    """
    variant = options.lora_variant
    if variant == "pissa" and options.adapter is None:
        others = {
            "--quantization": quantization,
            "--lora-dropout": options.lora_dropout,
            "--weight-decay": options.weight_decay,
        }
        if given := [name for name, value in others.items() if value]:
            raise UsageError(
                "--lora-variant pissa: not with {given}, which would change what must stay of its adapters",
                given=", ".join(given),
            )
    if variant == "dora" and quantization == "8bit":
        raise UsageError(
            "--lora-variant dora: PEFT cannot compute it over weights in 8 bits; take --quantization 4bit, "
            "or rslora"
        )


def variant_of(config: Mapping[str, Any]) -> str:
    """Return the word of `--lora-variant` for a saved configuration; with DoRA, whatever its scale."""
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"


def saved_config(adapter: Path) -> Any:
    """Read PEFT's configuration from an adapter's folder, for an adapter that trains."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(adapter))
    # However its weights were first made, they are loaded.
    config.inference_mode, config.init_lora_weights = False, True
    return config


def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load saved weights into the adapter of a `PeftModel`.

    Args:
        model: the `PeftModel`.
        tensors: named as in PEFT's files.

    Raises:
        KeyError: the adapter has other parameters.
    """
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, dict(tensors))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if different := [*result.unexpected_keys, *sorted({*result.missing_keys} & trained)]:
        raise KeyError(*different)


def check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Refuse targets that match nothing in a model.

    Raises:
        ModelError: naming the first of them.
    """
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        module = re.compile(LORA_TARGETS.get(target) or re.escape(FULL_TARGETS[target]))
        if not any(module.fullmatch(name) for name in names):
            raise ModelError("--train-target {target}: this model has nothing of that name", target=target)


def count_target(model: nn.Module, target: str, *, tied: bool) -> TargetCount:
    """Count what a target trains in a `PeftModel`; `tied` tells whether its embeddings are tied."""
    if target in LORA_TARGETS:
        pattern = re.compile(rf".*?({LORA_TARGETS[target]})\.lora_\w+\..*")
    else:
        name = FULL_TARGETS["embed_tokens" if tied else target]
        pattern = re.compile(rf".*?({re.escape(name)})\.modules_to_save\..*")
    matches = [(match[1], p) for n, p in model.named_parameters() if (match := pattern.fullmatch(n))]
    return TargetCount(target, len({name for name, _ in matches}), sum(p.numel() for _, p in matches))
