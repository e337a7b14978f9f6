"""How well an accelerator was used, against sums by hand."""

import numpy as np
import pytest
import torch
from benchmarks.gpu_model import config_of

from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training import summary
from mdl_toolkit.training.log import Pace
from mdl_toolkit.training.summary import operations_of, say_throughput
from mdl_toolkit.utils.device import peak_of
from tests.support.pretended_device import NAME, pretending


def test_four_operations_for_each_number_and_token():
    with torch.device("meta"):
        model = MiDashengLMModel(config_of("7B")).requires_grad_(False)
    samples, texts = np.array([160_000, 16_000]), np.array([300, 100])
    found = operations_of(model, texts, samples)
    # Queries, keys, values, output; gate, up, down. In the encoder 12 times the square of its width a block.
    layer = 3584 * (3584 + 2 * 512 + 3584) + 3 * 3584 * 18944
    audio = np.array([audio_token_count(each) for each in samples.tolist()])
    assert found == pytest.approx(4 * (28 * layer * texts + 32 * 12 * 1280**2 * 5 * audio))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("cuda:0 (NVIDIA H100 80GB HBM3)", 989e12),
        ("cuda:1 (NVIDIA H100 PCIe)", 756e12),
        ("cuda:0 (NVIDIA L40S)", 362e12),
        ("cuda:0 (NVIDIA L4)", 121e12),
        ("cuda:0 (NVIDIA A10G)", 70e12),
        ("cuda:0 (Tesla T4)", 65e12),
        ("cuda:0 (Something else)", None),
    ],
)
def test_peaks_are_known_by_name(name, peak):
    assert peak_of(name) == peak


def test_what_is_said_of_an_accelerator_and_not_of_a_cpu(monkeypatch, capsys):
    pace = Pace(10, 10.0, 2.0, 0.0, 3000, 989e12)
    say_throughput(pace, torch.device("cpu"), None, 10**9)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(summary, "device_name", lambda _: "cuda:0 (NVIDIA H200)")
    with pretending():
        say_throughput(pace, torch.device(NAME, 0), 1_234_000_000, 1_200_000_000)
    assert capsys.readouterr().err.strip() == (
        "cuda:0 (NVIDIA H200): 1,500 tokens/s; MFU 50.0% of 989 TFLOP/s (4 operations a parameter and "
        "token); most memory 1.2 GB, planned 1.2 GB"
    )


def test_of_several_devices_each_has_its_share(monkeypatch, capsys):
    monkeypatch.setattr(summary, "device_name", lambda _: "cuda:0 (NVIDIA H200)")
    with pretending():
        say_throughput(Pace(10, 10.0, 2.0, 0.0, 3000, 989e12), torch.device(NAME, 0), 10**9, 10**9, 4)
    assert "375 tokens/s; MFU 12.5% of 989 TFLOP/s" in capsys.readouterr().err
