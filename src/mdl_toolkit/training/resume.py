"""Compare a resumed run with the interrupted one: options, sizes of steps, evaluations, other processes.

Differences are said, or refused where going on would be another training than the one that was meant.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdl_toolkit import __version__
from mdl_toolkit.config.options import spec_of, spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import (
    DATASETS,
    NAME,
    OUTPUT,
    PATH,
    RESUME,
    WEIGHTED_DATASETS,
    ValueType,
    weighted_paths,
)
from mdl_toolkit.config.yaml import SETTINGS_FILE, read_settings, word_of
from mdl_toolkit.data.collate import SampleSource
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import prefix_sample
from mdl_toolkit.errors import InputError, ModelError, ToolkitError
from mdl_toolkit.evaluation.text_metrics import Best
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.training.answer_eval import AnswerEvaluator
from mdl_toolkit.training.checkpoints import Checkpoint, checkpoint_of, damage
from mdl_toolkit.training.lora import LORA_TARGETS
from mdl_toolkit.training.optimization.optimizer import ADAMW
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.weights.provenance import Provenance

# Options that do not change what is learnt, only where files are and how fast they are read.
ANY_TIME = frozenset(
    {
        "output", "resume_from_checkpoint", "num_workers", "tokenizing_batch_size", "download_cache",
        "max_download_mb", "max_audio_hours", "from_modelscope", "report_to", "cache_audio_features",
        "verify", "shard_weights",
    }
)  # fmt: skip


# Options that only the first process uses, or that change nothing but speed. Paths may differ from machine to
# machine: what they hold is compared, and the step that is gone on from.
# Types of options whose values are paths, of which each machine may have its own.
PLACES = (DATASETS, WEIGHTED_DATASETS, NAME, OUTPUT, PATH)
ANY_PROCESS = frozenset(
    {
        "num_workers", "tokenizing_batch_size", "max_download_mb", "from_modelscope", "report_to", "verify",
    }
)  # fmt: skip


def identity_of(sampler: BatchSampler) -> dict[str, Any]:
    """Return what the order of a run's examples depends on, as a checkpoint keeps it."""
    mixture = sampler.mixture
    return {
        "rows": len(sampler.lengths),
        "lengths": _hash_arrays(sampler.lengths, sampler.supervised),
        "effective": sampler.effective,
        "seed": sampler.seed,
        **({} if mixture is None else {"sizes": [*mixture.sizes], "weights": [*mixture.weights]}),
    }


def judged_by(eval_set: SampleSource | None, answers: AnswerEvaluator | None) -> dict[str, Any] | None:
    """Return what evaluations depend on, as a checkpoint keeps it; None without any.

    Losses and metrics can be compared only where it is the same.
    """
    if eval_set is None:
        return None
    asked = {}
    if answers is not None:
        asked = {"metric": answers.metric.name, "answers": _hash_arrays(answers.drawn)}
    return {"rows": len(eval_set.token_counts), "lengths": _hash_arrays(eval_set.token_counts), **asked}


