"""Each address is asked for once in a run, and fetched again only if it has changed."""

import json
import multiprocessing
import os
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.errors import AudioError
from tests.support.answers import BODY, AnswerServer, basic, in_turn, reply

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

# --- each address once in a run ----------------------------------------------------------------------------


class Resource:
    """What a well-behaved server answers: 304 to whoever has the content; keeps conditions, counts bytes."""

    def __init__(self, body: bytes = BODY, pause_s: float = 0, **headers: str) -> None:
        self.body, self.pause_s, self.headers = body, pause_s, headers
        self.sent = 0
        self.conditions: list[tuple[str | None, str | None]] = []  # If-None-Match, If-Modified-Since

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        version, moment = handler.headers["If-None-Match"], handler.headers["If-Modified-Since"]
        self.conditions.append((version, moment))
        time.sleep(self.pause_s)
        is_same = (version or moment) == self.headers.get("ETag" if version else "Last_Modified", "")
        self.sent += 0 if is_same else len(self.body)
        reply(304 if is_same else 200, b"" if is_same else self.body, **self.headers)(handler)


def cached(url: str, folder: Path, run: str = "1", max_mb: float = 1) -> bytes:
    """What a process of a run gets."""
    return Downloads(folder, max_mb, run).path_of(url).read_bytes()


def refused(url: str, folder: Path, run: str = "1", max_mb: float = 1) -> str:
    with pytest.raises(AudioError) as caught:
        cached(url, folder, run, max_mb)
    assert caught.value.message.zh != caught.value.message.en
    return caught.value.message.en


def have_both(downloads: Downloads, url: str, barrier: Any) -> None:
    """What a thread or process does: twice a file, and twice another one that is not there."""
    for _ in range(2):
        barrier.wait(60)
        assert downloads.path_of(f"{url}/a").read_bytes() == BODY
        barrier.wait(60)
        with pytest.raises(AudioError, match="404"):
            downloads.path_of(f"{url}/b")


@pytest.fixture
def slow(server) -> AnswerServer:
    """A server that takes so long that all who ask meet."""
    server.answers["/a"] = Resource(pause_s=0.3)
    server.answers["/b"] = lambda handler: (time.sleep(0.3), reply(404)(handler))
    return server


