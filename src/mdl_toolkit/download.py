"""An http(s) address to a local file: time and size limits, retries, and no password where it is not due.

Proxies and certificates are those of Python's standard library, and so of the environment. What a file
holds is not looked at.
"""

import base64
import hashlib
import http.client
import re
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib import error, request
from urllib.parse import quote, unquote, urlsplit

from mdl_toolkit import __version__
from mdl_toolkit.errors import AudioError
from mdl_toolkit.language import Text
from mdl_toolkit.manifest import is_url, without_credentials

MEGABYTE = 1_000_000  # bytes
MOST_REDIRECTS = 5
PIECE = 1 << 16  # bytes read at once
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that may be gone at the next try
LONGEST_PAUSE = 60.0  # seconds between two tries, whatever the server asks for
_SAFE = "%/:@!$&'()*+,;=~-._"  # RFC 3986: what a path holds unquoted; % as addresses come quoted already


def fetch(
    url: str,
    folder: Path,
    *,
    max_mb: float,
    timeout_s: float = 30,
    tries: int = 3,
    pause_s: float = 1,
    deadline_s: float = 1_800,
) -> Path:
    """Fetch an address into a folder; the file appears there whole or not at all.

    Args:
        url: an http(s) address; `user:password@` in it goes to that host only, as basic authentication.
        folder: where the file goes, under a name made from the address.
        max_mb: the most megabytes that are accepted.
        timeout_s: seconds without a sign of life.
        tries: how often it is tried, if the failure is of a passing kind.
        pause_s: seconds before the second try; twice as long before each further one.
        deadline_s: seconds for everything together.

    Raises:
        AudioError: what the server said, or how the connection failed, with the address but no password.
    """
    fetching = _Fetching(url, folder, max_mb, timeout_s, time.monotonic() + deadline_s)
    attempt = 1
    while True:
        try:
            return fetching.once()
        except _TryError as failure:
            pause = max(pause_s * 2 ** (attempt - 1), min(failure.pause_s, LONGEST_PAUSE))
            if failure.is_final or attempt >= tries or time.monotonic() + pause > fetching.ends:
                raise failure.as_error(url) from failure
        time.sleep(pause)
        attempt += 1


class Downloads:
    """Fetches each distinct address once per run; may be used from several threads."""

    def __init__(self, folder: Path, max_mb: float) -> None:
        self._folder = folder
        self._max_mb = max_mb
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._done: dict[str, Path | AudioError] = {}
        self._unreached: set[str] = set()  # hosts that could not be reached: tried once more, not three times

    def path_of(self, url: str) -> Path:
        """The local copy of what is at an address; fetched at the first call.

        Raises:
            AudioError: it cannot be had; the same at every call.
        """
        with self._lock:
            lock = self._locks.setdefault(url, threading.Lock())
        with lock:
            if url not in self._done:
                self._done[url] = self._try(url)
        done = self._done[url]
        if isinstance(done, AudioError):
            raise AudioError(done.text.en, done.text.zh)
        return done

    def _try(self, url: str) -> Path | AudioError:
        host = _origin(url)
        try:
            return fetch(url, self._folder, max_mb=self._max_mb, tries=1 if host in self._unreached else 3)
        except _UnreachedError as problem:
            self._unreached.add(host)
            return problem
        except AudioError as problem:
            return problem


class _UnreachedError(AudioError):
    """There was no answer at all."""


@dataclass(eq=False)
class _TryError(Exception):
    """One try that failed: why, whether another one may help, and when the server wants it."""

    reason: Text
    is_final: bool = False
    is_answered: bool = True
    pause_s: float = 0

    def as_error(self, url: str) -> AudioError:
        kind = AudioError if self.is_answered else _UnreachedError
        shown = without_credentials(url)
        return kind(
            f"{shown}: {self.reason.en}; check the address, or fetch the file yourself and give its path",
            f"{shown}：{self.reason.zh}；请检查地址，或自行下载后填写文件路径",
        )


