"""What a person wants to know before the first step of a run, and after its last one: a few plain lines."""

from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.i18n import Text
from mdl_toolkit.training.log import Pace
from mdl_toolkit.training.lora import TargetCount
from mdl_toolkit.training.memory.plan import MemoryPlan
from mdl_toolkit.training.sampler import Sampling
from mdl_toolkit.utils.console import clock, say, warn
from mdl_toolkit.utils.run_folder import LOG, Smooth, read_log

MOST_EVALUATIONS = 10  # shown at the end: the last ones, and the best one
HOUR = 3600.0


# --- before ----------------------------------------------------------------------------------------------


def say_machine(device: torch.device, dtype: torch.dtype, quantization: str | None, processes: int) -> None:
    """Say what computes, and in which numbers."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    numbers = str(dtype).removeprefix("torch.")
    en = f"quantized in {quantization}, computed in {numbers}" if quantization else numbers
    zh = f"{quantization} 量化，以 {numbers} 计算" if quantization else numbers
    more_en, more_zh = (f", {processes} processes", f"，{processes} 个进程") if processes > 1 else ("", "")
    say(
        f"device: {device}{name}{more_en}; base weights: {en}",
        f"设备：{device}{name}{more_zh}；基础权重：{zh}",
    )


def say_data(train_set: ConvertedDataset, eval_set: ConvertedDataset | None) -> None:
    """Say how much there is to learn, and to evaluate on."""
    amount = _amount(train_set)
    en, zh = f"training data: {amount.en}", f"训练数据：{amount.zh}"
    if eval_set is not None:
        amount = _amount(eval_set)
        en, zh = f"{en}; evaluation data: {amount.en}", f"{zh}；评估数据：{amount.zh}"
    say(en, zh)


def _amount(dataset: ConvertedDataset) -> Text:
    rows, seconds = len(dataset), float(dataset.samples.sum()) / SAMPLE_RATE
    hours = f"{seconds / HOUR:.2f}" if seconds >= 0.1 * HOUR else f"{seconds / HOUR:.2g}"
    return Text(f"{rows:,} rows, {hours} hours of audio", f"{rows:,} 行，{hours} 小时音频")


def say_steps(options: TrainOptions, sampling: Sampling, total: int) -> None:
    """Say how many steps there are, and what each consists of."""
    factors = f"{sampling.batch_size} x {sampling.accumulation} x {sampling.processes}"
    say(
        f"steps: {total:,} in {options.num_epochs:g} epochs of {sampling.steps_per_epoch:,}; "
        f"effective batch: {sampling.effective} = {factors} (batch x accumulation x processes)",
        f"步数：{options.num_epochs:g} 轮共 {total:,} 步，每轮 {sampling.steps_per_epoch:,} 步；"
        f"有效批次：{sampling.effective} = {factors}（批次 x 累积 x 进程）",
    )
    if options.warmup_steps >= total:
        warn(
            f"--warmup-steps {options.warmup_steps:,} is not less than the run's {total:,} steps: the "
            f"learning rate never gets beyond {(total - 1) / options.warmup_steps:.2g} of --lr",
            f"--warmup-steps {options.warmup_steps:,} 不小于总步数 {total:,}："
            f"学习率最高只达到 --lr 的 {(total - 1) / options.warmup_steps:.2g}",
        )


def say_memory(plan: MemoryPlan) -> None:
    """Say how much memory is going to be needed and how much is free, and warn if that does not do."""
    for line in plan.lines():
        say(line.en, line.zh)
    if warning := plan.warning():
        warn(warning.en, warning.zh)


def say_targets(counts: list[TargetCount], model: Any) -> None:
    """Say what of a `PeftModel` trains: each target, and the share of all parameters."""
    trained, there = model.get_nb_trainable_parameters()  # knows that quantized ones are packed
    for count in counts:
        share = f"{count.parameters / there:.2%}"
        say(
            f"training {count.target}: {count.layers} layers, {count.parameters:,} parameters ({share})",
            f"训练 {count.target}：{count.layers} 层，{count.parameters:,} 个参数（{share}）",
        )
    say(
        f"training {trained:,} of {there:,} parameters ({trained / there:.2%})",
        f"共训练 {there:,} 个参数中的 {trained:,} 个（{trained / there:.2%}）",
    )
    tied = bool(model.get_base_model().config.tie_word_embeddings)
    if tied and {"embed_tokens", "lm_head"} & {count.target for count in counts}:
        say(
            "this model ties embed_tokens and lm_head: training one trains both",
            "该模型的 embed_tokens 与 lm_head 共享权重：训练其一即同时训练两者",
        )


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
    smooth, last = Smooth(), lines[-1]
    losses = [smooth.add(line["loss"]) for line in lines]
    say(
        f"trained: {last['step']:,} steps, {last['epoch']:.3g} epochs; smoothed loss: "
        f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last",
        f"训练：{last['step']:,} 步，{last['epoch']:.3g} 轮；平滑损失：开始时 {losses[0]:.4f}，"
        f"结束时 {losses[-1]:.4f}",
    )


def _say_pace(pace: Pace) -> None:
    seconds = max(pace.seconds, 1e-9)
    speed, hours, waited = pace.rows / seconds, pace.audio / seconds, f"{pace.waited / seconds:.1%}"
    say(
        f"time: {clock(pace.seconds)}; {speed:.3g} samples/s, {hours:.3g} hours of audio in an hour, "
        f"{waited} of the time waiting for data",
        f"时间：{clock(pace.seconds)}；每秒 {speed:.3g} 个样本，每小时 {hours:.3g} 小时音频，"
        f"等待数据占 {waited}",
    )


def _say_evaluations(lines: list[dict[str, Any]], best: int | None) -> None:
    if not lines:
        return
    names = [name for name in lines[-1] if name not in ("step", "eval_loss", "eval_tokens", "epoch")]
    metrics = "".join(f"{name.removeprefix('eval_'):>10}" for name in names)
    say(f"{'evaluation':<10}{'step':>9}{'loss':>10}{metrics}", f"{'评估':<8}{'step':>9}{'loss':>10}{metrics}")
    left_out = len(lines) - MOST_EVALUATIONS
    for number, line in enumerate(lines):
        if number >= left_out or line["step"] == best:
            figures = "".join(f"{line[name]:>10.4f}" for name in ("eval_loss", *names) if name in line)
            is_best = line["step"] == best
            say(
                f"{'':<10}{line['step']:>9}{figures}{'  best' if is_best else ''}",
                f"{'':<10}{line['step']:>9}{figures}{'  最佳' if is_best else ''}",
            )
