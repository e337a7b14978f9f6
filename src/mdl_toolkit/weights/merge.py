"""Write an adapter or a merged model to a folder.

A merged model is the base folder, file by file, with W + (alpha / r) B A in place of W: same tensor names,
shapes, dtypes and shards. The model is not loaded to make it, only to verify it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from mdl_toolkit.config.yaml import SETTINGS_FILE
from mdl_toolkit.errors import InputError, ModelError
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.files import refuse_devices, replace_folder, report_write_errors
from mdl_toolkit.utils.machine import available_cpus
from mdl_toolkit.weights.adapter import AdapterDelta
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.model_card import CARD, ResultMetadata, render_card
from mdl_toolkit.weights.provenance import PROVENANCE_FILE
from mdl_toolkit.weights.resolve import quantized_by
from mdl_toolkit.weights.safetensors_stream import (
    FLOATS,
    SUFFIX,
    TensorEntry,
    WeightFile,
    rewrite,
    weight_files,
)
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX

# Dtypes as options spell them, and as files do.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Files that are merged at once.
MOST_THREADS = 4
# The model keeps these in float32, whatever its dtype.
_ALWAYS_FLOAT32 = ".init_bn."
# Files of the base that are not copied: those written anew, and its weights in other formats.
_LEFT_OUT = {CARD, SETTINGS_FILE, PROVENANCE_FILE, "pytorch_model.bin.index.json"}
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}
_PRIVATE = (".*", "__pycache__")
# Files of the base that an adapter folder holds too: tokenizer and processor.
_COPIED_TO_ADAPTER = (
    "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip


def export_merged(
    base: Path,
    adapter: Path,
    output: Path,
    metadata: ResultMetadata,
    *,
    verify: Callable[[Path], None] | None = None,
    dtype: str | None = None,
    kind: str = "train",
) -> None:
    """Write base and adapter as one model, replacing what is at the output.

    Args:
        base: folder of the base model.
        adapter: folder of the trained adapter (a checkpoint will do).
        output: the folder to write.
        metadata: settings, provenance and the content of its model card.
        verify: called with the finished folder before that replaces the output; raises if it is wrong.
        dtype: of the result, one of `DTYPES`; the base's if not given.
        kind: the command that writes it, for the record of its files.

    Raises:
        ModelError: the adapter does not fit the base, or a merged tensor is not finite.
        InputError: the folder cannot be written.
    """
    with report_write_errors(f"--output {output}", InputError), replace_folder(output, kind) as work:
        merge(base, adapter, work, dtype)
        _write_metadata(work, base, metadata, is_adapter=False)
        if verify is not None:
            verify(work)


def export_adapter(base: Path, adapter: Path, output: Path, metadata: ResultMetadata) -> None:
    """Write the adapter with its tokenizer and metadata, replacing what is at the output.

    Raises:
        InputError: the folder cannot be written.
    """
    with report_write_errors(f"--output {output}", InputError), replace_folder(output, "train") as work:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(adapter / name, work / name)
        for pattern in _COPIED_TO_ADAPTER:
            for file in base.glob(pattern):
                shutil.copyfile(file, work / file.name)
        # What the `auto_map` of a configuration names, and what that imports.
        if any("auto_map" in read_json(file) for file in work.glob("*_config.json")):
            for file in base.glob("*.py"):
                shutil.copyfile(file, work / file.name)
        _write_metadata(work, base, metadata, is_adapter=True)


def _write_metadata(folder: Path, base: Path, metadata: ResultMetadata, *, is_adapter: bool) -> None:
    (folder / SETTINGS_FILE).write_text(metadata.settings, encoding="utf-8")
    metadata.provenance.write(folder)
    (folder / CARD).write_text(render_card(metadata, base, is_adapter=is_adapter), encoding="utf-8")


# --- merging ---------------------------------------------------------------------------------------------


def merge(base: Path, adapter: Path, output: Path, dtype: str | None = None) -> None:
    """Write the base model with the adapter merged into it to an empty folder.

    Raises:
        ModelError: the adapter does not fit, the base is quantised, or a merged tensor is not finite.
    """
    if method := quantized_by(base):
        raise ModelError(
            "{base}: its weights are quantised ({method}); merge into the unquantised model",
            base=base,
            method=method,
        )
    delta, files = AdapterDelta.read(adapter, base), weight_files(base)
    for path in sorted(base.iterdir()):
        if path.name in _LEFT_OUT or path.suffix == SUFFIX or any(map(path.match, _PRIVATE)):
            continue
        if path.suffix in _OTHER_WEIGHTS:
            warn("{path}: left out, as these weights would not be the merged ones", path=path)
        elif path.is_dir():
            for each in (path, *filter(Path.is_dir, path.rglob("*"))):
                refuse_devices(each, ModelError)
            shutil.copytree(path, output / path.name, ignore=shutil.ignore_patterns(*_PRIVATE))
        else:
            shutil.copyfile(path, output / path.name)
    # Threads compute and write at once: torch and the system release Python's lock.
    with ThreadPoolExecutor(min(len(files), available_cpus(), MOST_THREADS)) as pool:
        list(pool.map(lambda file: _merge_file(file, output / file.path.name, delta, dtype), files))
    if dtype is None:
        return
    config = read_json(output / "config.json")
    _write_changed(output / "config.json", config, _with_dtype(config, dtype))
    if (output / INDEX).is_file():
        index = read_json(output / INDEX)
        size = sum(entry.stop - entry.start for file in weight_files(output) for entry in file.entries)
        metadata = {**index.get("metadata", {}), "total_size": size}
        _write_changed(output / INDEX, index, {**index, "metadata": metadata})


def _merge_file(source: WeightFile, target: Path, delta: AdapterDelta, dtype: str | None) -> None:
    dtypes = {
        entry.name: DTYPES[dtype]
        for entry in source.entries
        if dtype is not None
        and entry.dtype in FLOATS
        and entry.dtype != DTYPES[dtype]
        and _ALWAYS_FLOAT32 not in entry.name
    }

    def changed(entry: TensorEntry) -> Iterator[Tensor] | None:
        if entry.name in dtypes or delta.changes(entry.name):
            return delta.merged_blocks(source, entry, FLOATS[dtypes.get(entry.name, entry.dtype)])
        return None

    rewrite(source, target, dtypes, changed)
    shutil.copymode(source.path, target)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Replace every dtype that a configuration names, its sections included."""
    nested = {name: _with_dtype(value, dtype) for name, value in config.items() if isinstance(value, dict)}
    return {**config, **nested, **{name: dtype for name in ("dtype", "torch_dtype") if name in config}}


def _write_changed(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    if after != before:
        path.write_text(json.dumps(after, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
