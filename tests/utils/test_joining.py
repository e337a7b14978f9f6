"""How processes join whose accelerators sum gradients: at the start, and with an error that says why."""

import pytest
import torch
from torch import distributed

from mdl_toolkit.errors import ToolkitError
from mdl_toolkit.utils.distributed import PeerLostError, join_devices
from tests.support.pretended_device import NAME, pretending

DUPLICATE = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, invalid usage (run with "
    "NCCL_DEBUG=WARN for details), NCCL version 2.27.5\nncclInvalidUsage: This usually reflects ...\n"
    "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"
)


@pytest.fixture
def device(monkeypatch):
    with pretending():
        monkeypatch.setattr(distributed, "get_default_backend_for_device", lambda _: "nccl")
        yield torch.device(NAME, 0)


def test_accelerators_sum_a_number_before_anything_long_begins(device, monkeypatch):
    made, summed = [], []
    monkeypatch.setattr(distributed, "new_group", lambda **settings: made.append(settings) or "group")
    monkeypatch.setattr(distributed, "all_reduce", lambda each, group: summed.append((each.device, group)))
    assert join_devices(device) == "group"
    ((settings,), ((place, group),)) = made, summed
    assert (settings["backend"], settings["device_id"]) == ("nccl", device)
    assert 60 < settings["timeout"].total_seconds() < 3 * 3600
    assert (place, group) == (device, "group")


def test_what_nccl_says_last_is_told(device, monkeypatch):
    def fail(**_):
        raise distributed.DistBackendError(DUPLICATE)

    monkeypatch.setattr(distributed, "new_group", fail)
    with pytest.raises(ToolkitError) as caught:
        join_devices(device)
    said = caught.value.message.en
    assert "over nccl: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000; each" in said
    assert "\n" not in said
    later = PeerLostError(distributed.DistBackendError(DUPLICATE)).message.en
    assert later.endswith("(here: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000)")