def _hash_arrays(*arrays: NDArray[np.int64]) -> str:
    """Return a short hash of arrays' contents."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def check_options(world: World, options: TrainOptions) -> None:
    """Refuse to train where processes have other options or other versions.

    Raises:
        ToolkitError: naming all that differs.
    """
    _refuse_differences(world, {"mdl-toolkit (version)": __version__, "torch (version)": torch.__version__})
    values = {
        spelling(field.name): repr(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in ANY_PROCESS and spec_of(field).type not in (*PLACES, RESUME)
    }
    _refuse_differences(world, values)


def check_data(
    world: World,
    origin: Provenance,
    dtype: torch.dtype,
    train_set: ConvertedDataset,
    eval_set: ConvertedDataset | None,
) -> None:
    """Refuse to train where processes found another base model, other data or another precision.

    Args:
        world: the processes.
        origin: the base model, and the adapter that training begins with.
        dtype: of the base's weights when they are loaded.
        train_set: the examples to learn from.
        eval_set: those to evaluate on, if any.

    Raises:
        ToolkitError: naming all that differs.
    """
    values = {
        "--model-name": "" if origin.base is None else origin.base.fingerprint,
        "--adapter": "" if origin.adapter is None else origin.adapter.fingerprint,
        "--bf16": str(dtype),
        "--train-dataset": dataset_digest(train_set),
        "--eval-dataset": "" if eval_set is None else dataset_digest(eval_set),
    }
    _refuse_differences(world, values)


def dataset_digest(dataset: ConvertedDataset) -> str:
    """Return a hash of a dataset's record, of all lengths and of the tokens of some examples."""
    digest = hashlib.sha256(repr(dataset.record).encode())
    for lengths in (dataset.token_counts, dataset.supervised_counts, dataset.audio_lengths):
        digest.update(lengths.tobytes())
    for index in prefix_sample(len(dataset)):
        tokens = dataset.tokens(index)
        digest.update(tokens.input_ids.tobytes() + tokens.labels.tobytes())
    return digest.hexdigest()


def _refuse_differences(world: World, values: Mapping[str, str]) -> None:
    """Refuse values, by what users call them, that are not the same in all processes."""
    different = world.differences(values)
    if different:
        ranks = sorted({rank for ranks in different.values() for rank in ranks})
        raise ToolkitError(
            "{names}: not the same in process {ranks} as in process 0; all processes of a run need the same",
            names=", ".join(different),
            ranks=", ".join(map(str, ranks)),
        )


def check_together(world: World, step: int, identity: dict[str, Any], total: int) -> None:
    """Refuse to train where processes read different checkpoints or data.

    Args:
        world: the processes.
        step: this process goes on from it.
        identity: what the order of its examples depends on, and its evaluations so far.
        total: steps of its run.

    Raises:
        ToolkitError: a process has another step, other data or another number of steps.
    """
    if not world.agrees(f"{step} {total} {sorted(identity.items())}"):
        raise ToolkitError(
            "process {rank} would go on from step {step} of {total} with {rows} {rows:row|rows}, another "
            "one differently; all need the same options, data and --output, in folders they share",
            rank=world.rank,
            step=step,
            total=total,
            rows=identity["rows"],
        )


def still_best(resume: Checkpoint, options: TrainOptions, judged: dict[str, Any] | None) -> Best:
    """Return the interrupted run's best evaluation, or none if it does not count any more.

    Args:
        resume: the checkpoint that the run goes on from.
        options: of the run.
        judged: what evaluations depend on from now on; None without any.
    """
    best = Best(**resume.state.get("best", {}))
    if best.step is None:
        return best
    if not is_judged_alike(resume, judged):
        why = Localized("it was made in another way")
    elif (
        options.keep_best
        and best.step != resume.step
        and damage(checkpoint_of(resume.folder.resolve().parent, best.step))
    ):
        why = Localized("its checkpoint is gone or damaged")
    else:
        return best
    warn(
        "the best evaluation so far, after step {step}, does not count any more: {why}",
        step=best.step,
        why=why,
    )
    return Best()


def is_judged_alike(resume: Checkpoint, judged: dict[str, Any] | None) -> bool:
    """Tell whether evaluations depend on the same as before; trust older checkpoints, which do not say."""
    return bool(resume.state.get("judged", judged) == judged)


def say_resumed(resume: Checkpoint, total: int, best: Best, patience: int | None) -> None:
    """Say where the run goes on, or why nothing is left to train."""
    if resume.step >= total:
        warn(
            "{folder} is the end of its run: nothing is left to train, its result is written",
            folder=resume.folder,
        )
    elif patience is not None and best.worse >= patience:
        warn(
            "{folder}: its run was stopped early, {worse} "
            "{worse:evaluation in a row was|evaluations in a row were} no better; its result is written; to "
            "go on, raise --early-stopping-patience",
            folder=resume.folder,
            worse=best.worse,
        )
    else:
        say(
            "going on after step {step:,} of {total:,}, from {folder}",
            step=resume.step,
            total=total,
            folder=resume.folder,
        )


