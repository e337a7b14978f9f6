"""One shard, in a worker process: rows to clips and tokens, and these to a file."""

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdl_toolkit.audio import Clip, load
from mdl_toolkit.csvfile import stamp_of
from mdl_toolkit.dataset import ShardWriter
from mdl_toolkit.download import Downloads
from mdl_toolkit.errors import AudioError, RowProblem
from mdl_toolkit.manifest import Row, is_url
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.packing import pack_audio
from mdl_toolkit.plan import Shard
from mdl_toolkit.summary import Tally
from mdl_toolkit.tokens import Encoder

FETCHED_AHEAD = 8  # recordings that a process fetches at the same time


@dataclass(frozen=True)
class Job:
    """A shard to convert.

    Attributes:
        shard: which.
        rows: its rows.
        file: where it is to be written.
        is_check: rows are known to be bad, so nothing will be written: only look at the recordings.
    """

    shard: Shard
    rows: list[Row]
    file: Path
    is_check: bool


@dataclass(frozen=True)
class Step:
    """So many rows more are done, with so many samples of audio."""

    rows: int
    samples: int


@dataclass(frozen=True)
class Finished:
    """A shard is done; its file is written unless a row was bad."""

    shard: Shard
    file: Path
    tally: Tally


@dataclass(frozen=True)
class ShardTask:
    """What a worker process does with a shard.

    Attributes:
        encoder: the model's tokenizer and template.
        downloads: what fetches addresses.
        allow_truncated: accept files that were cut off.
        with_answer: for training; otherwise prompts alone, and no labels.
        rows_per_step: how often progress is reported.
    """

    encoder: Encoder
    downloads: Downloads
    allow_truncated: bool
    with_answer: bool
    rows_per_step: int

    def __call__(self, job: Job) -> Iterator[Step | Finished]:
        """Convert the shard, and report."""
        tally = Tally()
        writer = None if job.is_check else ShardWriter(job.file)
        clips = self._clips(job.rows, tally)
        while group := list(itertools.islice(clips, self.rows_per_step)):
            for row, clip in group:
                if clip is not None and writer is not None:
                    self._store(row, clip, writer, tally)
            if tally.problems.count and writer is not None:
                writer.discard()
                writer = None
            yield Step(len(group), sum(len(clip.samples) for _, clip in group if clip is not None))
        tally.bytes = 0 if writer is None else writer.close()
        yield Finished(job.shard, job.file, tally)

    def _clips(self, rows: list[Row], tally: Tally) -> Iterator[tuple[Row, Clip | None]]:
        for row, file in self._fetched(rows):
            yield row, self._look(row, file, tally)

    def _look(self, row: Row, file: "Path | _Fetch", tally: Tally) -> Clip | None:
        """The row's recording, or None and a problem in the tally."""
        try:
            place = file.result() if isinstance(file, _Fetch) else file
            clip = load(place, allow_truncated=self.allow_truncated)
            if not is_url(row.audio) and _stamp(place) != row.stamp:
                raise AudioError(
                    "the file was changed while it was being read; start again when it is complete",
                    "文件在读取过程中被修改；请在其写完后重新运行",
                )
        except AudioError as problem:
            tally.problems.add(RowProblem(row.line, "audio", row.shown, problem.text))
            return None
        return clip

    def _store(self, row: Row, clip: Clip, writer: ShardWriter, tally: Tally) -> None:
        count = audio_token_count(len(clip.samples))
        tokens = self.encoder.encode_row(row, count, with_answer=self.with_answer)
        writer.append(tokens, pack_audio(clip.samples))
        tally.add(row, clip, len(tokens.input_ids), count)

    def _fetched(self, rows: list[Row]) -> Iterator[tuple[Row, "Path | _Fetch"]]:
        """Each row with its file; addresses are fetched ahead, some at a time."""
        ahead: deque[tuple[Row, Path | _Fetch]] = deque()
        for row in rows:
            ahead.append((row, _Fetch(self.downloads, row.audio) if is_url(row.audio) else Path(row.audio)))
            if len(ahead) == FETCHED_AHEAD:
                yield ahead.popleft()
        yield from ahead


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        return stamp_of(file.stat())
    except OSError:
        return None


class _Fetch(threading.Thread):
    """A download under way; nobody waits for it when the process is interrupted."""

    def __init__(self, downloads: Downloads, url: str) -> None:
        super().__init__(daemon=True)
        self._downloads, self._url = downloads, url
        self._answer: list[Path | Exception] = []
        self.start()

    def run(self) -> None:
        """Fetch; see `threading.Thread`."""
        try:
            self._answer.append(self._downloads.path_of(self._url))
        except Exception as problem:  # noqa: BLE001 - raised where the file is wanted
            self._answer.append(problem)

    def result(self) -> Path:
        """The local file.

        Raises:
            AudioError: it cannot be had.
        """
        self.join()
        (answer,) = self._answer
        if isinstance(answer, Exception):
            raise answer
        return answer
