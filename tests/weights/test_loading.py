"""Names and folders to files and models: nothing from a checkpoint is run, each refusal says what to do."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl_toolkit.cli.main import run
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Verbatim
from mdl_toolkit.utils.machine import describe_oom
from mdl_toolkit.weights.loading import best_device, choose_dtype, explaining_memory, load_model
from mdl_toolkit.weights.resolve import find_model, read_json, require_package
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.chinese import wrong_in
from tests.support.paths import MODEL
from tests.support.runs import copy_checkpoint, files_below, make_rows, write_csv

NAME = "mispeech/midashenglm-7b"
WAYS = ("local folder with --model-name", "HF_ENDPOINT", "--from-modelscope true")
COMMANDS = (  # that take a model; the last two an adapter
    ("convert-dataset", "in.csv", "--output", "out", "--model-name", "run"),
    ("train", "--train-dataset", "in.csv", "--output", "out", "--model-name", "run"),
    ("inference", "in.csv", "--output", "out", "--model-name", "run"),
    ("check", "in.csv", "--model-name", "run"),
    ("merge", "run", "--output", "out"),
    ("merge", "a/final", "--output", "out", "--model-name", "run"),
)
CPU = torch.device("cpu")


@pytest.fixture
def model(golden, tmp_path) -> Path:
    """A checkpoint to change."""
    return copy_checkpoint(golden, "A-small", tmp_path)


def find(name: str | Path, **more: bool) -> Path:
    return find_model(str(name), **{"from_modelscope": False, "weights": True, **more})


def load(folder: Path, **more: Any) -> Any:
    return load_model(folder, **{"dtype": torch.float32, "device": CPU, **more})


def refused(action: Any, *words: Any, **more: Any) -> str:
    """The English message, which is one sentence as is the Chinese one."""
    with pytest.raises(ModelError) as caught:
        action(*words, **more)
    en, zh = caught.value.message.en, caught.value.message.zh
    assert "\n" not in en + zh
    assert not wrong_in(zh)
    assert any("\u4e00" <= character <= "\u9fff" for character in zh) or en == zh.replace("：", ": ")
    return en


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- where a model is ------------------------------------------------------------------------------------


def test_a_folder_stays_local(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert find(model) == model
    assert find("A-small") == Path("A-small")
    assert find("./A-small", from_modelscope=True) == Path("./A-small")
    monkeypatch.setenv("HOME", str(model.parent))
    assert find("~/A-small") == model


def test_a_folder_goes_before_a_name_on_the_hub(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    Path("mispeech").mkdir()
    model.rename(NAME)
    assert find(NAME) == Path(NAME)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "../x"])
def test_a_missing_folder_is_not_looked_for_on_a_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(find, name)
    assert message.startswith(f"model {name}: not a folder here, and there is no such folder. ")
    assert all(way in message for way in WAYS)


def test_a_file_is_no_folder(model, monkeypatch):
    monkeypatch.chdir(model)
    assert "there is no such folder" in refused(find, "config.json")


@pytest.mark.parametrize("name", [NAME, "gpt2", "not a name!"])
def test_offline(name):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    message = refused(find, name)
    assert message.startswith(f"model {name}: not a folder here, and Hugging Face did not give it (")
    assert all(way in message for way in WAYS)


def test_a_hub_that_cannot_be_reached():
    code = (
        "import sys\nfrom mdl_toolkit.errors import ModelError\n"
        "from mdl_toolkit.weights.resolve import find_model\n"
        "try:\n    find_model(sys.argv[1], from_modelscope=False, weights=True)\n"
        "except ModelError as problem:\n    print(problem.message.en)\n    print(problem.message.zh)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment["no_proxy"] = "127.0.0.1"
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, NAME], env=environment, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - begun < 20
    en, zh = done.stdout.splitlines()
    assert en.startswith(f"model {NAME}: not a folder here, and Hugging Face did not give it (")
    assert "refused" in en
    assert all(way in en for way in WAYS)
    assert all(way in zh for way in ("--model-name", "HF_ENDPOINT", "--from-modelscope true"))


@pytest.fixture
def cached(model, tmp_path, monkeypatch) -> Path:
    """The snapshot of a model in the hub's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (place / "refs").mkdir()
    (place / "refs/main").write_text("a" * 40)
    return snapshot


