"""Tokenizer, chat template and special tokens: where they may be, and what is said when they are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.model_folders import change_json, refused
from tests.support.paths import MODEL
from tests.support.runs import copy_checkpoint


@pytest.fixture
def model(golden, tmp_path) -> Path:
    """A checkpoint to change."""
    return copy_checkpoint(golden, "A-small", tmp_path)


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


@pytest.mark.parametrize("template", [None, [], [{"name": "rag", "template": "x"}]])
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
    change_json(model / "config.json", audio_token_id=495)
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
