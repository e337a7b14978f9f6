"""Where a result comes from: its base, the prompts and data it was trained with, what was measured.

Kept as `mdl-toolkit.json` in adapter folders, checkpoints and merged models alike; PEFT and transformers pay
no attention to it.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mdl_toolkit import __version__
from mdl_toolkit.errors import ModelError
from mdl_toolkit.weights.resolve import read_json
from mdl_toolkit.weights.safetensors_stream import WeightFile, weight_files

PROVENANCE_FILE = "mdl-toolkit.json"
SAMPLE = 64  # bytes, looked at in three places of each tensor
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to.

    Attributes:
        name: on the hub, or the absolute path of a local folder.
        revision: the hub's commit, where it is known.
        fingerprint: of its weights.
    """

    name: str
    revision: str | None
    fingerprint: str

    @staticmethod
    def of(folder: Path, name: str) -> "Base":
        """Identify a base model's folder.

        Raises:
            ModelError: its weights are damaged.
        """
        found = folder.resolve()
        is_snapshot = found.parent.name == "snapshots" and _COMMIT.fullmatch(found.name) is not None
        return Base(name, found.name if is_snapshot else None, fingerprint(folder))

    def __str__(self) -> str:
        return f"{self.name}{f'@{self.revision[:12]}' if self.revision else ''} ({self.fingerprint})"


@dataclass(frozen=True)
class Prompts:
    """The prompts of the training rows.

    Attributes:
        system: the one that all rows had; None if they had none, or not the same.
        user: likewise.
        system_differs: not all rows had the same.
        user_differs: likewise.
    """

    system: str | None = None
    user: str | None = None
    system_differs: bool = False
    user_differs: bool = False


@dataclass(frozen=True)
class Provenance:
    """What a result says of its origin.

    Attributes:
        base: the model it was made from; None if that is not known.
        prompts: of the training rows.
        data: rows and hours of the training and evaluation sets, by name.
        metrics: of the result, by name.
        toolkit: version that wrote it.
    """

    base: Base | None = None
    prompts: Prompts = field(default_factory=Prompts)
    data: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    toolkit: str = __version__

    def to_json(self) -> str:
        """The file's content."""
        prompts = self.prompts
        values = {
            "base": None if self.base is None else asdict(self.base),
            "prompts": {"system": prompts.system, "user": prompts.user},
            "prompts_differ": {"system": prompts.system_differs, "user": prompts.user_differs},
            "data": self.data, "metrics": self.metrics, "toolkit": self.toolkit,
        }  # fmt: skip
        return json.dumps(values, ensure_ascii=False, indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Put the file into a folder."""
        (folder / PROVENANCE_FILE).write_text(self.to_json(), encoding="utf-8")

    def check_base(self, base: Base, adapter: Path) -> None:
        """Refuse another base than the recorded one; where nothing is recorded, any will do.

        Raises:
            ModelError: naming both.
        """
        if self.base is not None and self.base.fingerprint != base.fingerprint:
            raise ModelError(
                "{adapter}: it was trained on {base}, and {other} has other weights; give its own base "
                "with --model-name",
                adapter=adapter,
                base=self.base,
                other=base,
            )

    def with_metrics(self, metrics: dict[str, float]) -> "Provenance":
        """The same, with what was measured of the result."""
        return replace(self, metrics=metrics)


def read_provenance(folder: Path) -> Provenance | None:
    """What a folder says of its origin, or None if it says nothing.

    Raises:
        ModelError: the file is there and cannot be understood.
    """
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return None
    values = read_json(file)
    try:
        base, words, differ = values["base"], values["prompts"], values["prompts_differ"]
        prompts = Prompts(words["system"], words["user"], bool(differ["system"]), bool(differ["user"]))
        return Provenance(
            None if base is None else Base(base["name"], base["revision"], base["fingerprint"]), prompts,
            dict(values["data"]), dict(values.get("metrics", {})), str(values["toolkit"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as problem:
        raise ModelError(
            "{file}: damaged ({reason}); without the file, the folder is read as one of unknown origin",
            file=file,
            reason=problem,
        ) from problem


def fingerprint(folder: Path) -> str:
    """The same for the same weights, however they are spread over files, at the cost of a few reads.

    It covers name, dtype, shape and three samples of the bytes of every tensor, and no other file: a copy
    whose configuration was written anew is still the same base.

    Raises:
        ModelError: a weight file is damaged.
    """
    parts = sorted(part for file in weight_files(folder) for part in _parts(file))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _parts(file: WeightFile) -> list[bytes]:
    return [
        f"{entry.name} {entry.dtype} {entry.shape} ".encode() + file.sample(entry, SAMPLE)
        for entry in file.entries
    ]
