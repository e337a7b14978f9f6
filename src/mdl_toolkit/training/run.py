"""Options to training to result: what is checked and prepared before, and what is written after.

How training itself goes is said in `trainer`.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.options import spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.data.collate import Collator, SampleSource
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import ChatTokenizer, prefix_sample
from mdl_toolkit.data.warnings import LossWatch, advise
from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.reporting.plots import plot
from mdl_toolkit.reporting.report import report_training
from mdl_toolkit.training.answer_eval import AnswerEvaluator
from mdl_toolkit.training.checkpoints import Checkpoint, checkpoint_at, save_state, set_aside, to_resume
from mdl_toolkit.training.datasets import FEATURES, PRIVATE, Converted, open_data
from mdl_toolkit.training.evaluator import Evaluator
from mdl_toolkit.training.feature_cache import FeatureCache, check_frozen
from mdl_toolkit.training.gradient_checkpointing import KeptBlocks
from mdl_toolkit.training.log import Pace, RunLog
from mdl_toolkit.training.lora import TargetCount, add_adapters, check_resumable
from mdl_toolkit.training.memory.plan import plan_memory
from mdl_toolkit.training.result import origin_of, write_result
from mdl_toolkit.training.resume import check_steps, say_resumed, warn_changed
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.schedule import Schedule
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.training.summary import (
    say_data,
    say_machine,
    say_memory,
    say_results,
    say_steps,
    say_targets,
)
from mdl_toolkit.training.trackers import Trackers, check_trackers
from mdl_toolkit.training.trainer import Outcome, Trainer
from mdl_toolkit.utils.console import is_first_process, progress, say, warn
from mdl_toolkit.utils.distributed import World, join_world
from mdl_toolkit.utils.files import check_apart, claim_folder, recover_outputs, report_write_errors
from mdl_toolkit.utils.launcher import warn_of_idle_gpus
from mdl_toolkit.utils.run_folder import LOG, PLOT, REPORT
from mdl_toolkit.utils.signals import Interruption, raise_if_interrupted
from mdl_toolkit.weights.loading import (
    best_device,
    choose_dtype,
    explaining_memory,
    load_model,
    quiet_libraries,
)
from mdl_toolkit.weights.provenance import Provenance
from mdl_toolkit.weights.resolve import (
    ADAPTER_CONFIG,
    BITSANDBYTES,
    FINAL,
    MODEL_CONFIG,
    find_model,
    recorded_name,
    require_package,
)

MEMORY_REMEDY = Localized(
    "lower --batch-size and raise --gradient-accumulation-steps, or try --quantization 4bit"
)


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

    Example:
        ```python
        from mdl_toolkit import TrainOptions, train

        result = train(
            TrainOptions(
                train_dataset="train.csv", output="run", model_name="midashenglm-7b", base_dir="recordings"
            )
        )
        print(result.final, result.train_loss)
        ```
    """
    check_trackers(options.report_to)
    check_frozen(options)
    if options.quantization is not None:
        require_package(BITSANDBYTES, "quantization", "--quantization")
    output = Path(options.output)
    _check_places(output, options)
    # Of several processes the first one writes.
    with Interruption(), claim_folder(output) if is_first_process() else nullcontext():
        if is_first_process():
            with report_write_errors(f"--output {output}", InputError):
                _clear_up(output)
        return _prepare_and_run(options, output / PRIVATE)


def _prepare_and_run(options: TrainOptions, private: Path) -> TrainResult:
    with join_world() as world:
        resume = _to_resume(options, world)
        converted = Converted(private)
        with converted.kept() if world.is_first else nullcontext():
            if not world.is_first:
                world.wait()  # for the first one, which converts
            files, train_set, eval_set = open_data(options, private)
            if world.is_first:
                advise(train_set, eval_set)
            base = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=True)
            if world.is_first:
                world.wait()
            with explaining_memory(MEMORY_REMEDY):
                return _run(
                    _plan(options, base, ChatTokenizer(files), train_set, eval_set, resume, world, converted)
                )


