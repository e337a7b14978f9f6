"""Folders to models: nothing from a checkpoint is run, each refusal says what to do."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Verbatim
from mdl_toolkit.utils.device import best_device
from mdl_toolkit.utils.machine import describe_oom
from mdl_toolkit.weights.loading import choose_dtype, explaining_memory, load_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.model_folders import change_json, find, refused
from tests.support.runs import copy_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def model(golden, tmp_path) -> Path:
    """A checkpoint to change."""
    return copy_checkpoint(golden, "A-small", tmp_path)


def load(folder: Path, **more: Any) -> Any:
    return load_model(folder, **{"dtype": torch.float32, "device": CPU, **more})


@pytest.mark.parametrize(
    ("asked", "cuda", "natively", "chosen"),
    [
        (None, False, True, torch.float32),
        (None, True, True, torch.bfloat16),
        (None, True, False, torch.float32),
        (True, False, False, torch.bfloat16),
        (False, True, True, torch.float32),
    ],
)
def test_dtype(monkeypatch, asked, cuda, natively, chosen):
    device = torch.device("cuda") if cuda else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: natively or including_emulation
    )
    assert choose_dtype(asked) == chosen


@pytest.mark.parametrize(
    ("environment", "count", "device"),
    [
        ({}, 8, "cuda:0"),
        ({"LOCAL_RANK": "3", "RANK": "11"}, 8, "cuda:3"),
        ({"LOCAL_RANK": "3"}, 1, "cuda:0"),  # a launcher that shows each process its own GPU alone
        ({"RANK": "11"}, 8, "cuda:3"),  # one that does not say which process of its machine it is
        ({"LOCAL_RANK": "", "RANK": "1"}, 2, "cuda:1"),
    ],
)
def test_device(monkeypatch, environment, count, device):
    assert best_device() == CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert best_device() == torch.device(device)


GPU_LACK = Verbatim("the GPU ran out of memory", "显存不足")
MACHINE_LACK = Verbatim("the machine ran out of memory", "内存不足")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), GPU_LACK),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            GPU_LACK,
        ),
        (RuntimeError("CUDA error: out of memory"), GPU_LACK),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            MACHINE_LACK,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
            MACHINE_LACK,
        ),
        (RuntimeError("std::bad_alloc"), MACHINE_LACK),
        (MemoryError(), MACHINE_LACK),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("CUDA error: out of memory"), None),
    ],
)
def test_a_lack_of_memory_whoever_says_so(problem, expected):
    assert describe_oom(problem) == expected


@pytest.mark.parametrize("make", [torch.empty, partial(np.empty, dtype=np.float32)])
def test_what_the_machine_cannot_give_is_a_lack_of_its_memory(make):
    """A real request of 4 EiB, more than a process can address."""
    with (
        pytest.raises(ModelError, match="^the machine ran out of memory; lower --batch-size$") as caught,
        explaining_memory(Verbatim("lower --batch-size", "请减小 --batch-size")),
    ):
        make(2**60)
    assert caught.value.message.zh == "内存不足；请减小 --batch-size"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_file_s(model, dtype):
    loaded = load(model, dtype=dtype)
    stored = load_file(model / "model.safetensors")
    state = loaded.state_dict()
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        if "init_bn" in name:
            assert state[name].dtype == tensor.dtype
        else:
            assert state[name].dtype == dtype
        torch.testing.assert_close(state[name], tensor.to(state[name].dtype), rtol=0, atol=0)


DECODER_LINEARS = {
    f"decoder.model.layers.{layer}.{part}"
    for layer in range(2)
    for part in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
}


@pytest.mark.parametrize(("kind", "layer"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_only_the_decoder_s_linear_layers_are_quantised(golden, kind, layer):
    folder = golden / "checkpoints/A-small"
    quantised = load(folder, quantization=kind)
    modules = {
        name: module
        for name, module in quantised.named_modules()
        if type(module).__module__.startswith("bitsandbytes")
    }
    assert set(modules) == DECODER_LINEARS
    assert {type(module).__name__ for module in modules.values()} == {layer}
    stored = load_file(folder / "model.safetensors")
    for name, tensor in quantised.state_dict().items():
        if name in stored and name.rpartition(".")[0] not in modules:
            torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)
    if kind == "4bit":
        weight = modules["decoder.model.layers.0.mlp.up_proj"].weight
        assert weight.quant_type == "nf4"
        assert weight.quant_state.nested
        assert weight.quant_state.dtype == torch.float32
    assert_about_the_same(quantised, load(folder))


def assert_about_the_same(quantised: torch.nn.Module, whole: torch.nn.Module) -> None:
    """In training mode, for which alone bitsandbytes has a 4-bit path for widths as small as these."""
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        ours, theirs = (model.train()(input_ids=ids).logits for model in (quantised, whole))
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert 0 < error < 0.5  # measured: 0.22 at 4 bits, 0.02 at 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: {**t, "audio_encoder.acoustic.weight": torch.zeros(3)},
            "unknown: audio_encoder.acoustic.weight",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "audio_encoder.norm.weight"},
            "missing: audio_encoder.norm.weight",
        ),
        (
            lambda t: {**t, "audio_projector.net.0.bias": torch.zeros(7)},
            "of another shape: audio_projector.net.0.bias [7] instead of [64]",
        ),
    ],
    ids=["unknown", "missing", "another shape"],
)
def test_tensors_that_do_not_fit_are_named(model, change, reason):
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"})
    message = refused(load, find(model))
    assert message.startswith(f"{model}: cannot be loaded: ")
    assert reason in message


def test_damaged_weights(model):
    content = (model / "model.safetensors").read_bytes()
    for damaged in (content[: len(content) // 2], b"junk" * 100, b""):
        (model / "model.safetensors").write_bytes(damaged)
        assert "model.safetensors: no whole safetensors file (" in refused(find, model)
        assert "model.safetensors: no whole safetensors file (" in refused(load, model)


def test_tensors_that_overlap(model):
    """The library refuses such a file when it is read; we do when its header is."""
    content = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    first, second, *_ = (entry for name, entry in header.items() if name != "__metadata__")
    second["data_offsets"] = first["data_offsets"]
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    assert "are not where they should be" in refused(find, model)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (5, "header.x: expected an object"),
        ({"dtype": None, "shape": [1], "data_offsets": [0, 4]}, "header.x.dtype: expected a text"),
        ({"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}, "header.x.shape[0]: expected a whole"),
        (
            {"dtype": "F32", "shape": [1], "data_offsets": [0]},
            "header.x.data_offsets: expected a list of two",
        ),
        ({"dtype": "F32", "shape": [1]}, "header.x.data_offsets is missing"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "the bytes of x are not where"),
    ],
)
def test_a_header_that_is_none(model, entry, reason):
    text = json.dumps({"x": entry}).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert reason in refused(find, model)


# --- nothing is run --------------------------------------------------------------------------------------


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_is_never_read(model, tmp_path):
    marker = tmp_path / "exploded"
    weights = load_file(model / "model.safetensors")
    torch.save({**weights, "bomb": Bomb(marker)}, model / "pytorch_model.bin")
    shutil.copy(model / "pytorch_model.bin", model / "training_args.bin")
    (model / "model.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    load(find(model))  # the safetensors beside it
    (model / "model.safetensors").unlink()
    assert "no weights (*.safetensors)" in refused(find, model)
    assert "model.safetensors" in refused(load, model)
    assert not marker.exists()


def test_code_in_a_folder_is_never_run(model, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    monkeypatch.chdir(model)
    hostile = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nraise RuntimeError\n"
    names = ("configuration_midashenglm", "modeling_midashenglm", "processing_midashenglm", "tokenization")
    for name in names:
        (model / f"{name}.py").write_text(hostile)
    classes = {
        "AutoConfig": "configuration_midashenglm.MiDashengLMConfig",
        "AutoModel": "modeling_midashenglm.MiDashengLMModel",
        "AutoModelForCausalLM": "modeling_midashenglm.MiDashengLMModel",
        "AutoProcessor": "processing_midashenglm.MiDashengLMProcessor",
        "AutoTokenizer": ["tokenization.Tokenizer", "tokenization.Tokenizer"],
    }
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        change_json(model / file, auto_map=classes)
    loaded = load(find(model))
    assert type(loaded).__module__ == "mdl_toolkit.model.modeling"
    with_file = ChatTokenizer(read_tokenizer_files(model))
    (model / "tokenizer.json").unlink()
    without = ChatTokenizer(read_tokenizer_files(model))
    assert with_file.backend.encode("狗 bark").ids == without.backend.encode("狗 bark").ids
    assert not marker.exists()


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(model, number):
    tensors, name = load_file(model / "model.safetensors"), "decoder.model.layers.1.mlp.up_proj.weight"
    tensors[name][2, 3] = number
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinity"):
        load(model)


def test_weights_of_another_type_are_named(model):
    tensors, name = load_file(model / "model.safetensors"), "decoder.model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].int()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is of type I32, not floating point"):
        load(model)
