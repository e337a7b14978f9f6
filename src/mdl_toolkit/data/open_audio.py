"""Open the recordings of rows, fetching addresses ahead; what cannot be used becomes a problem of its row."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.audio.embedded import embedded_stamp, split_reference
from mdl_toolkit.audio.loading import Clip, load_length, load_segments
from mdl_toolkit.audio.segments import Segment, SegmentError
from mdl_toolkit.audio.urls import is_url
from mdl_toolkit.data.csv_reader import file_stamp
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import AudioError, RowProblem, UnavailableError, breakdown
from mdl_toolkit.i18n import Localized

T = TypeVar("T")
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
        """Yield each row with its clip, or with what is wrong with that; addresses are fetched ahead.

        A recording of which rows name segments is decoded once, and its segments are kept until their rows
        come; any other is decoded once for rows that follow one another.
        """
        visits = [*_visits(rows)]
        uses = Counter((visit, row.segment) for visit, row in zip(visits, rows, strict=True))
        segments: dict[tuple[str, int], list[Segment]] = {}
        for visit, segment in uses:
            segments.setdefault(visit, []).append(segment)
        opened: dict[tuple[str, int], _Opened] = {}
        files = self._files([row.audio for row in rows])
        for visit, row, file in zip(visits, rows, files, strict=True):
            if visit not in opened:
                opened[visit] = self._open(file, segments[visit])
            recording = opened[visit]
            yield row, recording.clip_of(row)
            uses[visit, row.segment] -= 1
            if not uses[visit, row.segment]:
                del recording.clips[row.segment]
            if not recording.clips:
                del opened[visit]

    def lengths(self, audios: list[str]) -> Iterator[tuple[str, float | AudioError]]:
        """Yield each recording with its seconds, or what is wrong with it; addresses are fetched ahead."""
        for audio, file in zip(audios, self._files(audios), strict=True):
            yield audio, _read(file, lambda path: load_length(path, self.allow_truncated, self.max_hours))

    def _open(self, file: Path | Future[Path], segments: list[Segment]) -> "_Opened":
        """Decode a recording once; what is wrong with it is wrong with all of its segments."""
        read = _read(
            file,
            lambda path: (
                load_segments(path, segments, self.allow_truncated, self.max_hours),
                _stamp(path),
            ),
        )
        if isinstance(read, AudioError):
            return _Opened(dict.fromkeys(segments, read), None)
        clips, stamp = read
        return _Opened(dict(zip(segments, clips, strict=True)), stamp)

    def _files(self, audios: list[str]) -> Iterator[Path | Future[Path]]:
        """Yield the file of each recording, or what will be it; addresses are fetched ahead."""
        files: dict[str, Path | Future[Path]] = {}
        for number, audio in enumerate(audios):
            for coming in audios[number : number + FETCHED_AHEAD]:
                if coming not in files:
                    files[coming] = _fetch(self.downloads, coming) if is_url(coming) else Path(coming)
            yield files[audio]


@dataclass
class _Opened:
    """Hold the segments of a recording that rows are still to come for.

    Attributes:
        clips: the segments, or what is wrong with them.
        stamp: size (bytes) and time of change (ns) of the file after it was read.
    """

    clips: dict[Segment, Clip | AudioError]
    stamp: tuple[int, int] | None

    def clip_of(self, row: Row) -> Clip | RowProblem:
        """Return a row's clip, or what is wrong with it."""
        clip = self.clips[row.segment]
        if isinstance(clip, SegmentError):
            return row.segment_problem(clip.field, clip.message)
        if isinstance(clip, Clip) and not is_url(row.audio) and self.stamp != row.stamp:
            clip = AudioError("the file was changed while it was being read; start again when it is complete")
        return row.audio_problem(clip) if isinstance(clip, AudioError) else clip


def _read(file: Path | Future[Path], read: Callable[[Path], T]) -> T | AudioError:
    """Return what is read of a recording, or what is wrong with it."""
    try:
        return read(file.result() if isinstance(file, Future) else file)
    except AudioError as problem:
        return problem
    except OSError as problem:
        return UnavailableError("the file cannot be read ({reason}); try again", reason=problem)
    except BaseException as problem:
        if (reason := breakdown(problem)) is None:
            raise
        kind = UnavailableError if isinstance(problem, MemoryError) else AudioError
        return kind("it cannot be decoded: {reason}", reason=reason)


def _visits(rows: list[Row]) -> Iterator[tuple[str, int]]:
    """Yield for every row its recording, and a number that tells apart the times at which that is decoded."""
    in_parts = {row.audio for row in rows if not row.segment.is_whole}
    run, previous = 0, None
    for row in rows:
        run += row.audio != previous
        previous = row.audio
        yield row.audio, 0 if row.audio in in_parts else run


def _stamp(file: Path) -> tuple[int, int] | None:
    reference = split_reference(file)
    try:
        if reference is not None:
            stamp = embedded_stamp(*reference)
            return None if isinstance(stamp, Localized) else stamp
        return file_stamp(file.stat())
    except OSError:
        return None


def _fetch(downloads: Downloads, url: str) -> Future[Path]:
    """Download in a thread for which nobody waits when the process is interrupted."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            future.set_result(downloads.path_of(url))
        # It is raised where the file is wanted, whatever it is.
        except BaseException as problem:  # noqa: BLE001
            future.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    return future
