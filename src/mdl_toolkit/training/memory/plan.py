"""How much memory a training needs, told before any weight is loaded, and how much is free.

Weights, adapters and optimizer follow exactly from the model's shapes; it is made without storage for that.
What a step adds is an estimate, of the largest batches of the first epoch: what autograd keeps for each
position or patch and layer. `tests/training/memory/test_plan.py` holds it to measured peaks.

Not counted: a CUDA context (0.3 to 0.6 GB), workspaces and fragmentation, Python and its libraries (0.5 GB),
evaluation, batches that are read ahead, eager attention.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.model.configuration import MiDashengLMConfig
from mdl_toolkit.training.gradient_checkpointing import NONE, KeptBlocks
from mdl_toolkit.training.lora import FULL_TARGETS, LORA_TARGETS, add_adapters
from mdl_toolkit.training.memory.activations import FLOAT, Integers, Step
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.utils.distributed import BUCKET_NUMEL
from mdl_toolkit.utils.machine import free_memory
from mdl_toolkit.weights.loading import quiet_libraries
from mdl_toolkit.weights.resolve import read_json

SMALL_SHARE = 0.1  # of the whole: it does not help to lower what is less
LOW_RANK = 8  # of adapters; does for simple tasks
MOST_STEPS = 20_000  # of the first epoch that are looked at: a fifth of a second
PARTS = {
    "audio_encoder": Localized("encoder"),
    "audio_projector": Localized("projector"),
    "decoder": Localized("decoder"),
}
# NF4 with double quantisation: a byte for every block of 64 numbers, a float32 for every 256 of those bytes,
# and two tables and an offset per matrix. Equal to what bitsandbytes 0.50 allocates.
BLOCK, BLOCKS, TABLES = 64, 256, 4 * (256 + 16 + 1)
KEPT_SHARE = 0.25  # of the memory that nothing needs: gradient checkpointing keeps activations in it


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a training is going to need on the device of one process.

    Attributes:
        parts: base weights by part (`audio_encoder`, ...) and form (`float32`, `bfloat16`, `4bit`, `8bit`).
        adapters: adapters and full copies, float32.
        gradients: of these.
        optimizer: AdamW's two states of these.
        activations: what the largest step needs beside all that.
        free: bytes that are free now; None where that cannot be told.
        remedies: figures of this plan, each with words of the command line that lower it.
        kept: blocks whose activations gradient checkpointing need not give up.
        blocks: that there are; None without gradient checkpointing.
    """

    parts: dict[tuple[str, str], int]
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    free: int | None
    remedies: tuple[tuple[str, str], ...]
    kept: KeptBlocks = NONE
    blocks: KeptBlocks | None = None

    @property
    def weights(self) -> int:
        """Bytes of all base weights."""
        return sum(self.parts.values())

    @property
    def trained(self) -> int:
        """Bytes of what is trained, its gradients and the optimizer's states."""
        return self.adapters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.trained + self.activations

    def lines(self) -> list[Localized]:
        """The prediction and what it consists of; then the weights, part by part."""
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
        parts = [
            Localized("{part} {size} {form}", part=PARTS[part], size=size(count), form=form)
            for (part, form), count in self.parts.items()
            if count > 0.001 * self.weights
        ]
        weights = Localized("memory of weights: {parts}", parts=join_messages(parts, "{left}, {right}"))
        return [predicted, weights, *self._recomputed()]

    def _recomputed(self) -> list[Localized]:
        """How much gradient checkpointing computes again, if it is on."""
        if self.blocks is None:
            return []
        pairs = [(self.blocks.encoder, self.kept.encoder), (self.blocks.decoder, self.kept.decoder)]
        encoder, decoder = (f"{there - kept}/{there}" for there, kept in pairs)
        return [
            Localized(
                "gradient checkpointing computes again: encoder blocks {encoder}, decoder layers {decoder}",
                encoder=encoder,
                decoder=decoder,
            )
        ]

    def warning(self) -> Localized | None:
        """What to lower, if less is free than is needed: first what lowers the largest share."""
        if self.free is None or self.total <= self.free:
            return None
        shares = sorted(self.remedies, key=lambda remedy: -getattr(self, remedy[0]))
        words = [words for figure, words in shares if getattr(self, figure) > SMALL_SHARE * self.total]
        warning = Localized(
            "memory may not suffice: {total} predicted, {free} free",
            total=size(self.total),
            free=size(self.free),
        )
        if not words:
            return warning
        tries = [Localized("{remedy}", remedy=each) for each in words]
        remedies = join_messages(tries, "{left}, or {right}")
        return Localized("{warning}; try {remedies}", warning=warning, remedies=remedies)