def test_the_cache_is_enough(cached):
    assert find(NAME) == cached
    assert load(find(NAME)).config.model_type == "midashenglm"


def test_a_cache_of_small_files_is_not_enough_for_weights(cached):
    (cached / "model.safetensors").unlink()
    assert find(NAME, weights=False) == cached
    assert "no weights" in refused(find, NAME)


def test_modelscope_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    message = refused(find, NAME, from_modelscope=True)
    assert 'pip install "mdl-toolkit[modelscope]"' in message
    assert "--from-modelscope" in message


def test_modelscope_gives_a_folder_or_the_reason(model, tmp_path, monkeypatch):
    """The package is stood in for by a module of the same name."""
    (tmp_path / "modelscope.py").write_text(
        "def snapshot_download(name, allow_patterns):\n"
        f"    if name == {NAME!r} and '*.safetensors' in allow_patterns:\n"
        f"        return {str(model)!r}\n"
        "    raise RuntimeError('404\\nnot there')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    assert find(NAME, from_modelscope=True) == model
    message = refused(find, "a/b", from_modelscope=True)
    assert "ModelScope did not give it (404)" in message
    assert all(way in message for way in WAYS)
    monkeypatch.delitem(sys.modules, "modelscope")


def test_an_optional_package_that_is_there():
    require_package("torch", "anything", "--option")


# --- what is no model ------------------------------------------------------------------------------------


def test_another_model(model):
    change_json(model / "config.json", model_type="qwen2")
    message = refused(find, model, weights=False)
    assert message.startswith(f"{model}: not a MiDashengLM (config.json says model_type 'qwen2')")


def test_no_config(model):
    (model / "config.json").unlink()
    assert refused(find, model, weights=False) == (
        f"{model}: no config.json there, so it is not a model folder"
    )


@pytest.mark.parametrize("result", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_folder_of_a_training_in_place_of_its_result(tmp_path, monkeypatch, capsys, words, result):
    """Each command that takes a model says where in the folder it is."""
    monkeypatch.chdir(tmp_path)
    write_csv(Path("in.csv"), make_rows(Path("audio"), 1))
    for folder, kind in (("run", result), ("a", "adapter_config.json")):
        place = Path(folder, "final")
        place.mkdir(parents=True)
        (place / kind).write_text('{"base_model_name_or_path": "gone"}')
        (place / "adapter_model.safetensors").touch()
    before = files_below(tmp_path)
    assert run([*words]) == 1
    expected = "did you mean run/final?"
    if words[:2] == ("merge", "run") and result == "config.json":  # which is no adapter
        expected = "no adapter"
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: run: ")
    assert expected in error
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "utf-8"),
        (b"[]", "expected a JSON object"),
        (b'{"model_type": null}', "not a MiDashengLM (config.json says model_type None)"),
    ],
)
def test_a_broken_config(model, content, reason):
    (model / "config.json").write_bytes(content)
    message = refused(find, model, weights=False)
    assert str(model) in message
    assert reason in message


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    assert find(model, weights=False) == model
    assert "no weights (*.safetensors)" in refused(find, model)
    assert "model.safetensors" in refused(load, model)