def _to_resume(options: TrainOptions, world: World) -> Checkpoint | None:
    """The checkpoint to go on from, if any; it fits, as far as that can be told without weights."""
    resume = to_resume(Path(options.output), options.resume_from_checkpoint)
    if resume is not None:
        check_resumable(resume.folder, options.train_target, options.lora_rank)
        check_steps(resume, options, world)
        warn_changed(resume, options)
    return resume


@dataclass(frozen=True)
class _Run:
    """What is known of a run before any weight is loaded."""

    options: TrainOptions
    base: Path
    origin: Provenance
    tokenizer: ChatTokenizer
    train_set: ConvertedDataset
    eval_set: ConvertedDataset | None
    resume: Checkpoint | None
    world: World
    sampler: BatchSampler
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    converted: Converted


def _plan(
    options: TrainOptions,
    base: Path,
    tokenizer: ChatTokenizer,
    train_set: ConvertedDataset,
    eval_set: ConvertedDataset | None,
    resume: Checkpoint | None,
    world: World,
    converted: Converted,
) -> _Run:
    sampler = BatchSampler(
        train_set.token_counts,
        train_set.supervised_counts,
        options.batch_size,
        options.gradient_accumulation_steps,
        world.size,
        options.seed,
    )
    schedule = Schedule.of(sampler.steps_per_epoch, options)
    origin = origin_of(options, base, train_set, eval_set)
    return _Run(
        options, base, origin, tokenizer, train_set, eval_set, resume, world, sampler, schedule,
        best_device(), choose_dtype(options.bf16), converted,
    )  # fmt: skip


def _run(run: _Run) -> TrainResult:
    options, output = run.options, Path(run.options.output)
    warn_of_idle_gpus(run.world.size, options.COMMAND)
    say_machine(run.device, run.dtype, options.quantization, run.world.size)
    say_data(run.train_set, run.eval_set)
    say_steps(options, run.sampler, run.schedule.total)
    beginning = run.tokenizer.shared_prefix_length(
        run.train_set.tokens(row).input_ids for row in prefix_sample(len(run.train_set))
    )
    plan = plan_memory(
        run.base, options, run.sampler, run.train_set.audio_lengths, beginning, run.device, run.dtype
    )
    say_memory(plan)
    done, pace = _train(run, plan.kept)
    # From here on the model that was trained is gone: what is written may be loaded to be looked at.
    if run.world.is_first:
        with _saying_how_to_go_on():
            raise_if_interrupted()
            write_result(options, run.base, run.origin, done, run.resume, run.train_set)
        say_results(output, done.best.step, pace)
        plot(output)
        report_training(output)
    run.world.wait()
    final = output / FINAL
    say("done: {steps} steps; the result is in {final}", steps=done.steps, final=final)
    return TrainResult(final, done.steps, done.loss, done.eval_loss)


@contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    """When what is trained does not become a result: none of it need be trained again."""
    try:
        yield
    except BaseException:
        say("every step is made and saved; to write the result: the same with --resume-from-checkpoint true")
        raise


def _train(run: _Run, kept: KeptBlocks) -> tuple[Outcome, Pace]:
    """Load the model and train it; neither it nor its optimizer outlives the call."""
    options, output, schedule = run.options, Path(run.options.output), run.schedule
    repeated = _repeated(options, schedule, run.train_set, run.eval_set)
    cache = FeatureCache(output / PRIVATE / FEATURES, options, run.base, run.world, repeated)
    model, counts = _trainable_model(options, run.base, run.device, run.dtype)
    say_targets(counts, model)
    rows: SampleSource = cache.featured(run.train_set, model)
    eval_rows = None if run.eval_set is None else cache.featured(run.eval_set, model)
    with progress(schedule.total, "training") as shown:
        trackers = Trackers(options, schedule.total)
        watch = LossWatch(schedule.total, schedule.warmup, options.lr)
        log = RunLog(output, shown, trackers, run.sampler, run.train_set.audio_lengths / SAMPLE_RATE, watch)
        answers = AnswerEvaluator.of(options, run.eval_set, run.tokenizer, run.world)
        forward = ForwardPass(model, Collator(run.tokenizer.pad_id), run.device, run.dtype)
        evaluator = Evaluator(options, schedule, forward, eval_rows, answers, run.world, log)
        trainer = Trainer(options, schedule, run.sampler, rows, forward, evaluator, run.world, log, kept)
        if run.resume is not None:
            trainer.resume(run.resume)
            say_resumed(run.resume, schedule.total, evaluator.best, options.early_stopping_patience)
        _prepare_output(run)
        _bring_the_best(run, evaluator.best.step)
        run.converted.is_wanted = True
        log.begin(trainer.step)
        raise_if_interrupted()
        done = trainer.run()
        log.close()
        return done, log.pace


