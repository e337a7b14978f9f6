"""An adapter folder as PEFT writes it: what it does to each tensor of its base.

What cannot be said so (DoRA, biases, other kinds than LoRA) is refused by name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdl_toolkit.errors import ModelError
from mdl_toolkit.weights.resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from mdl_toolkit.weights.safetensors_stream import TensorEntry, WeightFile

EMBEDDING, HEAD = "decoder.model.embed_tokens.weight", "decoder.lm_head.weight"
_PREFIX = "base_model.model."
# The two sides of LoRA in a file; an embedding's are stored the other way round.
_SIDES = re.compile(r"(.+)\.(lora_|lora_embedding_)([AB])(?:\.weight)?")
# What PEFT's LoRA can do beyond W + s B A, by the name in its configuration.
_MORE = (
    "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "layer_replication", "megatron_config", "use_bdlora", "arrow_config",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
# Ways of starting LoRA that also change the base's weights.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRankDelta:
    """A tensor's change: W + scale B A, where W is seen as a matrix of its first dimension and all others.

    Attributes:
        sides: where in the adapter's file A and B are.
        of_embedding: they are stored the other way round: as B and A, both transposed.
        scale: alpha / r, or alpha / sqrt(r).
    """

    sides: tuple[TensorEntry, TensorEntry]
    of_embedding: bool
    scale: float

    def matrices(self, file: WeightFile) -> tuple[Tensor, Tensor]:
        """A `[r, columns]` and B `[rows, r]` in float32."""
        first, second = (file.read(side).float().flatten(1) for side in self.sides)
        return (second.T.contiguous(), first.T.contiguous()) if self.of_embedding else (first, second)


@dataclass(frozen=True)
class AdapterDelta:
    """What an adapter does to the tensors of its base.

    Attributes:
        file: the adapter's weights.
        low_rank: by tensor name.
        full: by tensor name, where in the file the trained tensor itself is.
        tied: the output head is the embedding: where a base stores only one of them, that is enough.
    """

    file: WeightFile
    low_rank: dict[str, LowRankDelta]
    full: dict[str, TensorEntry]
    tied: bool

    @staticmethod
    def read(adapter: Path, base_config: Mapping[str, Any]) -> "AdapterDelta":
        """Read an adapter folder; with tied embeddings a change of one side is a change of both.

        Raises:
            ModelError: it is damaged, or does something that cannot be merged.
        """
        config, file = read_json(adapter / ADAPTER_CONFIG), WeightFile.open(adapter / ADAPTER_WEIGHTS)
        check_mergeable(adapter, config)
        pairs: dict[str, dict[str, TensorEntry]] = {}
        full: dict[str, TensorEntry] = {}
        for entry in file.entries:
            name = entry.name.removeprefix(_PREFIX)
            if match := _SIDES.fullmatch(name):
                pairs.setdefault(match[1], {})[match[2] + match[3]] = entry
            elif "lora_" in name:
                raise _cannot(adapter, name)
            else:
                full[name] = entry
        low_rank = {f"{name}.weight": _low_rank(adapter, config, name, pair) for name, pair in pairs.items()}
        tied = is_tied(base_config)
        if tied and {EMBEDDING, HEAD} & low_rank.keys():
            raise _cannot(adapter, "LoRA on tied embeddings")
        if tied and (trained := full.get(EMBEDDING) or full.get(HEAD)):
            full[EMBEDDING] = full[HEAD] = trained
        return AdapterDelta(file, low_rank, full, tied)

    def touch(self, name: str) -> bool:
        """Tell whether a tensor changes."""
        return name in self.low_rank or name in self.full

    def missing(self, there: set[str]) -> list[str]:
        """Changed tensors that are not among those of the base."""
        names = (self.low_rank.keys() | self.full.keys()) - there
        if self.tied and EMBEDDING in there:
            names.discard(HEAD)  # most tied models store the one matrix once
        return sorted(names)

    def blocks(self, base: WeightFile, entry: TensorEntry, dtype: torch.dtype) -> Iterator[Tensor]:
        """A tensor's new content, in blocks of rows, computed in float32.

        Raises:
            ModelError: the shapes differ, or the result is not finite.
        """
        if entry.name in self.full:
            found = self._full(entry)
        elif entry.name in self.low_rank:
            found = self._added(base, entry)
        else:
            found = base.rows(entry)
        most = torch.finfo(dtype).max
        for block in found:
            cast = block.to(dtype)
            lowest, highest = (float(each) for each in block.aminmax())  # not a number if any is not
            if not (-most <= lowest and highest <= most) and not cast.isfinite().all():
                raise ModelError("{name}: not finite after merging", name=entry.name)
            yield cast

    def _full(self, entry: TensorEntry) -> Iterator[Tensor]:
        trained = self.full[entry.name]
        if trained.shape != entry.shape:
            raise _misfit(entry, trained.shape)
        return self.file.rows(trained)

    def _added(self, base: WeightFile, entry: TensorEntry) -> Iterator[Tensor]:
        change = self.low_rank[entry.name]
        a, b = change.matrices(self.file)
        if entry.shape[0] != len(b) or math.prod(entry.shape[1:]) != a.shape[1]:
            raise _misfit(entry, (len(b), a.shape[1]))
        start = 0
        for block in base.rows(entry):
            part = b[start : start + len(block)]
            matrix = block.float().reshape(len(block), -1)
            yield matrix.addmm_(part, a, alpha=change.scale).reshape(block.shape)
            start += len(block)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell from a model's `config.json` whether its output head is its embedding."""
    text = config.get("text_config") or {}
    return bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def check_mergeable(adapter: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than W + s B A and full copies.

    Raises:
        ModelError: naming what it is.
    """
    if config.get("peft_type") != "LORA":
        raise _cannot(adapter, f"peft_type {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        raise _cannot(adapter, f"bias {config['bias']}")
    for name in _MORE:
        if config.get(name):
            raise _cannot(adapter, name)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise _cannot(adapter, f"init_lora_weights {start}")


def _cannot(adapter: Path, what: str) -> ModelError:
    return ModelError(
        "{adapter}: an adapter with {what} cannot be merged here, only plain LoRA and full copies can",
        adapter=adapter,
        what=what,
    )


def _low_rank(
    adapter: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, TensorEntry]
) -> LowRankDelta:
    kind = "lora_embedding_" if "lora_embedding_A" in pair else "lora_"
    if pair.keys() != {f"{kind}A", f"{kind}B"}:
        raise _cannot(adapter, f"only {', '.join(sorted(pair))} of {module}")
    sides, rank = (pair[f"{kind}A"], pair[f"{kind}B"]), pair[f"{kind}A"].shape[0]
    alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankDelta(sides, kind != "lora_", scale)


def _of_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """What a module gets, by PEFT's rule: the first pattern that is the end of its name."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _misfit(entry: TensorEntry, shape: tuple[int, ...]) -> ModelError:
    return ModelError(
        "{name}: the adapter's shape {shape} is not the base's {expected}",
        name=entry.name,
        shape=list(shape),
        expected=list(entry.shape),
    )
