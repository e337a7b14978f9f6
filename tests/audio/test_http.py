"""An address is fetched whole or not at all, from a server on this machine that misbehaves on purpose."""

import errno
import gzip
import io
import os
import sys
import time
import zlib
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from mdl_toolkit.audio.http import FetchError, Limits, download_error, fetch
from mdl_toolkit.errors import AudioError, UnavailableError
from tests.support.answers import BODY, basic, in_turn, reply

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


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


def test_a_full_disk_is_no_fault_of_the_server_s(server, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.answers["/a"] = reply()
    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    with pytest.raises(UnavailableError, match=rf"^{tmp_path}: cannot be written: .*No space left") as caught:
        fetch(f"{server.url}/a", tmp_path / "x", Limits(1))
    assert "address" not in str(caught.value)
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
    "the status line": b"HTTP/1.1 20",
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


@pytest.mark.parametrize("name", ENDLESS)
def test_no_drop_is_a_sign_of_life_before_the_content(server, tmp_path, name):
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(ENDLESS[name])
        while not server.stop.wait(0.02):
            handler.wfile.write(b"0" if ENDLESS[name] else b"HTTP/1.1 102 Processing\r\n\r\n")

    server.answers["/a"] = drip
    started = time.monotonic()
    assert "does not answer in time" in refuse(f"{server.url}/a", tmp_path, timeout_s=0.3)
    assert time.monotonic() - started < 5
    assert len(server.asked) == 3


def test_slow_content_is_a_sign_of_life(server, tmp_path):
    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(6):
            time.sleep(0.2)
            handler.wfile.write(b"x")

    server.answers["/a"] = slow
    assert get(f"{server.url}/a", tmp_path, timeout_s=0.8).read_bytes() == b"xxxxxx"


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_what_is_compressed_on_the_way_is_unpacked(server, tmp_path, encoding, pack):
    """Some servers do it unasked; the limit counts what is unpacked."""
    server.answers["/a"] = reply(body=pack(BODY), Content_Encoding=encoding)
    assert get(f"{server.url}/a", tmp_path).read_bytes() == BODY
    server.answers["/b"] = reply(body=pack(bytes(2_000_000)), Content_Encoding=encoding)
    assert "larger than 1 MB" in refuse(f"{server.url}/b", tmp_path)
    server.answers["/c"] = reply(Content_Encoding=encoding)
    assert "cannot be fetched" in refuse(f"{server.url}/c", tmp_path)


def test_a_web_page_is_no_recording(server, tmp_path):
    server.answers["/a"] = reply(body=b"\n<!doctype HTML><title>Sign in</title>", Content_Type="audio/wav")
    assert "the server sent a web page, such as a login" in refuse(f"{server.url}/a", tmp_path)
    assert len(server.asked) == 1


ABSURD = {
    "a long header": {"X_Long": "x" * 300_000},
    "many headers": {f"X_{number}": "x" * 20 for number in range(10_000)},
    "a long pause": {"Retry_After": "9" * 5000},
    "a pause without sense": {"Retry_After": "\u0663"},
    "another place": {"Location": "http://127.0.0.1:99999999/"},
    "a long place": {"Location": "http://h/" + "x" * 70_000},
    "no place": {"Location": "http://[::1"},
}


@pytest.mark.parametrize("name", ABSURD)
@pytest.mark.parametrize("status", [200, 302, 503])
def test_absurd_headers_are_an_error_of_that_address(server, tmp_path, monkeypatch, name, status):
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        head = "".join(f"{key.replace('_', '-')}: {value}\r\n" for key, value in ABSURD[name].items())
        handler.wfile.write(f"HTTP/1.1 {status} Words\r\n{head}Content-Length: 2\r\n\r\nok".encode())

    server.answers["/a"] = answer
    try:
        got = get(f"{server.url}/a", tmp_path).read_bytes()
    except AudioError as problem:
        got = str(problem).encode()
    assert got == b"ok" or (b"127.0.0.1" in got and len(got) < 500)


@pytest.mark.parametrize("length", ["9" * 19, "9" * 5000, "-1", "x", "1, 2"])
def test_absurd_lengths(server, tmp_path, length):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nok".encode())

    server.answers["/a"] = answer
    assert "cannot be fetched" in refuse(f"{server.url}/a", tmp_path)


def test_a_pause_that_the_server_wants_is_said(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.answers["/a"] = in_turn(reply(503, Retry_After="7"), reply(503), reply())
    get(f"http://me:secret@{server.host}/a", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{server.url}/a: ")
    assert " 7 " in line


# --- proxies ---------------------------------------------------------------------------------------------


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


def test_a_socks_proxy_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    assert "pip install 'httpx[socks]'" in refuse("http://example.org/a", tmp_path)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_named(other, tmp_path, monkeypatch, scheme):
    monkeypatch.setenv(f"{scheme}_proxy", other.url)
    other.answers["http://example.org/a"] = reply(407)
    said = refuse(f"{scheme}://example.org/a", tmp_path)
    assert f"the proxy {other.host}" in said
    assert "407" in said or "501" in said  # this server knows no CONNECT


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_named(other, tmp_path, monkeypatch, scheme):
    other.close()
    monkeypatch.setenv(f"{scheme}_proxy", other.url)
    assert f"the proxy {other.host} refuses or cannot be reached" in refuse(
        f"{scheme}://example.org/a", tmp_path
    )


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


@pytest.mark.parametrize(
    "place", ["{server}/b", "http://localhost:{port}/b", "http://10.1.2.3/b", "http://[::1]/b"]
)
def test_a_public_address_does_not_lead_into_the_private_network(server, other, tmp_path, monkeypatch, place):
    """The public one is reached by a proxy, of which neither its own address counts nor what is behind it."""
    monkeypatch.setenv("http_proxy", other.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    place = place.format(server=server.url, port=server.host.split(":")[1])
    other.answers |= {"http://example.org/a": reply(302, Location=place), place: reply()}
    server.answers["/b"] = reply()
    said = refuse("http://example.org/a", tmp_path)
    assert "redirects from a public address to one of this machine" in said
    assert server.asked == []
    assert [path for path, _ in other.asked] == ["http://example.org/a"]


def test_one_public_address_may_lead_to_another(other, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", other.url)
    other.answers["http://example.org/a"] = reply(302, Location="http://1.1.1.1/b")
    other.answers["http://1.1.1.1/b"] = reply()
    assert get("http://example.org/a", tmp_path).read_bytes() == BODY


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
