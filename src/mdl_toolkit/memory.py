"""How much memory a training needs, told before any weight is loaded, and how much is free.

Weights, adapters and optimizer follow exactly from the model's shapes; it is made without storage for that.
What a step adds is an estimate, of the largest batches of the first epoch: what autograd keeps for each
position or patch and layer. `tests/test_memory.py` holds it to measured peaks.

Not counted: a CUDA context (0.3 to 0.6 GB), workspaces and fragmentation, Python and its libraries (0.5 GB),
evaluation, batches that are read ahead, eager attention.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdl_toolkit.distributed import BUCKET
from mdl_toolkit.errors import ModelError
from mdl_toolkit.folders import read_json
from mdl_toolkit.free_memory import free_memory
from mdl_toolkit.language import Text
from mdl_toolkit.loading import quiet_libraries
from mdl_toolkit.lora import FULL_TARGETS, LORA_TARGETS, add_adapters
from mdl_toolkit.model.configuration import MiDashengLMConfig
from mdl_toolkit.model.lengths import patch_count
from mdl_toolkit.sampling import Sampling
from mdl_toolkit.training_options import TrainOptions

SMALL_SHARE = 0.1  # of the whole: it does not help to lower what is less
LOW_RANK = 8  # of adapters; does for simple tasks
MOST_STEPS = 20_000  # of the first epoch that are looked at: a fifth of a second
PARTS = {
    "audio_encoder": Text("encoder", "编码器"),
    "audio_projector": Text("projector", "投影器"),
    "decoder": Text("decoder", "解码器"),
}
FLOAT = 4  # bytes of a float32 number
# NF4 with double quantisation: a byte for every block of 64 numbers, a float32 for every 256 of those bytes,
# and two tables and an offset per matrix. Equal to what bitsandbytes 0.50 allocates.
BLOCK, BLOCKS, TABLES = 64, 256, 4 * (256 + 16 + 1)
# Bytes per sample of the front end at its widest: the padded waveform (4), and of each frame of 160 samples
# 257 complex numbers (12.85), their squares and the sum (3 x 6.43). Measured: 36.2.
FRONT_END = 36.2

Integers = NDArray[np.int64]


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
    """

    parts: dict[tuple[str, str], int]
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    free: int | None
    remedies: tuple[tuple[str, str], ...]

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

    def lines(self) -> list[Text]:
        """The prediction and what it consists of; then the weights, part by part."""
        sizes = [size(count) for count in (self.total, self.weights, self.trained, self.activations)]
        free = ("", "") if self.free is None else (f"; free: {size(self.free)}", f"；可用 {size(self.free)}")
        parts = [(PARTS[part], f"{size(count)} {form}") for (part, form), count in self.parts.items()
                 if count > 0.001 * self.weights]  # fmt: skip
        en = "memory predicted: {} (weights {}, adapters and optimizer {}, activations {})".format(*sizes)
        zh = "预计内存占用：{}（权重 {}，适配器与优化器 {}，激活值 {}）".format(*sizes)
        return [
            Text(en + free[0], zh + free[1]),
            Text(
                "memory of weights: " + ", ".join(f"{name.en} {words}" for name, words in parts),
                "权重占用：" + "，".join(f"{name.zh} {words}" for name, words in parts),
            ),
        ]

    def warning(self) -> Text | None:
        """What to lower, if less is free than is needed: first what lowers the largest share."""
        if self.free is None or self.total <= self.free:
            return None
        shares = sorted(self.remedies, key=lambda remedy: -getattr(self, remedy[0]))
        words = [words for figure, words in shares if getattr(self, figure) > SMALL_SHARE * self.total]
        return Text(
            f"memory may not suffice: {size(self.total)} predicted, {size(self.free)} free"
            + (f"; try {', or '.join(words)}" if words else ""),
            f"内存可能不足：预计需要 {size(self.total)}，可用 {size(self.free)}"
            + (f"；可尝试 {'，或 '.join(words)}" if words else ""),
        )


