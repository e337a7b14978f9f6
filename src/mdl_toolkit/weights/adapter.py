"""The changes that an adapter, as PEFT writes it, makes to the tensors of its base.

LoRA, also with DoRA's magnitudes, and full copies are merged; other methods and biases are refused by name.
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
# The tensors of a LoRA layer in a file; the matrices of an embedding's are stored transposed.
_LORA = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?")
# Features of PEFT's LoRA beyond these, by their names in its configuration.
_UNSUPPORTED = (
    "use_qalora", "lora_bias", "fan_in_fan_out", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "layer_replication", "megatron_config", "use_bdlora", "arrow_config",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
# Initialisations of LoRA that also change the base's weights.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRankDelta:
    """Hold a tensor's change W + scale B A, where W is a matrix of its first dimension and all others.

    Attributes:
        entries: those of A, of B and with DoRA of the magnitudes in the adapter's file, by name.
        scale: alpha / r, or alpha / sqrt(r).
    """

    entries: Mapping[str, TensorEntry]
    scale: float

    def merged_blocks(self, file: WeightFile, base: WeightFile, entry: TensorEntry) -> Iterator[Tensor]:
        """Yield the merged tensor in blocks of rows, `[rows, ...]`, in float32.

        With DoRA, the norm of each row (of an embedding: each column) of W + scale B A becomes its magnitude.

        Args:
            file: the adapter's weights.
            base: the file of W.
            entry: that of W.

        Raises:
            ModelError: the shapes differ.
        """
        parts = {name: file.read(part).float() for name, part in self.entries.items()}
        magnitude = parts.pop("lora_magnitude_vector", None)
        of_embedding = "lora_embedding_A" in parts
        a, b = (parts[name].flatten(1) for name in sorted(parts))
        if of_embedding:
            a, b = b.T.contiguous(), a.T.contiguous()
        if entry.shape[0] != len(b) or math.prod(entry.shape[1:]) != a.shape[1]:
            raise _other_shape(entry, (len(b), a.shape[1]))

        def sums() -> Iterator[tuple[int, Tensor]]:
            start = 0
            for block in base.rows(entry):
                rows = b[start : start + len(block)]
                yield start, block.float().reshape(len(block), -1).addmm_(rows, a, alpha=self.scale)
                start += len(block)

        norms = torch.ones(())
        if magnitude is not None and of_embedding:
            norms = sum((block.square().sum(0) for _, block in sums()), torch.zeros(())).sqrt()
        for start, block in sums():
            if magnitude is not None and of_embedding:
                block *= magnitude / norms
            elif magnitude is not None:
                block *= magnitude.reshape(-1, 1)[start : start + len(block)] / block.norm(
                    dim=1, keepdim=True
                )
            yield block.reshape(-1, *entry.shape[1:])


@dataclass(frozen=True)
class AdapterDelta:
    """Hold the changes that an adapter makes to the tensors of its base.

    Attributes:
        file: the adapter's weights.
        low_rank: low-rank changes by tensor name.
        full: entries of tensors that were trained themselves, by tensor name.
        tied: the output head is the embedding; a base may store only one of them.
    """

    file: WeightFile
    low_rank: dict[str, LowRankDelta]
    full: dict[str, TensorEntry]
    tied: bool

    @staticmethod
    def read(adapter: Path, base_config: Mapping[str, Any]) -> "AdapterDelta":
        """Read an adapter folder; with tied embeddings a change of one side is a change of both.

        Raises:
            ModelError: the adapter is damaged, or changes tensors in a way that cannot be merged.
        """
        config, file = read_json(adapter / ADAPTER_CONFIG), WeightFile.open(adapter / ADAPTER_WEIGHTS)
        check_mergeable(adapter, config)
        modules: dict[str, dict[str, TensorEntry]] = {}
        full: dict[str, TensorEntry] = {}
        for entry in file.entries:
            name = entry.name.removeprefix(_PREFIX)
            if match := _LORA.fullmatch(name):
                modules.setdefault(match[1], {})[match[2]] = entry
            elif "lora_" in name:
                raise _not_mergeable(adapter, name)
            else:
                full[name] = entry
        low_rank: dict[str, LowRankDelta] = {}
        for module, entries in modules.items():
            if not any({f"lora_{kind}A", f"lora_{kind}B"} <= entries.keys() for kind in ("", "embedding_")):
                raise _not_mergeable(adapter, f"only {', '.join(sorted(entries))} of {module}")
            # As PEFT does it: the first pattern that matches the end of the module's name.
            patterns = (config.get("alpha_pattern") or {}).items()
            alphas = (alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", module))
            rank = (entries.get("lora_A") or entries["lora_embedding_A"]).shape[0]
            divisor = math.sqrt(rank) if config.get("use_rslora") else rank
            scale = next(alphas, config["lora_alpha"]) / divisor
            low_rank[f"{module}.weight"] = LowRankDelta(entries, scale)
        text = base_config.get("text_config") or {}
        tied = bool(text.get("tie_word_embeddings", base_config.get("tie_word_embeddings", False)))
        if tied and {EMBEDDING, HEAD} & low_rank.keys():
            raise _not_mergeable(adapter, "LoRA on tied embeddings")
        if tied and (trained := full.get(EMBEDDING) or full.get(HEAD)):
            full[EMBEDDING] = full[HEAD] = trained
        return AdapterDelta(file, low_rank, full, tied)

    def changes(self, name: str) -> bool:
        """Tell whether a tensor changes."""
        return name in self.low_rank or name in self.full

    def missing(self, base_names: set[str]) -> list[str]:
        """List changed tensors that the base does not have."""
        names = (self.low_rank.keys() | self.full.keys()) - base_names
        # Most tied models store the one matrix once.
        if self.tied and EMBEDDING in base_names:
            names.discard(HEAD)
        return sorted(names)

    def merged_blocks(self, base: WeightFile, entry: TensorEntry, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield a tensor's merged content in blocks of rows, `[rows, ...]`, computed in float32.

        Raises:
            ModelError: the shapes differ, or the result is not finite.
        """
        if entry.name in self.full:
            trained = self.full[entry.name]
            if trained.shape != entry.shape:
                raise _other_shape(entry, trained.shape)
            blocks = self.file.rows(trained)
        elif entry.name in self.low_rank:
            blocks = self.low_rank[entry.name].merged_blocks(self.file, base, entry)
        else:
            blocks = base.rows(entry)
        limit = torch.finfo(dtype).max
        for block in blocks:
            cast = block.to(dtype)
            # NaN if any number is.
            lowest, highest = (float(each) for each in block.aminmax())
            if not (-limit <= lowest and highest <= limit) and not cast.isfinite().all():
                raise ModelError("{name}: not finite after merging", name=entry.name)
            yield cast


def check_mergeable(adapter: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than LoRA, DoRA and full copies.

    Raises:
        ModelError: naming the unsupported feature.
    """
    if config.get("peft_type") != "LORA":
        raise _not_mergeable(adapter, f"peft_type {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        raise _not_mergeable(adapter, f"bias {config['bias']}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise _not_mergeable(adapter, name)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_BASE):
        raise _not_mergeable(adapter, f"init_lora_weights {start}")


def _not_mergeable(adapter: Path, what: str) -> ModelError:
    return ModelError(
        "{adapter}: an adapter with {what} cannot be merged here, only LoRA, DoRA and full copies can",
        adapter=adapter,
        what=what,
    )


def _other_shape(entry: TensorEntry, shape: tuple[int, ...]) -> ModelError:
    return ModelError(
        "{name}: the adapter's shape {shape} is not the base's {expected}",
        name=entry.name,
        shape=list(shape),
        expected=list(entry.shape),
    )
