"""A linear layer and its LoRA adapter in one: y = x W' + b + (x A') B' * alpha / rank.

PEFT adds the adapter's output to the layer's, which passes over tensors of full width three times more, and
as often again for the gradients. Here products of rank width add up in place. With gradient checkpointing, a
block's last layer is not computed again: nothing that the backward pass needs comes from its output.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

from mdl_toolkit.recomputing import is_again

ADAPTER = "default"
LAST = ("mlp.fc2", "mlp.down_proj")  # layers whose output is only added up, in encoder and decoder blocks


class LowRankLinear(Linear):
    """PEFT's layer with a faster way of the same results; the plain way where dropout acts on the input."""

    is_last = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., in]` to `[..., out]`, as `peft.tuners.lora.Linear`."""
        if args or kwargs or self.disable_adapters or self.merged or self._drops:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        base, a, b = self.get_base_layer(), self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        is_needed = not (self.is_last and is_again())
        words = (x, base.weight, base.bias, a, b, self.scaling[ADAPTER], is_needed)
        found: Tensor = _LowRank.apply(*words)  # type: ignore[no-untyped-call]
        return found

    @property
    def _drops(self) -> bool:
        return self.training and not isinstance(self.lora_dropout[ADAPTER], nn.Identity)


def quicken(model: nn.Module) -> None:
    """Let the plain LoRA layers of a `PeftModel` compute in the faster way; quantised ones stay."""
    for name, module in model.named_modules():
        if type(module) is Linear:
            module.__class__ = LowRankLinear
            module.is_last = name.endswith(LAST)


class _LowRank(torch.autograd.Function):
    """In the dtype of the frozen weight, as autocast would; gradients in the dtype of what they are of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
        is_needed: bool,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        down, up = a.to(weight.dtype), b.to(weight.dtype)
        low = (flat @ down.T).mul_(scaling)
        ctx.save_for_backward(flat, weight, down, up, low)
        ctx.scaling, ctx.dtypes = scaling, (x.dtype, a.dtype, b.dtype)
        shape = (*x.shape[:-1], len(weight))
        if not is_needed:  # not a number: if anything did use it, the loss would say so
            return flat.new_full((1,), torch.nan).expand(shape)
        return functional.linear(flat, weight, bias).addmm_(low, up.T).view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, low = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        wide = gradient.reshape(-1, gradient.shape[-1])
        narrow = (wide @ up).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (wide @ weight).addmm_(narrow, down).view(*gradient.shape[:-1], -1).to(x_dtype)
        to_a, to_b = (narrow.T @ flat).to(a_dtype), (wide.T @ low).to(b_dtype)
        return to_x, None, None, to_a, to_b, None, None
