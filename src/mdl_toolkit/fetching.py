"""An http(s) address asked for: time and size limits, retries, and no password where it is not due.

Proxies and certificates are those of Python's standard library, and so of the environment. What a file
holds is not looked at; `download` keeps what comes.
"""

import base64
import hashlib
import http.client
import re
import ssl
import time
from dataclasses import asdict, dataclass
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
_HEADER = re.compile(r"[\x20-\x7e\x80-\xff]{0,1000}")  # ETags and times that are kept, and sent back


@dataclass(frozen=True)
class Limits:
    """How much, how long and how often.

    Attributes:
        max_mb: the most megabytes that are accepted.
        timeout_s: seconds without a sign of life.
        tries: how often it is tried, if the failure is of a passing kind.
        pause_s: seconds before the second try; twice as long before each further one.
        deadline_s: seconds for everything together.
    """

    max_mb: float
    timeout_s: float = 30
    tries: int = 3
    pause_s: float = 1
    deadline_s: float = 1_800


@dataclass(frozen=True)
class Version:
    """Which content an address had; no part of the address itself, nor a password, is in it.

    Attributes:
        size: its bytes; -1 if there is none.
        etag: its ETag as the server sent it, or nothing.
        modified: its Last-Modified, likewise.
        place: SHA-256 of the address that it came from in the end, after redirections.
    """

    size: int = -1
    etag: str = ""
    modified: str = ""
    place: str = ""

    def is_sound(self) -> bool:
        """Whether all values are of their types, and those that are sent to a server can be sent."""
        types = [type(value) for value in asdict(self).values()]
        if types != [type(value) for value in asdict(type(self)()).values()]:
            return False
        return bool(_HEADER.fullmatch(self.etag) and _HEADER.fullmatch(self.modified))

    def condition(self, address: str) -> dict[str, str]:
        """The header by which a server sends the content only if it has changed.

        There is none for an address that the content did not come from (redirections may lead elsewhere by
        now): ETags and times of different addresses must not be compared.
        """
        if self.etag:
            header = {"If-None-Match": self.etag}
        else:
            header = {"If-Modified-Since": self.modified} if self.modified else {}
        return header if self.place == digest(address) else {}


NOTHING = Version()


@dataclass(eq=False)
class FetchError(Exception):
    """What is at an address was not to be had.

    Attributes:
        reason: why, without the address.
        is_final: another try would not help.
        is_answered: the server was reached.
        pause_s: seconds after which the server wants to be asked again.
    """

    reason: Text
    is_final: bool = False
    is_answered: bool = True
    pause_s: float = 0


def refusal(url: str, reason: Text) -> AudioError:
    """The error for a recording whose address failed, with the address but no password."""
    shown = without_credentials(url)
    return AudioError(
        f"{shown}: {reason.en}; check the address, or fetch the file yourself and give its path",
        f"{shown}：{reason.zh}；请检查地址，或自行下载后填写文件路径",
    )