def size(count: int) -> str:
    """Bytes in words, by thousands: 16.9 GB, 310 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


# --- the prediction ------------------------------------------------------------------------------------


def plan_memory(
    base: Path,
    options: TrainOptions,
    sampler: BatchSampler,
    samples: Integers,
    beginning: int,
    device: torch.device,
    dtype: torch.dtype,
) -> MemoryPlan:
    """Predict what a training needs on the device of one process.

    Args:
        base: folder of the base model; only its `config.json` is read.
        options: the run's.
        sampler: its order, with the lengths of all rows.
        samples: audio samples of every row, `[rows]`.
        beginning: positions before the audio that all rows have in common; they are computed once a batch.
        device: where the model is going to be.
        dtype: of the base weights.

    Raises:
        ModelError: no model can be made of the configuration, or a target matches nothing.
    """
    model = on_paper(base)
    quantization = options.quantization or _quantized(base)
    parts, widest = _weights(model, dtype, quantization)
    sizes, gradients = _trained(model, options)
    settings = (model.config, options, dtype.itemsize, device.type == "cuda", quantization, gradients)
    steps = [
        Step(*settings, sampler.lengths[rows], sampler.supervised[rows], samples[rows], beginning)
        for rows in largest_batches(sampler, samples)
    ]
    total, free, held = FLOAT * sum(sizes), free_memory(device), widest * dtype.itemsize
    least = total + _update(sizes, sampler.processes)
    kept = NONE
    if options.gradient_checkpointing and free is not None:
        kept = _kept(steps, least, free - sum(parts.values()) - 3 * total - held)
    peak = max(*(replace(step, kept=kept).peak for step in steps), least) + held
    remedies = _remedies(options, device, dtype, quantization)
    blocks = steps[0].blocks if options.gradient_checkpointing else None
    return MemoryPlan(parts, total, total, 2 * total, peak - total, free, remedies, kept, blocks)


def _kept(steps: list[Step], least: int, rest: int) -> KeptBlocks:
    """Blocks whose activations fit into a share of the memory that would be left without them.

    Args:
        steps: the largest ones.
        least: bytes that an optimizer step needs whatever is kept.
        rest: bytes that are free for both.
    """
    needed = max(*(step.peak for step in steps), least)
    most = needed + int(KEPT_SHARE * max(0, rest - needed))
    return min((step.keeping(most) for step in steps), key=lambda kept: (kept.decoder, kept.encoder))


def largest_batches(sampler: BatchSampler, samples: Integers) -> list[Integers]:
    """Indices of the first epoch's batches with the most positions (padded), answers and audio."""
    steps = range(min(sampler.steps_per_epoch, MOST_STEPS))
    rows = np.concatenate([sampler.examples(step) for step in steps])
    starts = np.arange(0, len(rows), sampler.batch_size)  # only the last step can be partial
    positions = np.maximum.reduceat(sampler.lengths[rows], starts) * np.diff([*starts, len(rows)])
    sums = [np.add.reduceat(each[rows], starts) for each in (sampler.supervised, samples)]
    chosen = {int(measure.argmax()) for measure in (positions, *sums)}
    return [rows[starts[number] :][: sampler.batch_size] for number in sorted(chosen)]


