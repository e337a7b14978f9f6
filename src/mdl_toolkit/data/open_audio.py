"""Open the recordings of rows, fetching addresses ahead; what cannot be used becomes a problem of its row."""

import threading
from collections import deque
from collections.abc import Iterator
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
    """

    downloads: Downloads
    allow_truncated: bool

    def clips(self, rows: list[Row]) -> Iterator[tuple[Row, Clip | RowProblem]]:
        """Yield each row with its recording, or with what is wrong with that; addresses are fetched ahead."""
        ahead: deque[tuple[Row, Path | _Fetch]] = deque()
        for row in rows:
            ahead.append((row, _Fetch(self.downloads, row.audio) if is_url(row.audio) else Path(row.audio)))
            if len(ahead) == FETCHED_AHEAD:
                yield self._open(*ahead.popleft())
        while ahead:
            yield self._open(*ahead.popleft())

    def _open(self, row: Row, file: "Path | _Fetch") -> tuple[Row, Clip | RowProblem]:
        try:
            path = file.result() if isinstance(file, _Fetch) else file
            clip = load(path, allow_truncated=self.allow_truncated)
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


class _Fetch(threading.Thread):
    """Download in the background; nobody waits for it when the process is interrupted."""

    def __init__(self, downloads: Downloads, url: str) -> None:
        super().__init__(daemon=True)
        self._downloads, self._url = downloads, url
        self._answer: list[Path | Exception] = []
        self.start()

    def run(self) -> None:
        """Fetch; see `threading.Thread`."""
        try:
            self._answer.append(self._downloads.path_of(self._url))
        # It is raised where the file is wanted.
        except Exception as problem:  # noqa: BLE001
            self._answer.append(problem)

    def result(self) -> Path:
        """Wait for the download and return the local file.

        Raises:
            AudioError: it cannot be had.
        """
        self.join()
        (answer,) = self._answer
        if isinstance(answer, Exception):
            raise answer
        return answer
