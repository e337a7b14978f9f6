"""Cache the content of http(s) addresses: each is asked for once in a run.

For each address the cache's folder holds, named by the address's SHA-256:

    HASH            the content, whole
    HASH.json       the record: the run that asked last, and what the server said of the content
    HASH.lock       locked by the process that downloads; never removed
    .HASH.partial-* while it is written; what a killed process leaves is in nobody's way

`http` asks the servers.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mdl_toolkit.audio.http import (
    MEGABYTE,
    FetchError,
    Limits,
    RemoteVersion,
    download_error,
    fetch,
    hash_address,
)
from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Verbatim
from mdl_toolkit.utils.files import parse_json, partial_name, report_write_errors
from mdl_toolkit.utils.locks import hold_lock


class Downloads:
    """Ask for each distinct address once per run, failures included, and fetch only what has changed.

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
        # Hosts that could not be reached: tried once more, not three times.
        self._unreached: set[str] = set()

    def path_of(self, url: str) -> Path:
        """Return the local copy of the file at an address, which is asked for at the run's first call.

        Raises:
            AudioError: it cannot be had, for the same reason at every call; or the folder cannot be used.
        """
        content = self._folder / hash_address(url)
        with report_write_errors(str(self._folder), AudioError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with hold_lock(content.with_suffix(".lock")):
                record = _Record.beside(content)
                is_whole = content.is_file() and content.stat().st_size == record.size
                if record.run != self._run or not (record.en or is_whole):
                    is_known = is_whole and record.size <= self._max_mb * MEGABYTE
                    known = replace(record, en="", zh="") if is_known else _Record()
                    record = self._update(url, content, known)
        if record.en:
            raise download_error(url, Verbatim(record.en, record.zh), may_pass=record.may_pass)
        return content

    def _update(self, url: str, content: Path, known: "_Record") -> "_Record":
        """Bring the content of an address up to date, and write and return its new record."""
        host = url.split("/")[2]
        limits = Limits(self._max_mb, tries=1 if host in self._unreached else Limits.tries)
        record = known
        with partial_name(content) as partial:
            try:
                fetched = fetch(url, partial, limits, known)
            except FetchError as failure:
                fetched = None
                reason, may_pass = failure.reason, not failure.is_final
                record = replace(known, en=reason.en, zh=reason.zh, may_pass=may_pass)
                if not failure.is_answered:
                    self._unreached.add(host)
            if fetched is not None:
                record = _Record(**asdict(fetched))
                # New content never lies beside an old record.
                content.with_suffix(".json").unlink(missing_ok=True)
                partial.replace(content)
        record = replace(record, run=self._run)
        with partial_name(content) as partial:
            partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
            partial.replace(content.with_suffix(".json"))
        return record


# --- on disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record(RemoteVersion):
    """Hold what is known of an address.

    Attributes:
        run: the run that asked last.
        en: why it could not be had when asked last, or nothing.
        zh: the same in Chinese.
        may_pass: another try may help.
    """

    run: str = ""
    en: str = ""
    zh: str = ""
    may_pass: bool = False

    @classmethod
    def beside(cls, content: Path) -> "_Record":
        """Read the record beside a content; it is empty if it is missing or damaged."""
        try:
            return cls(**parse_json(content.with_suffix(".json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()
