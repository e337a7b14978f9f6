"""Answers by a server that speaks OpenAI's chat API, here a stand-in: what it is sent, and its failures."""

import base64
import io
import json
import signal
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile

from mdl_toolkit.errors import InputError
from mdl_toolkit.inference import server_engine
from mdl_toolkit.inference.run import infer
from tests.support.inferences import infer_options, table
from tests.support.model_folders import refused
from tests.support.runs import copy_checkpoint, make_csv, make_rows, write_csv
from tests.support.server import needs_server
from tests.support.waves import wave

pytestmark = needs_server
MESSAGES = {400: {"error": {"message": "the audio\nis broken"}}}


class ChatServer:
    """Answer with the number of samples of a recording; fail as `failures` says, in turn."""

    def __init__(self):
        self.models, self.bodies, self.keys, self.failures = [{"id": "A-small"}], [], [], []
        self.pause, self.at_once, self.most_at_once, self.places = 0.0, 0, 0, 99
        self.lock, self.ends, outer = threading.Lock(), threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.keys.append(self.headers["Authorization"])
                self.reply(200, {"data": outer.models})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    is_full = outer.at_once >= outer.places
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    outer.bodies.append(body)
                    failure = outer.failures.pop(0) if outer.failures else 0
                    if is_full:
                        failure = 503
                        outer.at_once -= 1
                if not is_full:
                    outer.ends.wait(outer.pause)
                    with outer.lock:
                        outer.at_once -= 1
                if failure == "dead":
                    self.close_connection = True
                elif failure:
                    self.reply(failure, MESSAGES.get(failure, {}))
                else:
                    self.reply(200, {"choices": [{"message": {"content": str(len(heard(body)))}}]})

            def reply(self, status, content):
                data = json.dumps(content).encode()
                # Who was interrupted does not listen any more.
                with suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("Retry-After", "0")
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def heard(body):
    part = body["messages"][-1]["content"][0]
    assert part["input_audio"]["format"] == "wav"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])), dtype="float32")
    assert rate == 16_000
    return samples


