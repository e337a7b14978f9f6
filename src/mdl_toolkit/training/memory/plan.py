"""Plan the memory of a training before any weight is loaded: predict the need, keep activations that fit.

Weights, adapters and optimizer follow exactly from the model's shapes; it is made without storage for that.
The activations of a step are an estimate, for the largest batches of the first epoch;
`tests/training/memory/test_plan.py` holds it to measured peaks.

Not counted: a CUDA context (0.3 to 0.6 GB), workspaces and fragmentation, Python and its libraries (0.5 GB),
evaluation, batches that are read ahead, eager attention.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import ModelError, UsageError
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.model.configuration import MiDashengLMConfig
from mdl_toolkit.training.gradient_checkpointing import NONE, KeptBlocks
from mdl_toolkit.training.lora import FULL_TARGETS, LORA_TARGETS, add_adapters, check_variant
from mdl_toolkit.training.memory.activations import FLOAT, ActivationEstimate, Integers
from mdl_toolkit.training.memory.sharding import check_sharding
from mdl_toolkit.training.optimization.optimizer import ADAMW, OptimizerConfig, target_of
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.utils.console import size
from mdl_toolkit.utils.device import CPU
from mdl_toolkit.utils.machine import free_memory
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.loading import quiet_libraries
from mdl_toolkit.weights.schemas import MODEL_CONFIG

# Of the whole: it does not help to lower less than that.
SMALL_SHARE = 0.1
# Rank of adapters that does for simple tasks.
LOW_RANK = 8
# Steps of the first epoch that are searched for the largest batches, in a fifth of a second.
MOST_STEPS = 20_000
# NF4 with double quantisation: a byte for every block of 64 numbers, a float32 for every 256 of those bytes,
# and two tables and an offset per matrix. Equal to what bitsandbytes 0.50 allocates.
BLOCK, BLOCKS, TABLES = 64, 256, 4 * (256 + 16 + 1)
# Matrices of a weight's size that exist at once while DoRA computes norms.
NORMS = 3
# Of the memory that nothing needs: gradient checkpointing keeps activations in it. A GPU has no other use for
# its memory, and where the prediction was too low all activations are computed again; not where weights are
# sharded, as no process can compute again alone.
KEPT_SHARE, GPU_SHARE = 0.25, 0.7
# What is sharded, and how often the largest block of it may be there whole: as weights, and as it arrived,
# this one and the next.
IN_BLOCK = re.compile(r".*?\.(?:blocks|layers)\.\d+\.")
GATHERED = 3


@dataclass(frozen=True)
class MemoryPlan:
    """Hold the bytes that a training is going to need on the device of one process.

    Attributes:
        weights: of the base.
        adapters: adapters and full copies, float32.
        gradients: of these.
        optimizer: the optimizer's two states of these.
        activations: of the largest step.
        free: bytes that are free now; None where that cannot be told.
        remedies: names of figures of this plan, each with command-line options that lower it.
        kept: blocks whose activations gradient checkpointing keeps.
        blocks: number of all blocks; None without gradient checkpointing.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    free: int | None
    remedies: tuple[tuple[str, str], ...]
    kept: KeptBlocks = NONE
    blocks: KeptBlocks | None = None

    @property
    def trained(self) -> int:
        """Return bytes of adapters and full copies, their gradients and the optimizer's states."""
        return self.adapters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Return bytes of everything."""
        return self.weights + self.trained + self.activations

    def lines(self) -> list[Localized]:
        """Describe the prediction, and what gradient checkpointing recomputes."""
        predicted = Localized(
            "memory predicted: {total} (weights {weights}, adapters and optimizer {trained}, activations "
            "{activations})",
            total=size(self.total),
            weights=size(self.weights),
            trained=size(self.trained),
            activations=size(self.activations),
        )
        if self.free is not None:
            predicted = Localized("{predicted}; free: {free}", predicted=predicted, free=size(self.free))
        if self.blocks is None:
            return [predicted]
        pairs = [(self.blocks.encoder, self.kept.encoder), (self.blocks.decoder, self.kept.decoder)]
        encoder, decoder = (f"{count - kept}/{count}" for count, kept in pairs)
        recomputed = Localized(
            "gradient checkpointing computes again: encoder blocks {encoder}, decoder layers {decoder}",
            encoder=encoder,
            decoder=decoder,
        )
        return [predicted, recomputed]

    def warning(self) -> Localized | None:
        """Suggest options that lower the need, if less is free; first those that lower the largest share."""
        if self.free is None or self.total <= self.free:
            return None
        shares = sorted(self.remedies, key=lambda remedy: -getattr(self, remedy[0]))
        options = [option for figure, option in shares if getattr(self, figure) > SMALL_SHARE * self.total]
        warning = Localized(
            "memory may not suffice: {total} predicted, {free} free",
            total=size(self.total),
            free=size(self.free),
        )
        if not options:
            return warning
        tries = [Localized("{remedy}", remedy=each) for each in options]
        remedies = join_messages(tries, "{left}, or {right}")
        return Localized("{warning}; try {remedies}", warning=warning, remedies=remedies)


def plan_memory(
    base: Path,
    options: TrainOptions,
    sampler: BatchSampler,
    samples: Integers,
    shared_prefix: int,
    device: torch.device,
    dtype: torch.dtype,
    start: Path | None = None,
) -> MemoryPlan:
    """Predict what a training needs on the device of one process.

    Args:
        base: folder of the base model; only its `config.json` is read.
        options: the run's.
        sampler: chooses the examples of each step.
        samples: audio samples of every example, `[examples]`.
        shared_prefix: tokens before the audio that all examples have in common.
        device: the model is going to be there.
        dtype: of the base weights.
        start: folder of the adapter that training goes on from, if any.

    Raises:
        ModelError: no model can be made of the configuration, or a target matches nothing.
    """
    model = meta_model(base)
    quantization = options.quantization or stored_quantization(base)
    shares = sampler.processes if options.shard_weights else 1
    weights, widest = _weights(model, options, device, dtype, quantization, shares)
    sizes, stepped, gradients = _trained(model, options, start, shares)
    settings = (model.config, options, dtype.itemsize, device != CPU, quantization, gradients)
    steps = [
        ActivationEstimate(
            *settings, sampler.lengths[batch], sampler.supervised[batch], samples[batch], shared_prefix
        )
        for batch in largest_batches(sampler, samples)
    ]
    total, free, held = FLOAT * sum(sizes), free_memory(device), widest * dtype.itemsize
    states = OptimizerConfig.of(options).state_bytes(stepped)
    held += _cast_bytes(gradients, dtype, quantization) + _norm_bytes(model, options)
    # With a gradient that is made anew.
    least = total + FLOAT * max(sizes)
    kept = NONE
    if options.gradient_checkpointing and free is not None:
        share = KEPT_SHARE if device == CPU or shares > 1 else GPU_SHARE
        kept = _blocks_to_keep(steps, least, free - weights - total - states - held, share)
    peak = max(*(replace(step, kept=kept).peak for step in steps), least) + held
    remedies = _remedies(options, device, dtype, quantization, sampler.processes)
    blocks = steps[0].blocks if options.gradient_checkpointing else None
    return MemoryPlan(weights, total, total, states, peak - total, free, remedies, kept, blocks)


def _cast_bytes(gradients: dict[str, int], dtype: torch.dtype, quantization: str | None) -> int:
    """Return the bytes of adapters that are kept in the dtype of the base too: not of PEFT's own layers."""
    if dtype == torch.float32:
        return 0
    targets = {*LORA_TARGETS} - ({"decoder"} if quantization else set())
    return sum(gradients.get(target, 0) for target in targets) // FLOAT * dtype.itemsize


