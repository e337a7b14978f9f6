"""Fetch what is at an http(s) address into a file, within limits of size and time, with retries.

httpx speaks the protocol: redirections, basic authentication, the proxies of the environment, time-outs.
Certificates are those of the machine (or of `SSL_CERT_FILE`), as a company's own are there. What a file holds
is not looked at; `download_cache` keeps the files.
"""

import hashlib
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mdl_toolkit import __version__
from mdl_toolkit.audio.connections import PRIVATE_TARGET, ConnectionWatch, PrivateAddressError
from mdl_toolkit.audio.unreadable import is_web_page
from mdl_toolkit.audio.urls import without_credentials
from mdl_toolkit.errors import AudioError, UnavailableError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import report_write_errors

if TYPE_CHECKING:
    import httpx

# Bytes.
MEGABYTE = 1_000_000
MAX_REDIRECTS = 5
# HTTP statuses that may be gone at the next try.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
# Seconds between two tries, whatever the server asks for.
LONGEST_PAUSE = 60.0
# Digits of numbers in headers that mean something.
MOST_DIGITS = 16
SILENT_SERVER = Localized("the server does not answer in time")
# The machine's certificates, read once.
machine_certificates = lru_cache(maxsize=1)(ssl.create_default_context)


@dataclass(frozen=True)
class Limits:
    """Hold the limits of size, time and tries of a download.

    Attributes:
        max_mb: the most megabytes that are accepted.
        timeout_s: seconds for an answer's head, and between two pieces of its body.
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
class RemoteVersion:
    """Identify the content that an address had, without any part of the address or a password.

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

    def condition(self, address: str) -> dict[str, str]:
        """Return the header by which a server sends the content only if it has changed.

        There is none for an address that the content did not come from (redirections may lead elsewhere by
        now): ETags and times of different addresses must not be compared.
        """
        if self.etag:
            header = {"If-None-Match": self.etag}
        else:
            header = {"If-Modified-Since": self.modified} if self.modified else {}
        return header if self.place == hash_address(address) else {}


NOTHING = RemoteVersion()


@dataclass(eq=False)
class FetchError(Exception):
    """Say why the content of an address could not be fetched.

    Attributes:
        reason: why, without the address.
        is_final: another try would not help.
        is_answered: the server was reached.
        pause_s: seconds after which the server wants to be asked again.
    """

    reason: Localized
    is_final: bool = False
    is_answered: bool = True
    pause_s: float = 0


def download_error(url: str, reason: Localized, *, may_pass: bool = False) -> AudioError:
    """Return the error for a recording whose address failed, with the address but no password."""
    shown, kind = without_credentials(url), UnavailableError if may_pass else AudioError
    return kind(
        "{shown}: {reason}; check the address, or fetch the file yourself and give its path",
        shown=shown,
        reason=reason,
    )


def hash_address(url: str) -> str:
    """Return the SHA-256 of an address, which stands for it on disk."""
    return hashlib.sha256(url.encode()).hexdigest()


def fetch(url: str, target: Path, limits: Limits, known: RemoteVersion = NOTHING) -> RemoteVersion | None:
    """Fetch what is at an address into a file, unless it is known already.

    Args:
        url: an http(s) address; `user:password@` in it goes to that host only, as basic authentication.
        target: the new file; in the end it is whole or not there.
        limits: how much, how long and how often.
        known: what is had already, and is not asked for again.

    Returns:
        What came; None if the address still has what is known.

    Raises:
        FetchError: the server refused, or the connection failed, at the last try; or there is a proxy that
            httpx cannot use.
    """
    ends = time.monotonic() + limits.deadline_s
    attempt = 1
    while True:
        try:
            with ConnectionWatch(limits.timeout_s, ends) as watch, _client(limits.timeout_s) as client:
                return _Transfer(client, watch, url, target, limits, known, ends).try_once()
        except FetchError as failure:
            pause = max(limits.pause_s * 2 ** (attempt - 1), min(failure.pause_s, LONGEST_PAUSE))
            if failure.is_final or attempt >= limits.tries or time.monotonic() + pause > ends:
                raise
            if failure.pause_s:
                say(
                    "{shown}: the server asks for a pause; it is asked again in {pause:.0f} s",
                    shown=without_credentials(url),
                    pause=pause,
                )
        time.sleep(pause)
        attempt += 1


def _client(timeout_s: float) -> "httpx.Client":
    """Return a client with the proxies of the environment."""
    import httpx

    # What is compressed on the way has no size to check at the start; some servers do it unasked.
    headers = {"User-Agent": f"mdl-toolkit/{__version__}", "Accept-Encoding": "identity"}
    with refusing_proxies():
        return httpx.Client(headers=headers, timeout=timeout_s, verify=machine_certificates())


@contextmanager
def refusing_proxies() -> Iterator[None]:
    """Refuse the proxies of the environment that httpx cannot use, where a client is made in the context.

    Raises:
        FetchError: saying why.
    """
    import httpx

    try:
        yield
    except ImportError as problem:
        reason = Localized(
            "the environment names a SOCKS proxy, which needs another package: pip install 'httpx[socks]'"
        )
        raise FetchError(reason, is_final=True) from problem
    except (ValueError, httpx.InvalidURL) as problem:
        raise FetchError(
            Localized("the proxy settings of the environment cannot be used ({reason})", reason=problem),
            is_final=True,
        ) from problem


