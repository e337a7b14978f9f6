"""Summarize a run in a few plain lines: its plan before the first step, its results after the last."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.concat import ConcatDataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.warnings import answer_ids
from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training.log import Pace
from mdl_toolkit.training.lora import TargetCount
from mdl_toolkit.training.memory.plan import MemoryPlan
from mdl_toolkit.training.optimization.expectation import MANY_ANSWERS, is_too_short, what_to_expect
from mdl_toolkit.training.optimization.schedule import Schedule, due_steps
from mdl_toolkit.training.sampler import BatchSampler, Mixture
from mdl_toolkit.utils.console import clock, is_first_process, say, size, warn
from mdl_toolkit.utils.device import device_name, peak_of
from mdl_toolkit.utils.run_folder import LOG, SmoothedLoss, read_log

# Shown at the end: the last ones, and the best one.
MOST_EVALUATIONS = 10
HOUR = 3600.0
# For each parameter of a matrix and token: two forward, two for the gradient of its input. Those of LoRA are
# few, and what gradient checkpointing computes again is no use.
OPERATIONS = 4
PATCHES_PER_TOKEN = 5


def say_machine(device: torch.device, dtype: torch.dtype, quantization: str | None, processes: int) -> None:
    """Say the device, the number of processes and the dtype of the base weights."""
    name = device_name(device)
    shown: str | Localized = name
    if processes > 1:
        shown = Localized("{name}, {processes} processes", name=name, processes=processes)
    numbers = str(dtype).removeprefix("torch.")
    weights: str | Localized = numbers
    if quantization:
        weights = Localized(
            "quantized in {quantization}, computed in {numbers}", quantization=quantization, numbers=numbers
        )
    say("device: {device}; base weights: {weights}", device=shown, weights=weights)


def say_data(
    train_set: ConvertedDataset, eval_set: ConvertedDataset | None, mixture: Mixture | None = None
) -> None:
    """Say how many examples and how much audio there are to learn from, and to evaluate on."""
    train = _data_size(train_set)
    if eval_set is None:
        say("training data: {train}", train=train)
    else:
        say("training data: {train}; evaluation data: {eval}", train=train, eval=_data_size(eval_set))
    if not isinstance(train_set, ConcatDataset):
        return
    counts = mixture.counts if mixture else [*map(len, train_set.parts.values())]
    for (name, part), count in zip(train_set.parts.items(), counts, strict=True):
        say(
            "  {name}: {size}; {share:.1%} of an epoch, in which a row comes {times:.3g} {times:time|times}",
            name=name,
            size=_data_size(part),
            share=count / len(train_set),
            times=count / len(part),
        )


def _data_size(dataset: ConvertedDataset) -> Localized:
    """Return the number of a dataset's examples and the hours of their audio, in words."""
    seconds = float(dataset.audio_lengths.sum()) / SAMPLE_RATE
    hours = f"{seconds / HOUR:.2f}" if seconds >= 0.1 * HOUR else f"{seconds / HOUR:.2g}"
    return Localized("{rows:,} {rows:row|rows}, {hours} hours of audio", rows=len(dataset), hours=hours)


def say_steps(options: TrainOptions, sampler: BatchSampler, schedule: Schedule) -> None:
    """Say the number of steps and the effective batch; warn of a warm-up that is longer than the run."""
    total, warmup = schedule.total, schedule.warmup
    factors = f"{sampler.batch_size} x {sampler.accumulation} x {sampler.processes}"
    say(
        "steps: {total:,} in {epochs:g} {epochs:epoch|epochs} of {per_epoch:,}; effective batch: "
        "{effective} = {factors} (batch x accumulation x processes)",
        total=total,
        epochs=options.num_epochs if options.max_steps is None else total / sampler.steps_per_epoch,
        per_epoch=sampler.steps_per_epoch,
        effective=sampler.effective,
        factors=factors,
    )
    if warmup >= total:
        warn(
            "the warm-up takes {warmup:,} {warmup:step|steps}, not less than the run's {total:,}: the "
            "learning rate never gets beyond {share:.2g} of --lr",
            warmup=warmup,
            total=total,
            share=(total - 1) / warmup,
        )
    if options.save_steps != 0 and len(due_steps(options.save_steps, sampler.steps_per_epoch, total)) == 1:
        say(
            "nothing is saved before the end, after step {total:,}: --save-steps is {every}",
            total=total,
            every=options.save_steps,
        )


def say_recipe(options: TrainOptions, warmup: int) -> None:
    """Say how the weights are going to change, after a warm-up of so many steps."""
    say(
        "recipe: {optimizer}, learning rate {lr} ({scheduler}, warm-up {warmup:,} {warmup:step|steps}), "
        "beta2 {beta2:g}, weight decay {decay:g}, gradient norm at most {norm:g}, label smoothing "
        "{smoothing:g}, LoRA+ ratio {ratio:g}",
        optimizer=options.optimizer,
        lr=", ".join(options.lr) if isinstance(options.lr, tuple) else f"{options.lr:g}",
        scheduler=options.lr_scheduler,
        warmup=warmup,
        beta2=options.adam_beta2,
        decay=options.weight_decay,
        norm=options.max_grad_norm or math.inf,
        smoothing=options.label_smoothing,
        ratio=options.lora_plus_ratio,
    )
    if options.lora_variant != "lora":
        say("adapters: {variant}", variant=options.lora_variant)


def warn_of_little(options: TrainOptions, schedule: Schedule, train_set: ConvertedDataset) -> None:
    """Warn before the first step of a run that is too short to learn a new task, with what would do."""
    if is_first_process() and is_too_short(options, schedule):
        answers: set[bytes] = set()
        for row in range(len(train_set)):
            answers.add(answer_ids(train_set, row).tobytes())
            if len(answers) == MANY_ANSWERS:
                break
        warn(what_to_expect(options, schedule, len(train_set), len(answers)))


