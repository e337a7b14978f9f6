"""Training: samples per second of the whole command, against what this machine's matrix products allow.

A mid-size random model (encoder 256 x 6, decoder 512 x 8, vocabulary 32,768), 64 clips of 1 to 12 s with
short answers, batch 8, float32, LoRA of rank 32 in encoder, projector and decoder. Speed is given per
GFLOP/s of the GEMM peak, so that it says something on another machine. A machine that others use too changes
its pace within a minute: the peak is taken anew before and after every step, and each step's time is counted
in what the peak would have allowed meanwhile.
"""

import contextlib
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Figure
from benchmarks.loss import peak_bytes
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.collate import Batch, Collator
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset, Sample
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.demo import make_tiny_model
from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel
from mdl_toolkit.training.gradient_checkpointing import KeptBlocks, checkpoint_gradients
from mdl_toolkit.training.lora import add_adapters
from mdl_toolkit.training.memory.plan import plan_memory
from mdl_toolkit.training.run import train
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.trainer import Trainer
from mdl_toolkit.utils.run_folder import read_log
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

CLIPS, SHORTEST, LONGEST = 64, 1.0, 12.0  # seconds
BATCH, EPOCHS, RANK = 8, 5, 32
VOCABULARY = 32_768
GEMM = 2048  # rows and columns of the square matrices whose product is timed
TARGETS = ("encoder", "projector", "decoder")


@dataclass(frozen=True)
class Speed:
    """One training; all steps but those of the first epoch.

    Attributes:
        samples: per second.
        peak: GFLOP/s of matrix products meanwhile.
        share: samples for each GFLOP that the peak would have allowed.
        waited: share of the time that was spent waiting for data.
    """

    samples: float
    peak: float
    share: float
    waited: float


def figures() -> list[Figure]:
    """Speed with and without gradient checkpointing, padding, arithmetic and memory."""
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        place = Path(name)
        model, data = make_model(place), _make_data(place)
        found = []
        for checkpointing in (True, False):
            speed = _train(place, model, data, checkpointing)
            found.append(_speed(speed, checkpointing))
            found += _of_one_step(model, data, speed, checkpointing)
        found += [_padding(data), _collation()]
    return found


def gemm_peak(times: int = 3) -> float:
    """GFLOP/s of a float32 matrix product on all threads: the median of so many."""
    left, right, out = torch.ones(3, GEMM, GEMM)
    found = []
    for _ in range(times):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        found.append(time.perf_counter() - started)
    return 2 * GEMM**3 / statistics.median(found) / 1e9


@contextlib.contextmanager
def _timed_steps() -> Iterator[list[tuple[float, float]]]:
    """Seconds of each step of a training, and the peak around it."""
    plain, found, peaks = Trainer.make_step, list[tuple[float, float]](), [gemm_peak(8)]

    def timed(self: Trainer, batches: Iterator[Batch]) -> float:
        started = time.perf_counter()
        loss = plain(self, batches)
        seconds = time.perf_counter() - started
        peaks.append(gemm_peak())
        found.append((seconds, sum(peaks[-2:]) / 2))
        return loss

    with mock.patch.object(Trainer, "make_step", timed):
        yield found


def make_model(place: Path) -> Path:
    """The text side of the demonstration's model with a larger random one; 62 million parameters."""
    phrases = Path(__file__).parent.parent / "src/mdl_toolkit/phrases"
    make_tiny_model(place / "tiny", phrases, seed=0)
    config = json.loads((place / "tiny/config.json").read_text(encoding="utf-8"))
    config["audio_encoder_config"] |= {"embed_dim": 256, "depth": 6, "num_heads": 4}
    config["text_config"] |= {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "layer_types": ["full_attention"] * 8,
    }  # fmt: skip
    torch.manual_seed(0)
    MiDashengLMModel(MiDashengLMConfig(**config)).save_pretrained(place / "model")
    for file in (place / "tiny").iterdir():
        if not (place / "model" / file.name).exists():
            shutil.copy(file, place / "model")
    return place / "model"


