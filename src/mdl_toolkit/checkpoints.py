"""When to save, what makes a checkpoint complete, which one to resume, which to delete.

A checkpoint is written under another name and renamed, so that a folder named `checkpoint-N` is whole.
"""

import re
import shutil
from pathlib import Path

from mdl_toolkit.errors import ModelError
from mdl_toolkit.loading import read_json
from mdl_toolkit.settings import SETTINGS_FILE

FINAL = "final"
WORK = ".saving"
_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = (
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "adapter_config.json",
    "adapter_model.safetensors",
)


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
    count = int(total / every + 1e-9)
    return frozenset({max(1, round(k * every)) for k in range(1, count + 1)} | {total})


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints of a run, the oldest first."""
    found = [(int(m[1]), path) for path in output.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if is_complete(path)]


def is_complete(path: Path) -> bool:
    """Tell whether training can go on from a folder."""
    return all((path / name).is_file() for name in _NEEDED)


def steps_of(checkpoint: Path) -> int:
    """Optimizer steps that were made when a checkpoint was saved."""
    return int(read_json(checkpoint / "trainer_state.json")["global_step"])


def to_resume(output: Path, resume: bool | str | None) -> Path | None:
    """The checkpoint that `--resume-from-checkpoint` means, or None to start afresh.

    Raises:
        ModelError: a path is given, and it is not a complete checkpoint.
    """
    if not resume:
        return None
    if resume is True:
        found = checkpoints(output)
        return found[-1] if found else None
    path = Path(resume)
    if not is_complete(path):
        raise ModelError(
            f"--resume-from-checkpoint {path}: not a complete checkpoint",
            f"--resume-from-checkpoint {path}：不是完整的检查点",
        )
    return path


def set_aside(output: Path) -> Path | None:
    """Move what an earlier run left into `previous-N/`, whole; None when there is nothing (rule 30)."""
    left = [p for p in output.glob("*") if p.name in (FINAL, SETTINGS_FILE) or _NAME.fullmatch(p.name)]
    if {path.name for path in left} <= {SETTINGS_FILE}:
        return None
    numbers = [
        int(p.name.removeprefix("previous-")) for p in output.glob("previous-*") if p.name[9:].isdigit()
    ]
    place = output / f"previous-{max(numbers, default=0) + 1}"
    place.mkdir()
    for path in left:
        path.rename(place / path.name)
    return place


def put_in_place(work: Path, output: Path) -> None:
    """Move a finished checkpoint from the folder it was written in to the run's."""
    for path in work.glob("checkpoint-*"):
        target = output / path.name
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
    shutil.rmtree(work, ignore_errors=True)


def delete_oldest(output: Path, limit: int | None, keep: Path | None) -> None:
    """Keep the newest `limit` checkpoints, and the one resumed from (rule 31)."""
    if limit is None:
        return
    for path in checkpoints(output)[:-limit]:
        if keep is None or path.resolve() != keep.resolve():
            shutil.rmtree(path)
