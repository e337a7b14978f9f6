"""What a run leaves as its result: which checkpoint it is, where it comes from, and the folder `final/`."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, read_settings, to_yaml
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import InputError, ModelError
from mdl_toolkit.inference.verify import choose_samples, verify_merge
from mdl_toolkit.training.checkpoints import STATE, Checkpoint, checkpoint_at, damage
from mdl_toolkit.training.trainer import Outcome
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.run_folder import LOG, read_log
from mdl_toolkit.weights.merge import export_adapter, export_merged
from mdl_toolkit.weights.model_card import ResultMetadata
from mdl_toolkit.weights.provenance import Base, Provenance
from mdl_toolkit.weights.resolve import FINAL, read_json, recorded_name

HOUR = 3600.0


def origin_of(
    options: TrainOptions, base: Path, train_set: ConvertedDataset, eval_set: ConvertedDataset | None
) -> Provenance:
    """Where a run's checkpoints and result come from.

    Raises:
        ModelError: the base's weights are damaged.
    """
    data = _amount(train_set, "")
    if eval_set is not None:
        data |= _amount(eval_set, "evaluation_")
    return Provenance(Base.of(base, recorded_name(options.model_name, base)), train_set.record.prompts, data)


def _amount(dataset: ConvertedDataset, prefix: str) -> dict[str, float]:
    seconds, tokens = dataset.audio_lengths / SAMPLE_RATE, dataset.token_counts
    amounts: dict[str, float] = {"rows": len(dataset), "hours": float(f"{seconds.sum() / HOUR:.4g}")}
    if len(dataset):
        amounts |= {
            "shortest_seconds": round(float(seconds.min()), 2),
            "longest_seconds": round(float(seconds.max()), 2),
            "median_tokens": int(np.percentile(tokens, 50, method="higher")),
            "most_tokens": int(tokens.max()),
        }
    return {f"{prefix}{name}": value for name, value in amounts.items()}


def write_result(
    options: TrainOptions,
    base: Path,
    origin: Provenance,
    done: Outcome,
    resume: Checkpoint | None,
    train_set: ConvertedDataset,
) -> Path:
    """Write `final/`, merged or not.

    Raises:
        ToolkitError: the result cannot be written, or is not what was trained; the checkpoints stay.
    """
    output = Path(options.output)
    final, step = output / FINAL, _chosen(options, done)
    checkpoint = checkpoint_at(output, step, resume)
    _check_whole(checkpoint)
    measured = origin.with_metrics(_metrics(output, step, checkpoint, done))
    about = ResultMetadata(measured, training_of(checkpoint) or options, to_yaml(options))
    if options.merge_lora:
        samples = choose_samples(train_set) if options.verify else ()
        verify = partial(verify_merge, base, checkpoint, samples=samples) if samples else None
        export_merged(base, checkpoint, final, about, verify=verify)
    else:
        export_adapter(base, checkpoint, final, about)
    return final


def _chosen(options: TrainOptions, done: Outcome) -> int:
    """The step whose checkpoint becomes the result: the last one, or with `--keep-best` the best."""
    step = done.best.step if options.keep_best and done.best.step is not None else done.steps
    if step != done.steps:
        say("the best evaluation was after step {step}: that is the result", step=step)
    return step


def training_of(adapter: Path) -> TrainOptions | None:
    """The options that an adapter was trained with, if they are there and are those of this version."""
    try:
        return TrainOptions(**read_settings(adapter / SETTINGS_FILE, TrainOptions))
    except (InputError, TypeError):
        return None


def _check_whole(checkpoint: Path) -> None:
    """Refuse to make a result of a damaged checkpoint.

    Raises:
        ModelError: naming what is wrong with it.
    """
    if reason := damage(checkpoint):
        raise ModelError(
            "{checkpoint}: {reason}, so no result is made of it; resume from another checkpoint",
            checkpoint=checkpoint,
            reason=reason,
        )


def _metrics(output: Path, step: int, checkpoint: Path, done: Outcome) -> dict[str, float]:
    """Steps, the mean loss until then, and the last evaluation of the checkpoint, from the run's log.

    Of a checkpoint whose steps another folder's log tells of, the checkpoint itself knows the evaluation.
    """
    state = read_json(checkpoint / STATE)
    loss = state["losses"] / max(step - state["since"], 1) if "losses" in state else done.loss
    try:
        lines = [line for line in read_log(output / LOG) if "eval_loss" in line and line["step"] == step]
    except OSError:  # it could not be written, which was said
        lines = []
    line = lines[-1] if lines else _evaluation_in(state, step)
    scores = {name: value for name, value in line.items() if name.startswith("eval_")}
    return {"steps": step, "training_loss": loss, **scores}


def _evaluation_in(state: dict[str, Any], step: int) -> dict[str, float]:
    """The evaluation after a checkpoint's step, if there was one: its loss, and the best one's metric."""
    if state.get("evaluated") != step:
        return {}
    best, metric = state["best"], (state.get("judged") or {}).get("metric")
    more = {f"eval_{metric}": best["value"]} if metric and best["step"] == step else {}
    return {"eval_loss": state["eval_loss"], **more}
