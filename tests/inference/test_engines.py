"""Engines: sampling, beam search and vLLM, and options that do not go together."""

import json
import sys

import pytest

from mdl_toolkit.errors import ModelError, UsageError
from mdl_toolkit.inference import engines
from mdl_toolkit.inference.run import infer
from tests.support.inferences import infer_options as options
from tests.support.inferences import table
from tests.support.runs import copy_checkpoint, make_csv, write_csv


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def test_drawn_answers_depend_on_the_seed_and_not_on_the_batch(model, tmp_path):
    source = make_csv(tmp_path, 6)
    drawn = {
        (seed, size): infer(
            options(source, model, tmp_path / "out.csv", temperature=1.0, seed=seed, batch_size=size)
        )
        for seed, size in [(1, 1), (1, 5), (2, 5)]
    }
    assert drawn[1, 1] == drawn[1, 5] != drawn[2, 5]


def test_beams_find_what_transformers_finds_for_each_row_alone(model, tmp_path):
    source = make_csv(tmp_path, 7)
    found = infer(options(source, model, tmp_path / "out.csv", num_beams=3))
    for number, row in enumerate(table(source)):
        single = write_csv(tmp_path / "single.csv", [row])
        assert infer(options(single, model, tmp_path / "s.csv", num_beams=3)) == [found[number]]
    assert found != infer(options(source, model, tmp_path / "greedy.csv"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "--num-beams and --temperature"),
        ({"choices": "c.txt", "temperature": 0.5}, "--choices and --temperature"),
        ({"choices": "c.txt", "num_beams": 2}, "--choices and --num-beams"),
        ({"engine": "vllm", "choices": "c.txt"}, "--engine vllm and --choices"),
        ({"engine": "vllm", "num_beams": 2}, "--engine vllm and --num-beams"),
        ({"top_k": 2}, "--top-k has no effect without --choices"),
        ({"normalize_scores": True}, "--normalize-scores has no effect without --choices"),
        ({"top_p": 0.5}, "--top-p has no effect without --temperature"),
    ],
)
def test_options_that_do_not_go_together(model, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        infer(options(tmp_path / "in.csv", model, tmp_path / "out.csv", **changes))


def test_vllm_has_to_be_installed(model, tmp_path):
    with pytest.raises(ModelError, match=r"mdl-toolkit\[vllm\]"):
        infer(options(tmp_path / "in.csv", model, tmp_path / "out.csv", engine="vllm"))


def test_vllm_is_given_prompts_with_one_mark_for_each_recording(model, tmp_path, monkeypatch):
    """A stand-in for vLLM, which cannot be run here: what it is called with, and where its answers go."""
    calls = []

    class Llm:
        def __init__(self, **settings):
            calls.append(settings)

        def generate(self, prompts, settings):
            calls.append((prompts, settings))
            answers = [f"answer of {setting['max_tokens']}" for setting in settings]
            return [type("Output", (), {"outputs": [type("One", (), {"text": text})]}) for text in answers]

    stand_in = type(sys)("vllm")
    stand_in.LLM, stand_in.SamplingParams = Llm, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(engines, "require_package", lambda *_: None)
    source = make_csv(tmp_path, 2)
    answers = infer(options(source, model, tmp_path / "out.csv", engine="vllm", max_new_tokens=5))
    assert answers == ["answer of 5"] * 2
    made, (prompts, settings) = calls
    assert made["model"] == str(model)
    assert made["trust_remote_code"] is False
    mark = json.loads((model / "config.json").read_text())["audio_token_id"]
    for prompt in prompts:
        assert prompt["prompt_token_ids"].count(mark) == 1
        assert prompt["multi_modal_data"]["audio"][1] == 16_000
    assert settings[0]["temperature"] == 0.0
