"""What one GPU does, in under twelve minutes: `python -m benchmarks gpu`; `--tiny --device cpu` tries it.

Each section prints a line of JSON for each figure as soon as it is known, and none stops the others:

    env        the machine, and what its matrix products reach
    parity     golden numbers and gradients, in float32 and bfloat16
    alone      a row's loss alone and in a batch
    resume     twice the same run, and one that was resumed: the same, bit for bit?
    steps      training steps of the 7B's shape: time, tokens, share of the peak, memory against the plan
    qlora      the same on 4-bit weights
    cache      steps of the decoder on waveforms and on cached audio features: time, and the same loss
    oom        a limit that a batch does not fit: the loss is the same
    decode     tokens a second, by continuous batching and by transformers' generate

At the end a row for `benchmarks/HISTORY.md`.
"""

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from benchmarks.gpu_model import (
    GOLDEN,
    Rows,
    config_of,
    options_of,
    plan_of,
    quantise,
    random_model,
    trainer_of,
)
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.model.decoding_batch import DecodingBatch
from mdl_toolkit.training.checkpoints import checkpoint_of, to_resume
from mdl_toolkit.training.feature_cache import FeatureCache
from mdl_toolkit.training.summary import operations_of
from mdl_toolkit.training.trainer import Trainer
from mdl_toolkit.utils.device import (
    best_device,
    device_memory,
    device_name,
    empty_cache,
    peak_memory,
    reset_peak_memory,
)
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.weights.loading import load_model, quiet_libraries

BF16, F32 = torch.bfloat16, torch.float32
CHECKPOINT = GOLDEN / "checkpoints/A-small"
MATRIX = 8192  # rows and columns of those whose product is timed