def _norm_bytes(model: Any, options: TrainOptions) -> int:
    """Return the bytes of the float32 matrices by which DoRA computes the norms of the largest weight's rows.

    PEFT makes one of the size of B A by multiplying the identity.
    """
    if options.lora_variant != "dora":
        return 0
    targets = [re.compile(LORA_TARGETS[each]) for each in options.train_target if each in LORA_TARGETS]
    shapes = [
        module.weight.shape
        for name, module in model.named_modules()
        if any(target.fullmatch(name.removeprefix("base_model.model.")) for target in targets)
    ]
    return FLOAT * max((wide * (wide + NORMS * high) for high, wide in shapes), default=0)


def _blocks_to_keep(steps: list[ActivationEstimate], least: int, rest: int, share: float) -> KeptBlocks:
    """Choose the blocks whose activations fit into a share of the memory that would be left without them.

    Args:
        steps: the largest ones.
        least: bytes that an optimizer step needs whatever is kept.
        rest: bytes that are free for activations or for an optimizer step.
        share: of these, where they are not needed.
    """
    needed = max(*(step.peak for step in steps), least)
    most = needed + int(share * max(0, rest - needed))
    return min((step.fit_blocks(most) for step in steps), key=lambda kept: (kept.decoder, kept.encoder))


def stored_quantization(base: Path) -> str | None:
    """Return the value of `--quantization` by which a folder's weights are stored."""
    stored = read_json(base / MODEL_CONFIG).get("quantization_config") or {}
    return "4bit" if stored.get("load_in_4bit") else "8bit" if stored.get("load_in_8bit") else None


