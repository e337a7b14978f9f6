"""Models of the published shapes with random weights, and rows for them: to try a GPU offline."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training.evaluator import Evaluator
from mdl_toolkit.training.gradient_checkpointing import NONE, KeptBlocks
from mdl_toolkit.training.lora import LORA_TARGETS, add_adapters
from mdl_toolkit.training.memory.plan import MemoryPlan, plan_memory
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.training.trainer import Trainer
from mdl_toolkit.utils.distributed import World

GOLDEN = Path(__file__).parents[1] / "tests/golden"
# What differs from the golden checkpoints' configurations. Of the 0.6B the encoder is not known: the 7B's.
ENCODER = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
SHAPES = {
    "7B": ("A-small", ENCODER, {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064,
    }),
    "0.6B": ("B-small-tied", ENCODER, {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    }),
    "tiny": ("A-small", {"embed_dim": 64, "depth": 3}, {"num_hidden_layers": 3, "vocab_size": 1024}),
}  # fmt: skip
# Tokens of a row before its audio, behind it, and of its answer.
BEFORE, AFTER, ANSWER = 20, 15, 40


def config_of(shape: str, layers: int | None = None) -> MiDashengLMConfig:
    """Return the configuration of a published size or `tiny`, with other numbers of blocks if asked for."""
    folder, audio, text = SHAPES[shape]
    settings = json.loads((GOLDEN / "checkpoints" / folder / "config.json").read_text(encoding="utf-8"))
    settings["audio_encoder_config"] |= audio
    settings["text_config"] |= text
    if layers is not None:
        settings["audio_encoder_config"]["depth"] = settings["text_config"]["num_hidden_layers"] = layers
    count = settings["text_config"]["num_hidden_layers"]
    settings["text_config"]["layer_types"] = ["full_attention"] * count
    return MiDashengLMConfig(**settings)


@torch.no_grad()
def random_model(config: MiDashengLMConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """Make a model with random weights on the device where it stays."""
    with torch.device("meta"):
        model = MiDashengLMModel(config)
    model = model.to(dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    bn = model.audio_encoder.init_bn
    for name, value in (("weight", 0.05), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        tensor = getattr(bn, name)
        tensor.data = torch.full(tensor.shape, value, dtype=torch.float32, device=device)
    # Its frequencies are no weights.
    model.decoder.model.rotary_emb = type(model.decoder.model.rotary_emb)(config.parts[1]).to(device)
    model.tie_weights()
    return model.requires_grad_(False).eval()


class Rows:
    """Hold examples in memory, as a `SampleSource`.

    Args:
        config: the model's.
        seconds: of audio in each example.
    """

    def __init__(self, config: MiDashengLMConfig, seconds: Sequence[float]) -> None:
        self.rows = []
        for number, length in enumerate(seconds):
            random, samples = np.random.default_rng(number), int(16_000 * length)
            audio, answer = (
                [config.audio_token_id] * audio_token_count(samples),
                random.integers(3, 400, ANSWER),
            )
            ids = np.array([1] * BEFORE + audio + [2] * AFTER + [*answer], dtype=np.int32)
            labels = np.where(np.arange(len(ids)) < len(ids) - ANSWER, -100, ids).astype(np.int32)
            noise = random.normal(0, 0.1, samples).astype(np.float32)
            self.rows.append(Sample(ids, labels, noise))
        self.token_counts = np.array([len(row.input_ids) for row in self.rows])
        self.supervised = np.array([int((row.labels != -100).sum()) for row in self.rows])
        self.audio_lengths = np.array([len(row.waveform) for row in self.rows])

    def __getitem__(self, index: int, /) -> Sample:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return a number for an example."""
        return str(index + 2)

    def tokens(self, index: int) -> Sample:
        """Return an example, with its ids and labels, as a dataset does."""
        return self.rows[index]


class Steps:
    """Take the steps of a training in place of its log."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, _: int, *, loss: float, norm: float, **__: Any) -> None:
        """Take a step."""
        self.losses.append(loss)
        self.norms.append(norm)

    def evaluation(self, *_: Any) -> None:
        """Take an evaluation."""


def options_of(output: Path, **changes: Any) -> TrainOptions:
    """Return options for steps without end; nothing is saved before it."""
    settings = {"train_dataset": "data", "output": str(output), "num_epochs": 1000.0, "save_steps": 0}
    return TrainOptions(**{**settings, **changes})


def sampler_of(rows: Rows, options: TrainOptions) -> BatchSampler:
    """Return the sampler of a run on one device."""
    return BatchSampler(
        rows.token_counts,
        rows.supervised,
        options.batch_size,
        options.gradient_accumulation_steps,
        1,
        options.seed,
    )


def plan_of(
    config: MiDashengLMConfig, rows: Rows, options: TrainOptions, dtype: torch.dtype, device: torch.device
) -> MemoryPlan:
    """Plan the memory of a run as the command does."""
    folder = Path(options.output)
    config.save_pretrained(folder)
    return plan_memory(folder, options, sampler_of(rows, options), rows.audio_lengths, BEFORE, device, dtype)


def trainer_of(
    model: Any,
    rows: Rows,
    options: TrainOptions,
    dtype: torch.dtype,
    device: torch.device,
    kept: KeptBlocks = NONE,
    source: Callable[[Any], Any] | None = None,
) -> tuple[Trainer, Steps]:
    """Add adapters to a model, and return what trains it, with what takes the steps.

    Examples are `rows`, or what `source` makes of the model with its adapters.
    """
    torch.manual_seed(options.seed)
    wrapped, _ = add_adapters(
        model, options.train_target, rank=options.lora_rank, alpha=options.lora_alpha,
        dropout=options.lora_dropout, base_name="",
    )  # fmt: skip
    sampler, log = sampler_of(rows, options), Steps()
    schedule, forward = (
        Schedule.of(sampler.steps_per_epoch, options),
        ForwardPass(wrapped.train(), Collator(0), device, dtype),
    )
    evaluator = Evaluator(options, schedule, forward, None, None, World(), log)  # type: ignore[arg-type]
    trainer = Trainer(
        options,
        schedule,
        sampler,
        rows if source is None else source(wrapped),
        forward,
        evaluator,
        World(),
        log,
        kept,
    )  # type: ignore[arg-type]
    return trainer, log


def quantise(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Quantise the decoder's linear layers of a model in 4 bits, one after the other."""
    import bitsandbytes

    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and re.fullmatch(LORA_TARGETS["decoder"], name):
            new = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype,
                quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            new.weight = bitsandbytes.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            if module.bias is not None:
                new.bias = nn.Parameter(module.bias.data, requires_grad=False)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new.to(device))
    model.is_loaded_in_4bit = True
