"""Names on a hub: two organisations, caches without network, and words that help when there is none.

Hubs are servers of this test, or a module in place of ModelScope's package.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from tests.support.model_folders import find, refused
from tests.support.runs import copy_checkpoint
from tests.support.server import needs_server

NAME, THERE = "mispeech/midashenglm-7b", "midasheng/midashenglm-7b"
FIND = """
import sys
from mdl_toolkit.errors import ModelError
from mdl_toolkit.weights.resolve import find_model
try:
    print(find_model(sys.argv[1], from_modelscope=False, weights=True))
except ModelError as problem:
    print(problem.message.en)
    print(problem.message.zh)
"""


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


@contextmanager
def server(status):
    """A server on this machine that answers everything with a status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_CONNECT = do_GET  # noqa: N815 - names of http.server's own

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def asked(name, cache, **environment):
    """What a process of its own prints, with nothing but these settings of the network."""
    kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    settings = {**kept, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache), **environment}
    done = subprocess.run(
        [sys.executable, "-c", FIND, name], env=settings, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr


def put_in_cache(model, cache, name):
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (place / "refs").mkdir()
    (place / "refs/main").write_text("a" * 40)
    return snapshot


SOCKS = {"ALL_PROXY": "socks5://127.0.0.1:9", "HF_ENDPOINT": "http://hub.invalid"}


def test_a_socks_proxy_does_not_hinder_a_cached_model(model, tmp_path):
    snapshot = put_in_cache(model, tmp_path / "cache", NAME)
    found, said = asked(NAME, tmp_path / "cache", **SOCKS)
    assert found == f"{snapshot}\n"
    assert "taken from the cache" in said
    assert "httpx[socks]" in said


def test_a_socks_proxy_names_the_package_that_it_needs(tmp_path):
    found, _ = asked(NAME, tmp_path / "cache", **SOCKS)
    en, zh = found.splitlines()
    assert all('pip install "httpx[socks]"' in message for message in (en, zh))


@needs_server
@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_wants_a_login_names_it(tmp_path, status):
    with server(status) as place:
        found, _ = asked(NAME, tmp_path / "cache", HF_ENDPOINT=f"http://{place}", no_proxy="127.0.0.1")
    en, zh = found.splitlines()
    assert all("hf auth login" in message and str(status) in message for message in (en, zh))


@needs_server
def test_a_proxy_that_refuses_is_named_without_its_password(tmp_path):
    with server(407) as place:
        proxy = f"http://user:secret@{place}"
        found, _ = asked(NAME, tmp_path / "cache", HTTPS_PROXY=proxy, HF_ENDPOINT="https://hub.invalid")
    en, zh = found.splitlines()
    assert all(place in message and "407" in message and "secret" not in message for message in (en, zh))


def test_a_proxy_that_is_not_there_is_named(tmp_path):
    environment = {"HTTPS_PROXY": "http://127.0.0.1:9", "HF_ENDPOINT": "https://hub.invalid"}
    found, _ = asked(NAME, tmp_path / "cache", **environment)
    assert "the proxy 127.0.0.1:9 does not let it through: " in found


@needs_server
def test_the_name_on_the_other_hub_is_tried(model, tmp_path):
    snapshot = put_in_cache(model, tmp_path / "cache", NAME)
    with server(404) as place:
        environment = {"HF_ENDPOINT": f"http://{place}", "no_proxy": "127.0.0.1"}
        found, _ = asked(THERE, tmp_path / "cache", **environment)
        neither, _ = asked(THERE, tmp_path / "nothing", **environment)
    assert found == f"{snapshot}\n"
    assert neither.startswith(f"model {THERE}: not a folder here, and Hugging Face did not give it (404")
    assert f"nor {NAME} (404" in neither


class Response:
    def __init__(self, status_code):
        self.status_code = status_code


class HttpError(Exception):
    def __init__(self, status):
        super().__init__(f"{status} Client Error")
        self.response = Response(status)


@pytest.fixture
def modelscope(monkeypatch):
    """A stand-in for ModelScope's package: what it has, what is in its cache, and what it was asked."""

    class ModelScope(type(sys)):
        online, cached, asked = {}, {}, []
        problem = HttpError(404)

        def snapshot_download(self, name, *, allow_patterns, local_files_only):
            assert "*.json" in allow_patterns
            self.asked.append((name, local_files_only))
            if local_files_only and name in self.cached:
                return str(self.cached[name])
            if local_files_only:
                raise ValueError("Cannot find the requested files in the cached path")
            if name in self.online:
                return str(self.online[name])
            raise self.problem

    stand_in = ModelScope("modelscope")
    stand_in.__spec__ = type(os.__spec__)("modelscope", None)
    stand_in.online, stand_in.cached, stand_in.asked = {}, {}, []
    monkeypatch.setitem(sys.modules, "modelscope", stand_in)
    return stand_in


def test_modelscope_s_cache_does_without_network(model, modelscope, capsys):
    modelscope.problem, modelscope.cached = ConnectionError("no route"), {NAME: model}
    assert find(NAME, from_modelscope=True) == model
    assert "taken from the cache" in capsys.readouterr().err
    assert modelscope.asked[-2:] == [(NAME, False), (NAME, True)]


def test_the_other_name_in_modelscope_s_cache_does_too(model, modelscope):
    modelscope.problem, modelscope.cached = ConnectionError("no route"), {THERE: model}
    assert find(NAME, from_modelscope=True) == model
    # Without a network nothing is waited for twice.
    assert modelscope.asked[-3:] == [(NAME, False), (NAME, True), (THERE, True)]


def test_modelscope_is_asked_for_the_authors_name_there(model, modelscope):
    modelscope.online = {THERE: model}
    assert find(NAME, from_modelscope=True) == model
    modelscope.online = {}
    message = refused(find, NAME, from_modelscope=True)
    assert "ModelScope did not give it (404" in message
    assert f"nor {THERE} (404" in message


def test_modelscope_s_login_is_named(modelscope):
    modelscope.problem = HttpError(403)
    assert "`modelscope login`" in refused(find, NAME, from_modelscope=True)


# --- before a download ---------------------------------------------------------------------------------

WARNED = "33 GB; its authors recommend {}-1021-bf16 for fine-tuning (--model-name)"


def test_the_default_s_size_is_said_before_it_is_downloaded(model, modelscope, capsys):
    modelscope.online = {THERE: model}
    assert find(THERE, from_modelscope=True, weights=False) == model
    assert capsys.readouterr().err == ""
    assert find(THERE, from_modelscope=True) == model
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{THERE}: " in said
    assert WARNED.format(THERE) in said


def test_nothing_is_said_of_what_is_cached_or_another_model(model, modelscope, capsys):
    newer = f"{THERE}-1021-bf16"
    modelscope.online = modelscope.cached = {THERE: model, newer: model}
    assert find(THERE, from_modelscope=True) == find(newer, from_modelscope=True) == model
    modelscope.cached = {}
    assert find(newer, from_modelscope=True) == model
    assert capsys.readouterr().err == ""


def test_on_hugging_face_the_cache_is_asked(model, tmp_path):
    _, said = asked(NAME, tmp_path / "cache", **SOCKS)
    assert WARNED.format(NAME) in said
    put_in_cache(model, tmp_path / "cache", NAME)
    _, said = asked(NAME, tmp_path / "cache", **SOCKS)
    assert "33 GB" not in said


@pytest.mark.parametrize("kind", ["midashenglm-spatial", "midashenglm-7b-gen", "MiDashengLM-spatial-0.6b"])
def test_relatives_with_other_parts_are_refused_by_name(kind, modelscope):
    for owner in ("mispeech", "midasheng"):
        message = refused(find, f"{owner}/{kind}", from_modelscope=True)
        assert message.startswith(f"model {owner}/{kind}: a relative of MiDashengLM")
    assert modelscope.asked == []


def test_somebody_s_own_model_may_have_such_a_name(model, modelscope):
    modelscope.online = {"me/midashenglm-gen": model, "mispeech/midashenglm-genre": model}
    for name in modelscope.online:
        assert find(name, from_modelscope=True) == model


# --- weights that are none -------------------------------------------------------------------------------


def test_a_git_lfs_pointer_is_named(model):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 56\n"
    (model / "model.safetensors").write_text(pointer)
    message = refused(find, model)
    assert "model.safetensors: a git-lfs pointer, not the weights; run `git lfs pull` in" in message


@pytest.mark.parametrize(
    "change", [lambda whole: whole[:-1], lambda whole: whole + whole], ids=["cut", "joined"]
)
def test_weights_that_are_cut_or_joined(model, change):
    file = model / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    assert f"{file}: no whole safetensors file (" in refused(find, model)


def test_a_shard_that_is_missing_is_named(model):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (model / "model.safetensors").rename(model / names[0])
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"no weights ({names[1]})" in refused(find, model)
    assert find(model, weights=False) == model