class Bench:
    """Run the sections and print what they find.

    Args:
        device: where.
        is_tiny: small shapes, few repetitions.
        out: file for the lines too.
    """

    def __init__(self, device: torch.device, is_tiny: bool, out: str | None) -> None:
        self.device, self.is_tiny, self.out = device, is_tiny, out
        self.began = time.perf_counter()
        self.shape = "tiny" if is_tiny else "7B"
        self.peak = 0.0
        self.row: dict[str, str] = {}

    def tell(self, section: str, **values: Any) -> None:
        """Print a line."""
        line = json.dumps(
            {"section": section, "t": round(time.perf_counter() - self.began, 1), **values}, default=str
        )
        print(line, flush=True)
        if self.out:
            with Path(self.out).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def wait(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def fresh(self) -> None:
        """Free what nobody needs, and forget the most memory so far."""
        gc.collect()
        empty_cache(self.device)
        reset_peak_memory(self.device)

    def seconds(self, work: Callable[[], object], warm: int, times: int) -> float:
        """Return the median seconds of some work."""
        found = []
        for turn in range(warm + times):
            start = time.perf_counter()
            work()
            self.wait()
            if turn >= warm:
                found.append(time.perf_counter() - start)
        return sorted(found)[len(found) // 2]

    def step_seconds(self, trainer: Trainer) -> float:
        """Return the median seconds of a training's steps."""
        wanted = (each for step in range(100) for each in trainer.sampler.batches(step, 0))
        with closing(trainer.loader.batches(wanted)) as batches:
            return self.seconds(lambda: trainer.make_step(batches), 2, 2 if self.is_tiny else 5)

    # --- sections ---

    def env(self) -> None:
        """Tell what the machine is, and what its products reach."""
        size = 512 if self.is_tiny else MATRIX
        matrix = torch.randn(size, size, device=self.device, dtype=BF16)
        self.peak = 2 * size**3 / self.seconds(lambda: matrix @ matrix, 3, 10)
        self.tell(
            "env", torch=torch.__version__, device=device_name(self.device),
            memory=device_memory(self.device), tflops=round(self.peak / 1e12, 2),
        )  # fmt: skip
        self.row["device"] = device_name(self.device)

    def parity(self) -> None:
        """Compare golden logits, and gradients with a CPU's in float32."""
        for name in ("A-small", "B-small"):
            wanted: dict[str, torch.Tensor] = {}
            for dtype, device in ((F32, torch.device("cpu")), (F32, self.device), (BF16, self.device)):
                off, gradients = _golden(name, dtype, device)
                wanted = wanted or gradients
                norm = torch.stack([each.norm() for each in wanted.values()]).norm()
                apart = (
                    torch.stack([(gradients[key] - each).norm() for key, each in wanted.items()]).norm()
                    / norm
                )
                is_good = off < (5e-4 if dtype == F32 else 0.5) and apart < (1e-3 if dtype == F32 else 0.1)
                self.tell(
                    "parity", model=name, dtype=str(dtype), device=str(device), logits_off=off,
                    gradients_off=float(apart), is_good=bool(is_good),
                )  # fmt: skip

    def alone(self) -> None:
        """Compare rows' losses alone with the loss of all."""
        config = config_of("tiny")
        rows, model = Rows(config, [0.4, 1.3, 2.6, 0.9]), random_model(config, F32, self.device)
        with torch.no_grad():
            losses = [self._loss(model, rows, [each]) for each in range(4)]
            whole = self._loss(model, rows, [*range(4)])
        off = abs(sum(losses) - whole) / whole
        self.tell("alone", losses=losses, whole=whole, off=off, is_good=off < 1e-5)

    def _loss(self, model: Any, rows: Rows, indices: list[int]) -> float:
        batch: Any = Collator(0)([rows[each] for each in indices])
        there = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return float(model(**there, num_items_in_batch=1).loss)

    def resume(self) -> None:
        """Make a run twice, and a third time from its middle."""
        changes = {"batch_size": 4, "num_epochs": 1.0, "save_steps": 3, "lora_rank": 4, "lr": 1e-2}
        with tempfile.TemporaryDirectory() as place:
            found = []
            for name, source in (("first", None), ("again", None), ("on", "first")):
                model = load_model(CHECKPOINT, dtype=BF16, device=self.device)
                rows = Rows(model.config, [0.5 + 0.13 * (number % 7) for number in range(24)])
                options = options_of(Path(place) / name, **changes)
                trainer, log = trainer_of(model, rows, options, BF16, self.device)
                if source is not None:
                    saved = to_resume(Path(place), str(checkpoint_of(Path(place) / source, 3)))
                    assert saved is not None
                    trainer.resume(saved)
                Path(options.output).mkdir(parents=True, exist_ok=True)
                trainer.run()
                found.append([each.detach().cpu() for each in trainer.trainable.parameters])
        same = [all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)) for other in found[1:]]
        self.tell("resume", again=same[0], resumed=same[1], losses=log.losses, is_good=all(same))

    def steps(self) -> None:
        """Time steps of the 7B's shape, and compare their memory with the plan."""
        cases = [("8x1", [1.0] * 8, {}), ("2x1", [1.0] * 2, {"gradient_checkpointing": False})]
        if not self.is_tiny:
            cases = [
                ("8x10", [10.0] * 8, {}), ("8x30", [30.0] * 8, {}), ("1x10", [10.0], {}),
                ("mixed", [30.0, 25, 20, 12, 8, 5, 3, 1], {}),
                ("8x10 dropout", [10.0] * 8, {"lora_dropout": 0.05}),
            ]  # fmt: skip
        for name, seconds, changes in cases:
            self._steps("steps", name, seconds, lambda _: None, **changes)

    def qlora(self) -> None:
        """Time steps on 4-bit weights."""
        cases = [("8x1", 1.0)] if self.is_tiny else [("8x10", 10.0), ("8x30", 30.0)]
        for name, seconds in cases:
            self._steps(
                "qlora",
                name,
                [seconds] * 8,
                lambda model: quantise(model, BF16, self.device),
                quantization="4bit",
            )

    def _steps(
        self, section: str, name: str, seconds: list[float], prepare: Callable[[Any], None], **changes: Any
    ) -> None:
        config = config_of(self.shape)
        with tempfile.TemporaryDirectory() as place:
            rows, options = Rows(config, seconds), options_of(Path(place), batch_size=len(seconds), **changes)
            self.fresh()
            plan = plan_of(config, rows, options, BF16, self.device)
            model = random_model(config, BF16, self.device)
            operations = operations_of(model, rows.token_counts, rows.audio_lengths).sum()
            prepare(model)
            trainer, log = trainer_of(model, rows, options, BF16, self.device, plan.kept)
            taken = self.step_seconds(trainer)
            tokens, most = int(rows.token_counts.sum()), peak_memory(self.device)
            found = {
                "ms": round(1e3 * taken, 1), "samples_per_s": round(len(seconds) / taken, 2),
                "tokens_per_s": round(tokens / taken),
                "mfu": round(operations / taken / max(self.peak, 1), 4),
            }  # fmt: skip
            self.tell(
                section, case=name, **found, kept=[plan.kept.encoder, plan.kept.decoder], planned=plan.total,
                most=most, off=most and round(most / plan.total - 1, 4), losses=log.losses[-2:],
                rows_at_once=trainer.micro_batcher.most, waited=round(trainer.loader.waited, 3),
            )  # fmt: skip
            self.row[f"{section} {name}"] = f"{found['samples_per_s']} samples/s, MFU {found['mfu']:.1%}"

    def cache(self) -> None:
        """Time steps of the decoder alone, on waveforms and on features that are computed once."""
        config, losses = config_of(self.shape), []
        for name in ("waveforms", "features"):
            self.fresh()
            with tempfile.TemporaryDirectory() as place:
                rows = Rows(config, [1.0 if self.is_tiny else 10.0] * 8)
                options = options_of(
                    Path(place), batch_size=8, train_target=("decoder",), cache_audio_features=True, bf16=True
                )
                config.save_pretrained(place)
                cached = FeatureCache(Path(place, "features"), options, Path(place), World(), [rows])
                source = partial(cached.precomputed, rows) if name == "features" else None
                torch.manual_seed(0)
                model = random_model(config, BF16, self.device)
                trainer, log = trainer_of(model, rows, options, BF16, self.device, source=source)
                taken = self.step_seconds(trainer)
                losses.append(log.losses[0])
                self.tell("cache", what=name, ms=round(1e3 * taken, 1))
                self.row[f"decoder on {name}"] = f"{8 / taken:.2f} samples/s"
        off = abs(losses[1] / losses[0] - 1)
        self.tell("cache", losses=losses, off=off, is_good=off < 1e-2)

    def oom(self) -> None:
        """Limit the memory so that a batch does not fit, and compare the loss."""
        memory = device_memory(self.device)
        if memory is None:
            self.tell("oom", skipped="memory of a CPU is not limited here")
            return
        config, losses, most = config_of(self.shape, 4), [], 0
        for share in (1.0, 0.6):
            self.fresh()
            with tempfile.TemporaryDirectory() as place:
                options = options_of(Path(place), batch_size=8, gradient_checkpointing=False)
                rows = Rows(config, [10.0] * 8)
                trainer, log = trainer_of(
                    random_model(config, BF16, self.device), rows, options, BF16, self.device
                )
                if most:
                    torch.cuda.set_per_process_memory_fraction(share * most / memory[1], self.device)
                wanted = trainer.sampler.batches(0, 0)
                try:
                    with closing(trainer.loader.batches(wanted)) as batches:
                        trainer.make_step(batches)
                finally:
                    if most:
                        torch.cuda.set_per_process_memory_fraction(1.0, self.device)
                most, losses = peak_memory(self.device) or 0, [*losses, log.losses[-1]]
        off = abs(losses[1] / losses[0] - 1)
        self.tell("oom", rows_at_once=trainer.micro_batcher.most, losses=losses, is_good=off < 1e-2)

    def decode(self) -> None:
        """Time tokens of answers, by our loop and by transformers' generate."""
        count, width, batch = (4, 12, 2) if self.is_tiny else (64, 200, 16)
        model = random_model(config_of(self.shape), BF16, self.device)
        self.fresh()
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
        )
        with torch.inference_mode():
            embeddings = 0.02 * torch.randn(
                batch, width, model.config.parts[1].hidden_size, device=self.device, dtype=BF16
            )

            def ours() -> None:
                rows = DecodingBatch(model.decoder)
                logits = rows.admit(
                    embeddings, [width - each % 5 for each in range(batch)], batch, width + count
                )
                for _ in range(count):
                    logits = rows.step(logits.argmax(-1).cpu().to(self.device))

            mask = torch.ones(batch, width, dtype=torch.long, device=self.device)
            mask[0, :3] = 0
            generate = model.decoder.generate
            ways = {
                "ours": ours,
                "generate": lambda: generate(
                    inputs_embeds=embeddings, attention_mask=mask, generation_config=settings
                ),
            }
            for name, work in ways.items():
                taken = self.seconds(work, 1, 2)
                speed = batch * count / taken
                self.tell(
                    "decode", what=name, batch=batch, tokens_per_s=round(speed, 1), ms=round(1e3 * taken, 1)
                )
                self.row[f"decode {name}"] = f"{speed:.0f} tokens/s"


