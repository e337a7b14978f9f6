"""What training needs to go on: when to save it, how to know that it is whole, which to resume or delete.

A checkpoint is written under another name and renamed, with the size and checksum of each of its files. It
holds what is trained and the optimizer's state; order of the data, learning rate and dropout follow from the
number of the step. Nothing in it is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
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
from mdl_toolkit.utils.files import fsync, remove_folder, replace_folder
from mdl_toolkit.utils.run_folder import LOG, PLOT, REPORT
from mdl_toolkit.weights.provenance import PROVENANCE_FILE
from mdl_toolkit.weights.resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FINAL, read_json

STATE, OPTIMIZER, CHECKSUMS = "state.json", "optimizer.safetensors", "checksums.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = (STATE, OPTIMIZER, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_PIECE = 1 << 20  # bytes read at once


def due_steps(cadence: int | float, steps_per_epoch: int, total: int) -> frozenset[int]:
    """The optimizer steps after which something is due; the last one always is (rules 27, 28).

    Args:
        cadence: every so many steps, or a fraction of an epoch, or 0 for the end alone.
        steps_per_epoch: optimizer steps in an epoch.
        total: optimizer steps of the run.
    """
    every = cadence if isinstance(cadence, int) else cadence * steps_per_epoch
    if every == 0:
        return frozenset({total})
    if every <= 1:
        return frozenset(range(1, total + 1))
    count = int(total / every + 1e-9)
    return frozenset({max(1, round(k * every)) for k in range(1, count + 1)} | {total})


# --- writing -----------------------------------------------------------------------------------------------


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
        with replace_folder(output / f"checkpoint-{step}") as work:
            adapter(work)
            save_file(dict(optimizer), work / OPTIMIZER)
            _write_state(work, {**state, "step": step})
            (work / SETTINGS_FILE).write_text(settings, encoding="utf-8")
            if (output / PROVENANCE_FILE).is_file():  # of all the run's checkpoints
                shutil.copyfile(output / PROVENANCE_FILE, work / PROVENANCE_FILE)
            _seal(work)
    except SafetensorError as problem:  # how safetensors tells of a full disk
        number = re.search(r"os error (\d+)", str(problem))
        raise (
            OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(problem))
        ) from problem


def save_state(output: Path, checkpoint: "Checkpoint", state: Mapping[str, Any]) -> None:
    """Put a checkpoint, of this run or another one, into a run's folder as it is, but for its state.

    Raises:
        OSError: the disk does not take it; what was there before is untouched.
    """
    with replace_folder(output / f"checkpoint-{checkpoint.step}") as work:
        shutil.copytree(checkpoint.folder, work, dirs_exist_ok=True)
        _write_state(work, {**checkpoint.state, **state})
        _seal(work)


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def _seal(folder: Path) -> None:
    """Write down sizes and checksums, and wait until all is on the disk."""
    sums = {}
    (folder / CHECKSUMS).unlink(missing_ok=True)  # of what it is a copy of
    for file in sorted(folder.iterdir()):
        file.chmod(0o644)  # safetensors lets nobody but the owner read
        fsync(file)
        sums[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    fsync(folder / CHECKSUMS)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        folder: where it is.
        state: what was saved beside the tensors.
    """

    folder: Path
    state: dict[str, Any]

    @staticmethod
    def at(folder: Path) -> "Checkpoint":
        """One that is known to be whole."""
        return Checkpoint(folder, read_json(folder / STATE))

    @property
    def step(self) -> int:
        """Optimizer steps that were made."""
        return int(self.state["step"])

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors, as PEFT names them in files."""
        return load_file(self.folder / ADAPTER_WEIGHTS)

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors."""
        return load_file(self.folder / OPTIMIZER)


