"""Save checkpoints, verify that they are whole, find the one to resume, delete the oldest.

A checkpoint is written under another name and renamed, with the size and checksum of each of its files. It
holds what is trained and the optimizer's state; order of the data, learning rate and dropout follow from the
number of the step. Nothing in it is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdl_toolkit.config.yaml import SETTINGS_FILE
from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.files import fsync, parse_json, remove_folder, replace_folder
from mdl_toolkit.utils.machine import describe_oom
from mdl_toolkit.utils.schema import (
    FIGURE,
    FILE_NAME,
    TEXT,
    Schema,
    integer,
    list_of,
    mapping_of,
    object_of,
    optional,
    required,
)
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.provenance import PROVENANCE_FILE
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG, ADAPTER_WEIGHTS

STATE, OPTIMIZER, CHECKSUMS = "state.json", "optimizer.safetensors", "checksums.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# What the state holds; versions differ in all but the step.
_STEP, _LOSS = optional(integer()), optional(FIGURE)
_STATE: Schema = {
    "step": required(integer()),
    "sampling": object_of(
        {"rows": integer(), "lengths": TEXT, "effective": integer(1), "seed": integer(most=2**64)}
    ),
    "judged": optional(
        object_of({"rows": integer(), "lengths": TEXT, "metric": optional(TEXT), "answers": optional(TEXT)})
    ),
    "eval_loss": _LOSS,
    "evaluated": _STEP,
    "best": object_of({"value": _LOSS, "step": _STEP, "worse": integer(), "loss": _LOSS}),
    "recent": list_of(FIGURE),
    "losses": FIGURE,
    "since": integer(),
    "most_rows": integer(1),
    "memory": optional(integer(0, 2**62)),
}
_CHECKSUM = object_of({"bytes": required(integer(0, 2**62)), "sha256": required(TEXT)})
_CHECKSUMS = mapping_of(_CHECKSUM, FILE_NAME)
_NEEDED = (STATE, OPTIMIZER, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# Bytes that are read at once.
_PIECE = 1 << 20


def save(
    output: Path,
    step: int,
    *,
    adapter: Callable[[Path], None],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    settings: str,
) -> None:
    """Write `checkpoint-STEP` into a run's folder, whole or not at all.

    Args:
        output: the run's folder.
        step: optimizer steps made.
        adapter: writes the adapter into a folder.
        optimizer: the optimizer's tensors, by name.
        state: anything else, as JSON; `step` is added.
        settings: the run's settings file.

    Raises:
        OSError: the disk does not take it; what was there before is untouched.
    """
    try:
        with replace_folder(output / f"checkpoint-{step}", "train") as work:
            adapter(work)
            save_file(dict(optimizer), work / OPTIMIZER)
            _write_state(work, {**state, "step": step})
            (work / SETTINGS_FILE).write_text(settings, encoding="utf-8")
            if (output / PROVENANCE_FILE).is_file():
                shutil.copyfile(output / PROVENANCE_FILE, work / PROVENANCE_FILE)
            _seal(work)
    # Safetensors tells of a full disk in words alone.
    except SafetensorError as problem:
        number = re.search(r"os error (\d+)", str(problem))
        raise (
            OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(problem))
        ) from problem


def save_state(output: Path, checkpoint: "Checkpoint", state: Mapping[str, Any]) -> None:
    """Put a checkpoint, of this run or another one, into a run's folder as it is, but for its state.

    Raises:
        OSError: the disk does not take it; what was there before is untouched.
    """
    with replace_folder(output / f"checkpoint-{checkpoint.step}", "train") as work:
        for name in read_json(checkpoint.folder / CHECKSUMS):
            shutil.copyfile(checkpoint.folder / name, work / name)
        _write_state(work, {**checkpoint.state, **state})
        _seal(work)


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a checkpoint."""
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def _seal(folder: Path) -> None:
    """Write sizes and checksums of a checkpoint's files, and wait until all is on the disk."""
    sums = {}
    for file in sorted(folder.iterdir()):
        # Safetensors lets nobody but the owner read.
        file.chmod(0o644)
        fsync(file)
        sums[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    fsync(folder / CHECKSUMS)


def _sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """Read a checkpoint that is whole.

    Attributes:
        folder: of its files.
        state: everything but the tensors.
    """

    folder: Path
    state: dict[str, Any]

    @staticmethod
    def at(folder: Path) -> "Checkpoint":
        """Open a checkpoint that is known to be whole."""
        return Checkpoint(folder, read_json(folder / STATE))

    @property
    def step(self) -> int:
        """Return the number of optimizer steps that were made."""
        return int(self.state["step"])

    def adapter(self) -> dict[str, Tensor]:
        """Load the adapter's tensors, named as in PEFT's files."""
        return load_file(self.folder / ADAPTER_WEIGHTS)

    def optimizer(self) -> dict[str, Tensor]:
        """Load the optimizer's tensors, named `PARAMETER/STATE`."""
        return load_file(self.folder / OPTIMIZER)


def damage(folder: Path) -> Localized | None:
    """Return the first fault of a checkpoint (a missing file, a wrong size or checksum); None if whole."""
    reading = CHECKSUMS
    try:
        sums = {}
        if (folder / CHECKSUMS).is_file():
            sums = parse_json((folder / CHECKSUMS).read_text(encoding="utf-8"))
            if fault := _CHECKSUMS.fault(CHECKSUMS, sums):
                return fault
        for name in (CHECKSUMS, *_NEEDED, *sums):
            if not (folder / name).is_file() or name not in {CHECKSUMS, *sums}:
                return Localized("{name} is missing", name=name)
        for name, expected in sums.items():
            reading, file = name, folder / name
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                return Localized("{name} is damaged", name=name)
        reading = STATE
        return object_of(_STATE).fault(STATE, parse_json((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        return Localized("{file}: {reason}", file=reading, reason=problem)


@contextmanager
def refusing_unloadable(checkpoint: "Checkpoint") -> Iterator[None]:
    """Refuse a checkpoint that is whole by its checksums, and cannot be loaded in this context all the same.

    Raises:
        ModelError: naming it, and why.
    """
    try:
        yield
    except (
        RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError, SafetensorError
    ) as problem:  # fmt: skip
        if isinstance(problem, RuntimeError) and describe_oom(problem) is not None:
            raise
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise ModelError(
            "{folder}: it cannot be resumed, as it is not what was saved ({reason}); take another checkpoint",
            folder=checkpoint.folder,
            reason=reason,
        ) from problem


def checkpoints(output: Path) -> list[Path]:
    """List the folders named as checkpoints of a run, the oldest first."""
    return sorted((path for path in output.glob("checkpoint-*") if is_checkpoint(path)), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Tell whether a folder is named as a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder, from its name."""
    return int(path.name.rpartition("-")[2])


def to_resume(output: Path, resume: bool | str | None) -> Checkpoint | None:
    """Find the checkpoint that `--resume-from-checkpoint` means; None to start afresh.

    Raises:
        ModelError: a path is given, and it is not a complete checkpoint.
    """
    if not resume:
        return None
    if resume is not True:
        path = Path(resume)
        if not path.is_dir():
            raise ModelError("--resume-from-checkpoint {path}: no such folder", path=path)
        reason = damage(path)
        if reason is None:
            return Checkpoint.at(path)
        # Name the newest whole checkpoint of the run that the path belongs to.
        candidates = checkpoints(path) or checkpoints(path.resolve().parent)
        whole = next((each for each in reversed(candidates) if damage(each) is None), None)
        said = Localized(
            "--resume-from-checkpoint {path}: not a complete checkpoint ({reason})", path=path, reason=reason
        )
        raise ModelError(
            said if whole is None else Localized("{said}; did you mean {whole}?", said=said, whole=whole)
        )
    for path in reversed(checkpoints(output)):
        if reason := damage(path):
            warn("{path} is skipped: {reason}", path=path, reason=reason)
        else:
            return Checkpoint.at(path)
    return None


def checkpoint_of(output: Path, step: int | None) -> Path:
    """Return the folder of a step's checkpoint in a run's folder."""
    return output / f"checkpoint-{step}"


def delete_oldest(output: Path, limit: int, keep: set[int | None]) -> int:
    """Delete all checkpoints of a run but the newest `limit`, at least one, and those of the steps `keep`.

    Returns:
        The number of those deleted.
    """
    count = 0
    for path in checkpoints(output)[: -max(1, limit)]:
        if step_of(path) in keep:
            continue
        try:
            remove_folder(path, "train")
            count += 1
        except OSError as problem:
            warn("{checkpoint} cannot be deleted: {reason}", checkpoint=path, reason=problem)
    return count
