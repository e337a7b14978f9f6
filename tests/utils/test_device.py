"""Which accelerator is used, of whatever kind, and what is asked of it."""

import os

import pytest
import torch

from mdl_toolkit.utils import device as devices
from mdl_toolkit.utils.launcher import warn_of_idle_gpus
from tests.support.pretended_device import NAME, pretending

CPU = torch.device("cpu")


def test_any_accelerator_of_torch_is_used_by_its_own_name():
    assert devices.best_device() == CPU
    with pretending(total=10**9) as pretended:
        device = devices.best_device()
        assert device == torch.device(NAME, 0)
        assert devices.device_count() == 1
        assert devices.device_name(device) == "pretended:0 (Pretended)"
        assert devices.device_memory(device) == (10**9 - pretended.used, 10**9)
        devices.reset_peak_memory(device)
        kept = torch.ones(1000, device=device)
        del kept
        assert devices.peak_memory(device) == pretended.used + 4096
        devices.empty_cache(device)
    assert devices.best_device() == CPU


@pytest.mark.parametrize("name", ["xpu:0", "cpu", "cuda"])
def test_of_a_kind_that_is_not_here_nothing_is_known(name):
    device = torch.device(name)
    assert devices.device_memory(device) is None
    assert devices.peak_memory(device) is None
    assert devices.device_name(device) == str(device)
    assert not devices.has_bfloat16(device)
    devices.empty_cache(device)


def test_an_apple_gpu_is_named_and_not_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    assert devices.best_device() == CPU
    warn_of_idle_gpus(1, "train")
    assert "warning: Apple GPU (MPS): here and not used" in capsys.readouterr().err


def test_products_are_rounded_to_tf32_on_cuda_alone_and_only_for_a_while():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    with devices.fast_float32(torch.device("cuda", 0)):
        assert products.fp32_precision == "tf32"
    with devices.fast_float32(CPU):
        assert products.fp32_precision == before
    assert products.fp32_precision == before != "tf32"


@pytest.mark.parametrize("own", [None, "max_split_size_mb:128"])
def test_cudas_allocator_can_grow_its_segments_unless_the_user_set_it(monkeypatch, own):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        # Set first, so that whatever is changed is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
    with pretending():
        devices.best_device()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if own else "expandable_segments:True")