def size(count: int) -> str:
    """Bytes in words, by thousands: 16.9 GB, 310 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


# --- the prediction ------------------------------------------------------------------------------------


def plan_memory(
    base: Path,
    options: TrainOptions,
    sampling: Sampling,
    samples: Integers,
    device: torch.device,
    dtype: torch.dtype,
) -> MemoryPlan:
    """Predict what a training needs on the device of one process.

    Args:
        base: folder of the base model; only its `config.json` is read.
        options: the run's.
        sampling: its order, with the lengths of all rows.
        samples: audio samples of every row, `[rows]`.
        device: where the model is going to be.
        dtype: of the base weights.

    Raises:
        ModelError: no model can be made of the configuration, or a target matches nothing.
    """
    model = _on_paper(base)
    quantization = options.quantization or _quantized(base)
    parts, widest = _weights(model, dtype, quantization)
    sizes, gradients = _trained(model, options)
    settings = (model.config, options, dtype.itemsize, device.type == "cuda", quantization, gradients)
    peaks = [
        Step(*settings, sampling.lengths[rows], sampling.supervised[rows], samples[rows]).peak
        for rows in largest_batches(sampling, samples)
    ]
    total = FLOAT * sum(sizes)
    peak = max(*peaks, total + _update(sizes, device, sampling.processes)) + widest * dtype.itemsize
    remedies = _remedies(options, device, dtype, quantization)
    return MemoryPlan(parts, total, total, 2 * total, peak - total, free_memory(device), remedies)


def largest_batches(sampling: Sampling, samples: Integers) -> list[Integers]:
    """Rows of the first epoch's batches with the most positions (padded), answers and audio."""
    steps = range(min(sampling.steps_per_epoch, MOST_STEPS))
    rows = np.concatenate([sampling.rows(step) for step in steps])
    starts = np.arange(0, len(rows), sampling.batch_size)  # only the last step can be partial
    positions = np.maximum.reduceat(sampling.lengths[rows], starts) * np.diff([*starts, len(rows)])
    sums = [np.add.reduceat(each[rows], starts) for each in (sampling.supervised, samples)]
    chosen = {int(measure.argmax()) for measure in (positions, *sums)}
    return [rows[starts[number] :][: sampling.batch_size] for number in sorted(chosen)]


def _on_paper(base: Path) -> Any:
    """The model of a folder's `config.json`, with shapes and without storage."""
    from mdl_toolkit.model import MiDashengLMModel

    quiet_libraries()
    try:
        with torch.device("meta"):
            return MiDashengLMModel(MiDashengLMConfig.from_pretrained(base, local_files_only=True))
    except Exception as problem:  # the libraries raise a dozen kinds; each means: no such model
        reason = " ".join(str(problem).split())
        raise ModelError(f"{base}: cannot be loaded: {reason}", f"{base}：无法加载：{reason}") from problem


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


def _update(sizes: list[int], device: torch.device, processes: int) -> int:
    """Bytes for a moment: a gradient made anew, AdamW on a CPU (not fused), gradients between processes."""
    travelling = min(sum(sizes), BUCKET) if processes > 1 else 0
    return FLOAT * max(max(sizes) * (1 if device.type == "cuda" else 2), travelling)