def _golden(name: str, dtype: torch.dtype, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the largest deviation from golden logits, and the gradients of the golden loss."""
    table = dict(np.load(GOLDEN / f"alone_{name}.npz"))
    model = MiDashengLMModel.from_pretrained(GOLDEN / "checkpoints" / name, dtype=dtype).to(device).eval()
    worst, total = 0.0, torch.zeros((), device=device)
    for clip in range(6):
        ids, labels = (torch.tensor(table[f"clip{clip}_{key}"]) for key in ("input_ids", "labels"))
        samples = _wave(int(table[f"clip{clip}_n"]), int(table[f"clip{clip}_seed"]))
        inputs = {
            "input_ids": ids[None].to(device), "input_values": torch.from_numpy(samples)[None].to(device),
            "audio_length": torch.tensor([len(samples)]),
        }  # fmt: skip
        with torch.no_grad():
            logits = model(**inputs).logits[0].float().cpu()
        predicting = torch.cat([labels[1:] != -100, torch.tensor([False])])
        for found, key in ((logits[predicting], "logits_at_supervised"), (logits[-4:], "logits_last4")):
            worst = max(worst, float((found - torch.tensor(table[f"clip{clip}_{key}"])).abs().max()))
        with torch.autocast(device.type, BF16, enabled=dtype == BF16):
            total = total + model(**inputs, labels=labels[None].to(device)).loss
    total.backward()
    gradients = {key: p.grad.float().cpu() for key, p in model.named_parameters() if p.grad is not None}
    return worst, gradients


def _wave(samples: int, seed: int) -> np.ndarray:
    """Return the waveform of a golden clip."""
    r = np.random.default_rng(seed)
    tones = [r.uniform(*bounds, 4) for bounds in ((0.02, 0.2), (80, 7000), (0, 6))]
    t = np.arange(samples) / 16000
    tone = sum(a * np.sin(2 * np.pi * f * t + p) for a, f, p in zip(*tones, strict=True))
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * 0.7 * t)
    return (tone * swell + 0.01 * r.standard_normal(samples)).astype(np.float32)


SECTIONS = ("env", "parity", "alone", "resume", "steps", "qlora", "cache", "oom", "decode")


def main(words: list[str]) -> int:
    """Run the sections; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu")
    parser.add_argument("--device", default=None, help="cpu, or the accelerator if not given")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, few repetitions")
    parser.add_argument("--only", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--out", default=None, help="a file for the lines of JSON too")
    parser.add_argument("--budget", type=float, default=660.0, help="seconds; no section begins later")
    given = parser.parse_args(words)
    quiet_libraries()
    bench = Bench(torch.device(given.device) if given.device else best_device(), given.tiny, given.out)
    failed = False
    for section in given.only:
        if time.perf_counter() - bench.began > given.budget:
            bench.tell(section, skipped="no time left")
            continue
        start = time.perf_counter()
        try:
            getattr(bench, section)()
            bench.tell(section, ok=True, took=round(time.perf_counter() - start, 1))
        except Exception as problem:  # noqa: BLE001 - a section must not stop the others
            failed = True
            bench.tell(
                section,
                error=f"{type(problem).__name__}: {problem}"[:500],
                where=traceback.format_exc()[-800:],
            )
        with suppress(Exception):
            bench.fresh()
    print("| " + " | ".join(bench.row) + " |\n| " + " | ".join(bench.row.values()) + " |")
    return int(failed)
