"""The changes that an adapter, as PEFT writes it, makes to the tensors of its base.

LoRA, also with DoRA's magnitudes, and full copies are merged; other methods and biases are refused by name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.device import CPU
from mdl_toolkit.utils.machine import available_cpus
from mdl_toolkit.weights.config_files import EMBEDDING, HEAD, is_tied, read_json, refusal
from mdl_toolkit.weights.safetensors_stream import FLOATS, TensorEntry, WeightFile, weight_files
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG

_PREFIX = "base_model.model."
# The tensors of a LoRA layer in a file; the matrices of an embedding's are stored transposed.
_LORA = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?")
# Features of PEFT's LoRA beyond these, by their names in its configuration.
_UNSUPPORTED = (
    "use_qalora", "lora_bias", "fan_in_fan_out", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "layer_replication", "megatron_config", "use_bdlora", "arrow_config",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
# PEFT's rank and alpha, where a configuration does not say them.
DEFAULT = 8
# Tensors that are merged at once.
MOST_THREADS = 4
# Initialisations of LoRA that also change the base's weights.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class NotMergeableError(ModelError):
    """Refuse an adapter that is more than this module can merge; PEFT may still apply it."""


@dataclass(frozen=True)
class LowRankDelta:
    """Hold a tensor's change W + scale B A, where W is a matrix of its first dimension and all others.

    Attributes:
        entries: those of A, of B and with DoRA of the magnitudes in the adapter's file, by name.
        scale: alpha / r, or alpha / sqrt(r).
    """

    entries: Mapping[str, TensorEntry]
    scale: float

    def merged_blocks(
        self, file: WeightFile, base: WeightFile, entry: TensorEntry, device: torch.device
    ) -> Iterator[Tensor]:
        """Yield the merged tensor in blocks of rows, `[rows, ...]`, in float32.

        With DoRA, the norm of each row (of an embedding: each column) of W + scale B A becomes its magnitude.

        Args:
            file: the adapter's weights.
            base: the file of W.
            entry: that of W.
            device: where it is computed.

        Raises:
            ModelError: the shapes differ.
        """
        parts = {name: file.read(part).to(device, torch.float32) for name, part in self.entries.items()}
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
                matrix = block.to(device, torch.float32).reshape(len(block), -1)
                yield start, matrix.addmm_(rows, a, alpha=self.scale)
                start += len(block)

        norms = torch.zeros((), device=device)
        if magnitude is not None and of_embedding:
            norms = sum((block.square().sum(0) for _, block in sums()), norms).sqrt()
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
        full: entries of tensors that were trained themselves, by tensor name; also the base's own ones that
            PEFT saves beside a LoRA of embeddings.
    """

    file: WeightFile
    low_rank: dict[str, LowRankDelta]
    full: dict[str, TensorEntry]

    @staticmethod
    def read(adapter: Path, base: Path) -> "AdapterDelta":
        """Read an adapter folder; with tied embeddings a change of one side is a change of both.

        Raises:
            NotMergeableError: it changes tensors in a way that cannot be merged here.
            ModelError: the adapter is damaged, or changes nothing, or tensors that the base does not have.
        """
        config, (file, modules, full) = read_json(adapter / ADAPTER_CONFIG), adapter_entries(adapter)
        low_rank: dict[str, LowRankDelta] = {}
        for module, entries in modules.items():
            rank = (entries.get("lora_A") or entries["lora_embedding_A"]).shape[0]
            low_rank[f"{module}.weight"] = LowRankDelta(entries, lora_scale(config, module, rank))
        tied = is_tied(read_json(base / MODEL_CONFIG))
        if tied and {EMBEDDING, HEAD} & low_rank.keys():
            raise NotMergeableError(
                "{adapter}: its LoRA changes word embeddings and output head apart, which the base ties to "
                "one matrix, so no merged model answers as base and adapter do; use the adapter as it is: "
                "inference --model-name {adapter}",
                adapter=adapter,
            )
        if tied and (trained := full.get(EMBEDDING) or full.get(HEAD)):
            full[EMBEDDING] = full[HEAD] = trained
        names = {entry.name for weights in weight_files(base) for entry in weights.entries}
        # Most tied models store the one matrix once.
        if tied and EMBEDDING in names:
            names.add(HEAD)
        if missing := sorted((low_rank.keys() | full.keys()) - names):
            raise ModelError(
                "{adapter}: the base model {base} has no tensors {names}",
                adapter=adapter,
                base=base,
                names=", ".join(missing[:20]),
            )
        return AdapterDelta(file, low_rank, full)

    def changes(self, name: str) -> bool:
        """Tell whether a tensor changes."""
        return name in self.low_rank or name in self.full

    def merge_into(self, model: nn.Module, base: Path) -> None:
        """Give a loaded base model the weights that the merged model would have, in its own dtypes.

        Raises:
            ModelError: the shapes differ, or the result is not finite.
        """
        state = model.state_dict()
        changed = [
            (file, each) for file in weight_files(base) for each in file.entries if self.changes(each.name)
        ]

        @torch.inference_mode()
        def merge(file: WeightFile, entry: TensorEntry) -> None:
            weight, start = state[entry.name], 0
            for block in self.merged_blocks(file, entry, weight.dtype, weight.device):
                weight[start : start + len(block)] = block
                start += len(block)

        # With one thread of Python, torch's own would wait for each other at every block.
        with ThreadPoolExecutor(min(available_cpus(), MOST_THREADS)) as pool:
            list(pool.map(merge, *zip(*changed, strict=True)))

    def merged_blocks(
        self, base: WeightFile, entry: TensorEntry, dtype: torch.dtype, device: torch.device = CPU
    ) -> Iterator[Tensor]:
        """Yield a tensor's merged content in blocks of rows, `[rows, ...]`, computed in float32.

        Raises:
            ModelError: the shapes differ, or the result is not finite.
        """
        file, source = base, entry
        if trained := self.full.get(entry.name):
            if trained.shape != entry.shape:
                raise _other_shape(entry, trained.shape)
            file, source = self.file, trained
        if low_rank := self.low_rank.get(entry.name):
            blocks = low_rank.merged_blocks(self.file, file, source, device)
        else:
            blocks = file.rows(source)
        limit = torch.finfo(dtype).max
        for block in blocks:
            cast = block.to(dtype)
            # NaN if any number is.
            lowest, highest = (float(each) for each in block.aminmax())
            if not (-limit <= lowest and highest <= limit) and not cast.isfinite().all():
                raise ModelError("{name}: not finite after merging", name=entry.name)
            yield cast