@pytest.fixture
def server():
    server = ChatServer()
    yield server
    server.ends.set()
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def model(golden, tmp_path):
    """Texts alone: the server has the weights."""
    folder = copy_checkpoint(golden, "A-small", tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return folder


@pytest.fixture
def options(model, tmp_path, server):
    def make(source, **changes):
        return infer_options(source, model, tmp_path / "out.csv", **{"engine": server.url, **changes})

    return make


def test_a_server_gets_messages_and_samples_and_its_answers_stand_in_their_rows(tmp_path, server, options):
    rows = make_rows(tmp_path / "audio", 5)
    rows[1] |= {"user_prompt": "Really?", "system_prompt": "Be brief."}
    source = write_csv(tmp_path / "in.csv", [{"system_prompt": "", **row} for row in rows])
    answers = infer(options(source, temperature=0.5, top_p=0.9, seed=3, max_new_tokens=7))
    recordings = [soundfile.read(row["audio"], dtype="float32")[0] for row in rows]
    assert answers == [str(len(each)) for each in recordings]
    assert [row["prediction"] for row in table(tmp_path / "out.csv")] == answers
    bodies = {len(heard(body)): body for body in server.bodies}
    for recording in recordings:
        assert np.array_equal(heard(bodies[len(recording)]), recording)
    system, user = bodies[len(recordings[1])]["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in user["content"]] == ["input_audio", "text"]
    assert user["content"][1]["text"] == "Really?"
    assert [len(bodies[len(each)]["messages"]) for each in recordings] == [1, 2, 1, 1, 1]
    names = ("model", "max_tokens", "top_p", "temperature")
    settings = {name: [body[name] for body in server.bodies] for name in names}
    assert settings == {
        "model": ["A-small"] * 5, "max_tokens": [7] * 5, "top_p": [0.9] * 5, "temperature": [0.5] * 5,
    }  # fmt: skip
    assert sorted(body["seed"] for body in server.bodies) == [3, 4, 5, 6, 7]


def test_what_a_model_s_own_settings_would_change_is_said_each_time(tmp_path, server, options):
    """vLLM takes from `generation_config.json` what a request leaves out."""
    infer(options(make_csv(tmp_path, 1)))
    (body,) = server.bodies
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p")} == {
        "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0,
    }  # fmt: skip
    penalties = {name: value for name, value in body.items() if name.endswith("_penalty")}
    assert penalties == {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


@pytest.mark.parametrize("fills_in", [True, False])
def test_an_empty_prompt_is_sent_to_a_server_that_would_fill_one_in(tmp_path, server, options, fills_in):
    if fills_in:
        server.models = [{"id": "A-small", "prompts": {"system": "Listen well.", "user": "What?"}}]
    row = {"audio": make_rows(tmp_path / "audio", 1)[0]["audio"]}
    infer(options(write_csv(tmp_path / "in.csv", [row]), system_prompt="", user_prompt=""))
    messages = server.bodies[0]["messages"]
    texts = [part["text"] for part in messages[-1]["content"] if part["type"] == "text"]
    assert texts == [""] * fills_in
    assert messages[:-1] == [{"role": "system", "content": ""}] * fills_in


def test_a_server_is_asked_about_each_window(tmp_path, server, options):
    file = tmp_path / "long.wav"
    soundfile.write(file, wave(71 * 1600, 3), 16_000, subtype="PCM_16")
    source = write_csv(tmp_path / "in.csv", [{"audio": str(file), "user_prompt": "?"}])
    answers = infer(options(source, window=3, overlap=1, join="list", max_new_tokens=7))
    assert answers == ["48000", "48000", "49600"]
    sent = {len(each): each for each in map(heard, server.bodies)}
    assert np.array_equal(sent[49_600], soundfile.read(file, dtype="float32")[0][64_000:])


def test_as_many_requests_as_the_batch_size_are_under_way(tmp_path, server, options):
    server.pause = 0.05
    infer(options(make_csv(tmp_path, 9), batch_size=3))
    assert server.most_at_once == 3


def test_what_fails_for_a_time_is_asked_again(tmp_path, server, options):
    server.failures = [503, 429, 500]
    assert len(infer(options(make_csv(tmp_path, 2)))) == 2
    assert len(server.bodies) == 5


def test_a_busy_server_is_waited_for_as_long_as_it_is_at_work(tmp_path, server, options, monkeypatch):
    """It answers one request at once, and refuses more of them than there are tries."""
    monkeypatch.setattr(server_engine, "TRIES", 2)
    server.places, server.pause = 1, 0.3
    assert len(infer(options(make_csv(tmp_path, 6), batch_size=6))) == 6
    assert len(server.bodies) > 6


def test_a_server_that_is_busy_with_nothing_of_ours_ends_the_run(tmp_path, server, options, monkeypatch):
    monkeypatch.setattr(server_engine, "TRIES", 2)
    server.failures = [503] * 99
    message = refused(infer, options(make_csv(tmp_path, 4), batch_size=4))
    assert "takes no further request (503" in message
    assert "lower --batch-size" in message
    assert len(server.bodies) < 30


PROXIES = {"socks5://127.0.0.1:1080": "pip install 'httpx[socks]'", "socks://127.0.0.1:1": "cannot be used ("}


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_that_cannot_be_used_is_said_and_matters_elsewhere_alone(
    tmp_path, server, options, monkeypatch, proxy
):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    source = make_csv(tmp_path, 1)
    assert PROXIES[proxy] in refused(infer, options(source, engine="http://example.org:8000"))
    assert infer(options(source))


def test_a_server_that_dies_ends_the_run_which_goes_on_later(tmp_path, server, options, monkeypatch):
    monkeypatch.setattr(server_engine, "TRIES", 1)
    source = make_csv(tmp_path, 6)
    server.failures = [0, 0, 0, "dead"]
    message = refused(infer, options(source, batch_size=1))
    assert "does not answer" in message
    assert not (tmp_path / "out.csv").exists()
    del server.bodies[:]
    assert len(infer(options(source, batch_size=1))) == 6
    assert len(server.bodies) == 3


def test_a_server_that_is_not_there_is_said_before_any_work(tmp_path, server, options):
    server.server.shutdown()
    server.server.server_close()
    message = refused(infer, options(make_csv(tmp_path, 2)))
    assert server.url in message
    assert not [path for path in tmp_path.iterdir() if "out.csv" in path.name]


def test_a_row_that_the_server_refuses_is_named(tmp_path, server, options):
    server.failures = [0, 400]
    message = refused(infer, options(make_csv(tmp_path, 3), batch_size=1))
    assert "refuses line" in message
    assert "400 Bad Request: the audio is broken" in message


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_row_is_kept_with_its_reason(tmp_path, server, options, status):
    server.failures = [0, status]
    source = make_csv(tmp_path, 4)
    with pytest.raises(InputError, match="1 of its rows has no prediction"):
        infer(options(source, batch_size=1, on_error="keep"))
    assert len(server.bodies) == 4
    rows = table(tmp_path / "out.csv")
    (lost,) = (number for number, row in enumerate(rows) if not row["prediction"])
    assert f"the server refuses line {lost + 2} ({status} " in rows[lost]["error"]
    assert [bool(row["error"]) for row in rows].count(True) == 1


def test_a_refused_row_is_asked_for_again_after_an_interruption(
    tmp_path, server, options, monkeypatch, capsys
):
    """The server may have been corrected: an answer then takes the refusal's place, in whatever file."""
    monkeypatch.setattr(server_engine, "TRIES", 1)
    source, changes = make_csv(tmp_path, 5), {"batch_size": 1, "on_error": "keep"}
    server.failures = [0, 400, 0, "dead"]
    assert "does not answer" in refused(infer, options(source, **changes))
    (record,) = (tmp_path / ".out.csv.partial").glob("answers-*.jsonl")
    record.rename(record.with_name("answers-1.jsonl"))
    del server.bodies[:]
    capsys.readouterr()
    assert all(infer(options(source, **changes)))
    assert len(server.bodies) == 3
    assert "2 of 5 rows are answered already" in capsys.readouterr().err
    assert not any(row["error"] for row in table(tmp_path / "out.csv"))


def test_rows_that_are_all_refused_are_told_at_the_first_batch(tmp_path, server, options, capsys):
    server.failures = [400] * 5
    with pytest.raises(InputError, match="5 of its rows have no prediction"):
        infer(options(make_csv(tmp_path, 5), batch_size=2, on_error="keep"))
    said = capsys.readouterr().err
    assert "warning: none of the first 2 rows has an answer: " in said
    assert "400 Bad Request: the audio is broken" in said
    assert all(row["error"] for row in table(tmp_path / "out.csv"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_that_is_not_of_the_row_ends_the_run(tmp_path, server, options, status):
    server.failures = [0, status]
    refused(infer, options(make_csv(tmp_path, 4), batch_size=1, on_error="keep"))
    assert len(server.bodies) == 2
    assert not (tmp_path / "out.csv").exists()


def test_an_answer_that_is_no_completion_is_refused(tmp_path, server, options, monkeypatch):
    monkeypatch.setattr(server_engine, "is_json", lambda response: "choices" not in response.text)
    assert "no chat completion" in refused(infer, options(make_csv(tmp_path, 1)))


@pytest.mark.parametrize(
    ("models", "chosen"),
    [
        ([{"id": "whatever"}], "whatever"),
        ([{"id": "base"}, {"id": "A-small"}], "A-small"),
        ([{"id": "base", "root": "/elsewhere"}, {"id": "tuned", "root": "{folder}"}], "tuned"),
    ],
)
def test_the_model_is_found_by_its_name_or_folder(tmp_path, model, server, options, models, chosen):
    server.models = [{k: v.format(folder=model) for k, v in each.items()} for each in models]
    infer(options(make_csv(tmp_path, 1)))
    assert server.bodies[0]["model"] == chosen


def test_several_models_of_other_names_are_refused_by_name(tmp_path, server, options):
    server.models = [{"id": "base"}, {"id": "tuned"}]
    message = refused(infer, options(make_csv(tmp_path, 1)))
    assert "A-small" in message
    assert "base, tuned" in message


def test_the_key_of_the_environment_is_sent(tmp_path, server, options, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    infer(options(make_csv(tmp_path, 1)))
    assert {*server.keys} == {"Bearer secret"}


def test_a_server_that_wants_a_key_says_where_it_belongs(tmp_path, server, options):
    server.failures = [401]
    assert "VLLM_API_KEY" in refused(infer, options(make_csv(tmp_path, 1)))


def test_an_interruption_does_not_wait_for_answers_that_are_under_way(tmp_path, server, options):
    server.pause = 30
    begun = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    with pytest.raises(KeyboardInterrupt):
        infer(options(make_csv(tmp_path, 2)))
    assert time.monotonic() - begun < 10
