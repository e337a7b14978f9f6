"""The converted dataset on disk: write it shard by shard, open it, read samples.

The folder is one that `datasets.load_from_disk` opens (Arrow streams with its metadata), but reading here
is a memory map and a view: no list of numbers is ever made. Audio is 16 kHz mono, 16 bits, as FLAC.
"""

import bisect
import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from numpy.typing import NDArray

from mdl_toolkit.audio import SAMPLE_RATE
from mdl_toolkit.errors import DatasetError, InputError
from mdl_toolkit.loading import TextFiles
from mdl_toolkit.outputs import writing
from mdl_toolkit.tokens import Tokens

RECORD_FILE = "mdl-toolkit.json"
FORMAT = 1
ROWS_PER_BATCH = 32
BATCH_BYTES = 64 * 2**20  # of audio: an Arrow batch holds at most 2 GiB of it
SHARD_BYTES = 256 * 2**20
QUIETEST = -100  # smallest exponent of a scale: 32768 / scale must be a float32

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


@dataclass(frozen=True)
class PackedAudio:
    """A waveform as it is stored: 16-bit FLAC, or 16-bit samples where FLAC would not be smaller.

    Attributes:
        data: the bytes.
        format: `flac` or `pcm16`.
        scale: power of two that the samples are multiplied with when read.
        length: samples.
    """

    data: bytes
    format: str
    scale: float
    length: int


def pack_audio(waveform: NDArray[np.float32]) -> PackedAudio:
    """Store a waveform in 16 bits.

    The scale keeps loud clips (above full scale) from clipping and gives quiet ones at least 12 bits, so
    that rounding noise stays 77 dB below a clip's peak; 16-bit recordings at 16 kHz are kept exactly.
    """
    scale = _scale(waveform)
    samples = np.rint(waveform * np.float32(32768.0 / scale)).astype("<i2")
    raw = samples.tobytes()
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    flac = buffer.getvalue()
    smaller = len(flac) < len(raw)
    return PackedAudio(flac if smaller else raw, "flac" if smaller else "pcm16", scale, len(samples))


def _scale(waveform: NDArray[np.float32]) -> float:
    """The power of two that stands for full scale."""
    lowest, highest = float(waveform.min(initial=0.0)), float(waveform.max(initial=0.0))
    exponent = int(np.frexp(max(-lowest, highest))[1])  # 2**(exponent - 1) <= peak < 2**exponent
    scale = 2.0 ** max(min(exponent + 3, 0), QUIETEST)
    while np.rint(highest * 32768.0 / scale) > 32767 or np.rint(lowest * 32768.0 / scale) < -32768:
        scale *= 2.0
    return scale


def unpack_audio(packed: PackedAudio) -> NDArray[np.float32]:
    """The waveform of `pack_audio`, `[samples]` float32.

    Raises:
        ValueError: the bytes are damaged.
    """
    if packed.format == "flac":
        try:
            samples, _ = soundfile.read(io.BytesIO(packed.data), dtype="int16")
        except soundfile.SoundFileError as problem:
            raise ValueError(str(problem)) from problem
    else:
        samples = np.frombuffer(packed.data, dtype="<i2")
    if len(samples) != packed.length:
        raise ValueError(f"{len(samples)} of {packed.length} samples")
    waveform: NDArray[np.float32] = samples.astype(np.float32)
    waveform *= np.float32(packed.scale / 32768.0)
    return waveform