@dataclass(frozen=True)
class _Fetching:
    """One address under its limits; `ends` is when, by the monotonic clock, patience is over."""

    url: str
    folder: Path
    max_mb: float
    timeout_s: float
    ends: float

    def once(self) -> Path:
        """Try once.

        Raises:
            _TryError: with the reason.
        """
        target = self.folder / hashlib.sha256(self.url.encode()).hexdigest()
        partial = target.with_suffix(".part")
        try:
            with self._open() as response, partial.open("wb") as file:
                self._copy(response, file)
            partial.replace(target)
        except (http.client.HTTPException, OSError) as problem:
            raise _disturbed(problem) from problem
        finally:
            partial.unlink(missing_ok=True)
        return target

    def _open(self) -> Any:
        """The server's answer, after redirections."""
        try:
            asked = _request(self.url)
            return request.build_opener(_Redirects).open(asked, timeout=self.timeout_s)
        except error.HTTPError as answer:
            with answer:
                raise _answered(answer) from answer
        except (ValueError, http.client.InvalidURL) as problem:
            raise _TryError(Text("the address is not valid", "地址无效"), is_final=True) from problem

    def _copy(self, response: Any, file: IO[bytes]) -> None:
        promised = _length(response)
        size = 0
        self._check_size(promised or 0)
        while piece := response.read1(PIECE):
            size += len(piece)
            self._check_size(size)
            if time.monotonic() > self.ends:
                raise _TryError(Text("it takes too long", "下载耗时过长"), is_final=True)
            file.write(piece)
        if promised is not None and size < promised:
            en, zh = f"{size} of {promised} bytes came", f"{promised} 字节中只收到 {size} 字节"
            raise _TryError(Text(en, zh))

    def _check_size(self, size: int) -> None:
        if size > self.max_mb * MEGABYTE:
            en = f"it is larger than {self.max_mb:g} MB (--max-download-mb)"
            raise _TryError(Text(en, f"文件大于 {self.max_mb:g} MB（--max-download-mb）"), is_final=True)


class _Redirects(request.HTTPRedirectHandler):
    """Follows redirections to http(s) only, and takes a password along only to where it was given for."""

    max_redirections = MOST_REDIRECTS
    http_error_308 = request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        """The next request; see the standard library."""
        if not is_url(newurl):
            raise error.HTTPError(newurl, code, msg, headers, fp)
        following = _request(newurl)
        password = req.get_header("Authorization")
        if password and _origin(newurl) == _origin(req.full_url):
            following.add_unredirected_header("Authorization", password)
        return following


def _origin(url: str) -> str:
    """Scheme, host and port of an address."""
    scheme, _, rest = without_credentials(url).lower().partition("://")
    return f"{scheme}://{re.split('[/?#]', rest)[0]}"


def _request(url: str) -> request.Request:
    """A request for an address, which may hold a user name and password, spaces and any script.

    Raises:
        ValueError: it is no address.
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if not host.isascii():
        host = host.encode("idna").decode()
    query = f"?{quote(parts.query, safe=_SAFE + '?')}" if parts.query else ""
    address = f"{parts.scheme}://{host}{quote(parts.path, safe=_SAFE) or '/'}{query}"
    asked = request.Request(address, headers={"User-Agent": f"mdl-toolkit/{__version__}"})
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        token = base64.b64encode(pair.encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {token}")
    return asked


def _length(response: Any) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _answered(answer: error.HTTPError) -> _TryError:
    """What an answer means that is not the file."""
    if 300 <= answer.code < 400:
        en = "the server redirects in a circle, too often, or to something else than http(s)"
        return _TryError(Text(en, "服务器重定向成环、次数过多，或指向非 http(s) 地址"), is_final=True)
    words = f"{answer.code} {http.client.responses.get(answer.code, '')}".strip()
    reason = Text(f"the server answered {words}", f"服务器返回 {words}")
    wait = answer.headers.get("Retry-After", "")
    return _TryError(reason, answer.code not in PASSING, pause_s=float(wait) if wait.isdecimal() else 0)


def _disturbed(problem: Exception) -> _TryError:
    """What an error of the connection means."""
    cause = problem.reason if isinstance(problem, error.URLError) else problem
    if isinstance(cause, TimeoutError):
        return _TryError(Text("the server does not answer in time", "服务器响应超时"), is_answered=False)
    words = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    reason = Text(f"it cannot be fetched ({words})", f"无法下载（{words}）")
    is_final = isinstance(cause, ssl.SSLCertVerificationError)
    return _TryError(reason, is_final, is_answered=not isinstance(problem, error.URLError))