def digest(text: str) -> str:
    """What stands for an address on disk: its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()


def origin(url: str) -> str:
    """Scheme, host and port of an address."""
    scheme, _, rest = without_credentials(url).lower().partition("://")
    return f"{scheme}://{re.split('[/?#]', rest)[0]}"


def fetch(url: str, target: Path, limits: Limits, known: Version = NOTHING) -> Version | None:
    """Fetch what is at an address into a file, unless it is known already.

    Args:
        url: an http(s) address; `user:password@` in it goes to that host only, as basic authentication.
        target: the new file; in the end it is whole or not there.
        limits: how much, how long and how often.
        known: what is had already, and is not asked for again.

    Returns:
        What came; None if the address still has what is known.

    Raises:
        FetchError: what the server said, or how the connection failed, at the last try.
    """
    fetching = _Fetching(url, target, limits, known, time.monotonic() + limits.deadline_s)
    attempt = 1
    while True:
        try:
            return fetching.once()
        except FetchError as failure:
            pause = max(limits.pause_s * 2 ** (attempt - 1), min(failure.pause_s, LONGEST_PAUSE))
            if failure.is_final or attempt >= limits.tries or time.monotonic() + pause > fetching.ends:
                raise
        time.sleep(pause)
        attempt += 1


@dataclass(frozen=True)
class _Fetching:
    """One address under its limits; `ends` is when, by the monotonic clock, patience is over."""

    url: str
    target: Path
    limits: Limits
    known: Version
    ends: float

    def once(self) -> Version | None:
        """Try once.

        Raises:
            FetchError: with the reason.
        """
        try:
            response = self._open()
            return None if response is None else self._store(response)
        except (http.client.HTTPException, OSError) as problem:
            raise _disturbed(problem) from problem

    def _open(self) -> Any:
        """The server's answer, after redirections; None if the content is what is known already."""
        try:
            opener = request.build_opener(_Redirects(self.known))
            return opener.open(_request(self.url, self.known), timeout=self.limits.timeout_s)
        except error.HTTPError as answer:
            with answer:
                if answer.code == 304 and self.known.condition(answer.geturl()):
                    return None
                raise _answered(answer) from answer
        except (ValueError, http.client.InvalidURL) as problem:
            raise FetchError(Text("the address is not valid", "地址无效"), is_final=True) from problem

    def _store(self, response: Any) -> Version:
        """Write an answer's body down."""
        try:
            with response, self.target.open("wb") as file:
                size = self._copy(response, file)
        except BaseException:
            self.target.unlink(missing_ok=True)
            raise
        etag, modified = (_header(response, name) for name in ("ETag", "Last-Modified"))
        return Version(size, etag, modified, digest(response.geturl()))

    def _copy(self, response: Any, file: IO[bytes]) -> int:
        """Write the body; gives its size in bytes."""
        promised = _length(response)
        size = 0
        self._check_size(promised or 0)
        while piece := response.read1(PIECE):
            size += len(piece)
            self._check_size(size)
            if time.monotonic() > self.ends:
                raise FetchError(Text("it takes too long", "下载耗时过长"), is_final=True)
            file.write(piece)
        if promised is not None and size < promised:
            en, zh = f"{size} of {promised} bytes came", f"{promised} 字节中只收到 {size} 字节"
            raise FetchError(Text(en, zh))
        return size

    def _check_size(self, size: int) -> None:
        most = self.limits.max_mb
        if size > most * MEGABYTE:
            en = f"it is larger than {most:g} MB (--max-download-mb)"
            raise FetchError(Text(en, f"文件大于 {most:g} MB（--max-download-mb）"), is_final=True)


class _Redirects(request.HTTPRedirectHandler):
    """Follows redirections to http(s) only, and takes a password along only to where it was given for."""

    max_redirections = MOST_REDIRECTS
    http_error_308 = request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it

    def __init__(self, known: Version) -> None:
        self._known = known

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        """The next request; see the standard library."""
        if not is_url(newurl):
            raise error.HTTPError(newurl, code, msg, headers, fp)
        following = _request(newurl, self._known)
        password = req.get_header("Authorization")
        if password and origin(newurl) == origin(req.full_url):
            following.add_unredirected_header("Authorization", password)
        return following


def _request(url: str, known: Version) -> request.Request:
    """A request for an address, which may hold a user name and password, spaces and any script.

    What is known already is not asked for again.

    Raises:
        ValueError: it is no address.
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if not host.isascii():
        host = host.encode("idna").decode()
    query = f"?{quote(parts.query, safe=_SAFE + '?')}" if parts.query else ""
    address = f"{parts.scheme}://{host}{quote(parts.path, safe=_SAFE) or '/'}{query}"
    headers = {"User-Agent": f"mdl-toolkit/{__version__}", **known.condition(address)}
    asked = request.Request(address, headers=headers)
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        token = base64.b64encode(pair.encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {token}")
    return asked


def _length(response: Any) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _header(response: Any, name: str) -> str:
    text = response.headers.get(name, "")
    return text if _HEADER.fullmatch(text) else ""


def _answered(answer: error.HTTPError) -> FetchError:
    """What an answer means that is not the file."""
    if 300 <= answer.code < 400 and answer.code != 304:
        en = "the server redirects in a circle, too often, or to something else than http(s)"
        return FetchError(Text(en, "服务器重定向成环、次数过多，或指向非 http(s) 地址"), is_final=True)
    words = f"{answer.code} {http.client.responses.get(answer.code, '')}".strip()
    reason = Text(f"the server answered {words}", f"服务器返回 {words}")
    wait = answer.headers.get("Retry-After", "")
    return FetchError(reason, answer.code not in PASSING, pause_s=float(wait) if wait.isdecimal() else 0)


def _disturbed(problem: Exception) -> FetchError:
    """What an error of the connection means."""
    cause = problem.reason if isinstance(problem, error.URLError) else problem
    if isinstance(cause, TimeoutError):
        return FetchError(Text("the server does not answer in time", "服务器响应超时"), is_answered=False)
    words = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    reason = Text(f"it cannot be fetched ({words})", f"无法下载（{words}）")
    is_final = isinstance(cause, ssl.SSLCertVerificationError)
    return FetchError(reason, is_final, is_answered=not isinstance(problem, error.URLError))
