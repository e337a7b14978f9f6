"""Write a converted dataset: shard by shard, then the metadata by which it is opened.

The folder is one that `datasets.load_from_disk` opens: Arrow streams with its metadata.
"""

import hashlib
import json
import os
from collections.abc import Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mdl_toolkit.audio.flac import PackedAudio
from mdl_toolkit.data.dataset import FEATURES, RECORD_FILE, SCHEMA, Record, checksum
from mdl_toolkit.data.tokenization import Tokens
from mdl_toolkit.errors import DatasetError, InputError
from mdl_toolkit.utils.files import fsync, report_write_errors
from mdl_toolkit.utils.ownership import check_output_folder

# An Arrow batch ends with whichever comes first. Small ones cost memory when the dataset is opened, as a look
# at a batch's head maps 64 KiB; large ones when it is written, as a batch is kept until it is complete.
ROWS_PER_BATCH = 1024
# Of audio.
BATCH_BYTES = 4 * 2**20


class ShardWriter:
    """Append samples to one new file, in the order in which they are read.

    Raises:
        DatasetError: the disk does not take it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[tuple[int, Tokens, PackedAudio]] = []
        # Bytes of audio in rows that are not written yet.
        self._pending = 0
        with self._writing():
            self._sink = pa.OSFile(os.fsencode(file), "wb")
            self._stream = pa.ipc.new_stream(self._sink, SCHEMA)

    def append(self, line: int, tokens: Tokens, audio: PackedAudio) -> None:
        """Add the sample of the row that starts on a line of the CSV."""
        self._rows.append((line, tokens, audio))
        self._pending += len(audio.data)
        if len(self._rows) == ROWS_PER_BATCH or self._pending >= BATCH_BYTES:
            self._flush()

    def close(self) -> tuple[int, int]:
        """Write what is pending, wait until all is on the disk, and return the file's bytes and checksum."""
        self._flush()
        with self._writing():
            self._stream.close()
            self._sink.close()
            fsync(self._file)
            return self._file.stat().st_size, checksum(self._file)

    def _flush(self) -> None:
        if not self._rows:
            return
        lines, tokens, audio = zip(*self._rows, strict=True)
        # From buffers: `pa.array` would import pandas where there is one, 0.2 s and 40 MB in each process.
        columns = [
            _list_array([each.input_ids for each in tokens]),
            _list_array([each.labels for each in tokens]),
            _bytes_array(pa.binary(), [each.data for each in audio]),
            _bytes_array(pa.string(), [each.format.encode() for each in audio]),
            _number_array(pa.float32(), np.array([each.scale for each in audio], dtype=np.float32)),
            _number_array(pa.int64(), np.array([each.length for each in audio], dtype=np.int64)),
            _number_array(pa.int64(), np.array(lines, dtype=np.int64)),
        ]
        with self._writing():
            self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        self._rows, self._pending = [], 0

    def _writing(self) -> AbstractContextManager[None]:
        return report_write_errors(str(self._file.parent), DatasetError)


def _list_array(values: Sequence[NDArray[np.int32]]) -> pa.Array:
    numbers = _number_array(pa.int32(), np.concatenate(values, dtype=np.int32))
    return pa.ListArray.from_arrays(_number_array(pa.int32(), _offsets(values)), numbers)


def _bytes_array(kind: pa.DataType, values: Sequence[bytes]) -> pa.Array:
    buffers = [None, pa.py_buffer(_offsets(values)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def _number_array(kind: pa.DataType, values: NDArray[Any]) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _offsets(values: Sequence[Sized]) -> NDArray[np.int32]:
    """Return where each value begins, and the last one ends."""
    return np.cumsum([0, *map(len, values)], dtype=np.int32)


def shard_name(number: int, count: int) -> str:
    """Return the file name of a shard, as `datasets` names them."""
    return f"data-{number:05d}-of-{count:05d}.arrow"


def write_metadata(folder: Path, checksums: Sequence[int], record: Record) -> None:
    """Complete a folder of shards with what `datasets` and this toolkit need to open it.

    Args:
        folder: of the shards.
        checksums: the CRC-32 of each shard.
        record: of all.

    Raises:
        DatasetError: the disk does not take it.
    """
    about = {"citation": "", "description": "", "features": FEATURES}
    files = [
        {"filename": shard_name(number, len(checksums)), "crc32": crc32}
        for number, crc32 in enumerate(checksums)
    ]
    # By the fingerprint `datasets` names what it caches.
    canonical = json.dumps([asdict(record), files], sort_keys=True)
    state: dict[str, Any] = {
        "_data_files": files,
        "_fingerprint": hashlib.sha256(canonical.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    with report_write_errors(str(folder), DatasetError):
        _write_json(folder / "dataset_info.json", about)
        _write_json(folder / RECORD_FILE, asdict(record))
        _write_json(folder / "state.json", state)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_output(output: Path) -> None:
    """Refuse an output that holds something else than a converted dataset, or cannot be replaced.

    Raises:
        InputError: naming a file that is no dataset's.
    """
    if output.resolve().is_mount():
        raise InputError(
            "--output {output}: a mounted folder cannot be replaced; give a folder inside it", output=output
        )
    check_output_folder(output, "convert-dataset")