@dataclass(frozen=True)
class _Transfer:
    """Fetch one address; `ends` is when, by the monotonic clock, the time is over."""

    client: "httpx.Client"
    watch: ConnectionWatch
    url: str
    target: Path
    limits: Limits
    known: RemoteVersion
    ends: float

    def try_once(self) -> RemoteVersion | None:
        """Ask once, and store the answer; None if nothing has changed.

        Raises:
            FetchError: it failed.
        """
        import httpx

        try:
            with closing(self._send()) as response:
                response.headers.encoding = "latin-1"
                if response.status_code == 304 and self.known.condition(_address(response.url)):
                    return None
                if response.is_success:
                    return self._store(response)
                status, wait = response.status_code, response.headers.get("Retry-After", "")
                words = f"{status} {httpx.codes.get_reason_phrase(status)}".strip()
                proxy = self.watch.proxy
                raise FetchError(
                    Localized("the server, or the proxy {proxy}, answered {words}", proxy=proxy, words=words)
                    if proxy
                    else Localized("the server answered {words}", words=words),
                    is_final=status not in TRANSIENT,
                    pause_s=float(wait) if wait.isdecimal() and len(wait) < MOST_DIGITS else 0,
                )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as problem:
            raise FetchError(Localized("the address is not valid"), is_final=True) from problem
        except PrivateAddressError as problem:
            raise FetchError(PRIVATE_TARGET, is_final=True) from problem
        # Also what headers without sense bring about: numbers of any size, names that are none.
        except (httpx.HTTPError, OSError, ValueError, OverflowError) as problem:
            self._check_time()
            raise _connection_error(problem, self.watch.proxy) from problem

    def _send(self) -> "httpx.Response":
        """Send the request and follow redirections, to http(s) only.

        Each address gets its own password, and the condition that is due there.
        """
        import httpx

        request = self.client.build_request("GET", self.url, extensions={"trace": self.watch})
        # An address that a server redirects to may be none.
        with suppress(httpx.InvalidURL):
            for _ in range(MAX_REDIRECTS + 1):
                self._check_time()
                self.watch.ask(request.url.raw_host.decode())
                login = (request.url.username, request.url.password)
                # httpx logs addresses.
                request.url = request.url.copy_with(userinfo=b"")
                request.headers.encoding = "latin-1"
                for name in ("If-None-Match", "If-Modified-Since"):
                    request.headers.pop(name, None)
                for name, value in self.known.condition(_address(request.url)).items():
                    request.headers[name] = value
                response = self.client.send(request, stream=True, auth=login if any(login) else None)
                if response.next_request is None:
                    return response
                response.close()
                request = response.next_request
                if request.url.scheme not in ("http", "https"):
                    break
        raise FetchError(
            Localized("the server redirects in a circle, too often, or to something else than http(s)"),
            is_final=True,
        )

    def _store(self, response: "httpx.Response") -> RemoteVersion:
        """Write the body of an answer to the file, and return what identifies it."""
        promised = response.headers.get("Content-Length", "")
        self._check_size(int(promised) if promised.isdecimal() and len(promised) < MOST_DIGITS else 0)
        size = 0
        try:
            with self.target.open("wb") as file:
                for piece in response.iter_bytes():
                    self.watch.renew()
                    size += len(piece)
                    self._check_size(size)
                    self._check_time()
                    with report_write_errors(str(self.target.parent), UnavailableError):
                        file.write(piece)
                        # A full disk is met here and nowhere else.
                        file.flush()
            # A connection that was cut off looks like the end of a body of unknown length.
            self._check_time()
            with self.target.open("rb") as file:
                if is_web_page(file.read(1000)):
                    raise FetchError(
                        Localized("the server sent a web page, such as a login or a network's sign-in page"),
                        is_final=True,
                    )
        except BaseException:
            self.target.unlink(missing_ok=True)
            raise
        etag, modified = (response.headers.get(name, "") for name in ("ETag", "Last-Modified"))
        return RemoteVersion(size, etag, modified, hash_address(_address(response.url)))

    def _check_time(self) -> None:
        if time.monotonic() > self.ends:
            raise FetchError(Localized("it takes too long"), is_final=True)
        if self.watch.is_cut:
            raise FetchError(SILENT_SERVER, is_answered=False)

    def _check_size(self, size: int) -> None:
        most = self.limits.max_mb
        if size > most * MEGABYTE:
            raise FetchError(
                Localized("it is larger than {most:g} MB (--max-download-mb)", most=most), is_final=True
            )


def _address(url: "httpx.URL") -> str:
    """Return an address as a server sees it: without user, password and fragment."""
    return f"{url.scheme}://{url.netloc.decode()}{url.raw_path.decode()}"


def _connection_error(problem: Exception, proxy: str) -> FetchError:
    """Return the error for a connection that failed, with the proxy that it went through."""
    import httpx

    if isinstance(problem, httpx.TimeoutException):
        return FetchError(SILENT_SERVER, is_answered=False)
    words = getattr(problem, "strerror", None) or re.sub(r"^\[Errno -?\d+\] ", "", str(problem))
    words = words or type(problem).__name__
    refused = Localized("the proxy {proxy} refuses or cannot be reached ({words})", proxy=proxy, words=words)
    is_refused = proxy and isinstance(problem, (httpx.ConnectError, httpx.ProxyError))
    return FetchError(
        refused if is_refused else Localized("it cannot be fetched ({words})", words=words),
        is_final="CERTIFICATE_VERIFY_FAILED" in words,
        is_answered=not isinstance(problem, (httpx.ConnectError, httpx.ProxyError)),
    )
