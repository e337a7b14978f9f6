"""Run a training: check and prepare everything, train, write the result. `trainer` has the loop itself."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.collate import Collator, SampleSource
from mdl_toolkit.data.concat import ConcatDataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import ChatTokenizer, prefix_sample
from mdl_toolkit.data.warnings import LossWatch, advise, warn_beyond_positions
from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.reporting.plots import plot
from mdl_toolkit.reporting.report import report_training
from mdl_toolkit.training.answer_eval import AnswerEvaluator
from mdl_toolkit.training.checkpoints import Checkpoint, refusing_unloadable, to_resume
from mdl_toolkit.training.datasets import FEATURES, PRIVATE, Converted, mixture_of, open_data
from mdl_toolkit.training.evaluator import Evaluator
from mdl_toolkit.training.feature_cache import FeatureCache, check_frozen, sets_to_cache
from mdl_toolkit.training.gradient_checkpointing import KeptBlocks
from mdl_toolkit.training.log import Pace, RunLog
from mdl_toolkit.training.lora import TargetCount, add_adapters, check_variant
from mdl_toolkit.training.memory.plan import may_quantize, plan_memory, stored_quantization
from mdl_toolkit.training.memory.sharding import (
    check_sharding,
    load_to_shard,
    shard_blocks,
)
from mdl_toolkit.training.optimization.optimizer import check_tied_rates, learning_rates
from mdl_toolkit.training.optimization.schedule import Schedule, check_warmup, warn_of_every_step
from mdl_toolkit.training.output import check_run_folder, prepare_output, tidy_output
from mdl_toolkit.training.result import origin_of, write_result
from mdl_toolkit.training.resume import check_data, check_options, compare_options, say_resumed
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.training.summary import (
    operations_of,
    say_data,
    say_machine,
    say_memory,
    say_recipe,
    say_results,
    say_steps,
    say_targets,
    say_throughput,
    warn_of_little,
)
from mdl_toolkit.training.trackers import Trackers, check_trackers
from mdl_toolkit.training.trainer import Outcome, Trainer
from mdl_toolkit.training.warm_start import load_start, say_start, take_over
from mdl_toolkit.utils.console import is_first_process, progress, say
from mdl_toolkit.utils.device import best_device, fast_float32, peak_memory, reset_peak_memory
from mdl_toolkit.utils.distributed import World, join_world
from mdl_toolkit.utils.files import claim_folder, report_write_errors
from mdl_toolkit.utils.launcher import warn_of_idle_gpus
from mdl_toolkit.utils.run_folder import LOG, read_log
from mdl_toolkit.utils.signals import Interruption, raise_if_interrupted
from mdl_toolkit.utils.worker_pool import end_unguarded_script
from mdl_toolkit.weights.loading import (
    base_of,
    choose_dtype,
    explaining_memory,
    load_model,
    quiet_libraries,
    say_loading,
)
from mdl_toolkit.weights.provenance import Provenance
from mdl_toolkit.weights.resolve import (
    BITSANDBYTES,
    FINAL,
    find_model,
    quantized_by,
    recorded_name,
    require_package,
)

OOM_REMEDY = Localized("lower --batch-size and raise --gradient-accumulation-steps")
QUANTIZED_REMEDY = Localized("{remedy}, or try --quantization 4bit", remedy=OOM_REMEDY)
PROOF_REMEDY = Localized("close other programs, or leave out the result's proof with --verify false")
SHARDED_REMEDY = Localized(
    "lower --batch-size and raise --gradient-accumulation-steps, or start more processes"
)


@dataclass(frozen=True)
class TrainResult:
    """Hold the result of a training.

    Attributes:
        final: folder of the result.
        steps: optimizer steps made, those before a resumption included.
        train_loss: mean over the run's steps.
        eval_loss: over the supervised tokens of the evaluation set, at the end; None without one.
    """

    final: Path
    steps: int
    train_loss: float
    eval_loss: float | None


def train(options: TrainOptions) -> TrainResult:
    """Fine-tune a model and write the result to `final/` in the output folder.

    Raises:
        ToolkitError: anything that the user can put right; wherever possible, before weights are loaded.

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
    end_unguarded_script()
    check_trackers(options.report_to)
    options, start = take_over(options)
    check_frozen(options)
    check_sharding(options, options.quantization)
    check_variant(options, options.quantization)
    check_warmup(options)
    check_tied_rates(options)
    warn_of_every_step(options)
    if options.quantization is not None:
        require_package(BITSANDBYTES, "quantization", "--quantization")
    if options.optimizer != "adamw":
        require_package(BITSANDBYTES, "quantization", f"--optimizer {options.optimizer}")
    output = Path(options.output)
    check_run_folder(output, options)
    # Of several processes the first one writes.
    with Interruption(), claim_folder(output) if is_first_process() else nullcontext():
        if is_first_process():
            with report_write_errors(f"--output {output}", InputError):
                tidy_output(output)
        with join_world(is_sharding=options.shard_weights) as world:
            check_options(world, options)
            return _prepare_and_run(options, start, world)


