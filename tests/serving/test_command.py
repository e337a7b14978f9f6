"""vLLM's server: the command line it is started with, by a stand-in that says what it was given."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mdl_toolkit.cli.main import run
from mdl_toolkit.config.serving import ServeOptions
from mdl_toolkit.serving.serve import find_places
from mdl_toolkit.weights.provenance import Base, Prompts, Provenance
from tests.support.adapters import make_adapter
from tests.support.model_folders import refused
from tests.support.paths import MODEL
from tests.support.runs import copy_checkpoint

STAND_IN = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ.get("VLLM_API_KEY")]))
"""


@pytest.fixture
def program(tmp_path) -> Path:
    """A folder with a program `vllm`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "vllm").write_text(STAND_IN)
    (folder / "vllm").chmod(stat.S_IRWXU)
    return folder


def started(program, *words):
    """The words and the token that vLLM was started with, and what was said before."""
    path = os.pathsep.join([str(program), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "mdl_toolkit", "serve", *words, "--engine", "vllm"],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    given, token = json.loads(done.stdout)
    return given, token, done.stderr


def values(words, name):
    """The words after an option, up to the next one."""
    after = words[words.index(name) + 1 :]
    return after[: next((n for n, word in enumerate(after) if word.startswith("--")), len(after))]


def test_a_whole_model_is_served(program):
    words, token, said = started(program, str(MODEL), "--port", "9", "--batch-size", "7", "--token", "s3cret")
    assert words[:2] == ["serve", str(MODEL)]
    assert values(words, "--served-model-name") == [str(MODEL)]
    assert values(words, "--host") == ["127.0.0.1"]
    assert (values(words, "--port"), values(words, "--max-num-seqs")) == (["9"], ["7"])
    assert json.loads(values(words, "--limit-mm-per-prompt")[0]) == {"audio": 1}
    # Greedy, as our own server, whatever `generation_config.json` says.
    assert json.loads(values(words, "--override-generation-config")[0]) == {
        "max_new_tokens": 256, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0,
    }  # fmt: skip
    # Of float32 weights vLLM would take 16 bits by itself.
    assert values(words, "--dtype") == ["float32"]
    assert not {"--enable-lora", "--trust-remote-code"} & {*words}
    # A command line is read by everybody on the machine.
    assert token == "s3cret"
    assert "s3cret" not in said + str(words)
    assert f"serve {MODEL} --served-model-name" in said


def test_adapters_are_served_on_their_base(golden, program, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    one, two = (make_adapter(base, tmp_path / f"r{rank}", ("decoder",), rank=rank) for rank in (4, 20))
    words, token, _ = started(
        program, str(base), "--adapter", f"one={one}", "--adapter", f"two={two}", "--bf16", "false"
    )
    assert words[1] == str(base)
    assert token is None
    assert values(words, "--lora-modules") == [f"one={one}", f"two={two}"]
    # The least that vLLM takes and that is enough.
    assert values(words, "--max-lora-rank") == ["32"]
    assert values(words, "--max-loras") == ["2"]
    assert "--enable-lora" in words
    # It is for adapters of the encoder or the projector.
    assert "--enable-tower-connector-lora" not in words
    assert values(words, "--dtype") == ["float32"]
    every = make_adapter(base, tmp_path / "every", ("encoder", "decoder"))
    words, _, _ = started(program, str(base), "--adapter", f"every={every}")
    assert "--enable-tower-connector-lora" in words
    words, _, _ = started(program, str(one))
    assert words[1] == str(base)
    assert values(words, "--lora-modules") == [f"{one}={one}"]
    assert values(words, "--served-model-name") == [f"{one}-base"]


def test_a_rank_that_vllm_does_not_take_is_refused(golden, tmp_path, monkeypatch, capsys, program):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", ("decoder",), rank=600)
    monkeypatch.setenv("PATH", str(program))
    assert run(["serve", str(base), "--adapter", f"one={adapter}", "--engine", "vllm"]) == 1
    assert "its rank 600 is above the 512 that vLLM takes; make one model of it" in capsys.readouterr().err


def test_without_vllm_it_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["serve", str(MODEL), "--engine", "vllm"]) == 1
    assert 'pip install "mdl-toolkit[vllm]"' in capsys.readouterr().err


def test_what_vllm_does_not_heed_is_refused(capsys):
    for option, value in (
        ("--max-request-mb", "3"),
        ("--quantization", "4bit"),
        ("--max-audio-seconds", "600"),
    ):
        assert run(["serve", str(MODEL), "--engine", "vllm", option, value]) == 2
        assert f"--engine vllm and {option} do not go together" in capsys.readouterr().err


# --- what is refused before anything is loaded -------------------------------------------------------------


def places(model, *adapters):
    return find_places(ServeOptions(model_name=str(model), adapter=adapters))


def test_adapters_that_do_not_belong_there_are_refused(golden, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    other = copy_checkpoint(golden, "B-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", ("decoder",))
    assert [*places(base, f"one={adapter}")] == [str(base), "one"]
    assert "no adapter, it has no adapter_config.json" in refused(places, base, f"one={other}")
    assert "MODEL_NAME has that name; give another" in refused(places, base, f"{base}={adapter}")
    assert "an adapter; with --adapter, MODEL_NAME is the base" in refused(places, adapter, f"one={adapter}")
    assert "no such folder" in refused(places, base, "one=./nowhere")


def test_folders_without_weights_and_adapters_of_another_base_are_refused(golden, tmp_path):
    base, other = (copy_checkpoint(golden, name, tmp_path) for name in ("A-small", "B-small"))
    adapter = make_adapter(base, tmp_path / "adapter", ("decoder",))
    Provenance(Base.of(base, str(base)), Prompts()).write(adapter)
    assert [*places(base, f"one={adapter}")] == [str(base), "one"]
    said = refused(places, other, f"one={adapter}")
    assert f"{adapter}: it was trained on {base}" in said
    assert "B-small" in said
    (base / "model.safetensors").unlink()
    assert "no weights (*.safetensors)" in refused(places, base)
    (adapter / "adapter_model.safetensors").unlink()
    assert "no weights (adapter_model.safetensors)" in refused(places, other, f"one={adapter}")


def test_words_that_are_no_adapter_are_refused(capsys):
    for words in (["folder"], ["=folder"], ["a=", "b=c"], ["a=b", "a=c"]):
        given = [part for word in words for part in ("--adapter", word)]
        assert run(["serve", str(MODEL), *given]) == 2
        assert "--adapter: expected " in capsys.readouterr().err
    assert run(["serve", str(MODEL), "--port", "70000"]) == 2


@pytest.mark.parametrize("token", ["", " ", "two words", "ключ"])
def test_a_token_that_cannot_be_sent_is_refused(monkeypatch, capsys, token):
    """An empty one, of a variable that is not set, would let everybody in."""
    assert run(["serve", str(MODEL), "--token", token]) == 2
    assert "--token: expected ASCII letters, digits and signs without spaces" in capsys.readouterr().err
    monkeypatch.setenv("MDL_TOKEN", token)
    assert run(["serve", str(MODEL)]) == 2
    said = capsys.readouterr().err
    assert "MDL_TOKEN in the environment: expected ASCII letters" in said
    assert not token.strip() or token not in said


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else object())
    assert run(["serve", str(MODEL)]) == 1
    assert 'serve needs the package fastapi: pip install "mdl-toolkit[serve]"' in capsys.readouterr().err
