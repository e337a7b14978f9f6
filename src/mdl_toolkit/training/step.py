"""The forward pass of a run: rows to a batch, a batch to its loss, in the precision of its base weights."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdl_toolkit.data.collate import Batch, Collator, SampleSource, items_of, pin_batch
from mdl_toolkit.training.checkpoints import Checkpoint
from mdl_toolkit.training.sampler import Rows


@dataclass(frozen=True)
class ForwardPass:
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

    def batch(self, dataset: SampleSource, rows: Rows) -> Batch:
        """Rows of a dataset put together, ready to be copied to the device."""
        batch = self.collator([dataset[int(row)] for row in rows])
        return pin_batch(batch) if self.device.type == "cuda" else batch

    def loss(self, batch: Batch, tokens: int) -> Tensor:
        """The sum of a batch's losses, divided by a number of supervised tokens."""
        there = {name: tensor.to(self.device, non_blocking=True) for name, tensor in items_of(batch)}
        with self.precision():
            loss: Tensor = self.model(**there, num_items_in_batch=tokens).loss
        return loss

    def precision(self) -> AbstractContextManager[None]:
        """While this context lasts, products are computed in bfloat16 if the base weights are."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class TrainableState:
    """The trainable parameters of a `PeftModel`, with AdamW (torch's defaults, no weight decay)."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self._named.values(), weight_decay=0.0, fused=True)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All of them, in the model's order."""
        return [*self._named.values()]

    def clip(self, most: float) -> float:
        """Scale gradients down to a norm of at most so much; the norm that they had."""
        return float(torch.nn.utils.clip_grad_norm_(self._named.values(), most))

    def update(self, rate: float) -> None:
        """Make an optimizer step at a learning rate, and forget the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.forget()

    @property
    def is_finite(self) -> bool:
        """Tell whether every trained number is one."""
        return bool(torch.stack([parameter.isfinite().all() for parameter in self._named.values()]).all())

    def forget(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    # --- to a checkpoint and back ---

    def save(self, folder: Path) -> None:
        """Write the adapter and full copies, as PEFT does."""
        # Left to itself, PEFT asks the hub whether the vocabulary was changed.
        self._model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, not filled in

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, by the names of parameters."""
        names = {id(parameter): name for name, parameter in self._named.items()}
        return {
            f"{names[id(parameter)]}/{key}": value.detach().cpu().contiguous()
            for parameter, values in self._optimizer.state.items()
            for key, value in values.items()
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            KeyError: it is of other parameters.
        """
        self._load_optimizer(checkpoint.optimizer())
        self._load_adapter(checkpoint.adapter())

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("/")
            parameter = self._named[name]
            if tensor.ndim and tensor.shape != parameter.shape:
                raise KeyError(name)
            self._optimizer.state[parameter][key] = tensor.to(self._device)

    def _load_adapter(self, tensors: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        found = set_peft_model_state_dict(self._model, tensors)
        if different := [*found.unexpected_keys, *sorted({*found.missing_keys} & {*self._named})]:
            raise KeyError(*different)
