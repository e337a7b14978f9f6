"""Addresses are fetched whole or not at all, from a server on this machine that misbehaves on purpose."""

import base64
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mdl_toolkit.audio import download_cache as download
from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.audio.http import FetchError, Limits, download_error, fetch
from mdl_toolkit.errors import AudioError

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

BODY = bytes(range(256)) * 1000  # 256,000 bytes
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Answers each path as `answers` says, and keeps what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str | None]] = []  # path, Authorization
        self.stop = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers["Authorization"]))
                outer.answers[self.path](self)

            def log_message(self, *words) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address) -> None:
                pass  # clients that hang up are what is tested

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"

    def close(self) -> None:
        self.stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Server()
    yield served
    served.close()


@pytest.fixture
def other() -> Iterator[Server]:
    served = Server()
    yield served
    served.close()


def reply(status: int = 200, body: bytes = BODY, length: int | None = -1, **headers: str) -> Answer:
    """An answer with a body; `length` is what Content-Length says, -1 the truth, None nothing."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if length is not None:
            handler.send_header("Content-Length", str(len(body) if length < 0 else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """The first answer first, and so on; the last one for ever."""
    rest = list(answers)
    return lambda handler: (rest.pop(0) if len(rest) > 1 else rest[0])(handler)


def get(url: str, folder: Path, **more) -> Path:
    target = folder / f"content-{len([*folder.iterdir()])}"
    try:
        assert fetch(url, target, Limits(**{"max_mb": 1, "timeout_s": 5, "pause_s": 0.01} | more)) is not None
    except FetchError as failure:
        raise download_error(url, failure.reason) from failure
    return target


def refuse(url: str, folder: Path, **more) -> str:
    """The English message; nothing must be left behind."""
    before = set(folder.iterdir())
    with pytest.raises(AudioError) as caught:
        get(url, folder, **more)
    assert set(folder.iterdir()) == before
    assert caught.value.message.zh != caught.value.message.en
    return caught.value.message.en


@pytest.mark.parametrize("length", [-1, None])
def test_a_file_is_fetched_whole(server, tmp_path, length):
    server.answers["/a"] = reply(length=length)
    path = get(f"{server.url}/a", tmp_path)
    assert path.read_bytes() == BODY
    assert list(tmp_path.iterdir()) == [path]


def test_chunked_bodies(server, tmp_path):
    def chunked(handler: BaseHTTPRequestHandler, whole: bool = True) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nhello\r\n" + b"0\r\n\r\n" * whole)

    server.answers["/a"] = chunked
    server.answers["/b"] = lambda handler: chunked(handler, whole=False)
    assert get(f"{server.url}/a", tmp_path).read_bytes() == b"hello"
    assert "cannot be fetched" in refuse(f"{server.url}/b", tmp_path)
    assert len(server.asked) == 1 + 3


def test_any_script_spaces_and_queries(server, tmp_path):
    server.answers["/%E4%BD%A0%20a%2Fb?x=1%20+2&y=%E5%A5%BD?"] = reply()
    assert get(f"{server.url}/你 a%2Fb?x=1 +2&y=好?#part", tmp_path).read_bytes() == BODY


# --- what goes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_final_answers_are_not_asked_for_again(server, tmp_path, status):
    server.answers["/a"] = reply(status)
    assert f"{server.url}/a: the server answered {status} " in refuse(f"{server.url}/a", tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_answers_are(server, tmp_path, status):
    server.answers["/a"] = in_turn(reply(status), reply(status), reply())
    assert get(f"{server.url}/a", tmp_path).read_bytes() == BODY
    server.answers["/b"] = reply(status)
    assert f"the server answered {status}" in refuse(f"{server.url}/b", tmp_path)
    assert [path for path, _ in server.asked] == ["/a"] * 3 + ["/b"] * 3


def test_pauses_grow_and_the_server_may_ask_for_longer_ones(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.answers["/a"] = reply(503)
    refuse(f"{server.url}/a", tmp_path, pause_s=1, tries=4)
    server.answers["/b"] = in_turn(reply(429, Retry_After="7"), reply(429, Retry_After="3600"), reply())
    get(f"{server.url}/b", tmp_path, pause_s=1)
    assert pauses == [1, 2, 4, 7, 60]


def test_a_body_shorter_than_promised(server, tmp_path):
    server.answers["/a"] = in_turn(reply(length=len(BODY) + 1), reply())
    assert get(f"{server.url}/a", tmp_path).read_bytes() == BODY
    server.answers["/b"] = reply(length=len(BODY) + 1)
    assert "received 256000 bytes, expected 256001" in refuse(f"{server.url}/b", tmp_path)


def test_a_connection_that_breaks_off(server, tmp_path):
    server.answers["/a"] = in_turn(lambda handler: handler.connection.close(), reply())
    assert get(f"{server.url}/a", tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("length", [-1, None])
def test_too_large(server, tmp_path, length):
    server.answers["/a"] = reply(body=b"x" * 2_000_000, length=length)
    assert "larger than 1 MB (--max-download-mb)" in refuse(f"{server.url}/a", tmp_path)
    assert len(server.asked) == 1


def test_exactly_as_large_as_allowed(server, tmp_path):
    server.answers["/a"] = reply()
    assert get(f"{server.url}/a", tmp_path, max_mb=0.256).stat().st_size == 256_000
    assert "larger" in refuse(f"{server.url}/a", tmp_path, max_mb=0.255_999)


def test_silence_is_not_waited_for(server, tmp_path):
    server.answers["/a"] = lambda _: server.stop.wait()
    started = time.monotonic()
    assert "does not answer in time" in refuse(f"{server.url}/a", tmp_path, timeout_s=0.1)
    assert time.monotonic() - started < 2
    assert len(server.asked) == 3


def test_a_server_that_drips(server, tmp_path):
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.stop.wait(0.02):
            handler.wfile.write(b"x")

    server.answers["/a"] = drip
    started = time.monotonic()
    assert "takes too long" in refuse(f"{server.url}/a", tmp_path, deadline_s=0.5)
    assert time.monotonic() - started < 2
    assert len(server.asked) == 1


ENDLESS = {
    "headers": b"HTTP/1.1 200 OK\r\nX-Long: ",
    "interim answers": b"",
    "a chunk's size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_server_that_drips_what_is_no_content(server, tmp_path, name):
    """Each byte comes in time, and none of them reaches the file."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(ENDLESS[name])
        while not server.stop.wait(0.02):
            handler.wfile.write(b"0" if ENDLESS[name] else b"HTTP/1.1 102 Processing\r\n\r\n")

    server.answers["/a"] = drip
    started = time.monotonic()
    assert "takes too long" in refuse(f"{server.url}/a", tmp_path, deadline_s=0.5)
    assert time.monotonic() - started < 2
    assert len(server.asked) == 1