@dataclass(frozen=True)
class _RunPlan:
    """Hold what is known of a run before any weight is loaded."""

    options: TrainOptions
    world: World
    converted: Converted
    resume: Checkpoint | None
    base: Path
    start: Path | None
    origin: Provenance
    tokenizer: ChatTokenizer
    train_set: ConvertedDataset
    eval_set: ConvertedDataset | None
    sampler: BatchSampler
    schedule: Schedule


def _prepare_and_run(options: TrainOptions, start: Path | None, world: World) -> TrainResult:
    """Open the data, find the base and plan the steps in all processes; then run."""
    resume = to_resume(Path(options.output), options.resume_from_checkpoint)
    if resume is not None:
        with refusing_unloadable(resume):
            compare_options(resume, options, world)
        # A log that cannot be gone on with is told now, not after the last step.
        if (log := Path(options.output) / LOG).is_file():
            read_log(log)
    private = Path(options.output) / PRIVATE
    converted = Converted(private)
    with converted.kept() if world.is_first else nullcontext():
        # The others wait for the first process, which converts.
        if not world.is_first:
            world.wait()
        files, train_set, eval_set = open_data(options, private)
        if world.is_first:
            advise(train_set, eval_set)
        name, hub = options.model_name, options.from_modelscope
        if start is None:
            base = find_model(name, from_modelscope=hub, weights=True)
        else:
            base = base_of(start, from_modelscope=hub, name=name)
        check_sharding(options, quantized_by(base))
        check_variant(options, stored_quantization(base))
        if world.is_first:
            world.wait()
        remedy = SHARDED_REMEDY if world.is_sharding else OOM_REMEDY
        if may_quantize(options, stored_quantization(base)):
            remedy = QUANTIZED_REMEDY
        with explaining_memory(remedy):
            sampler = BatchSampler(
                train_set.token_counts,
                train_set.supervised_counts,
                options.batch_size,
                options.gradient_accumulation_steps,
                world.size,
                options.seed,
                mixture_of(options, train_set),
            )
            schedule = Schedule.of(sampler.steps_per_epoch, options)
            data, tokenizer = (train_set, eval_set), ChatTokenizer(files)
            origin = origin_of(options, base, start, *data, sampler.mixture)
            check_data(world, origin, choose_dtype(options.bf16), *data)
            models = base, start, origin, tokenizer
            return _run(_RunPlan(options, world, converted, resume, *models, *data, sampler, schedule))


def _run(run: _RunPlan) -> TrainResult:
    """Say what a run is going to do, train, and write the result."""
    options, output, train_set = run.options, Path(run.options.output), run.train_set
    device, dtype = best_device(), choose_dtype(options.bf16)
    warn_of_idle_gpus(run.world.size, options.COMMAND)
    say_machine(device, dtype, options.quantization, run.world.size)
    if run.start is not None:
        say_start(options)
    say_data(train_set, run.eval_set, run.sampler.mixture)
    say_steps(options, run.sampler, run.schedule)
    say_recipe(options, run.schedule.warmup)
    warn_of_little(options, run.schedule, train_set)
    warn_beyond_positions(run.base, train_set, Localized("cut the recordings by `start` and `end`"))
    examples = (train_set.tokens(index).input_ids for index in prefix_sample(len(train_set)))
    prefix = run.tokenizer.shared_prefix_length(examples)
    plan = plan_memory(
        run.base, options, run.sampler, train_set.audio_lengths, prefix, device, dtype, run.start
    )
    say_memory(plan)
    reset_peak_memory(device)
    done, pace = _train(run, plan.kept, device, dtype)
    most = peak_memory(device)
    # From here on the model that was trained is gone: what is written may be loaded to be verified.
    if run.world.is_first:
        try:
            raise_if_interrupted()
            with explaining_memory(PROOF_REMEDY):
                write_result(options, run.base, run.origin, done, train_set)
        except BaseException:
            say(
                "every step is made and saved; to write the result: the same with "
                "--resume-from-checkpoint true (and --verify false, to leave out its proof)"
            )
            raise
        say_results(output, done.best.step, pace)
        say_throughput(pace, device, most, plan.total, run.world.size)
        plot(output)
        report_training(output)
    run.world.wait()
    final = output / FINAL
    say("done: {steps} {steps:step|steps}; the result is in {final}", steps=done.steps, final=final)
    return TrainResult(final, done.steps, done.loss, done.eval_loss)


