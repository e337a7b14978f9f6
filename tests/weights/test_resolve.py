"""Names and folders to files: each refusal says what to do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from mdl_toolkit.cli.main import run
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.resolve import require_package
from tests.support.model_folders import change_json, find, refused
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


@pytest.fixture
def model(golden, tmp_path) -> Path:
    """A checkpoint to change."""
    return copy_checkpoint(golden, "A-small", tmp_path)


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
    assert (
        load_model(find(NAME), dtype=torch.float32, device=torch.device("cpu")).config.model_type
        == "midashenglm"
    )


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
        "def snapshot_download(name, allow_patterns, local_files_only):\n"
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
        save_file({"lora_A": torch.zeros(1)}, place / "adapter_model.safetensors")
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


def test_an_adapter_is_found_as_it_is(model):
    (model / "adapter_config.json").write_text("{}")
    (model / "adapter_model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "config.json").unlink()
    (model / "model.safetensors").unlink()
    assert find(model) == model


def test_json_of_a_model_folder(tmp_path):
    (tmp_path / "a.json").write_text('{"狗": [1, 2.5]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"狗": [1, 2.5]}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "notes"])
@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_may_never_end_is_refused_before_it_is_opened(model, name, kind):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name) if kind == "FIFO" else (model / name).symlink_to("/dev/zero")
    message = refused(find, model, weights=False)
    assert message == f"{model / name}: a FIFO, socket or device, which is never read here; remove it"


def test_a_run_that_has_no_result_yet_names_its_last_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoint-{step}/adapter_config.json").write_text("{}")
    assert refused(find, tmp_path / "run").endswith(f"did you mean {tmp_path / 'run/checkpoint-10'}?")