def _remedies(
    options: TrainOptions, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> tuple[tuple[str, str], ...]:
    """Options that lower the need, of those that lower the same thing the cheapest first."""
    half = options.batch_size // 2
    more = options.gradient_accumulation_steps * options.batch_size // max(half, 1)
    full = " ".join(target for target in options.train_target if target in FULL_TARGETS)
    possible = (
        (not options.gradient_checkpointing, "activations", "--gradient-checkpointing true"),
        (half > 0, "activations", f"--batch-size {half} --gradient-accumulation-steps {more}"),
        (dtype == torch.float32 and device.type == "cuda", "weights", "--bf16 true"),
        (quantization is None, "weights", "--quantization 4bit"),
        (full != "", "trained", f"--train-target (- {full})"),
        (options.lora_rank > LOW_RANK, "trained", f"--lora-rank {LOW_RANK}"),
    )
    return tuple((figure, words) for is_possible, figure, words in possible if is_possible)


# --- one step ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One batch on its way forward and back; figures are bytes beyond weights, adapters and optimizer.

    What is counted was found by comparing with the tensors that autograd keeps in torch 2.13 and peft 0.21.

    Attributes:
        config: the model's.
        options: the run's.
        number: bytes of a number in matrix products: 4, or 2 under autocast to bfloat16.
        on_gpu: where autocast computes the encoder's norms in float32.
        quantization: of the decoder's matrices.
        gradients: float32, of each target.
        lengths: decoder positions, of which `supervised` are learnt, and audio `samples`; each `[rows]`.
    """

    config: MiDashengLMConfig
    options: TrainOptions
    number: int
    on_gpu: bool
    quantization: str | None
    gradients: dict[str, int]
    lengths: Integers
    supervised: Integers
    samples: Integers

    @property
    def peak(self) -> int:
        """The most at once: in the front end, at the loss, or on the way back through decoder or encoder."""
        waves = len(self.samples) * int(self.samples.max())
        every, head = sum(self.gradients.values()), self.gradients.get("lm_head", 0)
        has_earlier = self.options.gradient_accumulation_steps > 1  # batch, which has left its gradients
        encoder, decoder = self._encoder, self._decoder
        front = encoder + decoder + max(self._loss, self._work(self._layer) + head)
        moments = (front + every * has_earlier, encoder + self._work(self._block) + every)
        return max(int(FRONT_END * waves), FLOAT * waves + max(moments))

    @property
    def _block(self) -> int:
        """An encoder block: inputs of two norms, four layers and the GELU; padded q, k, v and result."""
        audio, norm = self.config.parts[0], FLOAT if self.on_gpu else self.number
        if "encoder" not in self.gradients:
            return 0
        patches, padded = self._patches
        dim, hidden = audio.embed_dim, int(audio.embed_dim * audio.mlp_ratio)
        patch = norm * 2 * dim + self.number * (3 * dim + 2 * hidden)
        patch += self._copies(is_quantized=False) * (3 * dim + hidden)
        return patches * patch + padded * self.number * 4 * dim

    @cached_property
    def _patches(self) -> tuple[int, int]:
        """All patches; and those of all chunks padded to the longest, as attention computes them."""
        audio = self.config.parts[0]
        counts = [patch_count(n, audio.hop_length, audio.patch_frames) for n in self.samples.tolist()]
        chunks = sum(-(-count // audio.chunk_patches) for count in counts)
        return sum(counts), chunks * min(max(counts), audio.chunk_patches)

    @property
    def _encoder(self) -> int:
        """What encoder and projector keep; the latter the inputs of its two layers and of its GELU."""
        audio, hidden = self.config.parts[0], int(self.config.parts[1].hidden_size)
        if not {"encoder", "projector"} & {*self.gradients}:
            return 0
        width = audio.embed_dim + 2 * hidden // self.config.subsample_factor
        kept = self._patches[0] * self.number * width
        return kept + self._kept(audio.depth, self._block, self._patches[0] * self.number * audio.embed_dim)

    @property
    def _layer(self) -> int:
        """A decoder layer: inputs of norms (float32) and linear layers; q, k, v, result; the MLP's three."""
        text = self.config.parts[1]
        if not {*self.gradients} - ({"lm_head"} if not self.config.tie_word_embeddings else set()):
            return 0
        heads = text.num_attention_heads
        query = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        wide, copies = text.intermediate_size, self._copies(is_quantized=self.quantization is not None)
        inputs = 2 * text.hidden_size + wide
        trains = "decoder" in self.gradients
        shared = inputs if self.quantization == "8bit" or (trains and not copies) else 0
        apart = inputs + 3 * text.hidden_size + query if trains else 0
        position = (
            FLOAT * 2 * text.hidden_size + self.number * (4 * query + 3 * wide + shared) + copies * apart
        )
        return int(self._positions * position)

    @property
    def _positions(self) -> int:
        """Of all rows, padding included."""
        return len(self.lengths) * int(self.lengths.max())

    @property
    def _decoder(self) -> int:
        """What the decoder keeps, its last norm's input too; bitsandbytes keeps 8-bit layers' inputs."""
        text = self.config.parts[1]
        if not self._layer:
            return 0
        width, layers = self._positions * int(text.hidden_size), int(text.num_hidden_layers)
        always = self._positions * self.number * (3 * text.hidden_size + text.intermediate_size)
        is_8bit = self.quantization == "8bit" and self.options.gradient_checkpointing
        embeds = {"embed_tokens", "lm_head"} & {*self.gradients}
        number = FLOAT if embeds else self.number  # full copies are float32, and so is what comes of them
        return int(
            FLOAT * width + self._kept(layers, self._layer, number * width) + layers * always * is_8bit
        )

    def _kept(self, layers: int, layer: int, width: int) -> int:
        """What so many layers keep: with gradient checkpointing, their inputs."""
        return layers * (min(layer, width) if self.options.gradient_checkpointing else layer)

    def _work(self, layer: int) -> int:
        """A layer on its way back: a quarter more (measured); with checkpointing all is made again."""
        return layer * 5 // 4 if self.options.gradient_checkpointing else layer // 4

    def _copies(self, *, is_quantized: bool) -> int:
        """Bytes of a number in inputs that each adapter keeps for itself, as PEFT's plain LoRA layers do."""
        if self.options.lora_dropout > 0:
            return self.number + (1 if self.on_gpu else FLOAT)  # and the mask
        return self.number if is_quantized and self.number < FLOAT else 0

    @property
    def _loss(self) -> int:
        """Supervised positions' states, logits and probabilities, float32; then the head's gradient."""
        from mdl_toolkit.model.modeling import MOST_LOGITS

        text, head = self.config.parts[1], self.gradients.get("lm_head", 0)
        supervised, casts = int(self.supervised.sum()), self.number < FLOAT
        logits = min(supervised, max(1, MOST_LOGITS // text.vocab_size)) * text.vocab_size
        numbers = logits * (2 * FLOAT + self.number * casts)
        copy = head // 2 * casts
        return int(self.number * supervised * text.hidden_size + max(numbers, FLOAT * logits + head) + copy)
