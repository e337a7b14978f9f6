"""The converted dataset on disk: write it shard by shard, open it, read samples.

The folder is one that `datasets.load_from_disk` opens (Arrow streams with its metadata), but reading here
is a memory map and a view: no list of numbers is ever made. Audio is 16 kHz mono, 16 bits, as FLAC.
"""

import bisect
import hashlib
import json
from collections.abc import Sequence, Sized
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mdl_toolkit.audio.flac import PackedAudio, unpack_audio
from mdl_toolkit.data.tokenization import IGNORE_INDEX, Tokens
from mdl_toolkit.errors import DatasetError, InputError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import fsync, report_write_errors
from mdl_toolkit.weights.provenance import Prompts
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles

RECORD_FILE = "mdl-toolkit.json"
COLUMNS_OF_0_1_0 = {"input_ids", "attention_mask", "input_values", "audio_length", "labels"}
FORMAT = 1
# An Arrow batch ends with whichever comes first. Small ones cost memory when the dataset is opened, as a look
# at a batch's head maps 64 KiB; large ones when it is written, as a batch is kept until it is complete.
ROWS_PER_BATCH = 1024
BATCH_BYTES = 4 * 2**20  # of audio

_FEATURES = {
    "input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "labels": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "audio": {"dtype": "binary", "_type": "Value"},
    "audio_format": {"dtype": "string", "_type": "Value"},
    "audio_scale": {"dtype": "float32", "_type": "Value"},
    "audio_length": {"dtype": "int64", "_type": "Value"},
}
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "audio": pa.binary(),
        "audio_format": pa.string(),
        "audio_scale": pa.float32(),
        "audio_length": pa.int64(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


# --- samples -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One row, ready for a batch.

    Attributes:
        input_ids: `[positions]` int32.
        labels: `[positions]` int32, -100 where nothing is to be learnt.
        waveform: `[samples]` float32 at 16 kHz.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    waveform: NDArray[np.float32]


# --- the record --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What a converted dataset says of itself (rule 22).

    Attributes:
        tokenizer: fingerprint of the tokenizer.
        chat_template: fingerprint of the chat template.
        system_prompt, user_prompt: the conversion's defaults.
        prompts: those of the rows themselves.
        rows: samples in the dataset.
        seconds: of audio.
        shortest_seconds: of the shortest clip.
        longest_seconds: of the longest clip.
        text_tokens: all positions that are not audio.
        audio_tokens: all audio positions.
        median_tokens: positions of a row that half of the rows do not exceed.
        p95_tokens: positions of a row that 95 % of the rows do not exceed.
        most_tokens: positions of the longest row.
        padded: clips padded to one audio token.
        silent: clips with nothing to hear.
        clipped: clips that were recorded too loud.
        truncated: clips that are shorter than their files promise.
        bytes: of all shards.
        toolkit: version that wrote it.
        format: version of the layout.
    """

    tokenizer: str
    chat_template: str
    system_prompt: str | None
    user_prompt: str | None
    prompts: Prompts = field(default_factory=Prompts)
    rows: int = 0
    seconds: float = 0.0
    shortest_seconds: float = 0.0
    longest_seconds: float = 0.0
    text_tokens: int = 0
    audio_tokens: int = 0
    median_tokens: int = 0
    p95_tokens: int = 0
    most_tokens: int = 0
    padded: int = 0
    silent: int = 0
    clipped: int = 0
    truncated: int = 0
    bytes: int = 0
    toolkit: str = ""
    format: int = FORMAT

    def check_model(self, files: TokenizerFiles, where: str) -> None:
        """Refuse a model whose text side is not the dataset's.

        Raises:
            DatasetError: with both fingerprints.
        """
        for what, ours, theirs in (
            (Localized("tokenizer"), self.tokenizer, files.tokenizer_fingerprint),
            (Localized("chat template"), self.chat_template, files.template_fingerprint),
        ):
            if ours != theirs:
                raise DatasetError(
                    "{where} was converted with another {what} ({ours}) than the model's ({theirs}); "
                    "convert it again with this model",
                    where=where,
                    what=what,
                    ours=ours,
                    theirs=theirs,
                )


# --- writing -----------------------------------------------------------------------------------------


class ShardWriter:
    """Append samples to one new file. Rows come out in the order they go in.

    Raises:
        DatasetError: the disk does not take it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[tuple[Tokens, PackedAudio]] = []
        self._pending = 0  # bytes of audio in rows that are not written yet
        with self._writing():
            self._sink = pa.OSFile(str(file), "wb")
            self._stream = pa.ipc.new_stream(self._sink, _SCHEMA)

    def append(self, tokens: Tokens, audio: PackedAudio) -> None:
        """Add one sample."""
        self._rows.append((tokens, audio))
        self._pending += len(audio.data)
        if len(self._rows) == ROWS_PER_BATCH or self._pending >= BATCH_BYTES:
            self._flush()

    def close(self) -> int:
        """Write the rest, wait until all is on the disk, and return the file's bytes."""
        self._flush()
        with self._writing():
            self._stream.close()
            self._sink.close()
            fsync(self._file)
            return self._file.stat().st_size

    def discard(self) -> None:
        """Give the file up, also if the disk does not take its end."""
        with suppress(OSError):
            self._stream.close()
            self._sink.close()
        self._file.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._rows:
            with self._writing():
                self._stream.write_batch(_batch(*zip(*self._rows, strict=True)))
            self._rows, self._pending = [], 0

    def _writing(self) -> AbstractContextManager[None]:
        return report_write_errors(str(self._file.parent), DatasetError)


def _batch(tokens: Sequence[Tokens], audio: Sequence[PackedAudio]) -> pa.RecordBatch:
    """From buffers: `pa.array` would import pandas where there is one, 0.2 s and 40 MB in each process."""
    columns = [
        _lists([each.input_ids for each in tokens]),
        _lists([each.labels for each in tokens]),
        _words(pa.binary(), [each.data for each in audio]),
        _words(pa.string(), [each.format.encode() for each in audio]),
        _numbers(pa.float32(), np.array([each.scale for each in audio], dtype=np.float32)),
        _numbers(pa.int64(), np.array([each.length for each in audio], dtype=np.int64)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _lists(rows: Sequence[NDArray[np.int32]]) -> pa.Array:
    values = _numbers(pa.int32(), np.concatenate(rows, dtype=np.int32))
    return pa.ListArray.from_arrays(_numbers(pa.int32(), _offsets(rows)), values)


def _words(kind: pa.DataType, rows: Sequence[bytes]) -> pa.Array:
    buffers = [None, pa.py_buffer(_offsets(rows)), pa.py_buffer(b"".join(rows))]
    return pa.Array.from_buffers(kind, len(rows), buffers)


def _numbers(kind: pa.DataType, values: NDArray[Any]) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _offsets(rows: Sequence[Sized]) -> NDArray[np.int32]:
    """Where each row begins, and the last one ends."""
    return np.cumsum([0, *map(len, rows)], dtype=np.int32)


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, as `datasets` names them."""
    return f"data-{number:05d}-of-{count:05d}.arrow"


def write_metadata(folder: Path, shards: int, record: Record) -> None:
    """Complete a folder of shards with what `datasets` and this toolkit need to open it.

    Raises:
        DatasetError: the disk does not take it.
    """
    about = {"citation": "", "description": "", "features": _FEATURES}
    with report_write_errors(str(folder), DatasetError):
        _write_json(folder / "dataset_info.json", about)
        _write_json(folder / RECORD_FILE, asdict(record))
        _write_json(folder / "state.json", _state([shard_name(i, shards) for i in range(shards)], record))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _state(names: list[str], record: Record) -> dict[str, Any]:
    """What `datasets` wants to know of the files; by the fingerprint it names what it caches."""
    canonical = json.dumps(asdict(record), sort_keys=True)
    return {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(canonical.encode()).hexdigest()[:16],
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
        "_split": None,
    }  # fmt: skip


def check_output(output: Path) -> None:
    """Refuse an output folder that would swallow something else than a dataset (rule 18).

    Raises:
        InputError: it is no folder, holds something else than a converted dataset, or cannot be replaced.
    """
    if output.resolve().is_mount():
        raise InputError(
            "--output {output}: a mounted folder cannot be replaced; give a folder inside it", output=output
        )
    taken = any(output.iterdir()) and not is_converted(output) if output.is_dir() else output.exists()
    if taken:
        raise InputError(
            "--output {output}: something else than a converted dataset is there; choose another folder",
            output=output,
        )


def _supervised(labels: pa.ListArray) -> NDArray[np.int64]:
    seen = np.concatenate([[0], np.cumsum(labels.values.to_numpy() != IGNORE_INDEX)])
    offsets = labels.offsets.to_numpy()
    counts: NDArray[np.int64] = seen[offsets[1:]] - seen[offsets[:-1]]
    return counts


# --- reading -----------------------------------------------------------------------------------------


def is_converted(path: Path) -> bool:
    """Tell whether a folder is a dataset that this toolkit converted."""
    return (path / RECORD_FILE).is_file() and (path / "state.json").is_file()


def _read_record(file: Path) -> Record:
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
    return Record(**{**values, "prompts": Prompts(**values.get("prompts", {}))})


@dataclass
class ConvertedDataset:
    """Samples of a converted dataset, memory-mapped; may be sent to data-loader workers.

    Raises:
        DatasetError: the folder is not a complete converted dataset.
    """

    folder: Path
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        if not is_converted(self.folder):
            self._refuse_version_0_1_0()
            raise DatasetError(
                "{folder}: not a complete dataset written by convert-dataset; convert again",
                folder=self.folder,
            )
        try:
            self.record = _read_record(self.folder / RECORD_FILE)
            rows = self._starts[-1]
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as problem:
            raise self._damaged(str(problem)) from problem
        if rows != self.record.rows:
            raise self._damaged(f"{rows} rows, {self.record.rows} recorded")

    def _refuse_version_0_1_0(self) -> None:
        """Refuse a dataset that mdl-toolkit 0.1.0 converted, whose columns tell it from any other one.

        Raises:
            DatasetError: naming the command that converts its CSV again.
        """
        try:
            info = json.loads((self.folder / "dataset_info.json").read_text(encoding="utf-8"))
            columns = set(info["features"])
        except (OSError, ValueError, TypeError, KeyError):
            return
        if columns >= COLUMNS_OF_0_1_0:
            command = "mdl-toolkit convert-dataset CSV --output NEW --model-name MODEL"
            raise DatasetError(
                "{folder}: converted by mdl-toolkit 0.1.0, which this version does not read; convert its "
                "CSV again: {command}",
                folder=self.folder,
                command=command,
            )

    def __len__(self) -> int:
        return self.record.rows

    def __getitem__(self, index: int) -> Sample:
        batch, row = self._locate(index)
        column = {name: batch.column(i)[row] for i, name in enumerate(_SCHEMA.names)}
        packed = PackedAudio(
            column["audio"].as_buffer(), column["audio_format"].as_py(), column["audio_scale"].as_py(),
            column["audio_length"].as_py(),
        )  # fmt: skip
        tokens = self.tokens(index)
        try:
            return Sample(tokens.input_ids, tokens.labels, unpack_audio(packed))
        except ValueError as problem:
            raise self._damaged(f"row {index}: {problem}") from problem

    def tokens(self, index: int) -> Tokens:
        """A row's ids and labels; no audio is decoded."""
        batch, row = self._locate(index)
        return Tokens(*(batch.column(name)[row].values.to_numpy() for name in ("input_ids", "labels")))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "record": self.record}

    def encoded_audio(self, index: int) -> memoryview:
        """The bytes that hold a row's audio; they are not decoded."""
        batch, row = self._locate(index)
        return memoryview(batch.column(_SCHEMA.names.index("audio"))[row].as_buffer())

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """Positions of every row in the decoder, `[rows]`."""
        counts = [batch.column(0).value_lengths().to_numpy() for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)

    @cached_property
    def supervised_counts(self) -> NDArray[np.int64]:
        """Supervised positions of every row, `[rows]`."""
        counts = [_supervised(batch.column(1)) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)

    @cached_property
    def audio_lengths(self) -> NDArray[np.int64]:
        """Audio samples of every row, `[rows]`."""
        index = _SCHEMA.names.index("audio_length")
        return np.concatenate([np.zeros(0, np.int64), *(b.column(index).to_numpy() for b in self._batches)])

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        batches: list[pa.RecordBatch] = []
        for file in state["_data_files"]:
            # A closed map stays mapped as long as a batch needs it, but takes no file descriptor.
            with pa.memory_map(str(self.folder / Path(file["filename"]).name)) as mapped:
                stream = pa.ipc.open_stream(mapped)
                if not stream.schema.equals(_SCHEMA):
                    raise ValueError(f"{file['filename']}: columns {stream.schema.names}")
                batches += stream
        return batches

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([len(batch) for batch in self._batches]).tolist()]

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        return self._batches[number], index - self._starts[number]

    def _damaged(self, reason: str) -> DatasetError:
        return DatasetError(
            "{folder}: the dataset is damaged ({reason}); convert again", folder=self.folder, reason=reason
        )