def say_memory(plan: MemoryPlan) -> None:
    """Say how much memory is predicted and how much is free, and warn if that may not suffice."""
    for line in plan.lines():
        say(line)
    if warning := plan.warning():
        warn(warning)


def say_targets(counts: list[TargetCount], model: Any) -> None:
    """Say how many parameters of a `PeftModel` train, in each target and of all."""
    # PEFT counts quantized parameters right, which are stored packed.
    trained, total = model.get_nb_trainable_parameters()
    for count in counts:
        say(
            "training {target}: {layers} {layers:layer|layers}, {parameters:,} parameters ({share})",
            target=count.target,
            layers=count.layers,
            parameters=count.parameters,
            share=f"{count.parameters / total:.2%}",
        )
    say(
        "training {trained:,} of {there:,} parameters ({share:.2%})",
        trained=trained,
        there=total,
        share=trained / total,
    )
    tied = bool(model.get_base_model().config.tie_word_embeddings)
    if tied and {"embed_tokens", "lm_head"} & {count.target for count in counts}:
        say("this model ties embed_tokens and lm_head: training one trains both")


def say_results(output: Path, best: int | None, pace: Pace) -> None:
    """Say the results of a run: losses and evaluations of the whole run, from its log, and the pace.

    Args:
        output: the run's folder.
        best: the step of the best evaluation.
        pace: of the steps made since the start or the resumption.
    """
    try:
        lines = read_log(output / LOG)
    # It could not be written, which was said, or was changed since.
    except (OSError, InputError):
        lines = []
    if steps := [line for line in lines if "loss" in line]:
        smooth = SmoothedLoss()
        losses = [smooth.add(line["loss"]) for line in steps]
        say(
            "trained: {step:,} {step:step|steps}, {epoch:.3g} {epoch:epoch|epochs}; smoothed loss: "
            "{first:.4f} at first, {last:.4f} at last",
            step=steps[-1]["step"],
            epoch=steps[-1]["epoch"],
            first=losses[0],
            last=losses[-1],
        )
    if pace.examples:
        seconds = max(pace.seconds, 1e-9)
        say(
            "time: {seconds}; {speed:.3g} samples/s, {hours:.3g} hours of audio in an hour, {waited} of the "
            "time waiting for data",
            seconds=clock(pace.seconds),
            speed=pace.examples / seconds,
            hours=pace.audio / seconds,
            waited=f"{pace.waited / seconds:.1%}",
        )
    _say_evaluations([line for line in lines if "eval_loss" in line], best)


def _say_evaluations(lines: list[dict[str, Any]], best: int | None) -> None:
    """Say the last evaluations of a run and the best one, as a table."""
    if not lines:
        return
    names = [name for name in lines[-1] if name not in ("step", "eval_loss", "eval_tokens", "epoch")]
    widths = {name: max(10, len(name) - 3) for name in names}
    metrics = "".join(f"{name.removeprefix('eval_'):>{widths[name]}}" for name in names)
    say("evaluation{columns}", columns=f"{'step':>9}{'loss':>10}{metrics}")
    first = len(lines) - MOST_EVALUATIONS
    for number, line in enumerate(lines):
        is_best = line["step"] == best
        if number >= first or is_best:
            figures = "".join(
                f"{line[name]:>{widths.get(name, 10)}.4f}" for name in ("eval_loss", *names) if name in line
            )
            columns = f"{'':<10}{line['step']:>9}{figures}"
            if is_best:
                say("{columns}  best", columns=columns)
            else:
                say("{columns}", columns=columns)


def say_throughput(
    pace: Pace, device: torch.device, most: int | None, planned: int, processes: int = 1
) -> None:
    """Say how well an accelerator was used, of what is known of it; nothing of a CPU.

    Args:
        pace: of the run, all processes together.
        device: of this process.
        most: bytes that tensors took at once; None where nothing tells.
        planned: bytes that were predicted.
        processes: number of them, of which each has its device.
    """
    if most is None or not pace.examples:
        return
    name, seconds = device_name(device), max(pace.seconds, 1e-9) * processes
    parts = [Localized("{tokens:,.0f} tokens/s", tokens=pace.tokens / seconds)]
    if peak := peak_of(name):
        parts.append(
            Localized(
                "MFU {share:.1%} of {peak:.0f} TFLOP/s (4 operations a parameter and token)",
                share=pace.operations / seconds / peak,
                peak=peak / 1e12,
            )
        )
    parts.append(Localized("most memory {most}, planned {planned}", most=size(most), planned=size(planned)))
    say("{device}: {parts}", device=name, parts=join_messages(parts, "{left}; {right}"))


def operations_of(
    model: Any, token_counts: NDArray[np.int64], samples: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Count the floating-point operations that learning from each example takes, `[examples]`.

    Args:
        model: a MiDashengLM.
        token_counts: decoder tokens of every example, `[examples]`.
        samples: of every example's audio, `[examples]`.
    """
    blocks = (model.decoder.model.layers, model.audio_encoder.blocks)
    decoder, encoder = (sum(_numbers(part) for part in each.modules()) for each in blocks)
    patches = PATCHES_PER_TOKEN * np.array([audio_token_count(each) for each in samples.tolist()])
    return OPERATIONS * (float(decoder) * token_counts + float(encoder) * patches)


def _numbers(module: Any) -> int:
    """Return the numbers in a frozen linear layer, also where they are packed; 0 for anything else."""
    is_counted = isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
    return int(module.in_features * module.out_features) if is_counted else 0
