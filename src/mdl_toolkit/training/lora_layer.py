"""Compute a linear layer and its LoRA adapter in one: y = x W' + b + (x A') B' * alpha / rank.

PEFT adds the adapter's output to the layer's, which passes over tensors of full width three times more, and
as often again for the gradients. Here products of rank width add up in place; layers with the same input are
computed together: one product with all A, and one gradient of the input. With gradient checkpointing, a
block's last layer is not computed again: nothing that the backward pass needs comes from its output. Dropout
draws what PEFT's layers would draw; of each adapter's input a mask is kept, not a copy.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

from mdl_toolkit.training.gradient_checkpointing import is_recomputing

ADAPTER = "default"
# Layers whose output is only added up, in encoder and decoder blocks.
LAST = ("mlp.fc2", "mlp.down_proj")
# Weight, bias, A, B, the casts of both, scale and dropout rate, as `_FastLora` takes them for each layer.
ARGUMENTS = 8


class FastLoraLinear(Linear):
    """Compute PEFT's LoRA layer faster, with the same results."""

    is_last = False
    # A and B in the dtype of the base weight, and the versions that these are of.
    casts: tuple[Tensor, Tensor] | None = None
    versions: tuple[int, int] = (-1, -1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `[..., in]` to `[..., out]`, as `peft.tuners.lora.Linear`."""
        if args or kwargs or not self._is_plain:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        is_needed = not (self.is_last and is_recomputing())
        return _FastLora.apply(x, is_needed, *self._parts)[0]  # type: ignore[no-any-return, no-untyped-call]

    def forward_group(self, x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...] | None:
        """Map `[..., in]` to the `[..., out]` of several layers; None if one of them needs PEFT's way."""
        parts = [layer._parts for layer in layers if isinstance(layer, FastLoraLinear) and layer._is_plain]
        if len(parts) < len(layers):
            return None
        return _FastLora.apply(x, True, *chain(*parts))  # type: ignore[no-any-return, no-untyped-call]

    @property
    def _parts(self) -> tuple[Any, ...]:
        """Return weight, bias, A, B, the casts of these that are up to date, scale and dropout rate."""
        base, (a, b) = self.get_base_layer(), self.adapter
        casts = self.casts if self.versions == (a._version, b._version) else None
        dropout: Any = self.lora_dropout[ADAPTER]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return base.weight, base.bias, a, b, *(casts or (None, None)), self.scaling[ADAPTER], rate

    @property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """Return A and B."""
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight

    @property
    def _is_plain(self) -> bool:
        """Tell whether base and adapter are added up."""
        return not (self.disable_adapters or self.merged)


def use_fast_lora(model: nn.Module) -> None:
    """Turn the plain LoRA layers of a `PeftModel` into `FastLoraLinear`; quantised ones and DoRA's stay."""
    for name, module in model.named_modules():
        if type(module) is Linear and not module.lora_variant:
            module.__class__ = FastLoraLinear
            module.is_last = name.endswith(LAST)


class AdapterCasts:
    """Keep a model's adapters in the dtype of its base weights too, cast all at once after each change."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, FastLoraLinear)
            and layer.get_base_layer().weight.dtype != layer.adapter[0].dtype
        ]
        for layer in self._layers:
            dtype, (a, b) = layer.get_base_layer().weight.dtype, layer.adapter
            layer.casts = torch.empty_like(a, dtype=dtype), torch.empty_like(b, dtype=dtype)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the adapters as they are now."""
        if not self._layers:
            return
        casts = [*chain.from_iterable(layer.casts or () for layer in self._layers)]
        torch._foreach_copy_(casts, [*chain.from_iterable(layer.adapter for layer in self._layers)])
        for layer in self._layers:
            a, b = layer.adapter
            layer.versions = (a._version, b._version)


class _FastLora(torch.autograd.Function):
    """Compute layers of one input, in the dtype of the frozen weight, as autocast would.

    Gradients have the dtype of what they are of. Products of rank width are made for all layers at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_needed: bool, *parts: Any) -> tuple[Tensor, ...]:
        weights, biases, downs, wide, *casts, scales, rates = (
            parts[first::ARGUMENTS] for first in range(ARGUMENTS)
        )
        dtype = weights[0].dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        a, b = (
            [each if cast is None else cast for each, cast in zip(*both, strict=True)]
            for both in zip((downs, wide), casts, strict=True)
        )
        down = (a[0] if len(a) == 1 else torch.cat(a)).to(dtype)
        ups = [_scaled(each.to(dtype), scale) for each, scale in zip(b, scales, strict=True)]
        ranks = [up.shape[1] for up in ups]
        lows: list[Tensor] = []
        masks: list[Tensor] = []
        if not any(rates):
            lows += torch.split(flat @ down.T, ranks, 1)
        else:
            for rate, part in zip(rates, down.split(ranks), strict=True):
                dropped, mask = torch.native_dropout(flat, rate, True)
                lows.append(dropped @ part.T)
                masks.append(mask)
        kept = weights if ctx.needs_input_grad[0] else ()
        ctx.save_for_backward(flat, down, *ups, *lows, *masks, *kept)
        ctx.scales, ctx.dtypes = scales, (x.dtype, downs[0].dtype, wide[0].dtype)
        ctx.boosts = [1 / (1 - rate) for rate in rates if masks]
        shapes = [(*x.shape[:-1], len(weight)) for weight in weights]
        # Not a number: if anything did use it, the loss would say so.
        if not is_needed:
            return tuple(flat.new_full((1,), torch.nan).expand(shape) for shape in shapes)
        results = [functional.linear(flat, *pair) for pair in zip(weights, biases, strict=True)]
        for result, low, up in zip(results, lows, ups, strict=True):
            result.addmm_(low, up.T)
        return tuple(result.view(shape) for result, shape in zip(results, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, down, *saved = ctx.saved_tensors
        count = len(gradients)
        ups, lows, saved = saved[:count], saved[count : 2 * count], saved[2 * count :]
        masks, weights = saved[: len(ctx.boosts)], saved[len(ctx.boosts) :]
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        wide = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        narrow, ranks = flat.new_empty(len(flat), len(down)), [up.shape[1] for up in ups]
        for part, gradient, up in zip(narrow.split(ranks, 1), wide, ups, strict=True):
            torch.mm(gradient, up, out=part)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = wide[0] @ weights[0]
            for gradient, weight in zip(wide[1:], weights[1:], strict=True):
                to_x.addmm_(gradient, weight)
            if masks:
                columns, rows = narrow.split(ranks, 1), down.split(ranks)
                for part, a, *drop in zip(columns, rows, masks, ctx.boosts, strict=True):
                    to_x.add_(_drop(part @ a, *drop))
            else:
                to_x.addmm_(narrow, down)
            to_x = to_x.view(*gradients[0].shape[:-1], to_x.shape[-1]).to(x_dtype)
        to_inputs: list[Tensor | None] = [to_x, None]
        if masks:
            parts = zip(narrow.split(ranks, 1), masks, ctx.boosts, strict=True)
            to_a = torch.cat([part.T @ _drop(flat, *drop) for part, *drop in parts])
        else:
            to_a = narrow.T @ flat
        to_each = zip(torch.split(to_a.to(a_dtype), ranks), wide, lows, ctx.scales, strict=True)
        for each, gradient, low, scale in to_each:
            to_b = _scaled(gradient.T @ low, scale).to(b_dtype)
            to_inputs += [None, None, each, to_b, None, None, None, None]
        return tuple(to_inputs)


def _drop(x: Tensor, mask: Tensor, boost: float) -> Tensor:
    """Return what dropout leaves of a matrix, or of a gradient."""
    dropped: Tensor = torch.ops.aten.native_dropout_backward(x, mask, boost)
    return dropped


def _scaled(matrix: Tensor, scale: float) -> Tensor:
    """Return a matrix times a scale; at 1, the matrix itself."""
    return matrix if scale == 1 else matrix * scale
