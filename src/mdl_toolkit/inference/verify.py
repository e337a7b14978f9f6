"""Verify that a merged model answers as its base with the adapter, with the same rows through both.

One model after the other, never two at once. Both are loaded in the dtype of the merged weights and asked
greedily; as long as both have said the same, their logits are comparable, and these are what decides.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from mdl_toolkit.weights.loading import best_device, load_model, with_adapter
from mdl_toolkit.weights.provenance import Prompts
from mdl_toolkit.weights.safetensors_stream import FLOATS, weight_files
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

ROWS = 3
NEW_TOKENS = 16
# Of the largest logit. In float32 the two ways differ by 1e-6 or so on small models (docs/decisions.md).
FLOAT32_TOLERANCE = 1e-3
# In 16 bits: so many times what rounding the sum W + s B A, in memory and by PEFT, does to the same logits.
ROUNDINGS = 3.0


@dataclass(frozen=True)
class Reply:
    """Hold a model's greedy answer to one row.

    Attributes:
        ids: `[steps]`, greedily, at most `NEW_TOKENS`.
        logits: `[steps, vocabulary]` float32, from which they were chosen.
    """

    ids: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class Difference:
    """Hold how far two models' replies to the same rows are apart.

    Attributes:
        logits: the largest difference, as long as the texts are the same.
        same: how many texts are.
    """

    logits: float
    same: int

    @staticmethod
    def between(one: Sequence[Reply], other: Sequence[Reply]) -> "Difference":
        """Compare replies row by row; what is not a number is infinitely far from anything."""
        largest, same = 0.0, 0
        for a, b in zip(one, other, strict=True):
            steps = _comparable(a.ids, b.ids)
            apart = (a.logits[:steps] - b.logits[:steps]).abs().max()
            largest = max(largest, float(apart) if apart.isfinite() else float("inf"))
            same += a.ids == b.ids
        return Difference(largest, same)


def verify_merge(base: Path, adapter: Path, merged: Path, samples: Sequence[Sample]) -> None:
    """Ask both models, and say how far their logits are apart.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter.
        merged: folder of the merged model.
        samples: some rows; of their answers nothing is looked at.

    Raises:
        ModelError: the replies differ by more than rounding.
    """
    tokenizer, dtype = ChatTokenizer(read_tokenizer_files(base)), _dtype_of(merged)
    device = best_device()
    try:
        found, size, allowed = _measure(base, adapter, merged, samples, tokenizer, dtype, device)
    # After a quantised training the GPU may be too small.
    except torch.OutOfMemoryError:
        found, size, allowed = _measure(base, adapter, merged, samples, tokenizer, dtype, torch.device("cpu"))
    shown = f"{found.logits:.2g}", f"{allowed:.2g}", f"{size:.3g}"
    if not found.logits <= allowed:
        raise ModelError(
            "the merged model does not answer as base and adapter do: largest logit difference {difference} "
            "(allowed {allowed}, largest logit {largest}); it was not put in place, the adapter stays in "
            "{adapter}",
            difference=shown[0],
            allowed=shown[1],
            largest=shown[2],
            adapter=adapter,
        )
    say(
        "proven: {count} rows through base + adapter and through the merged model: largest logit "
        "difference {difference} (allowed {allowed}, largest logit {largest}), {same} of {count} greedy "
        "texts the same",
        count=len(samples),
        difference=shown[0],
        allowed=shown[1],
        largest=shown[2],
        same=found.same,
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
    """Return the difference, the largest logit, and the difference that is allowed."""
    with _loaded(base, dtype, device) as plain:
        model = with_adapter(plain, adapter).eval()
        reference = _replies(model, samples, tokenizer)
        size = max(float(reply.logits.abs().max()) for reply in reference)
        allowed = FLOAT32_TOLERANCE * size
        if dtype != torch.float32:
            model.merge_adapter()
            rounded = Difference.between(reference, _replies(model, samples, tokenizer))
            allowed = max(allowed, ROUNDINGS * rounded.logits)
        del plain, model
    with _loaded(merged, dtype, device) as plain:
        found = Difference.between(reference, _replies(plain.eval(), samples, tokenizer))
        del plain
    return found, size, allowed


@contextmanager
def _loaded(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    """Load a model for the context, with the memory free before and after it."""
    _free()
    try:
        yield load_model(folder, dtype=dtype, device=device)
    finally:
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dtype_of(folder: Path) -> torch.dtype:
    """Return the dtype that most of a model's numbers have; never more than float32."""
    sizes: dict[str, int] = {}
    for file in weight_files(folder):
        for entry in file.entries:
            if entry.dtype in FLOATS:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.stop - entry.start
    most = FLOATS[max(sizes, key=lambda name: sizes[name])]
    return torch.float32 if most == torch.float64 else most


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
        said = model.generate(**on_device, generation_config=settings)
        logits = torch.cat(said.logits).float().cpu()
        replies.append(Reply(tuple(said.sequences[0, -len(logits) :].tolist()), logits))
    return replies


def _comparable(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many steps began alike in both: up to and with the first token that differs."""
    shared = min(len(one), len(other))
    return next((step + 1 for step in range(shared) if one[step] != other[step]), shared)


# --- rows ------------------------------------------------------------------------------------------------


def choose_samples(dataset: ConvertedDataset) -> list[Sample]:
    """Return a few rows of a dataset, always the same: the shortest, one at a quarter, the median."""
    order = dataset.token_counts.argsort(kind="stable")
    places = sorted({0, len(order) // 4, len(order) // 2})[:ROWS]
    return [dataset[int(order[place])] for place in places]


def synthesize_samples(tokenizer: ChatTokenizer, prompts: Prompts) -> list[Sample]:
    """Invent rows where there are none: noise of 1, 2 and 3 s, asked as in training where that is known."""
    random = np.random.default_rng(0)
    system = () if prompts.system is None else (Message("system", prompts.system),)
    messages = (*system, Message("user", prompts.user, has_audio=True))
    rows = []
    for seconds in range(1, ROWS + 1):
        wave = (0.1 * random.standard_normal(seconds * SAMPLE_RATE)).astype(np.float32)
        tokens = tokenizer.encode(tokenizer.template.segments(messages), audio_token_count(len(wave)))
        rows.append(Sample(tokens.input_ids, tokens.labels, wave))
    return rows
