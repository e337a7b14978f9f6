"""Weights laid out once, against torch's own layer; and what that does to the process."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mdl_toolkit.model.kernels import matmul

# Row numbers that come once, as those of prompts do; what is left when all that is free is given back.
MEETING_MANY_SIZES = """
import ctypes
import torch
from mdl_toolkit.model.kernels.matmul import prepack

def held():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

model = torch.nn.Sequential(torch.nn.Linear(128, 256))
prepack(model)
x = torch.ones(500, 128)
with torch.inference_mode():
    model(x)
    before = held()
    for rows in range(1, 401):
        model(x[:rows])
print(type(model[0]).__name__, held() - before)
"""


@pytest.fixture
def unlimited(monkeypatch):
    """No limit in the environment, whatever ran before; what is set meanwhile goes again."""
    for variable in matmul.CAPACITY_VARIABLES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_laid_out_once_computes_as_torchs(rows, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 80, bias=bias))
    x = torch.randn(2, rows, 40)
    expected = model(x)
    matmul.prepack(model)
    assert isinstance(model[0], matmul.PrepackedLinear)
    torch.testing.assert_close(model(x), expected)


def test_asking_whether_it_is_possible_changes_nothing(unlimited):
    before = dict(os.environ)
    assert matmul.can_prepack()
    assert dict(os.environ) == before


def test_laying_out_limits_what_is_kept_unless_the_user_has(unlimited, monkeypatch):
    mine, theirs = matmul.CAPACITY_VARIABLES
    monkeypatch.setenv(theirs, "7")
    matmul.prepack(nn.Sequential())
    assert (os.environ[mine], os.environ[theirs]) == (str(matmul.CAPACITY), "7")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_onednn_keeps_is_limited():
    environment = {k: v for k, v in os.environ.items() if k not in matmul.CAPACITY_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", MEETING_MANY_SIZES],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    name, count = done.stdout.split()
    assert name == "PrepackedLinear"
    assert int(count) < 80e6, done.stdout
