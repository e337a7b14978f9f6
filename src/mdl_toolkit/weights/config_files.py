"""Read the JSON and text files of a model or adapter folder, and refuse what they must not hold.

`schemas` says what that is. Every reader goes through `read_json`; `check_files` reads all files of a folder
before anything else is done with it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import parse_json
from mdl_toolkit.utils.schema import Schema, find_fault, not_wanted
from mdl_toolkit.weights.schemas import (
    LAYER_COUNTS,
    MODEL_CONFIG,
    RELATIONS,
    SCHEMAS,
    STORED_SIZES,
    plain_name,
    sizes_of,
)

if TYPE_CHECKING:
    from mdl_toolkit.weights.safetensors_stream import TensorEntry, WeightFile

EMBEDDING, HEAD = "decoder.model.embed_tokens.weight", "decoder.lm_head.weight"
# Bytes at the start, middle and end of two tensors that are compared.
SAMPLE = 4096


def read_text(path: Path) -> str:
    """Read a text file of a model folder.

    Raises:
        ModelError: the file is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            "{folder}: no {name} there, so it is not a model folder", folder=path.parent, name=path.name
        ) from None
    except (OSError, ValueError) as problem:
        raise ModelError("{path}: {reason}", path=path, reason=problem) from problem


def read_json(path: Path, schema: Schema | None = None) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Args:
        path: the file.
        schema: what it must hold; that of files of its name if not given.

    Raises:
        ModelError: the file is missing or no JSON object, or a key does not have what it must.
    """
    try:
        value = parse_json(read_text(path))
    except ValueError as problem:
        raise ModelError("{path}: {reason}", path=path, reason=problem) from problem
    if not isinstance(value, dict):
        raise ModelError("{path}: expected a JSON object", path=path)
    if fault := find_fault(value, SCHEMAS.get(path.name, {}) if schema is None else schema):
        raise ModelError("{path}: {reason}", path=path, reason=fault)
    return value


def check_files(folder: Path) -> None:
    """Refuse a model's or adapter's folder for what its configuration files hold.

    Raises:
        ModelError: naming the file and the key.
    """
    configs = {name: read_json(folder / name) for name in SCHEMAS if (folder / name).is_file()}
    for relation in RELATIONS:
        model = configs.get(MODEL_CONFIG, {})
        if value_at(model, relation.unless) is not None:
            continue
        value, other = value_at(configs.get(relation.file, {}), relation.key), value_at(model, relation.other)
        if value is not None and other is not None and not relation.holds(value, other):
            wanted = relation.wanted(relation.other, other)
            raise refusal(folder / relation.file, relation.key, wanted, value)


def check_tensors(folder: Path, files: "Sequence[WeightFile]") -> None:
    """Refuse a model's `config.json` that says other sizes than its tensors have.

    Raises:
        ModelError: naming the key and the tensor.
    """
    path = folder / MODEL_CONFIG
    config = read_json(path)
    stored_entries = [(file, entry) for file in files for entry in file.entries]
    entries = {plain_name(entry.name, config): (file, entry) for file, entry in stored_entries}
    sizes = sizes_of(config)
    for stored in STORED_SIZES:
        # Quantised weights may be packed in integers of another shape; a key that is not there has a default.
        entry = entries[stored.tensor][1] if stored.tensor in entries else None
        if entry is None or "F" not in entry.dtype or not {*stored.factors} <= sizes.keys():
            continue
        size = int(math.prod(sizes[name] or 0 for name in stored.factors))
        if entry.shape[stored.dimension : stored.dimension + 1] != (size,):
            wanted = Localized(
                "what fits the tensor {tensor} of shape {shape}", tensor=entry.name, shape=list(entry.shape)
            )
            raise refusal(path, stored.key, wanted, value_at(config, stored.key))
    for key, prefix in LAYER_COUNTS.items():
        layers = re.compile(rf"{re.escape(prefix)}(\d+)\.")
        count = len({match[1] for match in map(layers.match, entries) if match})
        if (value := value_at(config, key)) not in (None, count):
            raise refusal(path, key, Localized("{count}, as many layers as are stored", count=count), value)
    if EMBEDDING in entries:
        check_tied(path, is_tied(config), entries)


def check_tied(path: Path, tied: bool, entries: "Mapping[str, tuple[WeightFile, TensorEntry]]") -> None:
    """Refuse a head that is stored and not said to be the model's own, or the other way round.

    Args:
        path: the `config.json`.
        tied: whether it says that the embeddings are the head.
        entries: the tensors and their files, by name.

    Raises:
        ModelError: naming the key and the tensor.
    """
    wanted = None
    if tied and HEAD in entries:
        head, embedding = (file.sample(entry, SAMPLE) for file, entry in (entries[HEAD], entries[EMBEDDING]))
        if head != embedding:
            wanted = Localized("false, as {head} is not {embedding}", head=HEAD, embedding=EMBEDDING)
    elif not tied and HEAD not in entries:
        wanted = Localized("true, as there is no tensor {head}", head=HEAD)
    if wanted is not None:
        raise refusal(path, "tie_word_embeddings", wanted, tied)


def is_tied(config: dict[str, Any]) -> bool:
    """Tell whether a model's input and output embeddings are one; what its decoder says counts first."""
    text = config.get("text_config") or {}
    return bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def value_at(values: dict[str, Any], key: str) -> Any:
    """Return the value at the end of a way of keys, such as `text_config.vocab_size`, or None."""
    value: Any = values
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def refusal(path: Path, key: str, wanted: Localized, value: Any) -> ModelError:
    """Return the refusal of a file in which a key has another value than it must have."""
    return ModelError("{path}: {reason}", path=path, reason=not_wanted(key, wanted, value))
