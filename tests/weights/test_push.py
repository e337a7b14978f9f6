"""Publishing by Hugging Face's library to a server of this test, and by a stand-in for ModelScope's."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mdl_toolkit.config.serving import PushOptions
from mdl_toolkit.weights.provenance import Base, Provenance
from mdl_toolkit.weights.push import push
from tests.support.adapters import make_adapter
from tests.support.model_folders import refused
from tests.support.runs import copy_checkpoint
from tests.support.server import needs_server


@pytest.fixture
def folder(golden, tmp_path):
    """A model as `train` leaves it, with what is not to be sent."""
    folder = copy_checkpoint(golden, "A-small", tmp_path)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A card\n")
    (folder / "mdl-toolkit.yaml").write_text("train_dataset: /home/me/train.csv\n")
    (folder / "mdl-toolkit.json").write_text(Provenance(None).to_json())
    (folder / ".secret").write_text("secret")
    return folder


class Hub:
    """Take repositories, large files and commits as Hugging Face does; keep what came."""

    def __init__(self) -> None:
        self.created, self.files, self.stored, self.put, self.status = [], {}, {}, [], 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if hub.status != 200 or self.headers.get("Authorization") != "Bearer hf_test":
                    return self.answer({"error": "no"}, hub.status if hub.status != 200 else 401)
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    return self.answer({"url": f"{hub.url}/me/model", "id": "me/model"})
                if self.path == "/api/validate-yaml":
                    return self.answer({"errors": [], "warnings": []})
                if "/preupload/" in self.path:
                    names = [file["path"] for file in json.loads(body)["files"]]
                    modes = [
                        {"path": name, "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                         "shouldIgnore": False, "oid": None}
                        for name in names
                    ]  # fmt: skip
                    return self.answer({"files": modes})
                if self.path.endswith("/info/lfs/objects/batch"):
                    objects = json.loads(body)["objects"]
                    for each in objects:
                        if each["oid"] not in hub.stored:
                            each["actions"] = {"upload": {"href": f"{hub.url}/put/{each['oid']}"}}
                    return self.answer({"transfer": "basic", "objects": objects})
                assert "/commit/" in self.path
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.stored[value["oid"]]
                address = f"{hub.url}/me/model/commit/a"
                return self.answer({"success": True, "commitOid": "a" * 40, "commitUrl": address})

            def do_GET(self) -> None:
                self.answer({"sha": "a" * 40, "id": "me/model", "siblings": []})

            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                hub.stored[hashlib.sha256(content).hexdigest()] = content
                hub.put.append(self.path)
                self.answer({})

            def answer(self, value, status=200) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hub():
    found = Hub()
    yield found
    found.close()


def pushed(hub, home, *words, token="hf_test"):
    """Run the command with nothing but the settings of this test."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        **kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {}),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "mdl_toolkit", "push", *map(str, words)],
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_server
def test_a_folder_is_published_on_hugging_face(folder, hub, tmp_path):
    done = pushed(hub, tmp_path / "home", folder, "me/model", "--private")
    assert done.returncode == 0, done.stderr
    assert f"published: {hub.url}/me/model" in done.stderr
    (created,) = hub.created
    assert (created["name"], created["organization"]) == ("model", "me")
    assert created.get("private") is True or created.get("visibility") == "private"
    kept = {".secret", "mdl-toolkit.yaml"}
    sent = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in kept}
    assert hub.files == sent
    assert {"README.md", "model.safetensors", "mdl-toolkit.json"} <= {*sent}
    # Nothing is left in the user's folder.
    assert {path.name for path in folder.iterdir()} == {*sent} | kept
    # What is there already is not sent again.
    assert len(hub.put) == 1
    assert pushed(hub, tmp_path / "home", folder, "me/model").returncode == 0
    assert len(hub.put) == 1


@needs_server
def test_without_login_nothing_is_sent(folder, hub, tmp_path):
    done = pushed(hub, tmp_path / "home", folder, "me/model", token=None)
    assert done.returncode == 1
    assert done.stderr == "error: nobody is logged in: `hf auth login` first, or set HF_TOKEN\n"
    assert hub.created == []


@needs_server
def test_a_hub_that_refuses_is_told_of_in_one_sentence(folder, hub, tmp_path):
    hub.status = 403
    done = pushed(hub, tmp_path / "home", folder, "me/model")
    assert done.returncode == 1
    *_, said = done.stderr.splitlines()
    assert said == (
        "error: me/model: status 403: this login may not write there; `hf auth login` with a token that may"
    )
    assert hub.files == {}


# --- what is no result -----------------------------------------------------------------------------------


def options(folder, repo="me/model", **more):
    return PushOptions(folder=str(folder), repo=repo, **more)


def test_what_is_no_result_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for name in ("model", "a/b/c", "https://huggingface.co/me/model", "me/", "../model"):
        assert "expected OWNER/NAME" in refused(push, options(folder, name))
    assert "no model and no adapter is there" in refused(push, options(tmp_path / "nowhere"))
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "final")
    assert f"did you mean {run / 'final'}?" in refused(push, options(run))
    (run / "final/README.md").unlink()
    assert "no README.md, the model card; write one first" in refused(push, options(run / "final"))
    (run / "final/model.safetensors").unlink()
    assert "no weights (*.safetensors)" in refused(push, options(run / "final"))


# --- ModelScope ------------------------------------------------------------------------------------------


@pytest.fixture
def modelscope(monkeypatch):
    """A stand-in for ModelScope's package: what it was asked."""
    calls = []

    class HubApi:
        def create_repo(self, repo_id, **more):
            calls.append(("create", repo_id, more))

        def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
            calls.append(("upload", repo_id, folder_path, ignore_patterns))

    class ModelScopeConfig:
        cookies = None

        @classmethod
        def get_cookies(cls):
            return cls.cookies

    api = types.ModuleType("modelscope.hub.api")
    api.HubApi, api.ModelScopeConfig = HubApi, ModelScopeConfig
    package = types.ModuleType("modelscope")
    package.__spec__ = type(os.__spec__)("modelscope", None)
    for name, module in (("modelscope", package), ("modelscope.hub", package), ("modelscope.hub.api", api)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    return calls, ModelScopeConfig


def test_a_folder_is_published_on_modelscope(folder, modelscope, monkeypatch):
    calls, config = modelscope
    assert "`modelscope login` first, or set MODELSCOPE_API_TOKEN" in refused(
        push, options(folder, to="modelscope")
    )
    assert calls == []
    config.cookies = {"m_session_id": "x"}
    assert push(options(folder, to="modelscope")) == "https://www.modelscope.cn/models/me/model"
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "x")
    config.cookies = None
    push(options(folder, to="modelscope", private=True))
    assert [call[2]["visibility"] for call in calls[::2]] == ["public", "private"]
    assert calls[1][:3] == ("upload", "me/model", str(folder))
    assert {"mdl-toolkit.yaml", ".*"} <= {*calls[1][3]}


def test_a_base_on_this_machine_is_warned_of(golden, tmp_path, modelscope, capsys):
    _, config = modelscope
    config.cookies = {"m_session_id": "x"}
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", ("decoder",))
    (adapter / "README.md").write_text("# A card")
    Provenance(Base.of(base, str(base))).write(adapter)
    push(options(adapter, to="modelscope"))
    said = capsys.readouterr().err
    assert f"the adapter names its base by a path of this machine, {base}" in said
    Provenance(Base.of(base, "mispeech/midashenglm-7b")).write(adapter)
    push(options(adapter, to="modelscope"))
    assert "a path of this machine" not in capsys.readouterr().err