# --- the record --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What a converted dataset says of itself (rule 22).

    Attributes:
        tokenizer: fingerprint of the tokenizer.
        chat_template: fingerprint of the chat template.
        system_prompt: the default system prompt of the conversion.
        user_prompt: the default user prompt of the conversion.
        rows: samples in the dataset.
        seconds: of audio.
        text_tokens: all positions that are not audio.
        audio_tokens: all audio positions.
        padded: clips padded to one audio token.
        silent: clips with nothing to hear.
        toolkit: version that wrote it.
        format: version of the layout.
    """

    tokenizer: str
    chat_template: str
    system_prompt: str | None
    user_prompt: str | None
    rows: int = 0
    seconds: float = 0.0
    text_tokens: int = 0
    audio_tokens: int = 0
    padded: int = 0
    silent: int = 0
    toolkit: str = ""
    format: int = FORMAT

    def check_model(self, files: TextFiles, where: str) -> None:
        """Refuse a model whose text side is not the dataset's.

        Raises:
            DatasetError: with both fingerprints.
        """
        for what, what_zh, ours, theirs in (
            ("tokenizer", "分词器", self.tokenizer, files.tokenizer_fingerprint),
            ("chat template", "对话模板", self.chat_template, files.template_fingerprint),
        ):
            if ours != theirs:
                raise DatasetError(
                    f"{where} was converted with another {what} ({ours}) than the model's ({theirs}); "
                    "convert it again with this model",
                    f"{where} 转换时使用的{what_zh}（{ours}）与模型的（{theirs}）不同；请用该模型重新转换",
                )


# --- writing -----------------------------------------------------------------------------------------


class ShardWriter:
    """Append samples; a new file is begun whenever one is full. Rows come out in the order they go in.

    Raises:
        DatasetError: the disk does not take it.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._files: list[Path] = []
        self._rows: list[dict[str, Any]] = []
        self._bytes = self._pending = 0  # of audio: in this shard, and in rows that are not written yet
        self._sink: pa.RecordBatchStreamWriter | None = None

    def append(self, tokens: Tokens, audio: PackedAudio) -> None:
        """Add one sample."""
        self._rows.append(
            {
                "input_ids": tokens.input_ids, "labels": tokens.labels, "audio": audio.data,
                "audio_format": audio.format, "audio_scale": audio.scale, "audio_length": audio.length,
            }
        )  # fmt: skip
        self._bytes += len(audio.data)
        self._pending += len(audio.data)
        with writing(str(self._folder), DatasetError):
            if len(self._rows) == ROWS_PER_BATCH or self._pending >= BATCH_BYTES:
                self._flush()
            if self._bytes >= self._shard_bytes:
                self._end_shard()

    def finish(self, record: Record) -> None:
        """Name the shards and write what `datasets` and this toolkit need to open the folder."""
        with writing(str(self._folder), DatasetError):
            self._end_shard()
            if not self._files:
                self._open_shard()
                self._end_shard()
            names = [f"data-{i:05d}-of-{len(self._files):05d}.arrow" for i in range(len(self._files))]
            for file, name in zip(self._files, names, strict=True):
                file.rename(self._folder / name)
            about = {"citation": "", "description": "", "features": _FEATURES}
            _write_json(self._folder / "dataset_info.json", about)
            _write_json(self._folder / RECORD_FILE, asdict(record))
            _write_json(self._folder / "state.json", _state(names, record))

    def _open_shard(self) -> pa.RecordBatchStreamWriter:
        self._files.append(self._folder / f"data-{len(self._files):05d}.arrow")
        self._sink = pa.ipc.new_stream(pa.OSFile(str(self._files[-1]), "wb"), _SCHEMA)
        return self._sink

    def _flush(self) -> None:
        if self._rows:
            sink = self._sink or self._open_shard()
            sink.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=_SCHEMA))
            self._rows, self._pending = [], 0

    def _end_shard(self) -> None:
        self._flush()
        if self._sink is not None:
            self._sink.close()
            self._sink, self._bytes = None, 0


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
            f"--output {output}: a mounted folder cannot be replaced; give a folder inside it",
            f"--output {output}：挂载点无法被替换；请指定其中的子目录",
        )
    taken = any(output.iterdir()) and not is_converted(output) if output.is_dir() else output.exists()
    if taken:
        raise InputError(
            f"--output {output}: something else than a converted dataset is there; choose another folder",
            f"--output {output}：该位置已有其他内容（不是转换后的数据集）；请选择其他目录",
        )


# --- reading -----------------------------------------------------------------------------------------


def is_converted(path: Path) -> bool:
    """Tell whether a folder is a dataset that this toolkit converted."""
    return (path / RECORD_FILE).is_file() and (path / "state.json").is_file()


def _read_record(file: Path) -> Record:
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
    return Record(**values)


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
            raise DatasetError(
                f"{self.folder}: not a complete dataset written by convert-dataset; convert again",
                f"{self.folder}：不是 convert-dataset 输出的完整数据集；请重新转换",
            )
        try:
            self.record = _read_record(self.folder / RECORD_FILE)
            rows = self._starts[-1]
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as problem:
            raise self._damaged(str(problem)) from problem
        if rows != self.record.rows:
            raise self._damaged(f"{rows} rows, {self.record.rows} recorded")

    def __len__(self) -> int:
        return self.record.rows

    def __getitem__(self, index: int) -> Sample:
        batch, row = self._locate(index)
        column = {name: batch.column(i)[row] for i, name in enumerate(_SCHEMA.names)}
        packed = PackedAudio(
            column["audio"].as_buffer(), column["audio_format"].as_py(), column["audio_scale"].as_py(),
            column["audio_length"].as_py(),
        )  # fmt: skip
        ids, labels = (column[name].values.to_numpy() for name in ("input_ids", "labels"))
        try:
            return Sample(ids, labels, unpack_audio(packed))
        except ValueError as problem:
            raise self._damaged(f"row {index}: {problem}") from problem

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "record": self.record}

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """Positions of every row in the decoder, `[rows]`."""
        counts = [batch.column(0).value_lengths().to_numpy() for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """Audio samples of every row, `[rows]`."""
        index = _SCHEMA.names.index("audio_length")
        return np.concatenate([np.zeros(0, np.int64), *(b.column(index).to_numpy() for b in self._batches)])

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        batches: list[pa.RecordBatch] = []
        for file in state["_data_files"]:
            stream = pa.ipc.open_stream(pa.memory_map(str(self.folder / Path(file["filename"]).name)))
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
            f"{self.folder}: the dataset is damaged ({reason}); convert again",
            f"{self.folder}：数据集已损坏（{reason}）；请重新转换",
        )