def _repeated(
    options: TrainOptions, schedule: Schedule, train_set: ConvertedDataset, eval_set: ConvertedDataset | None
) -> list[ConvertedDataset]:
    """Of what `--cache-audio-features` keeps features: whatever is read more than once."""
    if not options.cache_audio_features:
        return []
    found = [train_set] if schedule.total > schedule.per_epoch else []
    if eval_set is not None and len(schedule.evaluating) > 1:
        found.append(eval_set)
    if not found:
        warn("every row is computed only once: --cache-audio-features ignored")
    return found


# --- before any weight is loaded -----------------------------------------------------------------------


def _check_places(output: Path, options: TrainOptions) -> None:
    if output.is_file():
        raise InputError("--output {output}: a file is there", output=output)
    if any((output / name).exists() for name in (ADAPTER_CONFIG, MODEL_CONFIG)):
        raise InputError(
            "--output {output}: a checkpoint or a model is there; give the folder of a run, or a new one",
            output=output,
        )
    if Path(options.model_name).is_dir():
        check_apart(output, Path(options.model_name))
    for option in ("train_dataset", "eval_dataset"):
        value = getattr(options, option)
        if value is None:
            continue
        if not Path(value).exists():
            name = spelling(option)
            raise InputError("{name} {value}: no such file or folder", name=name, value=value)
        inside = Path(value).resolve()
        if inside == output.resolve() or inside in output.resolve().parents:
            check_apart(output, Path(value))


# --- the model and the run -----------------------------------------------------------------------------


def _prepare_output(run: _Run) -> None:
    """Set aside what is not resumed, and write the settings down, and where the checkpoints come from."""
    options, output = run.options, Path(run.options.output)
    if not run.world.is_first:
        return
    if options.resume_from_checkpoint is True and run.resume is None:
        warn("no complete checkpoint in {output}: starting afresh", output=output)
    with report_write_errors(f"--output {output}", InputError):
        if place := set_aside(output, run.resume):
            say("what an earlier run left is now in {place}", place=place)
        (output / SETTINGS_FILE).write_text(to_yaml(options), encoding="utf-8")
        run.origin.write(output)


def _bring_the_best(run: _Run, step: int | None) -> None:
    """Copy the best checkpoint so far from where it is: a later resumption looks in this folder alone."""
    output, resume = Path(run.options.output), run.resume
    if not run.world.is_first or resume is None or step is None or not run.options.keep_best:
        return
    there = checkpoint_at(output, step, resume)
    if there.resolve() == (output / f"checkpoint-{step}").resolve():
        return
    try:
        save_state(output, Checkpoint.at(there), {})
    except OSError as problem:
        reason = problem.strerror or str(problem)
        warn(
            "{checkpoint}, the best so far, cannot be copied: {reason}; after an interruption it does not "
            "count",
            checkpoint=there,
            reason=reason,
        )


def _clear_up(output: Path) -> None:
    """Remove what a killed run left half-written; what was away for something new is put back."""
    recover_outputs(output, FINAL, LOG, PLOT, REPORT, "checkpoint-*")
    # As versions before 2026-12 left it.
    for away in output.glob(".saving/checkpoint-*.old"):
        if not (output / away.stem).exists():
            away.rename(output / away.stem)
    shutil.rmtree(output / ".saving", ignore_errors=True)
    (output / "log.partial").unlink(missing_ok=True)


def _trainable_model(
    options: TrainOptions, base: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Any, list[TargetCount]]:
    quiet_libraries()
    torch.manual_seed(options.seed)
    model = load_model(base, dtype=dtype, device=device, quantization=options.quantization)
    name = recorded_name(options.model_name, base)
    return add_adapters(
        model, options.train_target, rank=options.lora_rank, alpha=options.lora_alpha,
        dropout=options.lora_dropout, base_name=name,
    )  # fmt: skip
