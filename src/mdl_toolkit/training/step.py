"""Compute a step: the forward pass over a batch, and the trainable parameters with their optimizer."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdl_toolkit.data.collate import Batch, Collator, SampleSource, items_of, pin_batch
from mdl_toolkit.model.modeling import LossPlan
from mdl_toolkit.training.checkpoints import Checkpoint
from mdl_toolkit.training.lora import load_adapter
from mdl_toolkit.training.lora_layer import AdapterCasts
from mdl_toolkit.training.optimization.optimizer import (
    ADAMW,
    FULL_RATE,
    OptimizerConfig,
    restore_state,
    saved_state,
)
from mdl_toolkit.training.optimization.row_shares import RowShares
from mdl_toolkit.training.sampler import Indices
from mdl_toolkit.utils.device import CPU
from mdl_toolkit.utils.distributed import ALONE, World


@dataclass(frozen=True)
class ForwardPass:
    """Compute the loss of examples, in the precision of the base weights.

    Attributes:
        model: a `PeftModel`.
        collator: makes batches of examples.
        device: of the model.
        dtype: of the base weights.
    """

    model: Any
    collator: Collator
    device: torch.device
    dtype: torch.dtype

    def batch(self, dataset: SampleSource, indices: Indices, *, is_training: bool) -> Batch:
        """Collate some examples of a dataset with the plan of their loss, ready to be copied to the device.

        It is called in threads, while the model may be in another mode than the batch is for.
        """
        batch = self.collator([dataset[int(index)] for index in indices])
        batch["plan"] = self._plan(batch, is_training=is_training)
        return batch if self.device == CPU else pin_batch(batch)

    def _plan(self, batch: Batch, *, is_training: bool) -> LossPlan:
        """Plan the loss of a batch on the CPU."""
        base = self.model.get_base_model()
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        plan: LossPlan = base.plan_loss(ids, mask, labels, is_training=is_training)
        return plan

    def loss(self, batch: Batch, tokens: int) -> Tensor:
        """Return the sum of the losses of a batch's tokens, divided by `tokens`; a scalar."""
        plan = batch.get("plan") or self._plan(batch, is_training=self.model.training)
        on_device: dict[str, Any] = {name: self._move(tensor) for name, tensor in items_of(batch)}
        # Its lengths are numbers for the host; tensors would be moved, where weights are sharded.
        on_device |= {"audio_length": batch["audio_length"].tolist(), "plan": plan.map(self._move)}
        with self.precision():
            loss: Tensor = self.model(**on_device, num_items_in_batch=tokens).loss
        return loss

    def _move(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the device without waiting for it."""
        return tensor.to(self.device, non_blocking=True)

    def precision(self) -> AbstractContextManager[None]:
        """Return a context in which products are computed in bfloat16 if the base weights are."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class TrainableState:
    """Hold the trainable parameters of a `PeftModel` and their optimizer."""

    def __init__(
        self, model: Any, device: torch.device, config: OptimizerConfig = ADAMW, world: World = ALONE
    ) -> None:
        self._model = model
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._shares = RowShares(self._named, config, world)
        self._optimizer = config.make(self._shares.stepped, device)
        self._casts = AdapterCasts(model)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Return all trainable parameters, in the model's order."""
        return [*self._named.values()]

    def clip(self, max_norm: float) -> Tensor:
        """Scale gradients down to a norm of at most `max_norm`; return the norm that they had, a scalar."""
        return torch.nn.utils.clip_grad_norm_(self._named.values(), max_norm)

    @property
    def rate(self) -> float:
        """Return the highest learning rate, of which each step has a share."""
        return float(max(group[FULL_RATE] for group in self._optimizer.param_groups))

    def update(self, share: float) -> None:
        """Make an optimizer step at a share of the learning rates, and drop the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = group[FULL_RATE] * share
        self._shares.take_gradients()
        self._optimizer.step()
        self._shares.spread()
        self._casts.refresh()
        self.drop_gradients()

    @property
    def is_finite(self) -> bool:
        """Tell whether every trained number is finite."""
        # A number that is not makes the sum so, which takes no memory.
        return bool(torch.stack([parameter.sum() for parameter in self._named.values()]).isfinite().all())

    def drop_gradients(self) -> None:
        """Drop the gradients, and free their memory."""
        for parameter in self._named.values():
            parameter.grad = None

    @property
    def is_divided(self) -> bool:
        """Tell whether processes hold shares of the optimizer's states, so that none can save them alone."""
        return bool(self._shares)

    def save(self, folder: Path) -> None:
        """Write the adapter and full copies, as PEFT does."""
        # Left to itself, PEFT asks the hub whether the vocabulary was changed.
        self._model.save_pretrained(str(folder), save_embedding_layers=False)
        # PEFT's form of a model card, not filled in.
        (folder / "README.md").unlink(missing_ok=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors, named `PARAMETER/STATE`.

        Where they are divided, all processes call it, and the first one gets them whole.
        """
        return self._shares.gather(saved_state(self._optimizer, self._shares.stepped))

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore parameters and optimizer from a checkpoint.

        Raises:
            KeyError: the checkpoint has other parameters.
            ValueError: it is of another optimizer.
        """
        states = self._shares.scatter(checkpoint.optimizer())
        restore_state(self._optimizer, self._shares.stepped, states)
        load_adapter(self._model, checkpoint.adapter())
        self._casts.refresh()