def largest_batches(sampler: BatchSampler, samples: Integers) -> list[Integers]:
    """Return the first epoch's batches with the most tokens (padded), supervised tokens and audio.

    Args:
        sampler: chooses the examples of each step.
        samples: audio samples of every example, `[examples]`.

    Returns:
        Indices of the examples of one to three batches.
    """
    steps = range(min(sampler.steps_per_epoch, MOST_STEPS))
    indices = np.concatenate([sampler.examples(step) for step in steps])
    # Only the last step can be partial.
    starts = np.arange(0, len(indices), sampler.batch_size)
    tokens = np.maximum.reduceat(sampler.lengths[indices], starts) * np.diff([*starts, len(indices)])
    sums = [np.add.reduceat(each[indices], starts) for each in (sampler.supervised, samples)]
    chosen = {int(measure.argmax()) for measure in (tokens, *sums)}
    return [indices[starts[number] :][: sampler.batch_size] for number in sorted(chosen)]


def meta_model(base: Path) -> Any:
    """Make the model of a folder's `config.json` on the meta device: with shapes, without storage.

    Raises:
        ModelError: there is no such model.
    """
    from mdl_toolkit.model import MiDashengLMModel

    quiet_libraries()
    try:
        with torch.device("meta"):
            return MiDashengLMModel(MiDashengLMConfig.from_pretrained(base, local_files_only=True))
    # The libraries raise a dozen kinds; each means that there is no such model.
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise ModelError("{base}: cannot be loaded: {reason}", base=base, reason=reason) from problem


def _weights(
    model: Any,
    options: TrainOptions,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
    shares: int,
) -> tuple[int, int]:
    """Return bytes of a process's base weights, and the numbers in the largest quantised matrix."""
    # Statistics and frequencies keep their dtype.
    total, widest = sum(buffer.nbytes for buffer in model.buffers()), 0
    blocks: Counter[str] = Counter()
    idle = set()
    # What a full copy is a copy of stays on the host.
    if shares > 1 and device != CPU and not model.config.tie_word_embeddings:
        idle = {
            f"{module}.weight" for target, module in FULL_TARGETS.items() if target in options.train_target
        }
    linear = re.compile(LORA_TARGETS["decoder"] + r"\.weight")
    for name, tensor in model.named_parameters():
        if name in idle:
            continue
        form = "float32" if ".init_bn." in name else str(dtype).removeprefix("torch.")
        if quantization is not None and linear.fullmatch(name):
            form, widest = quantization, max(widest, tensor.numel())
        total += stored_size(tensor, form)
        if block := IN_BLOCK.match(name):
            blocks[block[0]] += stored_size(tensor, form)
    if shares > 1:
        total += GATHERED * max(blocks.values()) - blocks.total() * (shares - 1) // shares
    return total, widest


