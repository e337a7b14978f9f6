"""Options to Trainer to result: what is checked and prepared before, and what is written after.

The loss of an optimizer step is the mean over all supervised tokens of its effective batch, however that is
split into batches and accumulation steps, and into processes where these divide the rows evenly (otherwise
accelerate fills the last batch up with rows of the first).
"""

import dataclasses
import difflib
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from mdl_toolkit.batching import Collator
from mdl_toolkit.checkpoints import FINAL, WORK, set_aside, steps_of, to_resume
from mdl_toolkit.console import is_first_process, progress, say, warn
from mdl_toolkit.conversion import convert_rows, read_rows
from mdl_toolkit.dataset import ConvertedDataset
from mdl_toolkit.errors import DatasetError, InputError, ToolkitError, UsageError
from mdl_toolkit.export import export
from mdl_toolkit.language import Text
from mdl_toolkit.legacy import AnyDataset, LegacyDataset, is_legacy
from mdl_toolkit.loading import (
    TextFiles,
    best_device,
    check_trainable,
    choose_dtype,
    explaining_memory,
    find_model,
    load_model,
    need,
    quiet_libraries,
    read_text_files,
)
from mdl_toolkit.lora import TargetCount, add_adapters, check_resumable
from mdl_toolkit.options import ConversionOptions, TrainOptions, spelling
from mdl_toolkit.outputs import check_apart, removing_empty
from mdl_toolkit.settings import SETTINGS_FILE, to_yaml
from mdl_toolkit.tokens import Encoder
from mdl_toolkit.trainer import Schedule, ScheduleCallback, ToolkitTrainer

MEMORY_REMEDY = Text(
    "lower --batch-size and raise --gradient-accumulation-steps, or try --quantization 4bit",
    "请减小 --batch-size 并增大 --gradient-accumulation-steps，或使用 --quantization 4bit",
)
PRIVATE = ".dataset"  # in the output folder, while a run lasts: what its CSVs were converted to


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    Attributes:
        final: folder of the result.
        steps: optimizer steps made, those before a resumption included.
        train_loss: mean over the run.
        eval_loss: over the supervised tokens of the evaluation set, at the end; None without one.
    """

    final: Path
    steps: int
    train_loss: float
    eval_loss: float | None


def train(options: TrainOptions) -> TrainResult:
    """Fine-tune a model and write the result to `final/` in the output folder.

    Raises:
        ToolkitError: anything the user can put right, before weights are loaded wherever that is possible.
    """
    check_trackers(options.report_to)
    if options.quantization is not None:
        need("bitsandbytes", "quantization", "--quantization")
    output = Path(options.output)
    _check_places(output, options)
    resume = to_resume(output, options.resume_from_checkpoint)
    if resume is not None:
        check_resumable(resume, options.train_target, options.lora_rank)
    private = output / PRIVATE
    with removing_empty(output):
        return _prepare_and_run(options, private, resume)


def _prepare_and_run(options: TrainOptions, private: Path, resume: Path | None) -> TrainResult:
    try:
        with _first_process_first():
            files, train_set, eval_set = _open_data(options, private)
            base = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=True)
        with explaining_memory(MEMORY_REMEDY):
            return _run(options, base, Encoder(files), train_set, eval_set, resume)
    finally:
        if is_first_process():
            shutil.rmtree(private, ignore_errors=True)


def _run(
    options: TrainOptions,
    base: Path,
    encoder: Encoder,
    train_set: AnyDataset,
    eval_set: AnyDataset | None,
    resume: Path | None,
) -> TrainResult:
    output = Path(options.output)
    schedule = Schedule.of(len(train_set), _processes(), options)
    model = _trainable_model(options, base)
    _prepare_output(output, options, resume)
    with progress("training", "训练中", schedule.total) as shown:
        callback = ScheduleCallback(schedule, shown)
        collator = Collator(encoder.pad_id)
        trainer = ToolkitTrainer(options, schedule, callback, model, collator, train_set, eval_set, resume)
        done = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if resume is not None and steps_of(resume) >= schedule.total:
            _warn_finished(resume)
            if eval_set is not None:
                trainer.evaluate()
    final = output / FINAL
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        left = output / f"checkpoint-{done.global_step}"
        export(base, left if resume is None or left.is_dir() else resume, final, options)
        shutil.rmtree(output / WORK, ignore_errors=True)
    say(
        f"done: {done.global_step} steps; the result is in {final}",
        f"完成：{done.global_step} 步；结果位于 {final}",
    )
    return TrainResult(final, done.global_step, done.training_loss, trainer.last_eval_loss)


def _warn_finished(resume: Path) -> None:
    warn(
        f"{resume} is the end of its run: nothing was left to train, its result is written again",
        f"{resume} 已是训练的终点：没有需要继续训练的步骤，仅重新输出结果",
    )


# --- before any weight is loaded -----------------------------------------------------------------------


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that transformers does not know or that are not installed (rule 34).

    Raises:
        UsageError: a name is unknown, or `all` or `none` do not stand alone.
        ToolkitError: a tracker's package is missing.
    """
    if not names:
        return
    from transformers.integrations import integration_utils

    known = {*integration_utils.INTEGRATION_TO_CALLBACK, "all", "none"}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            en, zh = (f"; did you mean {close[0]}?", f"；是否想写 {close[0]}？") if close else ("", "")
            listed = ", ".join(sorted(known))
            raise UsageError(
                f"--report-to {name}: unknown tracker{en} (known: {listed})",
                f"--report-to {name}：未知的平台{zh}（可用：{listed}）",
            )
    if len(names) > 1 and {"all", "none"} & set(names):
        raise UsageError("--report-to: all and none stand alone", "--report-to：all 和 none 只能单独使用")
    missing = set(names) - {"all", "none"} - set(integration_utils.get_available_reporting_integrations())
    if missing:
        listed = ", ".join(sorted(missing))
        raise ToolkitError(
            f"--report-to {listed}: not installed; pip install it, or leave it out",
            f"--report-to {listed}：尚未安装；请先 pip install，或去掉该选项",
        )