def compare_options(resume: Checkpoint, options: TrainOptions, world: World) -> None:
    """Refuse or warn of options that differ from the interrupted run's.

    Raises:
        ToolkitError: the checkpoint's steps had another number of examples, or its adapter another shape.
    """
    steps = resume.state.get("sampling", {}).get("effective")
    now = options.batch_size * options.gradient_accumulation_steps * world.size
    if steps != now:
        raise ToolkitError(
            "{folder}: its steps had {before} {before:row|rows}, now it would be {now}; --batch-size x "
            "--gradient-accumulation-steps x processes ({size}) must be what it was",
            folder=resume.folder,
            before=steps,
            now=now,
            size=world.size,
        )
    try:
        before = read_settings(resume.folder / SETTINGS_FILE, TrainOptions)
    # A version with other options wrote them.
    except InputError:
        return
    check_shape(resume.folder, before, options)
    warn_changed(before, options)


def check_shape(folder: Path, before: dict[str, Any], options: TrainOptions) -> None:
    """Refuse to go on with an adapter of another shape.

    Args:
        folder: of the checkpoint.
        before: the options that it was made with.
        options: the run's.

    Raises:
        ModelError: `--lora-rank`, `--lora-variant`, `--train-target` or `--optimizer` differs, or `--adapter`
            is left out.
    """
    targets = before["train_target"]
    has_rank = LORA_TARGETS.keys() & {*targets}
    shape = [f"--lora-rank {before['lora_rank']}"] if before["lora_rank"] != options.lora_rank else []
    # Older checkpoints do not say it.
    if (variant := before.get("lora_variant", options.lora_variant)) != options.lora_variant:
        shape.append(f"--lora-variant {variant}")
    shape = shape if has_rank else []
    if {*targets} != {*options.train_target}:
        shape += [f"--train-target {target}" for target in targets]
    # Older checkpoints do not say it.
    optimizer = before.get("optimizer", ADAMW.name)
    if optimizer != options.optimizer:
        shape.append(f"--optimizer {optimizer}")
    # Which scales a new one would not have (rsLoRA, DoRA, patterns).
    if before.get("adapter") and options.adapter is None:
        shape.append(f"--adapter {before['adapter']}")
    if shape:
        raise ModelError(
            "{checkpoint}: it was trained with {words}; give the same, or start afresh",
            checkpoint=folder,
            words=" ".join(shape),
        )


def warn_changed(before: dict[str, Any], options: TrainOptions) -> None:
    """Warn of options that differ from those of before; another spelling of a path is no difference."""
    types = {field.name: spec_of(field).type for field in dataclasses.fields(options)}
    changed = [
        Localized(
            "{option} {now} (was {then})",
            option=spelling(name),
            now=_typed(getattr(options, name)),
            then=_typed(then),
        )
        for name, then in before.items()
        if name not in ANY_TIME
        and _meaning(types[name], getattr(options, name)) != _meaning(types[name], then)
    ]
    if changed:
        warn(
            "options differ from the interrupted run's, and the new ones hold: {changed}",
            changed=join_messages(changed, "{left}, {right}"),
        )


def _meaning(value_type: ValueType, value: Any) -> Any:
    """Return an option's value, a path in its one absolute spelling."""
    if value_type in (DATASETS, WEIGHTED_DATASETS):
        paths = weighted_paths(value)
        return [(Path(path).expanduser().resolve(), weight) for path, weight in paths.items()]
    is_path = value is not None and value_type in PLACES
    return Path(value).expanduser().resolve() if is_path else value


def _typed(value: Any) -> str:
    """Return an option's value as it is typed."""
    return (", ".join(value) or "null") if isinstance(value, tuple) else word_of(value)
