"""Servers that misbehave, one at each path of one host, and commands that fetch a recording from them."""

import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdl_toolkit.audio import download_cache, http
from tests.stress.fuzz import cases
from tests.stress.fuzz.cases import Case
from tests.support.paths import MODEL
from tests.support.recordings import pcm_wav

OK = "HTTP/1.1 200 OK\r\n"
GOOD = pcm_wav((np.random.default_rng(0).standard_normal(8000) * 3000).astype(np.int16))
STATUSES = (
    100, 101, 199, 204, 206, 300, 304, 400, 401, 403, 404, 407, 408, 418, 429, 500, 502, 503, 599, 999,
)  # fmt: skip
NUMBERS = ("-1", "0", "1", "9" * 30, "1e3", "0x10", "", "abc", " 5")
ADDRESSES = (
    "/again", "//", "", "http://", "http://127.0.0.1:9/", "ftp://127.0.0.1/", "file:///etc/passwd",
    "http://[::1", "http://169.254.169.254/latest", "\x1b[2J", "/" + "a" * 70_000, "javascript:1",
)  # fmt: skip


@dataclass(frozen=True)
class ShortLimits(http.Limits):
    """Be as patient as in real life, in seconds instead of minutes."""

    timeout_s: float = 3
    pause_s: float = 0.1
    deadline_s: float = 15


def _answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1") + body


def _whole(*headers: str, body: bytes = GOOD) -> bytes:
    return _answer("200 OK", f"Content-Length: {len(body)}", *headers, body=body)


def behaviours(random: np.random.Generator) -> dict[str, tuple[bytes, bool]]:
    """Return what is sent by name of the behaviour, and whether it is sent a byte a second."""
    length, cut = len(GOOD), int(random.integers(len(GOOD)))
    status = int(random.choice(STATUSES))
    number = str(random.choice([*NUMBERS, str(length - 1), str(length + 1)]))
    letters, to = random.bytes(200), str(random.choice(ADDRESSES))
    chunked = "Transfer-Encoding: chunked"
    return {
        "whole": (_whole(), False),
        f"status {status}": (_answer(f"{status} Nö\x1b[31m", "Content-Length: 4", body=b"oops"), False),
        f"Retry-After {number}": (_answer("503 Busy", f"Retry-After: {number}", "Content-Length: 0"), False),
        f"Content-Length {number}": (_answer("200 OK", f"Content-Length: {number}", body=GOOD), False),
        f"cut at {cut}": (_whole()[: cut + 1], False),
        "junk": (letters, False),
        "junk after the status": (OK.encode() + letters, False),
        "nothing": (b"", False),
        "no length": (_answer("200 OK", "Connection: close", body=GOOD), False),
        "a header of 1 MB": (_answer("200 OK", "X: " + "a" * 1_000_000, body=GOOD), False),
        "10,000 headers": (_answer("200 OK", *(f"X-{n}: y" for n in range(10_000)), body=GOOD), False),
        f"redirect to {to[:30]!r}": (_answer("302 Found", f"Location: {to}", "Content-Length: 0"), False),
        "gzip": (_whole("Content-Encoding: gzip", body=gzip.compress(GOOD)), False),
        "gzip that is none": (_whole("Content-Encoding: gzip"), False),
        "a gzip bomb": (_whole("Content-Encoding: gzip", body=gzip.compress(bytes(2**30), 9)), False),
        "an unknown encoding": (_whole("Content-Encoding: zzz"), False),
        "chunks": (_answer("200 OK", chunked, body=b"%x\r\n%b\r\n0\r\n\r\n" % (length, GOOD)), False),
        "a chunk size that is none": (_answer("200 OK", chunked, body=b"zz\r\n" + GOOD), False),
        "a chunk of absurd size": (_answer("200 OK", chunked, body=b"f" * 60 + b"\r\n" + GOOD), False),
        "two lengths": (_answer("200 OK", f"Content-Length: {length}", "Content-Length: 5"), False),
        "a login page": (_whole("Content-Type: text/html", body=b"<!DOCTYPE html>Log in</html>"), False),
        "a part": (_answer("206 Partial", f"Content-Range: bytes 0-9/{length}", body=GOOD[:10]), False),
        "a dripping status": (_whole(), True),
        "dripping headers": (OK.encode() + b"X: ", True),
        "a dripping body": (_answer("200 OK", f"Content-Length: {length}"), True),
        "a dripping chunk size": (_answer("200 OK", chunked), True),
    }  # fmt: skip


class BadServer:
    """Serve bytes by path, closing each connection, and `/again` by a redirect to itself."""

    def __init__(self) -> None:
        download_cache.Limits, http.LONGEST_PAUSE = ShortLimits, 1.0  # type: ignore[misc]
        self.sent: dict[str, tuple[bytes, bool]] = {}
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *given: object) -> None:
        threading.Thread(target=work, args=given, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            path = connection.recv(65536).split(b" ")[1].decode()
            again = _answer("302 Found", "Location: /again", "Content-Length: 0")
            content, drips = self.sent.get(path, (again, False))
            if not drips:
                connection.sendall(content)
                return
            end = time.monotonic() + 1.5 * cases.SECONDS
            # The head at once where it is whole, and what never ends after it.
            at_once = len(content) if b"\r\n" in content and len(content) < 200 else 0
            connection.sendall(content[:at_once])
            while time.monotonic() < end:
                connection.sendall(content[at_once : at_once + 1] or b"1")
                at_once += 1
                time.sleep(1)


def make(folder: Path, server: BadServer, random: np.random.Generator) -> Case:
    """Return a case of a command that fetches from a server with one behaviour."""
    found = behaviours(random)
    name = [*found][random.integers(len(found))]
    path = f"/{folder.name}.wav"
    server.sent[path] = found[name]
    (folder / "rows.csv").write_text(f"audio,prediction\n{server.url}{path},yes\n")
    words = [
        "convert-dataset",
        "rows.csv",
        "--output",
        "out",
        "--model-name",
        str(MODEL),
        "--num-workers",
        "1",
    ]
    return Case(folder, words, name)
