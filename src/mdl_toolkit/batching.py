"""Samples to one batch of tensors: text padded on the left, audio on the right.

Which samples go together is the training room's business for now: any order, any mixture of lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from mdl_toolkit.dataset import Sample
from mdl_toolkit.tokens import IGNORE_INDEX


class Batch(TypedDict):
    """What the model's forward takes.

    Attributes:
        input_ids: `[batch, positions]` int64, padded on the left.
        attention_mask: `[batch, positions]` int64, 0 at padding.
        labels: `[batch, positions]` int64, -100 at padding and prompt.
        input_values: `[batch, longest]` float32, zero-padded on the right.
        audio_length: `[batch]` int64, in samples.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    input_values: Tensor
    audio_length: Tensor


@dataclass(frozen=True)
class Collator:
    """Make a batch; `pad_id` fills the ids of short rows."""

    pad_id: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Pad samples to one length and stack them."""
        ids = [sample.input_ids for sample in samples]
        return Batch(
            input_ids=_left(ids, self.pad_id),
            attention_mask=_left([np.ones_like(row) for row in ids], 0),
            labels=_left([sample.labels for sample in samples], IGNORE_INDEX),
            input_values=_right([sample.waveform for sample in samples]),
            audio_length=torch.tensor([len(sample.waveform) for sample in samples]),
        )


def _left(rows: Sequence[np.ndarray], filler: int) -> Tensor:
    padded = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) :] = row
    return torch.from_numpy(padded)


def _right(rows: Sequence[np.ndarray]) -> Tensor:
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.float32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)
