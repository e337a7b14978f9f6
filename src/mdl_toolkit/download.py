"""An http(s) address to a local file: time and size limits, retries, and no password where it is not due.

`Downloads` is a cache on disk. For each address its folder holds, named by the address's SHA-256:

    HASH            the content, whole
    HASH.json       the record: for which run it was asked for last, and what the server said of the content
    HASH.lock       locked by whoever is at it; never removed
    HASH.*.part     being written; what a killed process leaves is in nobody's way

Proxies and certificates are those of Python's standard library, and so of the environment. What a file
holds is not looked at.
"""

import base64
import hashlib
import http.client
import json
import re
import secrets
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any
from urllib import error, request
from urllib.parse import quote, unquote, urlsplit

from mdl_toolkit import __version__
from mdl_toolkit.errors import AudioError
from mdl_toolkit.language import Text
from mdl_toolkit.manifest import is_url, without_credentials
from mdl_toolkit.outputs import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MEGABYTE = 1_000_000  # bytes
MOST_REDIRECTS = 5
PIECE = 1 << 16  # bytes read at once
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that may be gone at the next try
LONGEST_PAUSE = 60.0  # seconds between two tries, whatever the server asks for
MOST_HOSTS = 1_000  # hosts out of reach that are remembered
_SAFE = "%/:@!$&'()*+,;=~-._"  # RFC 3986: what a path holds unquoted; % as addresses come quoted already
_HEADER = re.compile(r"[\x20-\x7e\x80-\xff]{0,1000}")  # ETags and times that are kept, and sent back


@dataclass(frozen=True)
class _Limits:
    """How much, how long and how often; see `fetch`."""

    max_mb: float
    timeout_s: float = 30
    tries: int = 3
    pause_s: float = 1
    deadline_s: float = 1_800