def _check_places(output: Path, options: TrainOptions) -> None:
    if output.is_file():
        raise InputError(f"--output {output}: a file is there", f"--output {output}：该位置是一个文件")
    if Path(options.model_name).is_dir():
        check_apart(output, Path(options.model_name))
    for option in ("train_dataset", "eval_dataset"):
        value = getattr(options, option)
        if value is None:
            continue
        if not Path(value).exists():
            name = spelling(option)
            raise InputError(f"{name} {value}: no such file or folder", f"{name} {value}：没有该文件或目录")
        inside = Path(value).resolve()
        if inside == output.resolve() or inside in output.resolve().parents:
            check_apart(output, Path(value))


def _open_data(options: TrainOptions, private: Path) -> tuple[TextFiles, AnyDataset, AnyDataset | None]:
    """The model's text side and both datasets; a CSV is converted into the run's private folder."""
    # Of a local folder everything is here to be checked at once; of a hub's, weights wait for the data.
    is_local = Path(options.model_name).is_dir()
    folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=is_local)
    check_trainable(folder)
    files = read_text_files(folder)
    _warn_ignored(options)
    train_set = _open_set(options.train_dataset, options, files, private / "train")
    if not len(train_set):
        raise DatasetError(f"{options.train_dataset}: no rows", f"{options.train_dataset}：没有任何行")
    if options.eval_dataset is None:
        return files, train_set, None
    return files, train_set, _open_set(options.eval_dataset, options, files, private / "eval")


def _open_set(path: str, options: TrainOptions, files: TextFiles, private: Path) -> AnyDataset:
    if Path(path).is_dir():
        if is_legacy(Path(path)):
            return LegacyDataset(Path(path), Encoder(files))
        dataset = ConvertedDataset(Path(path))
        dataset.record.check_model(files, path)
        return dataset
    if is_first_process():
        manifest = read_rows(path, options, needs_prediction=True)
        convert_rows(manifest, private, Encoder(files), options, reuse=True)
    return ConvertedDataset(private)


def _warn_ignored(options: TrainOptions) -> None:
    """Name conversion options that were given although all data are converted already (rule 24)."""
    paths = [path for path in (options.train_dataset, options.eval_dataset) if path is not None]
    if not all(Path(path).is_dir() for path in paths):
        return
    given = [
        spelling(field.name)
        for field in dataclasses.fields(ConversionOptions)
        if field.name not in ("from_modelscope", "num_workers")
        and getattr(options, field.name) != field.default
    ]
    if given:
        names = ", ".join(given)
        warn(f"the data are converted already: {names} ignored", f"数据已经转换：忽略 {names}")


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _first_process_first() -> AbstractContextManager[None]:
    """With several processes, let the first do the work alone; the others find it done."""
    if _processes() == 1:
        return nullcontext()
    from accelerate import PartialState

    # The others wait here while the first one converts; the usual ten minutes would not do.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))
    return state.main_process_first()


# --- the model and the run -----------------------------------------------------------------------------


def _prepare_output(output: Path, options: TrainOptions, resume: Path | None) -> None:
    """Set aside what is not resumed, and write the settings down."""
    if not is_first_process():
        return
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output / WORK, ignore_errors=True)
    if options.resume_from_checkpoint is True and resume is None:
        warn(
            f"no complete checkpoint in {output}: starting afresh",
            f"{output} 中没有完整的检查点：从头开始训练",
        )
    if resume is None and (place := set_aside(output)):
        say(f"what an earlier run left is now in {place}", f"先前训练的产物已移至 {place}")
    (output / SETTINGS_FILE).write_text(to_yaml(options), encoding="utf-8")


def _trainable_model(options: TrainOptions, base: Path) -> Any:
    quiet_libraries()
    set_seed(options.seed)
    model = load_model(
        base, dtype=choose_dtype(options.bf16), device=best_device(), quantization=options.quantization
    )
    name = str(base.resolve()) if Path(options.model_name).is_dir() else options.model_name
    peft_model, counts = add_adapters(
        model, options.train_target, rank=options.lora_rank, alpha=options.lora_alpha,
        dropout=options.lora_dropout, base_name=name,
    )  # fmt: skip
    _say_counts(counts, tied=bool(model.config.tie_word_embeddings))
    return peft_model


def _say_counts(counts: list[TargetCount], *, tied: bool) -> None:
    for count in counts:
        say(
            f"training {count.target}: {count.layers} layers, {count.parameters:,} parameters",
            f"训练 {count.target}：{count.layers} 层，{count.parameters:,} 个参数",
        )
    if tied and {"embed_tokens", "lm_head"} & {count.target for count in counts}:
        say(
            "this model ties embed_tokens and lm_head: training one trains both",
            "该模型的 embed_tokens 与 lm_head 共享权重：训练其一即同时训练两者",
        )
