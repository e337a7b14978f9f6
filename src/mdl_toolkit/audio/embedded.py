"""Recordings inside Parquet files: `clips.parquet#17` is the one in row 17, counted from 1.

Hugging Face's datasets keep them so, as the bytes of files in a column of structs.
"""

import io
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Localized

REFERENCE = re.compile(r"(.+\.parquet)#([0-9]+)", re.DOTALL)
# Rows that are read at once, unless they have more bytes.
BATCH_ROWS, BATCH_BYTES = 16, 64 << 20
NO_COLUMN = Localized("no column of the file is known to hold its recordings; call it `audio`")


def split_reference(audio: str | Path) -> tuple[str, int] | None:
    """Return the Parquet file and the row that a path names; None where that is the name of a file."""
    match = REFERENCE.fullmatch(str(audio))
    return (match[1], int(match[2])) if match and not Path(audio).exists() else None


def audio_column(schema: pa.Schema) -> str | None:
    """Return the column with the bytes of recordings, `audio` or else the only one; None without any."""
    names = [field.name for field in schema if _holds_bytes(field.type)]
    names += [field.name for field in schema if field.name == "audio" and _is_bytes(field.type)]
    return "audio" if "audio" in names else names[0] if len(names) == 1 else None


def _holds_bytes(kind: pa.DataType) -> bool:
    names = [field.name for field in kind] if pa.types.is_struct(kind) else []
    return {*names} == {"bytes", "path"} and _is_bytes(kind.field("bytes").type)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


class ParquetAudio:
    """Read the recordings of a Parquet file, fast in the order of its rows; threads take turns.

    Args:
        path: the file.

    Attributes:
        column: with the bytes of recordings; None without any.

    Raises:
        OSError, ValueError: it is none.
    """

    def __init__(self, path: str) -> None:
        self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        self.column = audio_column(self._file.schema_arrow)
        groups = [self._file.metadata.row_group(number) for number in range(self._file.num_row_groups)]
        self._sizes: list[int] = [group.total_byte_size // max(group.num_rows, 1) for group in groups]
        self._starts: list[int] = [0, *accumulate(group.num_rows for group in groups)]
        self._lock = threading.Lock()
        self._group, self._begin, self._values = -1, 0, pa.array([])
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def __len__(self) -> int:
        return self._starts[-1]

    def size(self, row: int) -> int:
        """Return how many bytes a row takes, about: the mean of its row group."""
        return self._sizes[bisect_right(self._starts, row - 1) - 1]

    def read(self, row: int) -> bytes:
        """Return the bytes of a row's recording; rows count from 1.

        Raises:
            AudioError: there are none.
            OSError, ValueError: the file cannot be read.
        """
        index, group = row - 1, bisect_right(self._starts, row - 1) - 1
        with self._lock:
            try:
                if group != self._group or index < self._begin:
                    self._group, self._begin, self._values = group, self._starts[group], pa.array([])
                    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(self._sizes[group], 1)))
                    self._batches = self._file.iter_batches(rows, [group], [self.column])
                while index >= self._begin + len(self._values):
                    self._begin += len(self._values)
                    self._values = next(self._batches).column(0)
                value = self._values[index - self._begin].as_py()
            except BaseException:
                # Which rows come next is not known any more.
                self._group = -1
                raise
        content = value["bytes"] if isinstance(value, dict) else value
        if not content:
            raise AudioError("row {row} of the Parquet file holds no bytes; get it again", row=row)
        return bytes(content)


@lru_cache(maxsize=4)
def _opened(path: str, _stamp: tuple[int, int]) -> ParquetAudio:
    return ParquetAudio(path)


def embedded_stamp(path: str, row: int) -> tuple[int, int] | Localized:
    """Return a recording's size (bytes, about) and the time of change (ns) of its file, or what is wrong.

    Raises:
        OSError: the file cannot be read.
    """
    status = os.stat(path)  # noqa: PTH116
    try:
        parquet = _opened(path, (status.st_size, status.st_mtime_ns))
    except (ValueError, pa.ArrowException) as problem:
        return Localized("cannot be read as Parquet ({reason})", reason=problem)
    if parquet.column is None:
        return NO_COLUMN
    if not 1 <= row <= len(parquet):
        return Localized("the file has {rows} {rows:row|rows}; correct the number", rows=len(parquet))
    return parquet.size(row), status.st_mtime_ns


def open_recording(path: str | Path) -> io.FileIO | io.BytesIO:
    """Open a recording, a file's or one in a Parquet file, whose bytes are held in memory.

    Raises:
        OSError, ValueError: there is none.
        AudioError: there is no such row, or it holds none.
    """
    reference = split_reference(path)
    if reference is None:
        return io.FileIO(path)
    stamp = embedded_stamp(*reference)
    if isinstance(stamp, Localized):
        raise AudioError(stamp)
    file, row = reference
    status = os.stat(file)  # noqa: PTH116
    return io.BytesIO(_opened(file, (status.st_size, status.st_mtime_ns)).read(row))