def fetch(
    url: str,
    folder: Path,
    *,
    max_mb: float,
    timeout_s: float = _Limits.timeout_s,
    tries: int = _Limits.tries,
    pause_s: float = _Limits.pause_s,
    deadline_s: float = _Limits.deadline_s,
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
    try:
        _fetch(url, folder, _Limits(max_mb, timeout_s, tries, pause_s, deadline_s), _Record())
    except _TryError as failure:
        raise _refusal(url, failure.reason) from failure
    return _content(url, folder)


class Downloads:
    """Asks for each distinct address once per run, failures included, and fetches only what has changed.

    May be used from several threads, and at the same time by all processes and machines that see the folder.

    Args:
        folder: where the cache is; made when needed.
        max_mb: the most megabytes of a file.
        run: one name for all that are to ask once together; asks anew of what was had under another one.
    """

    def __init__(self, folder: Path, max_mb: float, run: str) -> None:
        self._folder = folder
        self._max_mb = max_mb
        self._run = run
        self._unreached: set[str] = set()  # hosts that could not be reached: tried once more, not three times

    def path_of(self, url: str) -> Path:
        """The local copy of what is at an address, asked for at the run's first call.

        Raises:
            AudioError: it cannot be had, for the same reason at every call; or the folder cannot be used.
        """
        content = _content(url, self._folder)
        with writing(str(self._folder), AudioError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(content.with_suffix(".lock")):
                record = self._record(url, content)
        if record.en:
            raise _refusal(url, Text(record.en, record.zh))
        return content

    def _record(self, url: str, content: Path) -> "_Record":
        """The run's record of an address: the one on disk, or a new one."""
        old = _read_record(content)
        is_whole = _size(content) == old.size
        if old.run == self._run and (old.en or is_whole):
            return old
        is_known = is_whole and old.size <= self._max_mb * MEGABYTE
        new = self._ask(url, replace(old, en="", zh="") if is_known else _Record())
        new = replace(new, run=self._run)
        _write_record(content, new)
        return new

    def _ask(self, url: str, known: "_Record") -> "_Record":
        host = _origin(url)
        limits = _Limits(self._max_mb, tries=1 if host in self._unreached else _Limits.tries)
        try:
            return _fetch(url, self._folder, limits, known)
        except _TryError as failure:
            if not failure.is_answered:
                self._remember(host)
            return replace(known, en=failure.reason.en, zh=failure.reason.zh)

    def _remember(self, host: str) -> None:
        if len(self._unreached) >= MOST_HOSTS:
            self._unreached.pop()
        self._unreached.add(host)


# --- on disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """What is known of an address; no part of the address itself, nor a password, is in it.

    Attributes:
        run: the run that asked last.
        size: bytes of the content; -1 if there is none.
        etag: the content's ETag as the server sent it, or nothing.
        modified: its Last-Modified, likewise.
        place: SHA-256 of the address that it came from in the end, after redirections.
        en: why it could not be had when asked last, or nothing.
        zh: the same in Chinese.
    """

    run: str = ""
    size: int = -1
    etag: str = ""
    modified: str = ""
    place: str = ""
    en: str = ""
    zh: str = ""

    def is_sound(self) -> bool:
        """Whether all values are of their types, and those that are sent to a server can be sent."""
        types = [type(value) for value in asdict(self).values()]
        if types != [type(value) for value in asdict(_Record()).values()]:
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
        return header if self.place == _digest(address) else {}


def _read_record(content: Path) -> _Record:
    """The record beside a content; an empty one if it is missing or damaged."""
    try:
        record = _Record(**json.loads(content.with_suffix(".json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return _Record()
    return record if record.is_sound() else _Record()


def _write_record(content: Path, record: _Record) -> None:
    partial = _partial(content)
    try:
        partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
        partial.replace(content.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep out other threads, processes and machines, where platform and file system have locks."""
    with ExitStack() as stack:
        if fcntl is not None:
            with suppress(OSError):
                file = stack.enter_context(path.open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX)
                stack.callback(_unlock, file)
        yield


def _unlock(file: IO[bytes]) -> None:
    """Closing would not do where a forked process has the file open too."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def _content(url: str, folder: Path) -> Path:
    return folder / _digest(url)


def _partial(content: Path) -> Path:
    """A name that nobody else has."""
    return content.with_suffix(f".{secrets.token_hex(8)}.part")


def _size(path: Path) -> int | None:
    """Bytes of a file; None if there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- over the network --------------------------------------------------------------------------------------


@dataclass(eq=False)
class _TryError(Exception):
    """One try that failed: why, whether another one may help, and when the server wants it."""

    reason: Text
    is_final: bool = False
    is_answered: bool = True
    pause_s: float = 0


def _refusal(url: str, reason: Text) -> AudioError:
    shown = without_credentials(url)
    return AudioError(
        f"{shown}: {reason.en}; check the address, or fetch the file yourself and give its path",
        f"{shown}：{reason.zh}；请检查地址，或自行下载后填写文件路径",
    )


def _fetch(url: str, folder: Path, limits: _Limits, known: _Record) -> _Record:
    """Bring the content of an address up to date, and say what is known of it then.

    Raises:
        _TryError: the last try's.
    """
    fetching = _Fetching(url, folder, limits, known, time.monotonic() + limits.deadline_s)
    attempt = 1
    while True:
        try:
            return fetching.once()
        except _TryError as failure:
            pause = max(limits.pause_s * 2 ** (attempt - 1), min(failure.pause_s, LONGEST_PAUSE))
            if failure.is_final or attempt >= limits.tries or time.monotonic() + pause > fetching.ends:
                raise
        time.sleep(pause)
        attempt += 1


@dataclass(frozen=True)
class _Fetching:
    """One address under its limits; `ends` is when, by the monotonic clock, patience is over."""

    url: str
    folder: Path
    limits: _Limits
    known: _Record
    ends: float

    def once(self) -> _Record:
        """Try once.

        Raises:
            _TryError: with the reason.
        """
        try:
            response = self._open()
            return self.known if response is None else self._store(response)
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
            raise _TryError(Text("the address is not valid", "地址无效"), is_final=True) from problem

    def _store(self, response: Any) -> _Record:
        """Put an answer's body in place; from then on, until there is a new one, there is no record."""
        content = _content(self.url, self.folder)
        partial = _partial(content)
        try:
            with response, partial.open("xb") as file:
                size = self._copy(response, file)
            content.with_suffix(".json").unlink(missing_ok=True)
            partial.replace(content)
        finally:
            partial.unlink(missing_ok=True)
        etag, modified = (_header(response, name) for name in ("ETag", "Last-Modified"))
        return _Record(size=size, etag=etag, modified=modified, place=_digest(response.geturl()))

    def _copy(self, response: Any, file: IO[bytes]) -> int:
        """Write the body; gives its size in bytes."""
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
        return size

    def _check_size(self, size: int) -> None:
        most = self.limits.max_mb
        if size > most * MEGABYTE:
            en = f"it is larger than {most:g} MB (--max-download-mb)"
            raise _TryError(Text(en, f"文件大于 {most:g} MB（--max-download-mb）"), is_final=True)


class _Redirects(request.HTTPRedirectHandler):
    """Follows redirections to http(s) only, and takes a password along only to where it was given for."""

    max_redirections = MOST_REDIRECTS
    http_error_308 = request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it

    def __init__(self, known: _Record) -> None:
        self._known = known

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        """The next request; see the standard library."""
        if not is_url(newurl):
            raise error.HTTPError(newurl, code, msg, headers, fp)
        following = _request(newurl, self._known)
        password = req.get_header("Authorization")
        if password and _origin(newurl) == _origin(req.full_url):
            following.add_unredirected_header("Authorization", password)
        return following


def _origin(url: str) -> str:
    """Scheme, host and port of an address."""
    scheme, _, rest = without_credentials(url).lower().partition("://")
    return f"{scheme}://{re.split('[/?#]', rest)[0]}"


def _request(url: str, known: _Record) -> request.Request:
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


def _answered(answer: error.HTTPError) -> _TryError:
    """What an answer means that is not the file."""
    if 300 <= answer.code < 400 and answer.code != 304:
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
