"""Adapter or merged model to a folder.

A merged model is the base folder, file by file, with W + (alpha / r) B A in the place of W: same tensor
names, shapes, dtypes and shards. The model itself is never loaded to make it, only to prove it.
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
from mdl_toolkit.utils.files import replace_folder, report_write_errors
from mdl_toolkit.utils.machine import available_cpus
from mdl_toolkit.weights.adapter import AdapterDelta
from mdl_toolkit.weights.model_card import ResultMetadata, card
from mdl_toolkit.weights.provenance import PROVENANCE_FILE
from mdl_toolkit.weights.resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS, quantized_by, read_json
from mdl_toolkit.weights.safetensors_stream import (
    FLOATS,
    SUFFIX,
    TensorEntry,
    WeightFile,
    rewrite,
    weight_files,
)

CARD = "README.md"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # as options and as files spell them
MOST_THREADS = 4  # files that are merged at once
INDEX = "model.safetensors.index.json"
_ALWAYS_FLOAT32 = "audio_encoder.init_bn."  # the model keeps it so, whatever its dtype
# Written anew, or the base's weights as other programs store them, which would not be the merged ones.
_LEFT = {CARD, SETTINGS_FILE, PROVENANCE_FILE, "pytorch_model.bin.index.json"}
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}
_PRIVATE = (".*", "__pycache__")
# What an adapter folder takes along: the text side and the processor, not the model's own files.
_BESIDE_ADAPTER = (
    "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip


def export_merged(
    base: Path,
    adapter: Path,
    output: Path,
    about: ResultMetadata,
    *,
    verify: Callable[[Path], None] | None = None,
    dtype: str | None = None,
) -> None:
    """Write base and adapter as one model, replacing what is at the output.

    Args:
        base: folder of the base model.
        adapter: folder of the trained adapter (a checkpoint will do).
        output: the folder to write.
        about: what the folder says of itself.
        verify: called with the finished folder before it is put in place; raises if it is not the same model.
        dtype: of the result, one of `DTYPES`; the base's if not given.

    Raises:
        ModelError: the adapter does not fit the base, or a merged tensor is not finite.
        InputError: the disk does not take it.
    """
    with report_write_errors(f"--output {output}", InputError), replace_folder(output) as work:
        merge(base, adapter, work, dtype)
        _describe(work, base, about, is_adapter=False)
        if verify is not None:
            verify(work)


def export_adapter(base: Path, adapter: Path, output: Path, about: ResultMetadata) -> None:
    """Write the adapter with what belongs to it, replacing what is at the output.

    Raises:
        InputError: the disk does not take it.
    """
    with report_write_errors(f"--output {output}", InputError), replace_folder(output) as work:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(adapter / name, work / name)
        for pattern in _BESIDE_ADAPTER:
            for file in base.glob(pattern):
                shutil.copyfile(file, work / file.name)
        _describe(work, base, about, is_adapter=True)


def _describe(folder: Path, base: Path, about: ResultMetadata, *, is_adapter: bool) -> None:
    (folder / SETTINGS_FILE).write_text(about.settings, encoding="utf-8")
    about.provenance.write(folder)
    (folder / CARD).write_text(card(about, base, is_adapter=is_adapter), encoding="utf-8")


# --- merging ---------------------------------------------------------------------------------------------


def merge(base: Path, adapter: Path, output: Path, dtype: str | None = None) -> None:
    """Fill an empty folder with the base model, the adapter's weights merged in.

    Raises:
        ModelError: the adapter does not fit, the base is quantised, or a merged tensor is not finite.
    """
    if method := quantized_by(base):
        raise ModelError(
            "{base}: its weights are quantised ({method}); merge into the unquantised model",
            base=base,
            method=method,
        )
    changes, files = AdapterDelta.read(adapter, read_json(base / "config.json")), weight_files(base)
    if missing := changes.missing({entry.name for file in files for entry in file.entries}):
        names = ", ".join(missing[:20])
        raise ModelError(
            "{adapter}: the base model {base} has no tensors {names}", adapter=adapter, base=base, names=names
        )
    _copy_others(base, output)
    # Numbers are computed and files written at once: torch and the system let go of Python's lock.
    with ThreadPoolExecutor(min(len(files), available_cpus(), MOST_THREADS)) as pool:
        list(pool.map(lambda file: _merge_file(file, output / file.path.name, changes, dtype), files))
    if dtype is not None:
        _say_dtype(output, dtype)


def _copy_others(base: Path, output: Path) -> None:
    """Everything but weights and what is written anew, folders included."""
    for path in sorted(base.iterdir()):
        if path.name in _LEFT or path.suffix == SUFFIX or any(map(path.match, _PRIVATE)):
            continue
        if path.suffix in _OTHER_WEIGHTS:
            warn("{path}: left out, as these weights would not be the merged ones", path=path)
        elif path.is_dir():
            shutil.copytree(path, output / path.name, ignore=shutil.ignore_patterns(*_PRIVATE))
        else:
            shutil.copyfile(path, output / path.name)


def _merge_file(source: WeightFile, target: Path, changes: AdapterDelta, dtype: str | None) -> None:
    dtypes = {} if dtype is None else _new_dtypes(source, DTYPES[dtype])

    def changed(entry: TensorEntry) -> Iterator[Tensor] | None:
        if entry.name in dtypes or changes.touch(entry.name):
            return changes.blocks(source, entry, FLOATS[dtypes.get(entry.name, entry.dtype)])
        return None

    rewrite(source, target, dtypes, changed)
    shutil.copymode(source.path, target)


def _new_dtypes(file: WeightFile, dtype: str) -> dict[str, str]:
    return {
        entry.name: dtype
        for entry in file.entries
        if entry.dtype in FLOATS and entry.dtype != dtype and not entry.name.startswith(_ALWAYS_FLOAT32)
    }


def _say_dtype(folder: Path, dtype: str) -> None:
    """Bring the dtype that `config.json` names, and the bytes that the index names, to what they are now."""
    config = read_json(folder / "config.json")
    _write_changed(folder / "config.json", config, _with_dtype(config, dtype))
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        size = sum(entry.stop - entry.start for file in weight_files(folder) for entry in file.entries)
        metadata = {**index.get("metadata", {}), "total_size": size}
        _write_changed(folder / INDEX, index, {**index, "metadata": metadata})


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same configuration, its parts included, wherever it names a dtype."""
    return {
        name: dtype if name in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype) if isinstance(value, dict)
        else value
        for name, value in config.items()
    }  # fmt: skip


def _write_changed(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    if after != before:
        path.write_text(json.dumps(after, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
