"""The forward pass of a run: rows to a batch, a batch to its loss, in the precision of its base weights."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdl_toolkit.data.collate import Batch, Collator, Readable, items_of, pinned
from mdl_toolkit.training.sampler import Rows


@dataclass(frozen=True)
class Forward:
    """What training and evaluations compute with.

    Attributes:
        model: a `PeftModel`.
        collator: rows to batches.
        device: where the model is.
        dtype: of the base weights.
    """

    model: Any
    collator: Collator
    device: torch.device
    dtype: torch.dtype

    def batch(self, dataset: Readable, rows: Rows) -> Batch:
        """Rows of a dataset put together, ready to be copied to the device."""
        batch = self.collator([dataset[int(row)] for row in rows])
        return pinned(batch) if self.device.type == "cuda" else batch

    def loss(self, batch: Batch, tokens: int) -> Tensor:
        """The sum of a batch's losses, divided by a number of supervised tokens."""
        there = {name: tensor.to(self.device, non_blocking=True) for name, tensor in items_of(batch)}
        with self.precision():
            loss: Tensor = self.model(**there, num_items_in_batch=tokens).loss
        return loss

    def precision(self) -> AbstractContextManager[None]:
        """While this context lasts, products are computed in bfloat16 if the base weights are."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
