"""The application at a real socket, in this process: clients that hang up, and engines that fail."""

import socket
import threading
import time
from functools import partial

import httpx
import pytest
import uvicorn

from mdl_toolkit.inference.generate import Answerer
from mdl_toolkit.model.decoding_batch import DecodingBatch
from mdl_toolkit.serving.app import Limits, Service, create_app
from mdl_toolkit.serving.engine import ContinuousBatch, ServedModel
from mdl_toolkit.weights.provenance import Prompts
from tests.support.processes import wait_for
from tests.support.questions import endless, load_checkpoint
from tests.support.recordings import pcm_wav
from tests.support.server import needs_server
from tests.support.serving import chat, events_of
from tests.support.waves import wave

pytestmark = needs_server
# More than is decoded in the time of a test.
ENDLESS = 1_000_000
CHAT = "/v1/chat/completions"
LOST = RuntimeError("CUDA error: device-side assert triggered")


class Steps:
    """Count the steps of decoding, and fail at one of them."""

    def __init__(self, monkeypatch):
        self.count, self.fails_at, step = 0, None, DecodingBatch.step

        def counted(batch, last):
            self.count += 1
            if self.count == self.fails_at:
                raise LOST
            return step(batch, last)

        monkeypatch.setattr(DecodingBatch, "step", counted)


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


@pytest.fixture
def client(golden):
    """A client of a server whose answers have as many tokens as they may."""
    model, tokenizer = load_checkpoint(golden, "A-small")
    batch = ContinuousBatch(partial(endless, model, tokenizer), 2)
    served = ServedModel("m", None, tokenizer, Prompts(), 2 * ENDLESS, batch)
    app = create_app(Service({"m": served}, Limits(5, 20, ENDLESS)), None, "127.0.0.1")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        yield client
    server.should_exit = True
    thread.join()
    listener.close()


def asked(**fields):
    return chat(pcm_wav(wave(16_000, 1)), "?", **fields)


@pytest.mark.parametrize("way", ["stream", "whole"])
def test_an_answer_whose_client_has_hung_up_is_given_up(client, steps, way):
    body = asked(stream=way == "stream")
    if way == "stream":
        with client.stream("POST", CHAT, json=body) as response:
            for _, _ in zip(range(8), response.iter_lines(), strict=False):
                pass
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=body, timeout=httpx.Timeout(60, read=1))
    assert steps.count > 1

    def stands_still():
        before = steps.count
        time.sleep(0.1)
        return steps.count == before

    wait_for(stands_still)
    assert steps.count < ENDLESS / 2
    # Its place is free again.
    assert client.post(CHAT, json=asked(max_tokens=2)).status_code == 200


def test_an_engine_that_has_died_is_told_by_health(client, steps, monkeypatch):
    assert client.get("/health").json() == {"status": "ok"}
    steps.fails_at = 2
    assert client.post(CHAT, json=asked(max_tokens=5)).status_code == 500
    # One batch has failed; the device is there, so the next one is answered.
    assert client.get("/health").status_code == 200
    assert client.post(CHAT, json=asked(max_tokens=5)).status_code == 200

    def lost(answerer):
        raise LOST

    monkeypatch.setattr(Answerer, "check_device", lost)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    steps.fails_at = steps.count + 2
    assert client.post(CHAT, json=asked(max_tokens=5)).status_code == 500
    wait_for(lambda: client.get("/health").status_code == 503)
    assert client.get("/health").json() == {"status": "failed"}
    refused = client.post(CHAT, json=asked(max_tokens=5))
    assert refused.status_code == 500
    assert "this model answers no more; start the server again" in refused.json()["error"]["message"]


def test_what_ends_a_stream_is_said_in_the_language_of_the_client(client, steps):
    for language, words in (("en", "it cannot be answered: "), ("zh", "无法回答：")):
        steps.fails_at = steps.count + 3
        response = client.post(CHAT, json=asked(stream=True), headers={"Accept-Language": language})
        *before, last = events_of(response)
        assert len(before) > 1
        error = last["error"]
        assert error["message"].startswith(words)
        assert str(LOST) in error["message"]
        assert (error["code"], error["type"]) == (500, "server_error")
