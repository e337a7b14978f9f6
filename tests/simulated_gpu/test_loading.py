"""Weights go straight to the device, and a model whose layers are on several devices has the same loss."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from benchmarks.gpu_model import config_of

from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Verbatim
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.weights.loading import explaining_memory, load_model
from tests.support.lora_models import adapted, assert_same, batch_of, learnt
from tests.support.paths import MODEL
from tests.support.pretended_device import NAME, pretending

DEVICE = f"{NAME}:0"
# Bytes of a file of weights, at least.
SHARD = 60_000_000


def own_memory() -> int:
    """Return the bytes of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def sparse_folder(folder: Path) -> int:
    """Write a large float32 model of zeros that take no space; return the largest file's bytes."""
    config = config_of("7B", layers=1)
    config.parts[1].vocab_size = 16_000
    with torch.device("meta"):
        tensors = dict(MiDashengLMModel(config).state_dict())
    config.save_pretrained(folder)
    index, files, size = {}, [[]], 0
    for name, tensor in tensors.items():
        if size > SHARD:
            files, size = [*files, []], 0
        files[-1].append((name, tensor))
        size += 4 * tensor.numel()
    for number, entries in enumerate(files, 1):
        path = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in entries:
            width = tensor.dtype.itemsize
            kind = "I64" if width == 8 else "F32"
            stop = offset + width * tensor.numel()
            header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
            offset, index[name] = stop, path.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_host_never_holds_more_than_the_largest_file(tmp_path, dtype):
    largest = sparse_folder(tmp_path)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert total > 3 * largest
    most, ends, before = [0], threading.Event(), own_memory()

    def watch():
        while not ends.is_set():
            most[0] = max(most[0], own_memory() - before)
            time.sleep(0.002)

    with pretending(is_dry=True) as device:
        used, watcher = device.used, threading.Thread(target=watch)
        watcher.start()
        try:
            model = load_model(tmp_path, dtype=dtype, device=torch.device(DEVICE))
        finally:
            ends.set()
            watcher.join()
        assert {each.device for each in model.parameters()} == {torch.device(DEVICE)}
        assert model.decoder.lm_head.weight.dtype == dtype
        assert device.used - used == pytest.approx(total * dtype.itemsize / 4, rel=0.01)
    assert most[0] < 1.1 * largest


def test_a_device_that_is_too_small_says_so_and_nothing_else():
    with pretending() as device:
        device.total = device.used + 300_000
        advice = Verbatim("take less", "少用些")
        with (
            pytest.raises(ModelError, match="^the GPU ran out of memory; take less$"),
            explaining_memory(advice),
        ):
            load_model(MODEL, dtype=torch.float32, device=torch.device(DEVICE))


@pytest.mark.parametrize("name", ["A-small", "B-small-tied"])
def test_layers_on_two_devices_have_the_loss_of_one(golden, name):
    model = adapted(golden, name)
    batch = batch_of(model)
    ours = learnt(model, batch)
    with pretending() as device:
        layers = model.get_base_model().decoder.model.layers
        layers[0].to(DEVICE)
        add_hook_to_module(layers[0], AlignDevicesHook(execution_device=torch.device(DEVICE)))
        add_hook_to_module(layers[1], AlignDevicesHook(execution_device=torch.device("cpu")))
        loss, gradients = learnt(model, batch)
        assert device.products[torch.float32] > 0
        theirs = loss, {key: each.cpu() for key, each in gradients.items()}
    assert_same(ours, theirs, 1e-5)
