"""Verify a merged model: it must answer the same samples as its base with the adapter does.

The models are loaded one after the other, in the dtype of the merged weights, and decode greedily. As long as
both have chosen the same tokens, their logits are comparable; the verdict rests on these.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.data.chat_template import Message
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.dataset import ConvertedDataset, Sample
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import ModelError
from mdl_toolkit.inference.generate import prompt_of
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.device import CPU, best_device, empty_cache
from mdl_toolkit.utils.machine import OOM_ERRORS, describe_oom
from mdl_toolkit.weights.loading import load_model, with_adapter
from mdl_toolkit.weights.provenance import Prompts
from mdl_toolkit.weights.safetensors_stream import stored_dtype
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

SAMPLES = 3
NEW_TOKENS = 16
# Share of the largest logit. In float32 the two differ by about 1e-6 on small models (docs/decisions.md).
FLOAT32_TOLERANCE = 1e-3
# In 16 bits: multiple of the change that PEFT's rounding of W + s B A in memory makes to the same logits.
ROUNDINGS = 3.0


@dataclass(frozen=True)
class Reply:
    """Hold a model's greedy answer to one sample.

    Attributes:
        ids: the tokens, `[steps]`, at most `NEW_TOKENS`.
        logits: `[steps, vocabulary]` float32, from which they were chosen.
    """

    ids: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class Difference:
    """Hold the distance between two models' replies to the same samples.

    Attributes:
        logits: the largest difference, over the steps up to the first tokens that differ.
        same_texts: the number of samples with the same text.
    """

    logits: float
    same_texts: int

    @staticmethod
    def between(one: Sequence[Reply], other: Sequence[Reply]) -> "Difference":
        """Compare replies sample by sample; a logit that is not finite is infinitely far from any other."""
        largest, same_texts = 0.0, 0
        for a, b in zip(one, other, strict=True):
            shared = min(len(a.ids), len(b.ids))
            steps = next((step + 1 for step in range(shared) if a.ids[step] != b.ids[step]), shared)
            difference = (a.logits[:steps] - b.logits[:steps]).abs().max()
            largest = max(largest, float(difference) if difference.isfinite() else float("inf"))
            same_texts += a.ids == b.ids
        return Difference(largest, same_texts)


def verify_merge(base: Path, adapter: Path, merged: Path, samples: Sequence[Sample]) -> None:
    """Compare the logits of base with adapter and of the merged model, and report their difference.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter.
        merged: folder of the merged model.
        samples: prompts and recordings; answers in them are not used.

    Raises:
        ModelError: the logits differ by more than rounding explains.
    """
    tokenizer, dtype = ChatTokenizer(read_tokenizer_files(base)), stored_dtype(merged)
    device = best_device()
    measured = None
    measure = partial(_measure, base, adapter, merged, samples, tokenizer, dtype)
    try:
        measured = measure(device)
    # After a quantised training the GPU may be too small.
    except OOM_ERRORS as problem:
        if device == CPU or describe_oom(problem) is None:
            raise
    # Here the error, which holds what the first attempt had loaded, is gone.
    difference, largest, allowed = measured or measure(CPU)
    figures = {
        "difference": f"{difference.logits:.2g}",
        "allowed": f"{allowed:.2g}",
        "largest": f"{largest:.3g}",
    }
    if not difference.logits <= allowed:
        raise ModelError(
            "the merged model does not answer as base and adapter do: largest logit difference {difference} "
            "(allowed {allowed}, largest logit {largest}); it was not put in place, the adapter stays in "
            "{adapter}",
            **figures,
            adapter=adapter,
        )
    say(
        "proven: {count} {count:row|rows} through base + adapter and through the merged model: largest "
        "logit difference {difference} (allowed {allowed}, largest logit {largest}), {same} of {count} "
        "greedy texts the same",
        count=len(samples),
        same=difference.same_texts,
        **figures,
    )


def _measure(
    base: Path,
    adapter: Path,
    merged: Path,
    samples: Sequence[Sample],
    tokenizer: ChatTokenizer,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Difference, float, float]:
    """Return the difference, the largest logit, and the largest difference that is allowed."""
    with _loaded(base, dtype, device) as plain:
        model = with_adapter(plain, adapter).eval()
        reference = _replies(model, samples, tokenizer)
        largest = max(float(reply.logits.abs().max()) for reply in reference)
        allowed = FLOAT32_TOLERANCE * largest
        if dtype != torch.float32:
            model.merge_adapter()
            rounded = Difference.between(reference, _replies(model, samples, tokenizer))
            allowed = max(allowed, ROUNDINGS * rounded.logits)
        del plain, model
    with _loaded(merged, dtype, device) as plain:
        difference = Difference.between(reference, _replies(plain.eval(), samples, tokenizer))
        del plain
    return difference, largest, allowed


@contextmanager
def _loaded(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    """Load a model for the context; free unused memory before and after it."""
    _free()
    try:
        yield load_model(folder, dtype=dtype, device=device)
    finally:
        _free()


def _free() -> None:
    gc.collect()
    empty_cache(best_device())


@torch.inference_mode()
def _replies(model: Any, samples: Sequence[Sample], tokenizer: ChatTokenizer) -> list[Reply]:
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    collate, replies = Collator(tokenizer.pad_id), []
    for sample in samples:
        batch: dict[str, Any] = {**collate([prompt_of(sample)])}
        del batch["labels"]
        on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
        answer = model.generate(**on_device, generation_config=settings)
        logits = torch.cat(answer.logits).float().cpu()
        replies.append(Reply(tuple(answer.sequences[0, -len(logits) :].tolist()), logits))
    return replies


def choose_samples(dataset: ConvertedDataset) -> list[Sample]:
    """Choose samples of a dataset, always the same: the shortest, one at a quarter, the median."""
    order = dataset.token_counts.argsort(kind="stable")
    ranks = sorted({0, len(order) // 4, len(order) // 2})[:SAMPLES]
    return [dataset[int(order[rank])] for rank in ranks]


def synthesize_samples(tokenizer: ChatTokenizer, prompts: Prompts) -> list[Sample]:
    """Make samples without a dataset: noise of 1, 2 and 3 s, with the prompts of the training if known."""
    random = np.random.default_rng(0)
    system = () if prompts.system is None else (Message("system", prompts.system),)
    messages = (*system, Message("user", prompts.user, has_audio=True))
    samples = []
    for seconds in range(1, SAMPLES + 1):
        wave = (0.1 * random.standard_normal(seconds * SAMPLE_RATE)).astype(np.float32)
        tokens = tokenizer.encode(tokenizer.template.spans(messages), audio_token_count(len(wave)))
        samples.append(Sample(tokens.input_ids, tokens.labels, wave))
    return samples