def on_paper(base: Path) -> Any:
    """The model of a folder's `config.json`, with shapes and without storage.

    Raises:
        ModelError: there is no such model.
    """
    from mdl_toolkit.model import MiDashengLMModel

    quiet_libraries()
    try:
        with torch.device("meta"):
            return MiDashengLMModel(MiDashengLMConfig.from_pretrained(base, local_files_only=True))
    except Exception as problem:  # the libraries raise a dozen kinds; each means: no such model
        reason = " ".join(str(problem).split())
        raise ModelError("{base}: cannot be loaded: {reason}", base=base, reason=reason) from problem


def _quantized(base: Path) -> str | None:
    """In which form a base that bitsandbytes has quantised already stores the decoder's matrices."""
    config = read_json(base / "config.json").get("quantization_config") or {}
    return "4bit" if config.get("load_in_4bit") else "8bit" if config.get("load_in_8bit") else None


def _weights(
    model: Any, dtype: torch.dtype, quantization: str | None
) -> tuple[dict[tuple[str, str], int], int]:
    """Base weights by part and form, and how many numbers the largest quantised matrix has."""
    found, widest = dict[tuple[str, str], int](), 0
    linear = re.compile(LORA_TARGETS["decoder"] + r"\.weight")
    buffers = {name for name, _ in model.named_buffers()}  # statistics and frequencies stay as they are
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        form = "float32" if ".init_bn." in name or name in buffers else str(dtype).removeprefix("torch.")
        if quantization is not None and linear.fullmatch(name):
            form, widest = quantization, max(widest, tensor.numel())
        key = name.partition(".")[0], form
        found[key] = found.get(key, 0) + (tensor.nbytes if name in buffers else _stored(tensor, form))
    return found, widest


def _stored(tensor: torch.Tensor, form: str) -> int:
    """Bytes of a tensor in some form."""
    numbers = tensor.numel()
    if form == "4bit":
        blocks = -(-numbers // BLOCK)
        return -(-numbers // 2) + blocks + FLOAT * -(-blocks // BLOCKS) + TABLES
    if form == "8bit":
        return numbers + FLOAT * len(tensor)  # a scale for each row
    return numbers * int(getattr(torch, form).itemsize)


def _trained(model: Any, options: TrainOptions) -> tuple[list[int], dict[str, int]]:
    """Numbers in each trained tensor, and bytes of each target's gradients; the model is wrapped for that."""
    with torch.device("meta"):
        wrapped, counts = add_adapters(
            model, options.train_target, rank=options.lora_rank, alpha=options.lora_alpha,
            dropout=options.lora_dropout, base_name="",
        )  # fmt: skip
    found = {count.target: FLOAT * count.parameters for count in counts}
    if model.config.tie_word_embeddings:  # both words mean one matrix, whose gradient begins at the head
        tied = [found.pop(target) for target in FULL_TARGETS if target in found]
        if tied:
            found["lm_head"] = tied[0]
    return [tensor.numel() for tensor in wrapped.parameters() if tensor.requires_grad], found


def _update(sizes: list[int], processes: int) -> int:
    """Bytes for a moment: a gradient made anew, gradients between processes."""
    travelling = min(sum(sizes), BUCKET_NUMEL) if processes > 1 else 0
    return FLOAT * max(*sizes, travelling)


def _remedies(
    options: TrainOptions, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> tuple[tuple[str, str], ...]:
    """Options that lower the need, of those that lower the same thing the cheapest first."""
    rows = options.batch_size
    less = next((each for each in range(rows // 2, 0, -1) if rows % each == 0), rows)
    more = options.gradient_accumulation_steps * rows // less
    full = " ".join(target for target in options.train_target if target in FULL_TARGETS)
    possible = (
        (not options.gradient_checkpointing, "activations", "--gradient-checkpointing true"),
        (less < rows, "activations", f"--batch-size {less} --gradient-accumulation-steps {more}"),
        (dtype == torch.float32 and device.type == "cuda", "weights", "--bf16 true"),
        (quantization is None, "weights", "--quantization 4bit"),
        (full != "", "trained", f"--train-target (- {full})"),
        (options.lora_rank > LOW_RANK, "trained", f"--lora-rank {LOW_RANK}"),
    )
    return tuple((figure, words) for is_possible, figure, words in possible if is_possible)