def stored_size(tensor: torch.Tensor, form: str) -> int:
    """Return the bytes of a tensor in a form: a dtype, `4bit` or `8bit`."""
    numbers = tensor.numel()
    if form == "4bit":
        blocks = -(-numbers // BLOCK)
        return -(-numbers // 2) + blocks + FLOAT * -(-blocks // BLOCKS) + TABLES
    if form == "8bit":
        # A scale for each row of the matrix.
        return numbers + FLOAT * len(tensor)
    return numbers * int(getattr(torch, form).itemsize)


def _trained(
    model: Any, options: TrainOptions, start: Path | None, shares: int
) -> tuple[list[int], list[int], dict[str, int]]:
    """Add adapters; return numbers in each trained tensor, all and updated here, and bytes of gradients."""
    with torch.device("meta"):
        wrapped, counts = add_adapters(
            model,
            options.train_target,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            variant=options.lora_variant,
            base_name="",
            start=start,
        )
    gradients = {count.target: FLOAT * count.parameters for count in counts}
    # Tied embeddings are one matrix, whose gradient begins at the head.
    if model.config.tie_word_embeddings:
        tied = [gradients.pop(target) for target in FULL_TARGETS if target in gradients]
        if tied:
            gradients["lm_head"] = tied[0]
    sizes = {name: each.numel() for name, each in wrapped.named_parameters() if each.requires_grad}
    divided = FULL_TARGETS if options.optimizer == ADAMW.name else ()
    stepped = [-(-n // shares) if target_of(name) in divided else n for name, n in sizes.items()]
    return [*sizes.values()], stepped, gradients


def is_accepted(options: TrainOptions, stored: str | None) -> bool:
    """Tell whether a training accepts its options, over weights that are stored quantised or not."""
    try:
        check_sharding(options, options.quantization or stored)
        check_variant(options, options.quantization or stored)
    except UsageError:
        return False
    return True


def may_quantize(options: TrainOptions, stored: str | None) -> bool:
    """Tell whether a training of a base that is stored quantised or not may take `--quantization 4bit`."""
    is_full = options.quantization is None and stored is None
    return is_full and is_accepted(replace(options, quantization="4bit"), stored)


def may_shard(options: TrainOptions, stored: str | None) -> bool:
    """Tell whether a training of a base that is stored quantised or not may take `--shard-weights`."""
    return not options.shard_weights and is_accepted(replace(options, shard_weights=True), stored)


def _remedies(
    options: TrainOptions, device: torch.device, dtype: torch.dtype, quantization: str | None, processes: int
) -> tuple[tuple[str, str], ...]:
    """Return figures of the plan with options that lower them; of the same figure, the cheapest first."""
    batch = options.batch_size
    less = next((each for each in range(batch // 2, 0, -1) if batch % each == 0), batch)
    more = options.gradient_accumulation_steps * batch // less
    full = " ".join(target for target in options.train_target if target in FULL_TARGETS)
    # An adapter that training goes on from has its rank and targets.
    is_new = options.adapter is None
    possible = (
        (not options.gradient_checkpointing, "activations", "--gradient-checkpointing true"),
        (less < batch, "activations", f"--batch-size {less} --gradient-accumulation-steps {more}"),
        (dtype == torch.float32 and device != CPU, "weights", "--bf16 true"),
        (may_shard(options, quantization) and processes > 1, "weights", "--shard-weights true"),
        (may_quantize(options, quantization), "weights", "--quantization 4bit"),
        (is_new and full != "", "trained", f"--train-target (- {full})"),
        (is_new and options.lora_rank > LOW_RANK, "trained", f"--lora-rank {LOW_RANK}"),
    )
    return tuple((figure, option) for is_possible, figure, option in possible if is_possible)
