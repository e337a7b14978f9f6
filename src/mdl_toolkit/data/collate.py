"""Samples to one batch of tensors: text padded on the left, audio on the right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.data.tokenization import IGNORE_INDEX
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.model.modeling import LossPlan


@dataclass(frozen=True)
class PrecomputedSample:
    """Hold an example whose audio has been through the encoder and the projector already.

    Attributes:
        input_ids: `[tokens]` int32.
        labels: `[tokens]` int32, -100 where nothing is to be learnt.
        features: `[audio tokens, hidden_size]`.
        samples: of its waveform.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    features: Tensor
    samples: int


class SampleSource(Protocol):
    """Give samples by their numbers, and their lengths without reading them."""

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Return the tokens of every example, `[examples]`."""

    def where(self, index: int) -> str:
        """Return the line of the CSV that an example comes from, and of several CSVs, which."""

    def __getitem__(self, index: int, /) -> Sample | PrecomputedSample:
        """Return one example."""


class _TextBatch(TypedDict):
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    audio_length: Tensor


class Batch(_TextBatch, total=False):
    """Hold the arguments of the model's forward: waveforms or features, not both.

    Attributes:
        input_ids: `[batch, tokens]` int64, padded on the left.
        attention_mask: `[batch, tokens]` int64, 0 at padding.
        labels: `[batch, tokens]` int64, -100 at padding and prompt.
        input_values: `[batch, longest]` float32, zero-padded on the right.
        audio_length: `[batch]` int64, in samples.
        audio_features: `[audio tokens of the batch, hidden_size]`, example after example.
        plan: of the loss, where it is made ahead.
    """

    input_values: Tensor
    audio_features: Tensor
    plan: LossPlan


@dataclass(frozen=True)
class PromptBatch:
    """Hold the prompts of examples that are to be answered.

    Attributes:
        tensors: `input_ids` `[batch, longest]` int64, padded on the right; `audio_length`; `input_values` or
            `audio_features`, as in a batch.
        lengths: tokens of each prompt.
    """

    tensors: dict[str, Tensor]
    lengths: list[int]


def collate_prompts(samples: Sequence[Sample | PrecomputedSample], pad_id: int) -> PromptBatch:
    """Collate prompts, padded on the right, where no token before the padding sees it."""
    ids = [sample.input_ids for sample in samples]
    padded = torch.from_numpy(_pad_right(ids, np.int64, pad_id))
    return PromptBatch({"input_ids": padded, **_collate_audio(samples)}, [len(row) for row in ids])


@dataclass(frozen=True)
class Collator:
    """Collate samples to a batch; `pad_id` fills the ids of short ones."""

    pad_id: int

    def __call__(self, samples: Sequence[Sample | PrecomputedSample]) -> Batch:
        """Pad samples, all of one kind, to one length and stack them."""
        ids = [sample.input_ids for sample in samples]
        return Batch(
            input_ids=_pad_left(ids, self.pad_id),
            attention_mask=_pad_left([np.ones_like(row) for row in ids], 0),
            labels=_pad_left([sample.labels for sample in samples], IGNORE_INDEX),
            **_collate_audio(samples),  # type: ignore[typeddict-item]
        )


def _collate_audio(samples: Sequence[Sample | PrecomputedSample]) -> dict[str, Tensor]:
    if featured := [sample for sample in samples if isinstance(sample, PrecomputedSample)]:
        lengths = torch.tensor([sample.samples for sample in featured])
        return {"audio_features": torch.cat([each.features for each in featured]), "audio_length": lengths}
    waveforms = [sample.waveform for sample in samples if isinstance(sample, Sample)]
    padded = torch.from_numpy(_pad_right(waveforms, np.float32, 0.0))
    return {"input_values": padded, "audio_length": torch.tensor([len(w) for w in waveforms])}


def _pad_left(rows: Sequence[np.ndarray], filler: int) -> Tensor:
    padded = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) :] = row
    return torch.from_numpy(padded)


def _pad_right(rows: Sequence[np.ndarray], dtype: type, filler: float) -> NDArray[Any]:
    padded: NDArray[Any] = np.full((len(rows), max(map(len, rows))), filler, dtype=dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def items_of(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a batch, without its plan."""
    yield from ((name, value) for name, value in batch.items() if isinstance(value, Tensor))


def pin_batch(batch: Batch) -> Batch:
    """Copy a batch with its plan to pinned memory, from which a GPU copies while it computes.

    Where none is left, it stays as it is.
    """
    try:
        pinned = Batch(**{name: tensor.pin_memory() for name, tensor in items_of(batch)})  # type: ignore[typeddict-item]
        return Batch(**{**pinned, "plan": batch["plan"].map(Tensor.pin_memory)})  # type: ignore[typeddict-item]
    except RuntimeError:
        return batch


def split(batch: Batch, most: int) -> Iterator[Batch]:
    """Split a batch into parts of at most `most` examples, without the padding that a part does not need.

    Parts have no plan.
    """
    size = len(batch["input_ids"])
    if size <= most:
        yield batch
        return
    first_token = 0
    for start in range(0, size, most):
        part = {name: tensor[start : start + most] for name, tensor in items_of(batch)}
        width, longest = int(part["attention_mask"].sum(1).max()), int(part["audio_length"].max())
        for name in ("input_ids", "attention_mask", "labels"):
            part[name] = part[name][:, -width:]
        if "audio_features" in batch:
            stop = first_token + sum(map(audio_token_count, part["audio_length"].tolist()))
            part["audio_features"], first_token = batch["audio_features"][first_token:stop], stop
        else:
            part["input_values"] = part["input_values"][:, :longest]
        yield Batch(**part)  # type: ignore[typeddict-item]
