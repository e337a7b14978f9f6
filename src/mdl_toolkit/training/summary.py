"""What a person wants to know before the first step of a run, and after its last one: a few plain lines."""

from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.i18n import Localized
from mdl_toolkit.training.log import Pace
from mdl_toolkit.training.lora import TargetCount
from mdl_toolkit.training.memory.plan import MemoryPlan
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.utils.console import clock, say, warn
from mdl_toolkit.utils.run_folder import LOG, SmoothedLoss, read_log

MOST_EVALUATIONS = 10  # shown at the end: the last ones, and the best one
HOUR = 3600.0


# --- before ----------------------------------------------------------------------------------------------


def say_machine(device: torch.device, dtype: torch.dtype, quantization: str | None, processes: int) -> None:
    """Say what computes, and in which numbers."""
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    numbers = str(dtype).removeprefix("torch.")
    weights: str | Localized = numbers
    if quantization:
        weights = Localized(
            "quantized in {quantization}, computed in {numbers}", quantization=quantization, numbers=numbers
        )
    if processes > 1:
        say(
            "device: {device}, {processes} processes; base weights: {weights}",
            device=name,
            processes=processes,
            weights=weights,
        )
    else:
        say("device: {device}; base weights: {weights}", device=name, weights=weights)


def say_data(train_set: ConvertedDataset, eval_set: ConvertedDataset | None) -> None:
    """Say how much there is to learn, and to evaluate on."""
    train = _amount(train_set)
    if eval_set is None:
        say("training data: {train}", train=train)
    else:
        say("training data: {train}; evaluation data: {eval}", train=train, eval=_amount(eval_set))


def _amount(dataset: ConvertedDataset) -> Localized:
    rows, seconds = len(dataset), float(dataset.audio_lengths.sum()) / SAMPLE_RATE
    hours = f"{seconds / HOUR:.2f}" if seconds >= 0.1 * HOUR else f"{seconds / HOUR:.2g}"
    return Localized("{rows:,} rows, {hours} hours of audio", rows=rows, hours=hours)


def say_steps(options: TrainOptions, sampler: BatchSampler, total: int) -> None:
    """Say how many steps there are, and what each consists of."""
    factors = f"{sampler.batch_size} x {sampler.accumulation} x {sampler.processes}"
    say(
        "steps: {total:,} in {epochs:g} epochs of {per_epoch:,}; effective batch: {effective} = {factors} "
        "(batch x accumulation x processes)",
        total=total,
        epochs=options.num_epochs,
        per_epoch=sampler.steps_per_epoch,
        effective=sampler.effective,
        factors=factors,
    )
    if options.warmup_steps >= total:
        warn(
            "--warmup-steps {warmup:,} is not less than the run's {total:,} steps: the learning rate "
            "never gets beyond {share:.2g} of --lr",
            warmup=options.warmup_steps,
            total=total,
            share=(total - 1) / options.warmup_steps,
        )


def say_memory(plan: MemoryPlan) -> None:
    """Say how much memory is going to be needed and how much is free, and warn if that does not do."""
    for line in plan.lines():
        say(line)
    if warning := plan.warning():
        warn(warning)


def say_targets(counts: list[TargetCount], model: Any) -> None:
    """Say what of a `PeftModel` trains: each target, and the share of all parameters."""
    trained, there = model.get_nb_trainable_parameters()  # knows that quantized ones are packed
    for count in counts:
        share = f"{count.parameters / there:.2%}"
        say(
            "training {target}: {layers} layers, {parameters:,} parameters ({share})",
            target=count.target,
            layers=count.layers,
            parameters=count.parameters,
            share=share,
        )
    say(
        "training {trained:,} of {there:,} parameters ({share:.2%})",
        trained=trained,
        there=there,
        share=trained / there,
    )
    tied = bool(model.get_base_model().config.tie_word_embeddings)
    if tied and {"embed_tokens", "lm_head"} & {count.target for count in counts}:
        say("this model ties embed_tokens and lm_head: training one trains both")


# --- after -----------------------------------------------------------------------------------------------


def say_results(output: Path, best: int | None, pace: Pace) -> None:
    """Say what a run came to: losses of the whole run, from its log, and the pace of this process's life.

    Args:
        output: the run's folder.
        best: the step of the best evaluation.
        pace: of the steps made since the beginning or the resumption.
    """
    try:
        lines = read_log(output / LOG)
    except OSError:  # it could not be written, which was said
        lines = []
    _say_losses([line for line in lines if "loss" in line])
    if pace.rows:
        _say_pace(pace)
    _say_evaluations([line for line in lines if "eval_loss" in line], best)


def _say_losses(lines: list[dict[str, Any]]) -> None:
    if not lines:
        return
    smooth, last = SmoothedLoss(), lines[-1]
    losses = [smooth.add(line["loss"]) for line in lines]
    say(
        "trained: {step:,} steps, {epoch:.3g} epochs; smoothed loss: {first:.4f} at first, {last:.4f} at "
        "last",
        step=last["step"],
        epoch=last["epoch"],
        first=losses[0],
        last=losses[-1],
    )


def _say_pace(pace: Pace) -> None:
    seconds = max(pace.seconds, 1e-9)
    speed, hours, waited = pace.rows / seconds, pace.audio / seconds, f"{pace.waited / seconds:.1%}"
    say(
        "time: {seconds}; {speed:.3g} samples/s, {hours:.3g} hours of audio in an hour, {waited} of the "
        "time waiting for data",
        seconds=clock(pace.seconds),
        speed=speed,
        hours=hours,
        waited=waited,
    )


def _say_evaluations(lines: list[dict[str, Any]], best: int | None) -> None:
    if not lines:
        return
    names = [name for name in lines[-1] if name not in ("step", "eval_loss", "eval_tokens", "epoch")]
    metrics = "".join(f"{name.removeprefix('eval_'):>10}" for name in names)
    head = f"{'step':>9}{'loss':>10}{metrics}"
    say("evaluation{columns}", columns=head)
    left_out = len(lines) - MOST_EVALUATIONS
    for number, line in enumerate(lines):
        if number >= left_out or line["step"] == best:
            figures = "".join(f"{line[name]:>10.4f}" for name in ("eval_loss", *names) if name in line)
            columns = f"{'':<10}{line['step']:>9}{figures}"
            if line["step"] == best:
                say("{columns}  best", columns=columns)
            else:
                say("{columns}", columns=columns)
