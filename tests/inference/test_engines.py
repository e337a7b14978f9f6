"""Engines: sampling, beam search and vLLM, and options that do not go together."""

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mdl_toolkit.api import evaluate
from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, ModelError, UsageError
from mdl_toolkit.inference import engines, vllm_engine
from mdl_toolkit.inference.run import infer
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.adapters import make_adapter
from tests.support.inferences import infer_options as options
from tests.support.inferences import table
from tests.support.model_folders import refused
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
        ({"engine": "vllm", "quantization": "4bit"}, "--engine vllm and --quantization"),
        ({"engine": "http://a:1", "choices": "c.txt"}, "--engine http://a:1 and --choices"),
        ({"engine": "http://a:1", "bf16": True}, "--engine http://a:1 and --bf16"),
        ({"choices": "c.txt", "repetition_penalty": 1.1}, "--choices and --repetition-penalty"),
        ({"engine": "vllm", "no_repeat_ngram_size": 2}, "--engine vllm and --no-repeat-ngram-size"),
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


class StandIn:
    """vLLM's engine: answers each question with the tokens of "rain" and an end, one question a step."""

    made, asked = {}, []

    def __init__(self, **settings):
        StandIn.made, StandIn.asked = settings, []
        self.llm_engine, self.waiting, self.most = self, [], 0

    def add_request(self, key, prompt, settings, lora_request=None):
        StandIn.asked.append((prompt, settings, lora_request))
        self.waiting.append(key)
        self.most = max(self.most, len(self.waiting))

    def get_num_unfinished_requests(self):
        return len(self.waiting)

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        ids = ChatTokenizer(read_tokenizer_files(StandIn.made["model"])).answer_ids("rain")
        answer = SimpleNamespace(token_ids=ids, finish_reason="stop")
        done = SimpleNamespace(finished=True, request_id=self.waiting.pop(), outputs=[answer])
        return [SimpleNamespace(finished=False), done]


@pytest.fixture
def vllm(monkeypatch):
    for name in vllm_engine.ENVIRONMENT:
        monkeypatch.setenv(name, "")
    package, request = type(sys)("vllm"), type(sys)("vllm.lora.request")
    package.LLM = lambda **settings: StandIn(**{**settings, "model": Path(settings["model"])})
    package.SamplingParams = lambda **settings: settings
    request.LoRARequest = lambda *words: words
    modules = {"vllm": package, "vllm.lora": type(sys)("vllm.lora"), "vllm.lora.request": request}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engines, "require_package", lambda *_: None)
    return StandIn


def test_vllm_is_given_prompts_with_one_mark_for_each_recording(model, tmp_path, vllm):
    """What vLLM is called with, and where its answers go; `make serving` runs vLLM itself."""
    source = make_csv(tmp_path, 5)
    drawn = {"temperature": 0.5, "top_p": 0.9, "seed": 3}
    answers = infer(
        options(source, model, tmp_path / "out.csv", engine="vllm", max_new_tokens=5, batch_size=2, **drawn)
    )
    assert answers == ["rain"] * 5
    assert vllm.made["model"] == model
    assert vllm.made["trust_remote_code"] is False
    assert vllm.made["dtype"] == "float32"
    assert "enable_lora" not in vllm.made
    mark = json.loads((model / "config.json").read_text())["audio_token_id"]
    longest = 0
    for prompt, settings, lora in vllm.asked:
        samples, rate = prompt["multi_modal_data"]["audio"]
        assert rate == 16_000
        assert prompt["prompt_token_ids"].count(mark) == 1
        assert (settings["max_tokens"], settings["temperature"], settings["top_p"], lora) == (
            5,
            0.5,
            0.9,
            None,
        )
        longest = max(longest, len(prompt["prompt_token_ids"]) - 1 + audio_token_count(len(samples)) + 5)
    assert vllm.made["max_model_len"] == longest
    assert sorted(settings["seed"] for _, settings, _ in vllm.asked) == [3, 4, 5, 6, 7]


def test_vllm_gets_an_adapter_beside_its_base(model, tmp_path, vllm):
    adapter = make_adapter(model, tmp_path / "adapter", ("projector", "decoder"), rank=9)
    source = make_csv(tmp_path, 1)
    infer(options(source, adapter, tmp_path / "out.csv", engine="vllm", bf16=True))
    wanted = {"model": model, "enable_lora": True, "max_lora_rank": 16, "enable_tower_connector_lora": True}
    assert {**vllm.made, **wanted, "dtype": "bfloat16"} == vllm.made
    assert vllm.asked[0][2] == ("adapter", 1, str(adapter))


def test_vllm_works_in_one_process(model, tmp_path, vllm, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        infer(options(make_csv(tmp_path, 1), model, tmp_path / "out.csv", engine="vllm"))


def test_what_vllm_cannot_load_is_said_in_one_sentence(model, tmp_path, vllm, monkeypatch):
    def fail(**_):
        raise ValueError("no room\nfor the cache")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", fail)
    source = make_csv(tmp_path, 1)
    message = refused(infer, options(source, model, tmp_path / "out.csv", engine="vllm"))
    assert message == f"{model}: vLLM cannot load it: no room for the cache"


def test_penalties_change_answers_greedy_and_by_beams(model, tmp_path):
    csv = make_csv(tmp_path, 4)
    for beams in (1, 2):
        found = []
        again = {"repetition_penalty": 0.1}
        for number, changes in enumerate(({}, again, {**again, "no_repeat_ngram_size": 1})):
            output = tmp_path / f"{beams}-{number}.csv"
            found.append(infer(options(csv, model, output, num_beams=beams, **changes)))
        assert found[0] != found[1] != found[2]


@pytest.mark.parametrize("on_error", ["stop", "keep"])
def test_the_reference_is_kept_where_evaluate_looks_for_it(model, tmp_path, on_error):
    csv = make_csv(tmp_path, 5)
    if on_error == "keep":
        shutil.copy(csv, tmp_path / "bad.csv")
        csv = tmp_path / "bad.csv"
        csv.write_text(csv.read_text() + "gone.wav,What is it?,the last\n")
    output = tmp_path / "p.csv"
    asked = options(csv, model, output, keep_reference=True, on_error=on_error)
    with nullcontext() if on_error == "stop" else pytest.raises(InputError, match="1 of its rows"):
        infer(asked)
    rows, before = table(output), table(csv)
    assert [row["reference"] for row in rows] == [row["prediction"] for row in before]
    assert [*rows[0]] == [*before[0], "reference", *(["error"] if on_error == "keep" else [])]
    assert [row["prediction"] for row in rows] != [row["reference"] for row in rows]
    evaluation = evaluate(EvaluateOptions(input=str(output)))
    assert len(evaluation.rows) == len(before)
    again = replace(asked, input=str(output), output=str(tmp_path / "again.csv"))
    with pytest.raises(InputError, match="--keep-reference needs a column `prediction` to keep, and none"):
        infer(again)
