"""Spread weights over several files as published folders do, and compare the files of two folders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def reshard(folder: Path, shards: int = 3) -> None:
    """Spread the one weight file over several, with an index, as published folders have them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number in range(shards):
        target = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / target, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, target)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


def layout(folder: Path) -> dict[str, Any]:
    """Names, shapes, dtypes and metadata, shard by shard."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            tensors = {n: (shard.get_tensor(n).shape, shard.get_tensor(n).dtype) for n in shard.keys()}  # noqa: SIM118
            found[file.name] = (shard.metadata(), tensors)
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def heads_of(folder: Path) -> dict[str, bytes]:
    """The headers, byte for byte."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        found[file.name] = content[: 8 + int.from_bytes(content[:8], "little")]
    return found


def same_weights(left: Path, right: Path) -> bool:
    """Tell whether two folders have the same weight files with the same tensors, bit for bit."""
    files = sorted(path.name for path in right.glob("*.safetensors"))
    assert files
    assert files == sorted(path.name for path in left.glob("*.safetensors"))
    pairs = [(load_file(left / name), load_file(right / name)) for name in files]
    return all(torch.equal(one[key], other[key]) for one, other in pairs for key in one.keys() | other.keys())
