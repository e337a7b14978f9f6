"""Write a run's result, `final/`: choose its checkpoint, record its origin, merge it or not."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, read_settings, to_yaml
from mdl_toolkit.data.concat import ConcatDataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import InputError, ModelError
from mdl_toolkit.inference.verify import choose_samples, verify_merge
from mdl_toolkit.training.checkpoints import STATE, checkpoint_of, damage
from mdl_toolkit.training.sampler import Mixture
from mdl_toolkit.training.trainer import Outcome
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.run_folder import LOG, read_log
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.merge import export_adapter, export_merged
from mdl_toolkit.weights.model_card import ResultMetadata
from mdl_toolkit.weights.provenance import Base, Provenance
from mdl_toolkit.weights.resolve import FINAL, recorded_name


def origin_of(
    options: TrainOptions,
    base: Path,
    start: Path | None,
    train_set: ConvertedDataset,
    eval_set: ConvertedDataset | None,
    mixture: Mixture | None = None,
) -> Provenance:
    """Return where a run's checkpoints and result come from: base, adapter, prompts and amounts of data.

    Raises:
        ModelError: the base's weights are damaged.
    """
    data = _data_figures(train_set, "")
    if eval_set is not None:
        data |= _data_figures(eval_set, "evaluation_")
    if isinstance(train_set, ConcatDataset):
        data |= {f"rows_of_{name}": len(part) for name, part in train_set.parts.items()}
        counts = () if mixture is None else mixture.counts
        data |= {
            f"rows_of_{name}_in_an_epoch": count for name, count in zip(train_set.parts, counts, strict=False)
        }
    adapter = None if start is None else Base.of(start, str(options.adapter))
    model = Base.of(base, recorded_name(options.model_name, base))
    return Provenance(model, train_set.record.prompts, data, adapter=adapter)


def _data_figures(dataset: ConvertedDataset, prefix: str) -> dict[str, float]:
    """Return figures of a dataset, with a prefix to their names."""
    seconds, tokens = dataset.audio_lengths / SAMPLE_RATE, dataset.token_counts
    amounts: dict[str, float] = {"rows": len(dataset), "hours": float(f"{seconds.sum() / 3600:.4g}")}
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
    train_set: ConvertedDataset,
) -> Path:
    """Write `final/`, merged or as an adapter, from the last checkpoint or with `--keep-best` the best.

    Raises:
        ToolkitError: the checkpoint is damaged, or the result cannot be written or is not what was trained;
            the checkpoints stay.
    """
    output = Path(options.output)
    final, step = output / FINAL, done.steps
    if options.keep_best and done.best.step not in (None, step):
        step = done.best.step
        say("the best evaluation was after step {step}: that is the result", step=step)
    checkpoint = checkpoint_of(output, step)
    if reason := damage(checkpoint):
        raise ModelError(
            "{checkpoint}: {reason}, so no result is made of it; resume from another checkpoint",
            checkpoint=checkpoint,
            reason=reason,
        )
    measured = replace(origin, metrics=_metrics(output, step, checkpoint, done))
    about = ResultMetadata(measured, training_of(checkpoint) or options, to_yaml(options))
    if options.merge_lora:
        samples = choose_samples(train_set) if options.verify else ()
        verify = partial(verify_merge, base, checkpoint, samples=samples) if samples else None
        export_merged(base, checkpoint, final, about, verify=verify)
    else:
        export_adapter(base, checkpoint, final, about)
    return final


def training_of(adapter: Path) -> TrainOptions | None:
    """Read the options that an adapter was trained with; None if there are none of this version."""
    try:
        return TrainOptions(**read_settings(adapter / SETTINGS_FILE, TrainOptions))
    except (InputError, TypeError):
        return None


def _metrics(output: Path, step: int, checkpoint: Path, done: Outcome) -> dict[str, float]:
    """Return steps, the mean loss until then, and the last evaluation of a checkpoint.

    The evaluation is read from the run's log; if that does not have it, as after a resumption in another
    folder, the checkpoint itself knows its loss, and the metric of the best one.
    """
    state = read_json(checkpoint / STATE)
    loss = state["losses"] / max(step - state["since"], 1) if "losses" in state else done.loss
    try:
        lines = [line for line in read_log(output / LOG) if "eval_loss" in line and line["step"] == step]
    # It could not be written, which was said, or was changed since.
    except (OSError, InputError):
        lines = []
    scores: dict[str, float] = {}
    if lines:
        scores = {name: value for name, value in lines[-1].items() if name.startswith("eval_")}
    elif state.get("evaluated") == step:
        scores = {"eval_loss": state["eval_loss"]}
        best, metric = state["best"], (state.get("judged") or {}).get("metric")
        if metric and best["step"] == step:
            scores[f"eval_{metric}"] = best["value"]
    return {"steps": step, "training_loss": loss, **scores}
