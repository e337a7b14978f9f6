"""Norms in one kernel, and in one dtype, against transformers' and torch's plain ones."""

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from mdl_toolkit.model.kernels.norms import LayerNorm, rms_norm
from tests.support.pretended_device import NAME, pretending

BF16, F32 = torch.bfloat16, torch.float32
DEVICE = f"{NAME}:0"
TOLERANCES = {F32: 1e-5, BF16: 1e-2}


def result_and_gradient(function, x, device="cpu"):
    """What a function makes of `x` under autocast, and the gradient of `x` for one that is random."""
    x = x.detach().to(device).requires_grad_()
    with torch.autocast(x.device.type, BF16):
        found = function(x)
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(7)).to(found.dtype)
    (gradient,) = torch.autograd.grad(found, x, towards.to(device))
    return found.detach().cpu(), gradient.cpu()


def norm_and_input(dtype):
    torch.manual_seed(0)
    norm = Qwen2RMSNorm(96, eps=1e-5)
    norm.weight.data.normal_(1, 0.3)
    return norm.to(dtype), 3 * torch.randn(4, 5, 96, dtype=dtype)


def assert_close(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_the_rms_norm_is_transformers_with_a_kernel_and_without(device, dtype):
    norm, x = norm_and_input(dtype)
    wanted = result_and_gradient(norm, x)
    with pretending() as pretended:
        norm.to(device).requires_grad_(False)
        found = result_and_gradient(lambda x: rms_norm(norm, x), x, device)
        computed = {name for name in pretended.operations if "copy" not in name}
    assert_close(found, wanted, TOLERANCES[dtype])
    assert computed == (
        {"aten::_fused_rms_norm", "aten::_fused_rms_norm_backward"} if device != "cpu" else set()
    )


def test_a_weight_that_is_trained_takes_the_plain_way():
    norm, x = norm_and_input(F32)
    assert rms_norm(norm, x).requires_grad
    assert not rms_norm(norm.requires_grad_(False), x).requires_grad


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_layer_norm_is_torchs_and_autocast_copies_nothing(dtype):
    torch.manual_seed(0)
    norm, plain = LayerNorm(96).to(dtype), nn.LayerNorm(96).to(dtype)
    nn.init.normal_(norm.weight, 1, 0.3)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(4, 5, 96, dtype=dtype)
    with pretending() as device:
        norm.requires_grad_(False).to(DEVICE)
        found = result_and_gradient(norm, x, DEVICE)
        computed = {name for name in device.operations if "copy" not in name}
        assert computed == {"aten::native_layer_norm", "aten::native_layer_norm_backward"}
        copies = device.operations["aten::_to_copy"]
    # Both results come back.
    assert copies == 2
    wanted = result_and_gradient(plain, x)
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


def test_a_layer_norm_of_another_dtype_leaves_it_to_autocast():
    with pretending():
        norm = LayerNorm(96).to(DEVICE, BF16)
        with torch.autocast(NAME, BF16):
            assert norm(torch.randn(5, 96).to(DEVICE)).dtype == F32