def damage(folder: Path) -> Localized | None:
    """What is wrong with a checkpoint, or None: missing files, sizes, checksums."""
    if not (folder / CHECKSUMS).is_file():
        return _missing(CHECKSUMS)
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name in _NEEDED:
            if name not in sums:
                return _missing(name)
        for name, expected in sums.items():
            file = folder / Path(name).name
            if not file.is_file():
                return _missing(name)
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                return Localized("{name} is damaged", name=name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return Localized("{file}: {reason}", file=CHECKSUMS, reason=problem)
    return None


def _missing(name: str) -> Localized:
    return Localized("{name} is missing", name=name)


def checkpoints(output: Path) -> list[Path]:
    """Folders named as checkpoints of a run, the oldest first."""
    return sorted((path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def to_resume(output: Path, resume: bool | str | None) -> Checkpoint | None:
    """The checkpoint that `--resume-from-checkpoint` means, or None to start afresh.

    Raises:
        ModelError: a path is given, and it is not a complete checkpoint.
    """
    if not resume:
        return None
    if resume is not True:
        path = Path(resume)
        if not path.is_dir():
            raise ModelError("--resume-from-checkpoint {path}: no such folder", path=path)
        if reason := damage(path):
            raise _incomplete(path, reason)
        return Checkpoint.at(path)
    for path in reversed(checkpoints(output)):
        if reason := damage(path):
            warn("{path} is skipped: {reason}", path=path, reason=reason)
        else:
            return Checkpoint.at(path)
    return None


def _incomplete(path: Path, reason: Localized) -> ModelError:
    """Return the error, with the newest whole checkpoint of the run that the path belongs to."""
    found = checkpoints(path) or checkpoints(path.resolve().parent)
    whole = next((each for each in reversed(found) if damage(each) is None), None)
    if whole is None:
        return ModelError(
            "--resume-from-checkpoint {path}: not a complete checkpoint ({reason})", path=path, reason=reason
        )
    return ModelError(
        "--resume-from-checkpoint {path}: not a complete checkpoint ({reason}); did you mean {whole}?",
        path=path,
        reason=reason,
        whole=whole,
    )


def checkpoint_at(output: Path, step: int, resumed: Checkpoint | None) -> Path:
    """Where a run has the checkpoint of a step: with those before, or its own."""
    if resumed is None or step > resumed.step:
        return output / f"checkpoint-{step}"
    return resumed.folder if step == resumed.step else resumed.folder.resolve().parent / f"checkpoint-{step}"


# --- what an earlier run left ------------------------------------------------------------------------------


def set_aside(output: Path, resumed: Checkpoint | None = None) -> Path | None:
    """Move what an earlier run left into `previous-N/`, whole; None when there is nothing (rule 30).

    Of the run that is gone on with, only what came after the checkpoint resumed from is moved.
    """
    left = _left(output, resumed)
    if {path.name for path in left} <= {SETTINGS_FILE, PROVENANCE_FILE}:
        return None
    numbers = [
        int(p.name.removeprefix("previous-")) for p in output.glob("previous-*") if p.name[9:].isdigit()
    ]
    place = output / f"previous-{max(numbers, default=0) + 1}"
    place.mkdir()
    for path in left:
        path.rename(place / path.name)
    if resumed is not None and not (place / LOG).exists() and (output / LOG).is_file():
        shutil.copyfile(output / LOG, place / LOG)  # of whose lines the run keeps those before
    return place


def _left(output: Path, resumed: Checkpoint | None) -> list[Path]:
    if resumed is not None and resumed.folder.resolve().parent == output.resolve():
        return [path for path in checkpoints(output) if _step_of(path) > resumed.step]
    names = (FINAL, SETTINGS_FILE, PROVENANCE_FILE, LOG, PLOT, REPORT)
    return [path for path in output.glob("*") if path.name in names or _NAME.fullmatch(path.name)]


def delete_oldest(output: Path, limit: int, keep: frozenset[Path]) -> int:
    """Keep the newest `limit`, at least one, and those that must stay (rule 31); how many went."""
    kept, count = {path.resolve() for path in keep}, 0
    for path in checkpoints(output)[: -max(1, limit)]:
        if path.resolve() not in kept:
            count += _delete(path)
    return count


def _delete(checkpoint: Path) -> bool:
    """Delete a checkpoint; tell whether it is gone."""
    try:
        remove_folder(checkpoint)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        warn("{checkpoint} cannot be deleted: {reason}", checkpoint=checkpoint, reason=reason)
        return False
    return True