def test_threads_ask_once(slow, tmp_path):
    done = []
    barrier = threading.Barrier(8)
    shared = Downloads(tmp_path / "new" / "cache", 1, "1")

    def work(downloads: Downloads) -> None:
        have_both(downloads, slow.url, barrier)
        done.append(True)

    several = [shared] * 4 + [Downloads(tmp_path / "new" / "cache", 1, "1") for _ in range(4)]
    threads = [threading.Thread(target=work, args=(downloads,)) for downloads in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8
    assert [path for path, _ in slow.asked] == ["/a", "/b"]


def test_processes_ask_once(slow, tmp_path):
    context = multiprocessing.get_context("spawn")
    task = (Downloads(tmp_path, 1, "1"), slow.url, context.Barrier(3))
    processes = [context.Process(target=have_both, args=task) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path for path, _ in slow.asked] == ["/a", "/b"]


def refuse_locks(*_: object) -> None:
    raise OSError(37, "No locks available")


def test_without_locks_it_works_too(slow, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", refuse_locks)
    barrier = threading.Barrier(2)
    one = threading.Thread(target=cached, args=(f"{slow.url}/a", tmp_path))
    slow.answers["/a"] = lambda handler: (barrier.wait(10), reply()(handler))
    one.start()
    assert cached(f"{slow.url}/a", tmp_path) == BODY  # both ask, or the barrier would break
    one.join()
    assert len(slow.asked) == 2
    assert cached(f"{slow.url}/a", tmp_path) == BODY
    assert len(slow.asked) == 2
    assert sorted({path.suffix for path in tmp_path.iterdir()} - {".lock"}) == ["", ".json"]


def test_a_forked_process_keeps_no_lock(server, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    copies, flock = [], fcntl.flock

    def lock_and_fork(file: int, how: int) -> None:
        flock(file, how)
        copies.append(os.dup(file))  # what a fork does to it

    monkeypatch.setattr(fcntl, "flock", lock_and_fork)
    server.answers["/a"] = reply()
    cached(f"{server.url}/a", tmp_path)
    (path,) = tmp_path.glob("*.lock")
    with path.open("ab") as file:
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # or BlockingIOError
    for copy in copies:
        os.close(copy)
    assert copies


def test_a_killed_process_is_in_nobodys_way(server, tmp_path):
    started = threading.Event()

    def stall(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(BODY)
        started.set()
        server.stop.wait()

    server.answers["/a"] = stall
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=cached, args=(f"{server.url}/a", tmp_path))
    process.start()
    assert started.wait(60)
    while not any(path.stat().st_size for path in tmp_path.glob(".*.partial-*")):
        time.sleep(0.01)
    process.kill()
    process.join()
    left = set(tmp_path.glob(".*.partial-*"))
    server.answers["/a"] = reply()
    assert cached(f"{server.url}/a", tmp_path) == BODY
    assert set(tmp_path.glob(".*.partial-*")) == left
    assert len(left) == 1


def test_different_addresses_are_different_files(server, tmp_path):
    server.answers |= {"/a": reply(body=b"a"), "/a?b": reply(body=b"b")}
    downloads = Downloads(tmp_path, max_mb=1, run="1")
    assert downloads.path_of(f"{server.url}/a").read_bytes() == b"a"
    assert downloads.path_of(f"{server.url}/a?b").read_bytes() == b"b"


def test_a_host_out_of_reach_is_not_waited_for_at_every_row(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.close()
    downloads = Downloads(tmp_path, 1, "1")
    for name in ("a", "b", "c"):
        with pytest.raises(AudioError, match="Connection refused"):
            downloads.path_of(f"{server.url}/{name}")
    assert pauses == [1, 2]


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").touch()
    assert refused(f"{server.url}/a", tmp_path / "file").startswith(f"{tmp_path}/file: cannot be written: ")
    assert server.asked == []


# --- from one run to the next ------------------------------------------------------------------------------

MOMENT = "Sat, 07 Jun 2025 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": '"one"'}, ('"one"', None)),
        ({"ETag": 'W/"\xe9"', "Last_Modified": MOMENT}, ('W/"\xe9"', None)),
        ({"Last_Modified": MOMENT}, (None, MOMENT)),
        ({}, (None, None)),
    ],
)
def test_the_next_run_fetches_only_what_has_changed(server, tmp_path, headers, condition):
    server.answers["/a"] = resource = Resource(**headers)
    for run in ("1", "1", "2", "2", "3"):
        assert cached(f"{server.url}/a", tmp_path, run) == BODY
    assert resource.conditions == [(None, None), condition, condition]
    assert resource.sent == len(BODY) * (1 if any(condition) else 3)
    resource.body, resource.headers = b"other", {name: f"{value}2" for name, value in headers.items()}
    assert cached(f"{server.url}/a", tmp_path, "3") == BODY
    assert cached(f"{server.url}/a", tmp_path, "4") == b"other"
    assert len(resource.conditions) == 4
    assert cached(f"{server.url}/a", tmp_path, "5") == b"other"
    assert resource.conditions[4][0] in (None, f"{condition[0]}2")


def test_a_cache_whose_folder_is_spelt_otherwise_is_the_same(server, tmp_path, monkeypatch):
    server.answers["/a"] = resource = Resource(ETag='"one"')
    (tmp_path / "link").symlink_to("cache")
    monkeypatch.chdir(tmp_path)
    for run, folder in enumerate(
        (tmp_path / "cache", Path("cache"), Path("cache/../link"), tmp_path / "link")
    ):
        assert cached(f"{server.url}/a", folder, str(run)) == BODY
    assert resource.sent == len(BODY)


