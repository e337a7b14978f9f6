"""Normalise in one kernel where a device has one, in the dtype of what is normalised.

Autocast would copy input, weight and bias to float32 and the result back; kernels sum in float32 anyway.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Kinds of devices for which torch has a kernel for RMS norms, instead of operations one by one.
FUSED_ON = {"cuda"}


class LayerNorm(nn.LayerNorm):
    """Compute a layer norm without autocast's copies."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., width]` to the same shape."""
        is_enabled = x.dtype != self.weight.dtype and torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=is_enabled):
            return super().forward(x)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Compute an RMS norm of Qwen over `[..., width]`."""
    weight, eps = norm.weight, norm.variance_epsilon
    if weight.requires_grad:
        normed: Tensor = norm(x)
    elif x.dtype == weight.dtype and x.device.type in FUSED_ON:
        with torch.autocast(x.device.type, enabled=False):
            normed = functional.rms_norm(x, weight.shape, weight, eps)
    else:
        normed = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    """Compute x / sqrt(mean(x^2) + eps), rounded to the dtype of x, times a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed = (wide * scale).to(x.dtype)
        return normed.mul_(weight) if weight.dtype == x.dtype else weight * normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        to_normed = (gradient * weight).float()
        wide = x.float() * scale
        share = torch.linalg.vecdot(to_normed, wide).unsqueeze(-1).div_(-x.shape[-1])
        return to_normed.addcmul_(wide, share).mul_(scale).to(x.dtype), None, None