def _make_data(place: Path) -> ConvertedDataset:
    """Noise of lengths that are evenly spread, in random order, with captions of 3 to 12 words."""
    random = np.random.default_rng(0)
    lines = ["audio,user_prompt,prediction"]
    for number, seconds in enumerate(random.permutation(np.linspace(SHORTEST, LONGEST, CLIPS))):
        noise = random.normal(0, 0.1, int(seconds * 16_000))
        soundfile.write(place / f"{number}.wav", noise, 16_000)
        words = " ".join(random.choice(["rain", "dog", "car", "music", "wind"], random.integers(3, 13)))
        lines.append(f"{place / f'{number}.wav'},What do you hear?,{words}")
    (place / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ConvertOptions(
        input=str(place / "rows.csv"), output=str(place / "data"), model_name=str(place / "model")
    )
    convert_dataset(options)
    return ConvertedDataset(place / "data")


def _train(place: Path, model: Path, data: ConvertedDataset, checkpointing: bool) -> Speed:
    output = place / f"run-{checkpointing}"
    options = TrainOptions(
        train_dataset=str(data.folder), output=str(output), model_name=str(model), num_epochs=EPOCHS,
        batch_size=BATCH, gradient_checkpointing=checkpointing, merge_lora=False, lora_rank=RANK,
        train_target=TARGETS,
    )  # fmt: skip
    with _timed_steps() as steps:
        train(options)
    waited = [line for line in read_log(output / "log.jsonl") if "loss" in line][-1]["waited"]
    seconds, peaks = np.array(steps[CLIPS // BATCH :]).T
    allowed, count = (seconds * peaks).sum(), CLIPS * (EPOCHS - 1)
    return Speed(count / seconds.sum(), allowed / seconds.sum(), count / allowed, waited)


def _speed(speed: Speed, checkpointing: bool) -> Figure:
    goal = 0.019 if checkpointing else 0.023
    what = f"training, {_named(checkpointing)}; other: the published tool's figure, both per GFLOP/s of peak"
    return Figure(
        f"{what} ({speed.peak:.0f} here, {100 * speed.waited:.1f} % of the time waiting for data)",
        f"{speed.samples:.2f} samples/s, {speed.share:.4f}", f"{goal:.3f}", speed.share / goal,
    )  # fmt: skip


def _of_one_step(folder: Path, data: ConvertedDataset, speed: Speed, checkpointing: bool) -> list[Figure]:
    """Arithmetic of an epoch's steps against the peak, and the most memory of the longest step."""
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    loaded = sum(tensor.nbytes for tensor in model.state_dict().values())
    wrapped, _ = add_adapters(model, TARGETS, rank=RANK, alpha=RANK, dropout=0.0, base_name=str(folder))
    if checkpointing:
        checkpoint_gradients(wrapped, _kept(folder, data))
    wrapped.train()
    sampler, collate = _sampling(data), Collator(0)
    batches = [collate([data[int(row)] for row in sampler.examples(step)]) for step in range(CLIPS // BATCH)]
    # The counter does not know of itself what these products cost.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added}) as counter:
        for batch in batches:
            wrapped(**batch).loss.backward()
    done = counter.get_total_flops() / CLIPS * speed.samples / 1e9
    wrapped.zero_grad(set_to_none=True)
    most = peak_bytes(lambda: wrapped(**batches[0]).loss.backward())
    name = _named(checkpointing)
    return [
        Figure(
            f"arithmetic, {name}; other: GEMM peak",
            f"{done:.0f} GFLOP/s", f"{speed.peak:.0f}", speed.peak / done,
        ),
        Figure(
            f"peak memory of the longest step, {name}; other: the loaded model",
            f"{most / 2**20:.0f} MiB", f"{loaded / 2**20:.0f} MiB", loaded / most,
        ),
    ]  # fmt: skip


def _added(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
    """Operations of a matrix product."""
    return 2 * left[0] * left[1] * right[1]


def _kept(folder: Path, data: ConvertedDataset) -> KeptBlocks:
    """Return the blocks that the command's gradient checkpointing leaves alone."""
    options = TrainOptions(
        train_dataset="data",
        output="run",
        batch_size=BATCH,
        gradient_checkpointing=True,
        lora_rank=RANK,
        train_target=TARGETS,
    )
    tokenizer = ChatTokenizer(read_tokenizer_files(folder))
    beginning = tokenizer.shared_prefix_length(data.tokens(row).input_ids for row in range(len(data)))
    return plan_memory(
        folder, options, _sampling(data), data.audio_lengths, beginning, torch.device("cpu"), torch.float32
    ).kept


def _padding(data: ConvertedDataset) -> Figure:
    """Decoder positions that are padding, in batches by length and in batches at random."""
    sampler = _sampling(data)
    ours = _share(data.token_counts, [sampler.examples(step) for step in range(CLIPS // BATCH)])
    random = np.random.default_rng(0)
    orders = [list(random.permutation(CLIPS).reshape(-1, BATCH)) for _ in range(100)]
    shares = [_share(data.token_counts, order) for order in orders]
    other = statistics.mean(shares)
    return Figure(
        "padding in decoder positions; other: random batches", f"{ours:.1%}", f"{other:.1%}", other / ours
    )


def _collation() -> Figure:
    """Time of the process's thread for a batch of 8 clips of 30 s, beside reading and decoding them."""
    noise = np.random.default_rng(0).normal(0, 0.1, 30 * 16_000).astype(np.float32)
    ids = np.arange(200, dtype=np.int32)
    rows, times = [Sample(ids, ids, noise.copy()) for _ in range(BATCH)], []
    for _ in range(9):
        started = time.thread_time()
        Collator(0)(rows)
        times.append(time.thread_time() - started)
    spent = statistics.median(times)
    name = "collation of 8 clips of 30 s (median of 9); other: goal"
    return Figure(name, f"{1000 * spent:.1f} ms", "15 ms", 0.015 / spent)


def _share(positions: np.ndarray, batches: list[np.ndarray]) -> float:
    computed = sum(int(positions[rows].max()) * len(rows) for rows in batches)
    return 1 - float(positions.sum()) / computed


def _sampling(data: ConvertedDataset) -> BatchSampler:
    return BatchSampler(data.token_counts, data.supervised_counts, BATCH, 1, 1, 42)


def _named(checkpointing: bool) -> str:
    return f"checkpointing {'on' if checkpointing else 'off'}"
