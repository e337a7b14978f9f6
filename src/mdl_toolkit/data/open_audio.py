"""Open the recordings of rows, fetching addresses ahead; what cannot be used becomes a problem of its row."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.audio.loading import Clip, load
from mdl_toolkit.audio.urls import is_url
from mdl_toolkit.data.csv_reader import file_stamp
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import AudioError, RowProblem

# Recordings that a process fetches at the same time.
FETCHED_AHEAD = 8


@dataclass(frozen=True)
class Recordings:
    """Open the recordings of rows.

    Attributes:
        downloads: what fetches addresses.
        allow_truncated: accept files that were cut off.
        max_hours: of the longest recording that is accepted.
    """

    downloads: Downloads
    allow_truncated: bool
    max_hours: float

    def clips(self, rows: list[Row]) -> Iterator[tuple[Row, Clip | RowProblem]]:
        """Yield each row with its recording, or with what is wrong with that; addresses are fetched ahead."""
        ahead: deque[tuple[Row, Path | Future[Path]]] = deque()
        for row in rows:
            ahead.append((row, _fetch(self.downloads, row.audio) if is_url(row.audio) else Path(row.audio)))
            if len(ahead) == FETCHED_AHEAD:
                yield self._open(*ahead.popleft())
        while ahead:
            yield self._open(*ahead.popleft())

    def _open(self, row: Row, file: Path | Future[Path]) -> tuple[Row, Clip | RowProblem]:
        try:
            path = file.result() if isinstance(file, Future) else file
            clip = load(path, allow_truncated=self.allow_truncated, max_hours=self.max_hours)
            if not is_url(row.audio) and _stamp(path) != row.stamp:
                raise AudioError(
                    "the file was changed while it was being read; start again when it is complete"
                )
        except AudioError as problem:
            return row, RowProblem(row.line, "audio", row.shown, problem.message)
        return row, clip


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        return file_stamp(file.stat())
    except OSError:
        return None


def _fetch(downloads: Downloads, url: str) -> Future[Path]:
    """Download in a thread for which nobody waits when the process is interrupted."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            future.set_result(downloads.path_of(url))
        # It is raised where the file is wanted.
        except Exception as problem:  # noqa: BLE001
            future.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    return future
