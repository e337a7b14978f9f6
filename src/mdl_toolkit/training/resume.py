"""What a resumed run is compared with: options, sizes of steps, evaluations, other processes.

What differs is said, or refused where going on would be another training than the one that was meant.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.config.options import setting_of, spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import NAME, PATH, Kind
from mdl_toolkit.config.yaml import SETTINGS_FILE, read_settings
from mdl_toolkit.data.collate import Readable
from mdl_toolkit.errors import InputError, ToolkitError
from mdl_toolkit.evaluation.text_metrics import Best
from mdl_toolkit.i18n import Text
from mdl_toolkit.inference.generate import Questions
from mdl_toolkit.training.checkpoints import Checkpoint, checkpoint_at, damage
from mdl_toolkit.training.sampler import Sampling
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.utils.distributed import World

# Options that do not change what is learnt, only where things are and how fast they come.
ANY_TIME = frozenset(
    {
        "output", "resume_from_checkpoint", "num_workers", "tokenizing_batch_size", "download_cache",
        "max_download_mb", "from_modelscope", "report_to", "cache_audio_features", "verify",
    }
)  # fmt: skip


def identity_of(sampling: Sampling) -> dict[str, Any]:
    """What the order of a run's rows comes from."""
    return {
        "rows": len(sampling.lengths), "lengths": _digest(sampling.lengths, sampling.supervised),
        "effective": sampling.effective, "seed": sampling.seed,
    }  # fmt: skip


def judged_by(eval_set: Readable | None, questions: Questions | None) -> dict[str, Any] | None:
    """What evaluations are made by, if there are any: figures of others cannot be compared with theirs."""
    if eval_set is None:
        return None
    asked = {}
    if questions is not None:
        asked = {"metric": questions.metric.name, "answers": _digest(questions.drawn)}
    return {"rows": len(eval_set.positions), "lengths": _digest(eval_set.positions), **asked}


def _digest(*arrays: NDArray[np.int64]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def check_steps(resume: Checkpoint, options: TrainOptions, world: World) -> None:
    """Refuse to go on with steps of another size.

    Raises:
        ToolkitError: the checkpoint's steps had another number of rows.
    """
    before = resume.state.get("sampling", {}).get("effective")
    now = options.batch_size * options.gradient_accumulation_steps * world.size
    if before != now:
        raise ToolkitError(
            f"{resume.folder}: its steps had {before} rows, now it would be {now}; --batch-size x "
            f"--gradient-accumulation-steps x processes ({world.size}) must be what it was",
            f"{resume.folder}：原来每步 {before} 行，现在为 {now} 行；"
            f"--batch-size、--gradient-accumulation-steps 与进程数（{world.size}）之积须保持不变",
        )


def check_together(world: World, step: int, identity: dict[str, Any], total: int) -> None:
    """Refuse to train where processes have found different things in their folders.

    Args:
        world: the processes.
        step: that this one goes on from.
        identity: what the order of its rows comes from, and its evaluations so far.
        total: steps of its run.

    Raises:
        ToolkitError: a process has another step, other data or another number of steps.
    """
    if not world.agrees(f"{step} {total} {sorted(identity.items())}"):
        raise ToolkitError(
            f"process {world.rank} would go on from step {step} of {total} with {identity['rows']} rows, "
            "another one differently; all need the same options, data and --output, in folders they share",
            f"进程 {world.rank} 将从第 {step} 步（共 {total} 步）以 {identity['rows']} 行数据继续，"
            "与其他进程不一致；所有进程须使用相同的选项、数据和共享的 --output 目录",
        )


def still_best(resume: Checkpoint, options: TrainOptions, judged: dict[str, Any] | None) -> Best:
    """The interrupted run's best evaluation, if it still counts.

    Args:
        resume: the checkpoint that is gone on from.
        options: of the run.
        judged: what evaluations are made by from now on; None without any.
    """
    best = Best(**resume.state.get("best", {}))
    if best.step is None:
        return best
    if not is_judged_alike(resume, judged):
        why = Text("it was made in another way", "其评估方式与现在不同")
    elif options.keep_best and damage(checkpoint_at(Path(options.output), best.step, resume)):
        why = Text("its checkpoint is gone or damaged", "其检查点已不存在或已损坏")
    else:
        return best
    warn(
        f"the best evaluation so far, after step {best.step}, does not count any more: {why.en}",
        f"此前最好的评估（第 {best.step} 步）不再计入：{why.zh}",
    )
    return Best()


def is_judged_alike(resume: Checkpoint, judged: dict[str, Any] | None) -> bool:
    """Tell whether evaluations are made as they were; an older checkpoint does not say: it is trusted."""
    return bool(resume.state.get("judged", judged) == judged)


def say_resumed(resume: Checkpoint, total: int, best: Best, patience: int | None) -> None:
    """Say where the run goes on, or why nothing is left to train."""
    if resume.step >= total:
        warn(
            f"{resume.folder} is the end of its run: nothing is left to train, its result is written",
            f"{resume.folder} 已是训练的终点：没有需要继续训练的步骤，仅输出结果",
        )
    elif patience is not None and best.worse >= patience:
        warn(
            f"{resume.folder}: its run was stopped early, {best.worse} evaluations in a row were no "
            "better; its result is written; to go on, raise --early-stopping-patience",
            f"{resume.folder}：该训练已提前停止（连续 {best.worse} 次评估没有改善），仅输出结果；"
            "如需继续，请增大 --early-stopping-patience",
        )
    else:
        say(
            f"going on after step {resume.step:,} of {total:,}, from {resume.folder}",
            f"从 {resume.folder} 继续：已完成 {resume.step:,} 步，共 {total:,} 步",
        )


def warn_changed(resume: Checkpoint, options: TrainOptions) -> None:
    """Warn of the options that differ from the interrupted run's; a path spelt otherwise does not."""
    try:
        before = read_settings(resume.folder / SETTINGS_FILE, TrainOptions)
    except InputError:  # of a version with other options
        return
    kinds = {field.name: setting_of(field).kind for field in dataclasses.fields(options)}
    changed = [
        (spelling(name), _shown(getattr(options, name)), _shown(value))
        for name, value in before.items()
        if name not in ANY_TIME
        and _meaning(kinds[name], getattr(options, name)) != _meaning(kinds[name], value)
    ]
    if changed:
        en = ", ".join(f"{name} {now} (was {then})" for name, now, then in changed)
        zh = "，".join(f"{name} {now}（原为 {then}）" for name, now, then in changed)
        warn(
            f"options differ from the interrupted run's, and the new ones hold: {en}",
            f"以下选项与被中断的训练不同，以新值为准：{zh}",
        )


def _meaning(kind: Kind, value: Any) -> Any:
    """Return an option's value such that a path has one spelling."""
    is_path = value is not None and kind in (PATH, NAME)
    return Path(value).expanduser().resolve() if is_path else value


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(value) or "null"
    return f"{value:g}" if isinstance(value, float) else str(value)
