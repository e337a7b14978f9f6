"""The server's interface: answers are those of `inference`, and what cannot be answered is refused."""

import io
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import httpx
import numpy as np
import pytest
import soundfile

from mdl_toolkit import demo
from mdl_toolkit.config.options import spelling
from mdl_toolkit.config.serving import ServeOptions
from mdl_toolkit.inference.run import infer
from tests.support.inferences import infer_options
from tests.support.server import needs_server
from tests.support.serving import Served, chat, events_of, text_of
from tests.support.spoilt import phrases
from tests.support.waves import wave

pytestmark = needs_server

TOKENS = 12
ROWS = phrases("test.csv")[::3]
MODELS = ["model", "adapter"]


@pytest.fixture(scope="module")
def inferred(place):
    """What `inference` answers to the rows, by model."""
    lines = (f"{row['audio']}\n" for row in ROWS)
    (place / "rows.csv").write_text("".join(["audio\n", *lines]))
    return {
        model: infer(
            infer_options(
                place / "rows.csv", place / model, place / f"{model}.csv", max_new_tokens=TOKENS,
                **({"user_prompt": demo.PROMPT} if model == "model" else {}),
            )
        )
        for model in MODELS
    }  # fmt: skip


def asking(served, model, place):
    """Name a model, and the prompt that it is to be sent: an adapter knows its own."""
    return ("tuned", None) if model == "adapter" else (str(place / "model"), demo.PROMPT)