def test_an_adapter_is_found_as_it_is(model):
    (model / "adapter_config.json").write_text("{}")
    (model / "adapter_model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "config.json").unlink()
    (model / "model.safetensors").unlink()
    assert find(model) == model


# --- the text side ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_a_text_file_that_is_no_text(model, name):
    (model / name).write_bytes(b"\xff\xfe")
    message = refused(read_tokenizer_files, model)
    assert str(model / name) in message
    assert "utf-8" in message


@pytest.mark.parametrize("missing", [("vocab.json",), ("merges.txt",), ("vocab.json", "merges.txt")])
def test_no_tokenizer(model, missing):
    for name in ("tokenizer.json", *missing):
        (model / name).unlink()
    message = refused(read_tokenizer_files, model)
    assert message == f"{model}: no tokenizer (neither tokenizer.json nor {missing[0]})"


def test_a_vocabulary_that_is_none(model):
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text("[1]")
    assert refused(read_tokenizer_files, model).startswith(f"{model}: no tokenizer (")


PUBLISHED = (MODEL / "chat_template.jinja").read_text()
PLACES: dict[str, tuple[str, Any]] = {
    "in the tokenizer's configuration": ("tokenizer_config.json", PUBLISHED),
    "in the processor's configuration": ("processor_config.json", PUBLISHED),
    "among several": (
        "tokenizer_config.json",
        [{"name": "rag", "template": "x"}, {"name": "default", "template": PUBLISHED}],
    ),
    "in a file of its own, in JSON": ("chat_template.json", PUBLISHED),
}


@pytest.mark.parametrize(("file", "template"), PLACES.values(), ids=PLACES)
def test_where_a_template_may_be(model, golden, file, template):
    (model / "chat_template.jinja").unlink()
    if not (model / file).exists():
        (model / file).write_text("{}")
    change_json(model / file, chat_template=template)
    assert read_tokenizer_files(model) == read_tokenizer_files(golden / "checkpoints/A-small")


@pytest.mark.parametrize(
    "template", [None, 5, [], [{"name": "rag", "template": "x"}], [5], [{"name": "default"}]]
)
def test_no_template(model, template):
    (model / "chat_template.jinja").unlink()
    change_json(model / "tokenizer_config.json", chat_template=template)
    assert refused(read_tokenizer_files, model) == f"{model}: no chat template"


def test_the_template_s_own_file_goes_first(model):
    change_json(model / "tokenizer_config.json", chat_template="other")
    assert read_tokenizer_files(model).chat_template == PUBLISHED


def test_special_tokens(model):
    change_json(model / "tokenizer_config.json", bos_token={"content": "<|vision_bos|>"}, pad_token=None)
    change_json(model / "processor_config.json", audio_token="<|IMAGE|>")
    specials = dict(read_tokenizer_files(model).specials)
    assert specials["bos_token"] == "<|vision_bos|>"
    assert specials["audio_token"] == "<|IMAGE|>"
    assert specials["pad_token"] == "<|endoftext|>"  # the usual one, where nothing else is said


def test_fingerprints(model, golden):
    usual = read_tokenizer_files(golden / "checkpoints/A-small")
    state = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(state, indent=7))
    (model / "chat_template.jinja").write_text(PUBLISHED + " ")
    other = read_tokenizer_files(model)
    assert other.tokenizer_fingerprint == usual.tokenizer_fingerprint
    assert other.template_fingerprint != usual.template_fingerprint
    state["model"]["merges"] = state["model"]["merges"][:-1]
    (model / "tokenizer.json").write_text(json.dumps(state))
    assert read_tokenizer_files(model).tokenizer_fingerprint != usual.tokenizer_fingerprint
    assert len(usual.tokenizer_fingerprint) == len(usual.template_fingerprint) == 16


# --- models ----------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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
            lambda t: {k: v for k, v in t.items() if k != "decoder.lm_head.weight"},
            "missing: decoder.lm_head.weight",
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
        assert refused(load, find(model)).startswith(f"{model}: cannot be loaded: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": 5},
        {"text_config": {"model_type": "llama"}},
        {"audio_encoder_config": {"embed_dim": "wide"}},
        {"audio_encoder_config": None},
    ],
)
def test_a_config_that_makes_no_model(model, changes):
    change_json(model / "config.json", **changes)
    assert refused(load, find(model)).startswith(f"{model}: cannot be loaded: ")


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


# --- small helpers ---------------------------------------------------------------------------------------


def test_json_of_a_model_folder(tmp_path):
    (tmp_path / "a.json").write_text('{"狗": [1, 2.5]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"狗": [1, 2.5]}
