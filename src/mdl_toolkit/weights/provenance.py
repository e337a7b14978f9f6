"""The provenance of a result: its base model, the prompts and data of its training, its metrics.

Adapter folders, checkpoints and merged models keep it as `mdl-toolkit.json`, which PEFT and transformers do
not read.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from mdl_toolkit import __version__
from mdl_toolkit.errors import ModelError
from mdl_toolkit.utils.schema import (
    BOOLEAN,
    FIGURE,
    TEXT,
    Schema,
    find_fault,
    mapping_of,
    object_of,
    optional,
    required,
)
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.schemas import ADAPTER_WEIGHTS

PROVENANCE_FILE = "mdl-toolkit.json"
# Bytes that a fingerprint reads at the start, middle and end of each tensor.
SAMPLE = 64
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PROMPTS = {name: required(optional(TEXT)) for name in ("system", "user")}
_DIFFER = {name: required(BOOLEAN) for name in ("system", "user")}
_BASE = {"name": required(TEXT), "revision": required(optional(TEXT)), "fingerprint": required(TEXT)}
_SCHEMA: Schema = {
    "base": required(optional(object_of(_BASE))),
    "adapter": optional(object_of(_BASE)),
    "prompts": required(object_of(_PROMPTS)),
    "prompts_differ": required(object_of(_DIFFER)),
    "data": required(mapping_of(FIGURE)),
    "metrics": mapping_of(FIGURE),
    "toolkit": required(TEXT),
}


@dataclass(frozen=True)
class Base:
    """Identify what a training began with: a base model, or an adapter on it.

    Attributes:
        name: its name on the hub, or the absolute path of a local folder.
        revision: the hub's commit, where it is known.
        fingerprint: that of its weights.
    """

    name: str
    revision: str | None
    fingerprint: str

    @staticmethod
    def of(folder: Path, name: str) -> "Base":
        """Identify the folder of a base model or an adapter.

        Raises:
            ModelError: its weights are damaged.
        """
        resolved = folder.resolve()
        is_snapshot = resolved.parent.name == "snapshots" and _COMMIT.fullmatch(resolved.name) is not None
        return Base(name, resolved.name if is_snapshot else None, fingerprint(folder))

    def __str__(self) -> str:
        return f"{self.name}{f'@{self.revision[:12]}' if self.revision else ''} ({self.fingerprint})"


@dataclass(frozen=True)
class Prompts:
    """Hold the prompts of a training set.

    Attributes:
        system: that of all examples; None if they had none, or different ones.
        user: likewise.
        system_differs: whether examples had different ones.
        user_differs: likewise.
    """

    system: str | None = None
    user: str | None = None
    system_differs: bool = False
    user_differs: bool = False


@dataclass(frozen=True)
class Provenance:
    """Hold the origin of a result.

    Attributes:
        base: the model it was made from; None if that is not known.
        prompts: those of the training set.
        data: examples and hours of the training and evaluation sets, by name.
        metrics: the result's, by name.
        toolkit: the version that wrote it.
        adapter: the one on the base that training went on from; None if it began with new ones.
    """

    base: Base | None = None
    prompts: Prompts = field(default_factory=Prompts)
    data: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    toolkit: str = __version__
    adapter: Base | None = None

    def to_json(self) -> str:
        """Return the text of `mdl-toolkit.json`."""
        prompts = self.prompts
        values = {
            **vars(self),
            "base": None if self.base is None else vars(self.base),
            "adapter": None if self.adapter is None else vars(self.adapter),
            "prompts": {"system": prompts.system, "user": prompts.user},
            "prompts_differ": {"system": prompts.system_differs, "user": prompts.user_differs},
        }
        return json.dumps(values, ensure_ascii=False, indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Write `mdl-toolkit.json` to a folder."""
        (folder / PROVENANCE_FILE).write_text(self.to_json(), encoding="utf-8")


def read_provenance(folder: Path) -> Provenance | None:
    """Read the provenance in a folder, or None where there is none.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return None
    values = read_json(file)
    if fault := find_fault(values, _SCHEMA):
        raise ModelError(
            "{file}: damaged ({reason}); without the file, the folder is read as one of unknown origin",
            file=file,
            reason=fault,
        )
    base, adapter = (
        None if each is None else Base(each["name"], each["revision"], each["fingerprint"])
        for each in (values["base"], values.get("adapter"))
    )
    texts, differ = values["prompts"], values["prompts_differ"]
    return Provenance(
        base,
        Prompts(texts["system"], texts["user"], differ["system"], differ["user"]),
        values["data"],
        values.get("metrics", {}),
        values["toolkit"],
        adapter,
    )


def fingerprint(folder: Path) -> str:
    """Hash a model's or adapter's weights with a few reads, independent of how they are spread over files.

    The hash covers name, dtype, shape and three samples of the bytes of every tensor, and no other file: a
    copy whose configuration was written anew is still the same base, and a checkpoint the same adapter as
    the result that is made of it.

    Raises:
        ModelError: a file of weights is damaged.
    """
    # It imports torch, which a conversion does without: a quarter of a gigabyte in each of its processes.
    from mdl_toolkit.weights.safetensors_stream import WeightFile, weight_files

    adapter = folder / ADAPTER_WEIGHTS
    tensors = sorted(
        f"{entry.name} {entry.dtype} {entry.shape} ".encode() + file.sample(entry, SAMPLE)
        for file in ([WeightFile.open(adapter)] if adapter.is_file() else weight_files(folder))
        for entry in file.entries
    )
    return hashlib.sha256(b"".join(tensors)).hexdigest()[:16]
