"""The converted dataset on disk: its columns and record, and the samples read from it.

Reading is a memory map and a view: no list of numbers is ever made. Audio is mono FLAC (`audio/flac.py`).
"""

import bisect
import json
import os
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mdl_toolkit.audio.flac import PackedAudio, unpack_audio
from mdl_toolkit.data.tokenization import IGNORE_INDEX, Tokens
from mdl_toolkit.errors import DatasetError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import parse_json, refuse_devices
from mdl_toolkit.utils.schema import (
    BOOLEAN,
    TEXT,
    Schema,
    integer,
    list_of,
    number,
    object_of,
    optional,
    required,
)
from mdl_toolkit.weights.provenance import Prompts
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles

RECORD_FILE = "mdl-toolkit.json"
FORMAT = 2
# Its audio is rounded to 16 bits.
ROUNDED_FORMAT = 1

FEATURES = {
    "input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "labels": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "audio": {"dtype": "binary", "_type": "Value"},
    "audio_format": {"dtype": "string", "_type": "Value"},
    "audio_scale": {"dtype": "float32", "_type": "Value"},
    "audio_length": {"dtype": "int64", "_type": "Value"},
    "line": {"dtype": "int64", "_type": "Value"},
}
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "audio": pa.binary(),
        "audio_format": pa.string(),
        "audio_scale": pa.float32(),
        "audio_length": pa.int64(),
        "line": pa.int64(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)
SCHEMAS = {ROUNDED_FORMAT: pa.schema([*SCHEMA][:6]), FORMAT: SCHEMA}
# Of the JSON files.
COUNT = integer(0, 2**62)
RECORD: Schema = {
    "format": required(integer()),
    **dict.fromkeys(("tokenizer", "chat_template"), required(TEXT)),
    **dict.fromkeys(("system_prompt", "user_prompt"), required(optional(TEXT))),
    "prompts": object_of(
        {
            **dict.fromkeys(("system", "user"), optional(TEXT)),
            **dict.fromkeys(("system_differs", "user_differs"), BOOLEAN),
        }
    ),
    "rows": required(COUNT),
    **dict.fromkeys(("seconds", "shortest_seconds", "longest_seconds"), number(0)),
    **dict.fromkeys(("text_tokens", "audio_tokens", "median_tokens", "p95_tokens", "most_tokens"), COUNT),
    **dict.fromkeys(("padded", "silent", "clipped", "truncated", "bytes"), COUNT),
    "toolkit": TEXT,
}
STATE: Schema = {
    "_data_files": required(
        list_of(object_of({"filename": required(TEXT), "crc32": optional(integer(0, 2**32 - 1))}))
    )
}


# --- samples -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Hold one example, ready for a batch.

    Attributes:
        input_ids: `[tokens]` int32.
        labels: `[tokens]` int32, -100 where nothing is to be learnt.
        waveform: `[samples]` float32 at 16 kHz.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    waveform: NDArray[np.float32]


# --- the record --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Hold what a converted dataset records of its contents and origin.

    Attributes:
        tokenizer: fingerprint of the tokenizer.
        chat_template: fingerprint of the chat template.
        system_prompt, user_prompt: the conversion's defaults.
        prompts: those of the rows themselves.
        rows: examples in the dataset.
        seconds: of audio.
        shortest_seconds: of the shortest clip.
        longest_seconds: of the longest clip.
        text_tokens: all tokens that are not audio.
        audio_tokens: all tokens that are audio.
        median_tokens: tokens that half of the examples do not exceed.
        p95_tokens: tokens that 95 % of the examples do not exceed.
        most_tokens: tokens of the longest example.
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
        """Refuse a model whose tokenizer or chat template is not the dataset's.

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


# --- reading -----------------------------------------------------------------------------------------


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file, read in pieces, which take no memory of a process that maps it later."""
    crc32 = 0
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            crc32 = zlib.crc32(piece, crc32)
    return crc32


def is_converted(path: Path) -> bool:
    """Tell whether a folder is a dataset that this toolkit converted."""
    return (path / RECORD_FILE).is_file() and (path / "state.json").is_file()


