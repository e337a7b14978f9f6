"""Large products by oneDNN, against torch's own."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from mdl_toolkit.model import products

# Row numbers that come once, as those of batches do; what is left when all that is free is given back.
MEETING_MANY_SIZES = """
import ctypes
import torch
from mdl_toolkit.model import products

def held():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

products.LARGE = 0
left, right = torch.ones(500, 128), torch.ones(256, 128)
products.product(left, right)
before = held()
for rows in range(1, 401):
    products.product(left[:rows], right)
print(held() - before)
"""


@pytest.fixture(autouse=True)
def found_out_anew():
    products.has_onednn.cache_clear()
    yield
    products.has_onednn.cache_clear()


@pytest.mark.parametrize("way", ["has it", "lacks it", "gets it wrong"])
def test_products_are_the_same_with_and_without_onednn(way, monkeypatch):
    monkeypatch.setattr(products, "LARGE", 0)
    if way == "lacks it":
        monkeypatch.setattr(products, "_by_onednn", lambda *_: torch.ops.mkldnn.no_such_operation)
    elif way == "gets it wrong":
        monkeypatch.setattr(products, "_by_onednn", lambda *words: functional.linear(*words) + 1)
    torch.manual_seed(0)
    left, right, bias = torch.randn(16, 40), torch.randn(80, 40), torch.randn(80)
    torch.testing.assert_close(products.product(left, right), left @ right.T)
    torch.testing.assert_close(products.product(left, right, bias), left @ right.T + bias)
    wide, total = torch.randn(16, 80), torch.randn(16, 40)
    torch.testing.assert_close(products.product(wide, right.T), wide @ right)
    wanted = total + wide @ right
    products.add_product(total, wide, right.T)
    torch.testing.assert_close(total, wanted)
    assert way == "has it" or not products.has_onednn()


def test_which_products_are_large(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda: True)
    left, right = torch.empty(512, 512), torch.empty(1024, 512)  # 2 x 512 x 512 x 1024 operations
    try:
        torch.set_num_threads(2)  # each has half of them
        assert products.is_large(left, right)
        assert not products.is_large(left[:511], right)
    finally:
        torch.set_num_threads(1)
    assert products.is_large(left[:256], right)
    assert not products.is_large(left[:255], right)
    assert not products.is_large(left.bfloat16(), right.bfloat16())
    assert not products.is_large(left.to("meta"), right.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.is_large(left, right)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_onednn_keeps_is_bounded():
    """Without a bound these sizes keep 237 MB, with it 28 (measured)."""
    done = subprocess.run(
        [sys.executable, "-c", MEETING_MANY_SIZES], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 80e6, done.stdout
