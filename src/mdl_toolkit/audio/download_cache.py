"""A cache of what is at http(s) addresses: each is asked for once in a run.

For each address the cache's folder holds, named by the address's SHA-256:

    HASH            the content, whole
    HASH.json       the record: for which run it was asked for last, and what the server said of the content
    HASH.lock       locked by whoever is at it; never removed
    .HASH.partial-* being written; what a killed process leaves is in nobody's way

How a server is asked is for `fetching` to know.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mdl_toolkit.audio.http import MEGABYTE, FetchError, Limits, Version, digest, fetch, origin, refusal
from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Verbatim
from mdl_toolkit.utils.files import partial_name, report_write_errors
from mdl_toolkit.utils.locks import hold_lock

MOST_HOSTS = 1_000  # hosts out of reach that are remembered


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
        content = self._content(url)
        with report_write_errors(str(self._folder), AudioError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with hold_lock(content.with_suffix(".lock")):
                record = self._record(url, content)
        if record.en:
            raise refusal(url, Verbatim(record.en, record.zh))
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
        """Bring the content of an address up to date, and say what is known of it then."""
        host, content = origin(url), self._content(url)
        limits = Limits(self._max_mb, tries=1 if host in self._unreached else Limits.tries)
        with partial_name(content) as partial:
            try:
                found = fetch(url, partial, limits, known)
            except FetchError as failure:
                if not failure.is_answered:
                    self._remember(host)
                return replace(known, en=failure.reason.en, zh=failure.reason.zh)
            if found is None:
                return known
            content.with_suffix(".json").unlink(missing_ok=True)  # until there is a new one, there is none
            partial.replace(content)
        return _Record(**asdict(found))

    def _content(self, url: str) -> Path:
        return self._folder / digest(url)

    def _remember(self, host: str) -> None:
        if len(self._unreached) >= MOST_HOSTS:
            self._unreached.pop()
        self._unreached.add(host)


# --- on disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record(Version):
    """What is known of an address.

    Attributes:
        run: the run that asked last.
        en: why it could not be had when asked last, or nothing.
        zh: the same in Chinese.
    """

    run: str = ""
    en: str = ""
    zh: str = ""


def _read_record(content: Path) -> _Record:
    """The record beside a content; an empty one if it is missing or damaged."""
    try:
        record = _Record(**json.loads(content.with_suffix(".json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return _Record()
    return record if record.is_sound() else _Record()


def _write_record(content: Path, record: _Record) -> None:
    with partial_name(content) as partial:
        partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
        partial.replace(content.with_suffix(".json"))


def _size(path: Path) -> int | None:
    """Bytes of a file; None if there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return None