def test_bytes_are_kept_as_they_are_sent(server, tmp_path):
    """A server that compresses unasked sends what it sends: a limit of decompressed bytes comes too late."""
    server.answers["/a"] = reply(Content_Encoding="gzip")
    assert get(f"{server.url}/a", tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1", "http://127.0.0.1:port"])
def test_a_proxy_that_cannot_be_used(server, tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    assert "the proxy settings of the environment cannot be used (" in refuse(f"{server.url}/a", tmp_path)


def test_a_proxy_of_the_environment_is_asked(server, other, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", other.url)
    other.answers["http://example.org/a"] = reply()
    assert get("http://example.org/a", tmp_path).read_bytes() == BODY
    server.answers["/a"] = reply()
    assert get(f"{server.url}/a", tmp_path).read_bytes() == BODY
    assert (len(server.asked), len(other.asked)) == (1, 1)


def test_no_server_at_all(server, tmp_path):
    server.close()
    assert "cannot be fetched (Connection refused)" in refuse(f"{server.url}/a", tmp_path)


@pytest.mark.parametrize("url", ["http://[::1/", "http://h:x/", "http:///a", f"http://{'é' * 90}/"])
def test_no_address(tmp_path, url):
    assert "the address is not valid" in refuse(url, tmp_path)


# --- redirections and passwords --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirections_are_followed(server, other, tmp_path, status):
    server.answers["/a"] = reply(status, Location="/b")
    server.answers["/b"] = reply(status, Location=f"{other.url}/c")
    other.answers["/c"] = reply()
    assert get(f"{server.url}/a", tmp_path).read_bytes() == BODY


def test_circles_and_other_kinds_of_addresses_are_not(server, tmp_path):
    server.answers["/a"] = reply(302, Location="/a")
    for number in range(10):
        server.answers[f"/{number}"] = reply(302, Location=f"/{number + 1}")
    for name, place in (("/f", "file:///etc/hostname"), ("/g", "ftp://127.0.0.1/a"), ("/h", "data:,x")):
        server.answers[name] = reply(302, Location=place)
    for name in ("/a", "/0", "/f", "/g", "/h"):
        server.asked.clear()
        assert "redirects in a circle, too often, or" in refuse(f"{server.url}{name}", tmp_path)
        assert len(server.asked) <= 6


def basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


def test_a_password_goes_to_its_own_server_only(server, other, tmp_path):
    server.answers["/a"] = reply(302, Location="/b")
    server.answers["/b"] = reply(302, Location=f"{other.url}/c")
    other.answers["/c"] = reply(302, Location=f"{server.url}/d")
    server.answers["/d"] = reply()
    url = f"http://us%40er:pa%3Ass@{server.host}/a"
    assert get(url, tmp_path).read_bytes() == BODY
    mine = basic("us@er:pa:ss")
    assert server.asked == [("/a", mine), ("/b", mine), ("/d", None)]
    assert other.asked == [("/c", None)]


def test_a_password_in_a_redirection_is_used_where_it_points(server, other, tmp_path):
    server.answers["/a"] = reply(302, Location=f"http://you:there@{other.host}/c")
    other.answers["/c"] = reply()
    get(f"{server.url}/a", tmp_path)
    assert other.asked == [("/c", basic("you:there"))]


def test_passwords_of_a_netrc_file_are_not_sent(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.answers["/a"] = reply()
    get(f"{server.url}/a", tmp_path)
    assert server.asked == [("/a", None)]


def test_a_password_is_never_shown(server, tmp_path, caplog):
    caplog.set_level(0)
    server.answers["/a"] = reply(401)
    with pytest.raises(AudioError) as caught:
        get(f"http://me:secret@{server.host}/a", tmp_path)
    assert str(caught.value).startswith(f"{server.url}/a: the server answered 401 Unauthorized; ")
    assert "secret" not in repr(caught.value) + repr(caught.value.__cause__) + caplog.text
    assert server.url in caplog.text


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
def slow(server) -> Server:
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


def test_only_so_many_hosts_are_remembered(server, other, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(download, "MOST_HOSTS", 1)
    downloads = Downloads(tmp_path, 1, "1")
    server.close()
    other.close()
    for number, host in enumerate((server, other, other, server)):
        with pytest.raises(AudioError, match="Connection refused"):
            downloads.path_of(f"{host.url}/{number}")
    assert pauses == [1, 2, 1, 2, 1, 2]


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
        ({"ETag": "x" * 1001}, (None, None)),  # no server means that
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
    b"", b"{", b"\xff", b"[]", b"null", b"{}", {"run": 1}, {"size": "256000"}, {"size": True}, {"etag": None},
    {"etag": 'a\nHost: b"'}, {"modified": "\u4f60"}, {"place": []}, {"en": 404}, {"zh": None}, {"more": ""},
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