def recording(samples: np.ndarray, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


SHORT = recording(wave(16_000, 1))


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_inference(served, place, inferred, model):
    name, prompt = asking(served, model, place)

    def ask(row):
        return text_of(served.ask(place.joinpath(row["audio"]), prompt, model=name, max_tokens=TOKENS))

    with ThreadPoolExecutor(10) as pool:
        found = [*pool.map(ask, ROWS)]
    assert found == inferred[model]
    assert len({*found}) > len(found) / 2


@pytest.mark.parametrize("model", MODELS)
def test_streams_and_transcriptions_say_the_same(served, place, inferred, model):
    name, prompt = asking(served, model, place)
    for row, wanted in zip(ROWS[:6], inferred[model], strict=False):
        audio = place / row["audio"]
        settings = {
            "model": name,
            "max_tokens": TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        events = events_of(served.ask(audio, prompt, **settings))
        parts = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
        assert "".join(parts) == wanted
        assert len([part for part in parts if part]) > 1 or len(wanted) < 2
        assert events[-2]["choices"][0]["finish_reason"] in ("stop", "length")
        usage = events[-1]["usage"]
        assert 0 < usage["completion_tokens"] <= TOKENS
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        form = {"model": name, "max_tokens": str(TOKENS), **({} if prompt is None else {"prompt": prompt})}
        whole = transcribe(served, audio.read_bytes(), **form)
        if model == "model":
            assert whole.json() == {"text": wanted}
            plain = transcribe(served, audio.read_bytes(), **form, response_format="text")
            assert plain.text == wanted
            events = events_of(transcribe(served, audio.read_bytes(), **form, stream="true"))
            assert "".join(event.get("delta", "") for event in events) == events[-1]["text"] == wanted
        else:
            assert whole.status_code == 200


def transcribe(served, content, **form):
    return served.client.post("/v1/audio/transcriptions", files={"file": ("a.wav", content)}, data=form)


def test_prompts_that_are_sent_win_over_those_of_the_training(served, place):
    def ask(*prompts):
        return text_of(served.ask(SHORT, *prompts, model="tuned", max_tokens=30))

    trained = ask()
    assert ask(demo.PROMPT) == ask(demo.PROMPT, "Listen well.") == trained
    assert len({trained, ask("Who speaks?"), ask(demo.PROMPT, ""), ask(demo.PROMPT, "Be brief.")}) == 4


def test_inference_by_this_server_is_inference_without_it(served, place, tmp_path, monkeypatch):
    """Cells that have no prompt get none, though the server would fill one in."""
    monkeypatch.chdir(place)
    (place / "tuned").symlink_to(place / "adapter")
    prompts = [(demo.PROMPT, "Listen well."), ("", ""), (demo.PROMPT, ""), ("", "Listen well.")] * 2
    rows = [f"{row['audio']},{user},{system}\n" for row, (user, system) in zip(ROWS, prompts, strict=False)]
    (tmp_path / "rows.csv").write_text("".join(["audio,user_prompt,system_prompt\n", *rows]))
    changes = {"base_dir": str(place), "max_new_tokens": TOKENS}
    here, there = (
        infer(infer_options(tmp_path / "rows.csv", "tuned", tmp_path / f"{number}.csv", **more, **changes))
        for number, more in enumerate(({}, {"engine": served.url}))
    )
    assert here == there
    assert len({*here}) > 4


def test_the_seed_decides_what_is_drawn(served):
    def draw(seed):
        return text_of(served.ask(SHORT, "?", temperature=1.5, top_p=0.9, seed=seed, max_tokens=20))

    with ThreadPoolExecutor(8) as pool:
        seeds = [1, 2, 3, 1, 2, 3, 4, 1]
        found = [*pool.map(draw, seeds)]
    assert len({*zip(seeds, found, strict=True)}) == len({*found}) == 4
    assert draw(1) == found[0] != text_of(served.ask(SHORT, "?", max_tokens=20))


def test_a_request_joins_those_that_are_being_answered(served):
    with served.client.stream("POST", "/v1/chat/completions", json=chat(SHORT, "?", stream=True)) as long:
        lines = long.iter_lines()
        for _ in range(8):
            next(lines)
        assert served.ask(SHORT, "?", max_tokens=2).status_code == 200
        rest = [line for line in lines if line.startswith("data: {")]
    # Of its 200 tokens most were still to come.
    assert len(rest) > 100


def test_models_and_health(served, place):
    listed = served.client.get("/v1/models").json()
    base, tuned = listed["data"]
    assert (base["id"], base["parent"], tuned["id"], tuned["parent"]) == (
        str(place / "model"), None, "tuned", str(place / "model"),
    )  # fmt: skip
    assert tuned["prompts"] == {"system": "Listen well.", "user": demo.PROMPT}
    assert listed["limits"] == {"request_mb": 2.0, "audio_seconds": 20.0, "new_tokens": 200}
    assert served.client.get("/health").json() == {"status": "ok"}


# --- refusals --------------------------------------------------------------------------------------------

IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
TWICE = chat(SHORT)
TWICE["messages"] *= 2
TWO = chat(SHORT)
TWO["messages"][0]["content"] *= 2
NO_BASE64 = chat(SHORT)
NO_BASE64["messages"][0]["content"][0]["input_audio"]["data"] = "%%%"
REFUSED = {
    "0 bytes": (chat(b""), 400, "the recording: the file is empty (0 bytes); get it again"),
    "no audio": (chat(b"Dear Sir or Madam"), 400, "the recording: this is a text file"),
    "no base64": (NO_BASE64, 400, "input_audio.data: no base64"),
    "another model": (chat(SHORT, model="gpt"), 404, "no model gpt; there are: "),
    "no messages": ({}, 400, "messages: Field required"),
    "no recording": ({"messages": [{"role": "user", "content": "Hi"}]}, 400, "expected one recording"),
    "two recordings": (TWO, 400, "expected one recording"),
    "an image": (IMAGE, 400, "messages.0.content.0: Input tag 'image_url'"),
    "two turns": (TWICE, 400, "not user, user; earlier turns are not taken"),
    "no turn": ({"messages": []}, 400, "not none; earlier turns are not taken"),
    "a field": (chat(SHORT, stop=["."]), 400, "stop is not supported here; leave it out"),
    "several answers": (chat(SHORT, n=3), 400, "n is not supported here"),
    "tools": (chat(SHORT, tools=[{"type": "function"}]), 400, "tools is not supported here"),
    "a form": (chat(SHORT, response_format={"type": "json_object"}), 400, "response_format is not supported"),
    "probabilities": (chat(SHORT, logprobs=True), 400, "logprobs is not supported here"),
    "other sampling": (chat(SHORT, top_k=5), 400, "top_k is not supported here"),
    "an unknown field": (chat(SHORT, temprature=0.5), 400, "temprature is not supported here"),
    "cut off": (chat(SHORT[:-9_000]), 400, "the recording was cut off: "),
    "temperature": (chat(SHORT, temperature=-1), 400, "temperature: Input should be greater than"),
    "tokens": (chat(SHORT, max_tokens=201), 400, "max_tokens 201: at most 200 are given here"),
    "no tokens": (chat(SHORT, max_tokens=0), 400, "max_tokens: Input should be greater than"),
    "long": (chat(recording(wave(22 * 8_000, 1), 8_000)), 413, "longer than 20 s, the most that is taken"),
    "large": (chat(b"0" * 2_000_000), 413, "the request is larger than 2 MB"),
    "room": (chat(SHORT, "word " * 50_000), 400, "tokens and the answer up to 200; this model has room for"),
    "text": (chat(recording(wave(16_000, 1))[:20]), 400, "the recording"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_sentence(served, case):
    body, status, words = REFUSED[case]
    said = refused(served.client.post("/v1/chat/completions", json=body), status)
    assert words in said
    # What is to be done can be done here.
    assert {*re.findall(r"--[a-z-]+", said)} <= {spelling(each.name) for each in fields(ServeOptions)}


def test_fields_that_change_nothing_are_taken(served):
    """What OpenAI's clients and our own engine send."""
    usual = {
        "user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto",
        "parallel_tool_calls": True, "stream_options": None, "n": 1, "stop": None, "tools": [],
        "tool_choice": "auto", "logprobs": False, "response_format": {"type": "text"}, "temperature": 0,
        "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "presence_penalty": 0,
        "frequency_penalty": 0.0, "logit_bias": {},
    }  # fmt: skip
    plain = text_of(served.ask(SHORT, "?", max_tokens=20))
    assert text_of(served.ask(SHORT, "?", max_tokens=20, **usual)) == plain


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    assert "\n" not in error["message"]
    return error["message"]


@pytest.mark.parametrize("body", [b'{"messages": [', b"hello", b"[1]", b"\xff\xfe", b""])
def test_what_is_no_json_is_refused(served, body):
    headers = {"Content-Type": "application/json"}
    said = refused(served.client.post("/v1/chat/completions", content=body, headers=headers), 400)
    assert said.startswith("the request: expected a JSON object, as application/json (")


def test_a_page_of_others_cannot_ask(served):
    """What a browser sends to another site without asking that site first is not taken."""
    headers = {"Content-Type": "text/plain"}
    body = served.client.build_request("POST", "/", json=chat(SHORT)).read()
    said = refused(served.client.post("/v1/chat/completions", content=body, headers=headers), 400)
    assert "as application/json" in said


def test_forms_that_cannot_be_answered_are_refused(served):
    post = served.client.post
    address = "/v1/audio/transcriptions"
    assert refused(post(address, data={"model": "tuned"}), 400).startswith("file: expected a recording")
    assert refused(post(address, json={}), 400).startswith("file: expected a recording")
    assert refused(post(address, data={"file": "a.wav"}), 400).startswith("file: expected a recording")
    assert "0 bytes" in refused(transcribe(served, b""), 400)
    assert "'json' or 'text'" in refused(transcribe(served, SHORT, response_format="srt"), 400)
    for name in ("include[]", "timestamp_granularities[]", "temprature"):
        assert f"{name} is not supported here" in refused(transcribe(served, SHORT, **{name: "x"}), 400)
    assert refused(transcribe(served, SHORT, model="gpt"), 404).startswith("no model gpt")
    assert "larger than 2 MB" in refused(transcribe(served, b"0" * 2_100_000), 413)
    assert "n is not supported here" in refused(transcribe(served, SHORT, n="2"), 400)
    usual = {"language": "en", "chunking_strategy": "auto", "user": "u", "max_tokens": "3"}
    usual |= {"top_k": "-1", "min_p": "0", "repetition_penalty": "1.0", "presence_penalty": "0.0", "n": "1"}
    assert transcribe(served, SHORT, **usual).status_code == 200


def test_a_refusal_is_in_the_language_that_is_asked_for(served):
    headers = {"Accept-Language": "zh"}
    response = served.client.post("/v1/chat/completions", json=chat(b""), headers=headers)
    assert "0 字节" in refused(response, 400)


def test_unknown_addresses_are_refused(served):
    assert refused(served.client.get("/v1/embeddings"), 404)
    assert refused(served.client.get("/v1/chat/completions"), 405)


def test_nothing_was_lost_by_all_this(served):
    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.ask(SHORT, "?", max_tokens=2).status_code == 200
    assert "Traceback" not in served.said


# --- who may ask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["option", "environment"])
def test_with_a_token_only_those_who_send_it_are_answered(place, way):
    words, variables = (["--token", "s3cret"], {}) if way == "option" else ([], {"MDL_TOKEN": "s3cret"})
    server = Served(str(place / "model"), *words, **variables)
    try:
        assert "s3cret" not in server.said
        get, send = server.client.get, server.client.post
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cre"}):
            assert "send Authorization: Bearer TOKEN" in refused(get("/v1/models", headers=headers), 401)
            body = chat(SHORT, max_tokens=1)
            refused(send("/v1/chat/completions", json=body, headers=headers), 401)
            refused(send("/v1/audio/transcriptions", files={"file": SHORT}, headers=headers), 401)
        right = {"Authorization": "Bearer s3cret"}
        assert get("/v1/models", headers=right).status_code == 200
        assert send("/v1/chat/completions", json=chat(SHORT, max_tokens=1), headers=right).status_code == 200
        assert get("/health").status_code == get("/").status_code == 200
    finally:
        server.close()


def test_it_listens_to_this_machine_alone(served):
    assert served.url.startswith("http://127.0.0.1:")
