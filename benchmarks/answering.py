"""Answering: rows per second against a plain loop of `generate` over batches in file order.

The mid-size random model of the training benchmark; clips of 1 to 12 s in random order, answers of 1 to 60
tokens, batch 16, float32. How long an answer is, is given to both as a budget, as a random model ends none;
the plain loop decodes a batch until its longest answer is complete, as `generate` does.
"""

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig

from benchmarks import Figure, alternate
from benchmarks.training import make_model
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.inference.generate import Answerer, Question
from mdl_toolkit.model.kernels.matmul import PrepackedLinear, prepack
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

ROWS, BATCH, RUNS = 96, 16, 3
SHORTEST, LONGEST, MOST_TOKENS = 1.0, 12.0, 60
CPU = torch.device("cpu")


def figures() -> list[Figure]:
    """Rows per second, when the first answer is there, and what laying weights out once is worth."""
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = make_model(Path(name))
        model, fast = _load(folder), _load(folder)
        tokenizer = ChatTokenizer(read_tokenizer_files(folder))
    questions = _questions(model)
    prepack(fast)
    assert dict(_ours(fast, tokenizer, questions)) == dict(_plain(model, tokenizer, questions))
    ours, other = alternate(
        lambda: dict(_ours(fast, tokenizer, questions)),
        lambda: dict(_plain(model, tokenizer, questions)),
        RUNS,
    )
    unpacked, _ = alternate(lambda: dict(_ours(model, tokenizer, questions)), lambda: None, RUNS)
    return [
        Figure(
            f"answering {ROWS} rows, batch {BATCH}; other: a plain loop of generate (median of {RUNS})",
            f"{ROWS / ours:.1f} rows/s", f"{ROWS / other:.1f} rows/s", other / ours,
        ),
        Figure(
            "the same without weights laid out once; other: the plain loop",
            f"{ROWS / unpacked:.1f} rows/s", f"{ROWS / other:.1f} rows/s", other / unpacked,
        ),
        _first(fast, tokenizer, questions, 2 * other * BATCH / ROWS),
        *(_product(rows) for rows in (1, 4, 16, 300)),
    ]  # fmt: skip


def _load(folder: Path) -> Any:
    model = load_model(folder, dtype=torch.float32, device=CPU).eval()
    model.generation_config.eos_token_id = None
    return model


def _questions(model: Any) -> list[Question]:
    random = np.random.default_rng(0)
    found = []
    for key, seconds in enumerate(random.permutation(np.linspace(SHORTEST, LONGEST, ROWS))):
        waveform = random.normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)
        audio = np.full(audio_token_count(len(waveform)), model.config.audio_token_id)
        ids = np.concatenate([random.integers(0, 200, 12), audio, random.integers(0, 200, 12)])
        sample = Sample(ids.astype(np.int32), np.full(len(ids), -100, np.int32), waveform)
        found.append(Question(key, sample, int(random.integers(1, MOST_TOKENS + 1))))
    return found


def _ours(model: Any, tokenizer: ChatTokenizer, questions: list[Question]) -> Iterator[tuple[int, str]]:
    answerer = Answerer(model, tokenizer, BATCH)
    answerer.ends = set()
    return answerer.answers(sorted(questions, key=lambda question: -len(question.sample.input_ids)))


def _plain(model: Any, tokenizer: ChatTokenizer, questions: list[Question]) -> Iterator[tuple[int, str]]:
    collate = Collator(tokenizer.pad_id)
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        batch: dict[str, Any] = {**collate([question.sample for question in part])}
        del batch["labels"]
        most = max(question.max_new_tokens for question in part)
        settings = GenerationConfig(do_sample=False, max_new_tokens=most)
        for question, ids in zip(part, model.generate(**batch, generation_config=settings), strict=True):
            yield question.key, tokenizer.decode(ids[: question.max_new_tokens].tolist())


def _first(model: Any, tokenizer: ChatTokenizer, questions: list[Question], two_batches: float) -> Figure:
    started = time.perf_counter()
    next(_ours(model, tokenizer, questions))
    first = time.perf_counter() - started
    what = "the first answer; other: two batches of the plain loop"
    return Figure(what, f"{first:.2f} s", f"{two_batches:.2f} s", two_batches / first)


def _product(rows: int, width: int = 3584) -> Figure:
    """Weights that do not fit into the caches, as a model's do not; one thread."""
    torch.set_num_threads(1)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(4)]
    packed = [PrepackedLinear(layer) for layer in layers]
    x = torch.randn(rows, width)
    with torch.inference_mode():
        ours, other = alternate(
            lambda: [layer(x) for layer in packed],
            lambda: [functional.linear(x, layer.weight) for layer in layers],
            9,
        )
    return Figure(
        f"{rows} rows times 4 weights of {width} x {width}, laid out once; other: as stored (median of 9)",
        f"{ours * 1000:.1f} ms", f"{other * 1000:.1f} ms", other / ours,
    )  # fmt: skip