def _train(run: _RunPlan, kept: KeptBlocks, device: torch.device, dtype: torch.dtype) -> tuple[Outcome, Pace]:
    """Load the model and train it; neither it nor its optimizer outlives the call."""
    options, output, schedule, world = run.options, Path(run.options.output), run.schedule, run.world
    cached = sets_to_cache(options, schedule, run.sampler, run.train_set, run.eval_set)
    cache = FeatureCache(output / PRIVATE / FEATURES, options, run.base, world, cached)
    is_sharding = world.is_sharding
    # Other processes get what the first one made, and a run that goes on reads it.
    decomposes = world.is_first and run.resume is None
    model, counts = trainable_model(
        options, run.base, device, dtype, run.start, is_on_host=is_sharding, decomposes=decomposes
    )
    say_targets(counts, model)
    if options.lora_variant == "pissa":
        world.take_first([each for each in model.parameters() if each.requires_grad])
    examples: SampleSource = cache.precomputed(run.train_set, model)
    eval_examples = None if run.eval_set is None else cache.precomputed(run.eval_set, model)
    if is_sharding:
        shard_blocks(model, world, device, dtype)
    with progress(schedule.total, "training") as shown:
        # They begin when what an earlier run left, their files too, is set aside.
        trackers = partial(Trackers, options, schedule.total)
        watch = LossWatch(schedule.total, schedule.warmup, max(learning_rates(options).values()))
        samples = run.train_set.audio_lengths
        operations = operations_of(model.get_base_model(), run.train_set.token_counts, samples)
        log = RunLog(output, shown, trackers, run.sampler, samples / SAMPLE_RATE, watch, operations)
        answers = AnswerEvaluator.of(options, run.eval_set, run.tokenizer, world)
        forward = ForwardPass(model, Collator(run.tokenizer.pad_id), device, dtype)
        parts = run.eval_set.indices if isinstance(run.eval_set, ConcatDataset) else {}
        evaluator = Evaluator(options, schedule, forward, eval_examples, answers, world, log, parts)
        trainer = Trainer(options, schedule, run.sampler, examples, forward, evaluator, world, log, kept)
        if run.resume is not None:
            with refusing_unloadable(run.resume):
                trainer.resume(run.resume)
            say_resumed(run.resume, schedule.total, evaluator.best, options.early_stopping_patience)
        if world.is_first:
            prepare_output(options, run.origin, run.resume, evaluator.best.step)
        run.converted.is_wanted = True
        log.begin(trainer.step)
        raise_if_interrupted()
        with fast_float32(device), log.telling_trackers():
            done = trainer.run()
        watch.end(done.steps)
        return done, log.pace


def trainable_model(
    options: TrainOptions,
    base: Path,
    device: torch.device,
    dtype: torch.dtype,
    start: Path | None = None,
    *,
    is_on_host: bool = False,
    decomposes: bool = True,
) -> tuple[Any, list[TargetCount]]:
    """Load a base model and add the adapters that train, new ones or those of an adapter's folder.

    Args:
        options: the run's.
        base: folder of the base model.
        device: where the model is put.
        dtype: of the base's weights.
        start: the adapter's folder, if training goes on from one.
        is_on_host: whether the model stays on the host, to be sharded from there.
        decomposes: whether PiSSA's adapters are made of the weights, and not left to be filled.

    Returns:
        The `PeftModel`, and the count of each target.
    """
    quiet_libraries()
    torch.manual_seed(options.seed)
    say_loading(base)
    if is_on_host:
        model = load_to_shard(base, options, dtype)
    else:
        model = load_model(base, dtype=dtype, device=device, quantization=options.quantization)
    model.label_smoothing = options.label_smoothing
    model, counts = add_adapters(
        model,
        options.train_target,
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        variant=options.lora_variant,
        base_name=recorded_name(options.model_name, base),
        start=start,
        decomposes=decomposes,
    )
    # As PEFT does where the weights have their dtype already; PiSSA's adapters are made after that.
    if is_on_host and options.lora_variant != "pissa":
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    if start is not None:
        load_start(model, start)
    return model, counts