@dataclass
class ConvertedDataset:
    """Read samples of a converted dataset, memory-mapped; may be sent to other processes.

    Raises:
        DatasetError: the folder is not a complete converted dataset.
    """

    folder: Path
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        # The shard that each of them is in.
        self._shards: list[str] = []
        if not is_converted(self.folder):
            raise DatasetError(
                "{folder}: not a complete dataset written by convert-dataset; convert again",
                folder=self.folder,
            )
        refuse_devices(self.folder, DatasetError)
        values, state = self._read(RECORD_FILE, RECORD), self._read("state.json", STATE)
        if values["format"] not in SCHEMAS:
            raise self._damaged(f"format {values['format']}, this version reads {FORMAT}")
        try:
            self.record = Record(**{**values, "prompts": Prompts(**values.get("prompts", {}))})
        # It is of a version with other figures.
        except TypeError as problem:
            raise self._damaged(f"{RECORD_FILE}: {problem}") from problem
        for file in state["_data_files"]:
            name = Path(file["filename"]).name
            try:
                batches = self._read_shard(self.folder / name, file.get("crc32"))
            except (OSError, ValueError, pa.ArrowException) as problem:
                raise self._damaged(f"{name}: {problem}") from problem
            self._batches += batches
            self._shards += [name] * len(batches)
        self._starts = [0, *np.cumsum([len(batch) for batch in self._batches]).tolist()]
        if self._starts[-1] != self.record.rows:
            raise self._damaged(f"{self._starts[-1]} rows, {self.record.rows} recorded")

    def check_model(self, files: TokenizerFiles) -> None:
        """Refuse a model whose tokenizer or chat template is another, and tokens that it does not have.

        Raises:
            DatasetError: naming the fingerprints, or the shard.
        """
        self.record.check_model(files, str(self.folder))
        size = files.vocabulary_size
        for shard, batch in zip(self._shards, self._batches, strict=True):
            if (highest := batch.column("input_ids").values.to_numpy().max(initial=0)) >= size:
                raise self._damaged(f"{shard}: token {highest}, of {size} in the vocabulary")

    def __len__(self) -> int:
        return self.record.rows

    def __getitem__(self, index: int) -> Sample:
        batch, row = self._locate(index)
        column = {name: batch.column(name)[row] for name in batch.schema.names}
        data = column["audio"].as_buffer()
        about = (column[f"audio_{name}"].as_py() for name in ("format", "scale", "length"))
        tokens = self.tokens(index)
        try:
            return Sample(tokens.input_ids, tokens.labels, unpack_audio(PackedAudio(data, *about)))
        except ValueError as problem:
            shard = self._shards[bisect.bisect_right(self._starts, index) - 1]
            raise self._damaged(f"{shard}, line {self.line(index)} of the CSV: {problem}") from problem

    def tokens(self, index: int) -> Tokens:
        """Return an example's ids and labels; no audio is decoded."""
        batch, row = self._locate(index)
        return Tokens(*(batch.column(name)[row].values.to_numpy() for name in ("input_ids", "labels")))

    def __reduce__(self) -> tuple[Any, ...]:
        return ConvertedDataset, (self.folder,)

    def encoded_audio(self, index: int) -> memoryview:
        """Return the bytes that hold an example's audio; they are not decoded."""
        batch, row = self._locate(index)
        return memoryview(batch.column(SCHEMA.names.index("audio"))[row].as_buffer())

    def line(self, index: int) -> int:
        """Return the line of the CSV where an example's row starts, as if each had one if it is not noted."""
        batch, row = self._locate(index)
        return int(batch.column("line")[row].as_py()) if "line" in batch.schema.names else index + 2

    def where(self, index: int) -> str:
        """Return where an example's row is, as messages name it: the line of the CSV."""
        return str(self.line(index))

    @cached_property
    def lines(self) -> NDArray[np.int64]:
        """Return the line of the CSV where the row of every example starts, `[examples]`."""
        if "line" not in SCHEMAS[self.record.format].names:
            return np.arange(len(self), dtype=np.int64) + 2
        return np.concatenate([np.zeros(0, np.int64), *(b.column("line").to_numpy() for b in self._batches)])

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """Return the tokens of every example, `[examples]`."""
        counts = [batch.column(0).value_lengths().to_numpy() for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)

    @cached_property
    def supervised_counts(self) -> NDArray[np.int64]:
        """Return the supervised tokens of every example, `[examples]`."""
        counts = []
        for batch in self._batches:
            labels = batch.column(1)
            seen = np.concatenate([[0], np.cumsum(labels.values.to_numpy() != IGNORE_INDEX)])
            offsets = labels.offsets.to_numpy()
            counts.append(seen[offsets[1:]] - seen[offsets[:-1]])
        return np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)

    @cached_property
    def audio_lengths(self) -> NDArray[np.int64]:
        """Return the audio samples of every example, `[examples]`."""
        index = SCHEMA.names.index("audio_length")
        return np.concatenate([np.zeros(0, np.int64), *(b.column(index).to_numpy() for b in self._batches)])

    def _read_shard(self, file: Path, crc32: int | None) -> list[pa.RecordBatch]:
        """Map a shard, once its bytes are known to be those that were written.

        Raises:
            ValueError, OSError, ArrowException: it is not what was written.
        """
        if self.record.format == FORMAT and checksum(file) != crc32:
            raise ValueError("its checksum is another, it was changed")
        # A closed map stays mapped as long as a batch needs it, but takes no file descriptor.
        with pa.memory_map(os.fsencode(file)) as mapped:
            stream = pa.ipc.open_stream(mapped)
            if not stream.schema.equals(SCHEMAS[self.record.format]):
                raise ValueError(f"columns {stream.schema.names}")
            batches: list[pa.RecordBatch] = [*stream]
        for batch in batches:
            batch.validate(full=True)
            ids, labels = (batch.column(each).values.to_numpy() for each in ("input_ids", "labels"))
            if len(ids) != len(labels) or (labels != np.where(labels == IGNORE_INDEX, labels, ids)).any():
                raise ValueError("labels that are not its tokens")
            if ids.min(initial=0) < 0:
                raise ValueError("a token below 0")
        return batches

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        return self._batches[number], index - self._starts[number]

    def _read(self, name: str, schema: Schema) -> dict[str, Any]:
        """Read a JSON object of the folder.

        Raises:
            DatasetError: it is not what was written.
        """
        try:
            values = parse_json((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise self._damaged(f"{name}: {problem}") from problem
        if fault := object_of(schema).fault(name, values):
            raise self._damaged(fault)
        return dict(values)

    def _damaged(self, reason: str | Localized) -> DatasetError:
        return DatasetError(
            "{folder}: the dataset is damaged ({reason}); convert again", folder=self.folder, reason=reason
        )
