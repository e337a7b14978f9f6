"""The converted dataset on disk: its columns and record, and the samples read from it.

Reading is a memory map and a view: no list of numbers is ever made. Audio is mono FLAC (`audio/flac.py`).
"""

import bisect
import json
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
}
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "audio": pa.binary(),
        "audio_format": pa.string(),
        "audio_scale": pa.float32(),
        "audio_length": pa.int64(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


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
        if not is_converted(self.folder):
            raise DatasetError(
                "{folder}: not a complete dataset written by convert-dataset; convert again",
                folder=self.folder,
            )
        try:
            values = json.loads((self.folder / RECORD_FILE).read_text(encoding="utf-8"))
            if values["format"] not in (ROUNDED_FORMAT, FORMAT):
                raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
            self.record = Record(**{**values, "prompts": Prompts(**values.get("prompts", {}))})
            rows = self._starts[-1]
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as problem:
            raise self._damaged(str(problem)) from problem
        if rows != self.record.rows:
            raise self._damaged(f"{rows} rows, {self.record.rows} recorded")

    def __len__(self) -> int:
        return self.record.rows

    def __getitem__(self, index: int) -> Sample:
        batch, row = self._locate(index)
        column = {name: batch.column(i)[row] for i, name in enumerate(SCHEMA.names)}
        packed = PackedAudio(
            column["audio"].as_buffer(),
            column["audio_format"].as_py(),
            column["audio_scale"].as_py(),
            column["audio_length"].as_py(),
        )
        tokens = self.tokens(index)
        try:
            return Sample(tokens.input_ids, tokens.labels, unpack_audio(packed))
        except ValueError as problem:
            raise self._damaged(f"row {index}: {problem}") from problem

    def tokens(self, index: int) -> Tokens:
        """Return an example's ids and labels; no audio is decoded."""
        batch, row = self._locate(index)
        return Tokens(*(batch.column(name)[row].values.to_numpy() for name in ("input_ids", "labels")))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "record": self.record}

    def encoded_audio(self, index: int) -> memoryview:
        """Return the bytes that hold an example's audio; they are not decoded."""
        batch, row = self._locate(index)
        return memoryview(batch.column(SCHEMA.names.index("audio"))[row].as_buffer())

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

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        batches: list[pa.RecordBatch] = []
        for file in state["_data_files"]:
            # A closed map stays mapped as long as a batch needs it, but takes no file descriptor.
            with pa.memory_map(str(self.folder / Path(file["filename"]).name)) as mapped:
                stream = pa.ipc.open_stream(mapped)
                if not stream.schema.equals(SCHEMA):
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
