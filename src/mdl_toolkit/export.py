"""Adapter or merged model to a folder.

A merged model is the base folder, file by file, with W + (alpha / r) B A in the place of W: same tensor
names, shapes, dtypes and shards. The model itself is never loaded.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdl_toolkit.errors import ModelError
from mdl_toolkit.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from mdl_toolkit.outputs import replacing
from mdl_toolkit.settings import SETTINGS_FILE, to_yaml
from mdl_toolkit.training_options import TrainOptions

_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "decoder.model.embed_tokens.weight", "decoder.lm_head.weight"
# What an adapter folder takes along: the text side and the processor, not the model's own files.
_BESIDE_ADAPTER = (
    "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip


def export(base: Path, adapter: Path, output: Path, options: TrainOptions) -> None:
    """Write the result of a training, merged or not, replacing what is at the output.

    Args:
        base: folder of the base model.
        adapter: folder of the trained adapter (a checkpoint will do).
        output: the folder to write.
        options: the training's; `merge_lora` decides what is written.

    Raises:
        ModelError: the adapter does not fit the base, or a merged tensor is not finite.
    """
    with replacing(output) as work:
        if options.merge_lora:
            merge(base, adapter, work)
        else:
            _copy_adapter(base, adapter, work)
        (work / SETTINGS_FILE).write_text(to_yaml(options), encoding="utf-8")


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Fill an empty folder with the base model, the adapter's weights merged in.

    Raises:
        ModelError: the adapter does not fit the base, or a merged tensor is not finite (named).
    """
    config = read_json(base / "config.json")
    changes = Changes.read(adapter, config)
    unused = set(changes.names)
    for file in sorted(base.iterdir()):
        if file.suffix == ".safetensors":
            unused -= _merge_shard(file, output / file.name, changes)
        elif file.is_file() and file.name != SETTINGS_FILE:
            shutil.copyfile(file, output / file.name)
    if _is_tied(config):
        unused.discard(_HEAD)  # most tied models store the one matrix once
    if unused:
        names = ", ".join(sorted(unused)[:20])
        raise ModelError(
            f"{adapter}: the base model {base} has no tensors {names}",
            f"{adapter}：基础模型 {base} 中没有张量 {names}",
        )


@dataclass(frozen=True)
class Changes:
    """What an adapter does to the tensors of its base.

    Attributes:
        low_rank: by tensor name, A `[r, in]` and B `[out, r]` in float32.
        full: by tensor name, the trained tensor itself.
        scale: alpha / r.
    """

    low_rank: dict[str, tuple[Tensor, Tensor]]
    full: dict[str, Tensor]
    scale: float

    @staticmethod
    def read(adapter: Path, base_config: dict[str, Any]) -> "Changes":
        """Read an adapter folder; with tied embeddings a change of one side is a change of both."""
        config = read_json(adapter / ADAPTER_CONFIG)
        state = {n.removeprefix(_PREFIX): t for n, t in load_file(adapter / ADAPTER_WEIGHTS).items()}
        modules = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
        low_rank = {
            f"{m}.weight": (state[f"{m}.lora_A.weight"].float(), state[f"{m}.lora_B.weight"].float())
            for m in modules
        }
        full = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
        trained = [full[name] for name in (_EMBEDDING, _HEAD) if name in full]
        if _is_tied(base_config) and trained:
            full[_EMBEDDING] = full[_HEAD] = trained[0]
        return Changes(low_rank, full, config["lora_alpha"] / config["r"])

    @property
    def names(self) -> set[str]:
        """Names of the tensors that change."""
        return set(self.low_rank) | set(self.full)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The changed tensor, in the dtype it had.

        Raises:
            ModelError: shapes differ, or the result is not finite.
        """
        if name in self.full:
            changed = self.full[name].float().clone()  # the two sides of tied embeddings share it
        else:
            a, b = self.low_rank[name]
            if (b.shape[0], a.shape[1]) != tuple(tensor.shape):
                raise _misfit(name, [b.shape[0], a.shape[1]], tensor)
            changed = tensor.float() + self.scale * (b @ a)
        if changed.shape != tensor.shape:
            raise _misfit(name, list(changed.shape), tensor)
        changed = changed.to(tensor.dtype)
        if not changed.isfinite().all():
            raise ModelError(f"{name}: not finite after merging", f"{name}：合并后出现非有限值")
        return changed


def _misfit(name: str, shape: list[int], tensor: Tensor) -> ModelError:
    return ModelError(
        f"{name}: the adapter's shape {shape} is not the base's {list(tensor.shape)}",
        f"{name}：适配器形状 {shape} 与基础模型的 {list(tensor.shape)} 不符",
    )


def _is_tied(config: dict[str, Any]) -> bool:
    text = config.get("text_config") or {}
    return bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def _merge_shard(source: Path, target: Path, changes: Changes) -> set[str]:
    """Write one shard with its changes; returns the names of the changed tensors."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    changed = changes.names & tensors.keys()
    if not changed:
        shutil.copyfile(source, target)
        return set()
    for name in changed:
        tensors[name] = changes.apply(name, tensors[name])
    save_file(tensors, target, metadata=metadata)
    shutil.copymode(source, target)  # safetensors lets nobody but the owner read
    return changed


def _copy_adapter(base: Path, adapter: Path, output: Path) -> None:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(adapter / name, output / name)
    for pattern in _BESIDE_ADAPTER:
        for file in base.glob(pattern):
            shutil.copyfile(file, output / file.name)