def test_conditions_are_repeated_at_every_try(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    resource = Resource(ETag='"one"')
    server.answers["/a"] = in_turn(resource, reply(503), reply(length=len(BODY) + 1), resource)
    assert cached(f"{server.url}/a", tmp_path, "1") == BODY
    assert cached(f"{server.url}/a", tmp_path, "2") == BODY
    assert resource.conditions == [(None, None), ('"one"', None)]
    assert len(server.asked) == 4


def test_conditions_go_where_the_content_came_from(server, other, tmp_path):
    here, there = Resource(ETag='"one"'), Resource(b"there", ETag='"one"')
    server.answers |= {"/a": reply(302, Location="/b"), "/b": here}
    other.answers["/b"] = there
    for run in ("1", "2"):
        assert cached(f"{server.url}/a", tmp_path, run) == BODY
    assert here.conditions == [(None, None), ('"one"', None)]
    server.answers["/a"] = reply(302, Location=f"{other.url}/b")
    for run in ("3", "4"):
        assert cached(f"{server.url}/a", tmp_path, run) == b"there"
    assert there.conditions == [(None, None), ('"one"', None)]


def test_nothing_new_from_who_was_not_asked_for_news(server, tmp_path):
    server.answers["/a"] = reply(304, b"")
    assert "the server answered 304 Not Modified" in refused(f"{server.url}/a", tmp_path)
    assert len(server.asked) == 1


def test_a_failure_holds_for_its_run_only(server, tmp_path):
    server.answers["/a"] = in_turn(reply(404), resource := Resource(ETag='"one"'), reply(403), resource)
    message = refused(f"{server.url}/a", tmp_path, "1")
    assert refused(f"{server.url}/a", tmp_path, "1") == message
    assert cached(f"{server.url}/a", tmp_path, "2") == BODY
    for _ in range(2):
        assert "403" in refused(f"{server.url}/a", tmp_path, "3")
    for _ in range(2):
        assert cached(f"{server.url}/a", tmp_path, "4") == BODY
    assert resource.conditions == [(None, None), ('"one"', None)]
    assert len(server.asked) == 4


def test_a_smaller_limit_holds_for_what_is_there(server, tmp_path):
    server.answers["/a"] = Resource(ETag='"one"')
    assert cached(f"{server.url}/a", tmp_path, "1", 0.256) == BODY
    assert "larger than 0.2 MB" in refused(f"{server.url}/a", tmp_path, "2", 0.2)


DAMAGED_RECORDS = [
    b"", b"{", b"\xff", b"[]", b"null", b"{}", {"size": "256000"}, {"size": True}, {"more": ""},
]  # fmt: skip


@pytest.mark.parametrize("run", ["1", "2"])
@pytest.mark.parametrize("damage", DAMAGED_RECORDS, ids=str)
def test_damaged_records(server, tmp_path, damage, run):
    server.answers["/a"] = resource = Resource(ETag='"one"', Last_Modified=MOMENT)
    cached(f"{server.url}/a", tmp_path)
    (path,) = tmp_path.glob("*.json")
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(path.read_bytes()) | damage).encode()
    path.write_bytes(damage)
    for _ in range(2):
        assert cached(f"{server.url}/a", tmp_path, run) == BODY
    assert resource.conditions == [(None, None)] * 2


@pytest.mark.parametrize("run", ["1", "2"])
@pytest.mark.parametrize("left", [None, b"", BODY[:-1], BODY + b"x"])
def test_content_that_is_missing_or_of_another_size(server, tmp_path, left, run):
    server.answers["/a"] = resource = Resource(ETag='"one"')
    path = Downloads(tmp_path, 1, "1").path_of(f"{server.url}/a")
    path.unlink() if left is None else path.write_bytes(left)
    for _ in range(2):
        assert cached(f"{server.url}/a", tmp_path, run) == BODY
    assert resource.conditions == [(None, None)] * 2


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_new_content_is_never_beside_an_old_record(server, tmp_path, monkeypatch):
    """Killed between the two, the next run must not take the one for the other, though they are as long."""
    server.answers["/a"] = resource = Resource(b"old", ETag='"one"')
    cached(f"{server.url}/a", tmp_path, "1")
    resource.body, resource.headers = b"new", {"ETag": '"two"'}
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", killed)
        with pytest.raises(KeyboardInterrupt):
            cached(f"{server.url}/a", tmp_path, "2")
    resource.body, resource.headers = b"old", {"ETag": '"one"'}
    assert cached(f"{server.url}/a", tmp_path, "3") == b"old"


def test_nothing_of_an_address_is_on_disk(server, tmp_path):
    server.answers |= {"/a?token=hidden": Resource(), "/b?token=hidden": reply(401)}
    for name in ("a", "b"):
        url = f"http://me:secret@{server.host}/{name}?token=hidden"
        cached(url, tmp_path) if name == "a" else refused(url, tmp_path)
    assert [login for _, login in server.asked] == [basic("me:secret")] * 2
    files = list(tmp_path.iterdir())
    assert len(files) == 5
    held = b"".join(f"{path}".encode() + path.read_bytes() for path in files)
    words = ("secret", "hidden", server.host, basic("me:secret").split()[1])
    assert [word for word in words if word.encode() in held] == []