def adapter_entries(
    adapter: Path,
) -> tuple[WeightFile, dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
    """Read what an adapter folder changes, by the names of its tensors.

    Returns:
        The file, the entries of each module with a low-rank change by kind, and those of full copies by the
        names of the base's tensors.

    Raises:
        NotMergeableError: it changes tensors in a way that cannot be merged here.
        ModelError: the adapter is damaged, or changes nothing.
    """
    config, file = read_json(adapter / ADAPTER_CONFIG), WeightFile.open(adapter / ADAPTER_WEIGHTS)
    if not file.entries:
        raise ModelError("{adapter}: the adapter holds no weights; copy it again", adapter=adapter)
    check_mergeable(adapter, config)
    modules: dict[str, dict[str, TensorEntry]] = {}
    full: dict[str, TensorEntry] = {}
    for entry in file.entries:
        if entry.dtype not in FLOATS:
            raise ModelError(
                "{path}: the tensor {name} is of type {dtype}, not floating point; fetch the model again",
                path=file.path,
                name=entry.name,
                dtype=entry.dtype,
            )
        name = entry.name.removeprefix(_PREFIX)
        if match := _LORA.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = entry
        elif "lora_" in name:
            raise _not_mergeable(adapter, name)
        else:
            full[name.replace(".base_layer.", ".")] = entry
    for module, entries in modules.items():
        if not any({f"lora_{kind}A", f"lora_{kind}B"} <= entries.keys() for kind in ("", "embedding_")):
            raise _not_mergeable(adapter, f"only {', '.join(sorted(entries))} of {module}")
        check_rank(adapter, config, module, (entries.get("lora_A") or entries["lora_embedding_A"]).shape[0])
    return file, modules, full


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the factor of a module's low-rank product, as PEFT computes it."""
    alpha = float(of_module(config, module, "alpha_pattern", "lora_alpha"))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_rank(adapter: Path, config: Mapping[str, Any], module: str, rank: int) -> None:
    """Refuse an adapter's configuration that says another rank than a module's matrices have.

    Raises:
        ModelError: naming the module.
    """
    said = of_module(config, module, "rank_pattern", "r")
    if said != rank:
        wanted = Localized("{rank}, as {module} has it", rank=rank, module=module)
        raise refusal(adapter / ADAPTER_CONFIG, "r / rank_pattern", wanted, said)


def of_module(config: Mapping[str, Any], module: str, pattern: str, key: str) -> Any:
    """Return a number of an adapter's configuration for a module: its pattern's, or that of all."""
    fitting = (
        value
        for regex, value in (config.get(pattern) or {}).items()
        if re.match(rf"(.*\.)?({regex})$", module)
    )
    return next(fitting, config.get(key, DEFAULT))


def check_mergeable(adapter: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than LoRA, DoRA and full copies.

    Raises:
        NotMergeableError: naming the unsupported feature.
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


def _not_mergeable(adapter: Path, what: str) -> NotMergeableError:
    return NotMergeableError(
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
