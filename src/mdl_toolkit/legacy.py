"""A dataset that mdl-toolkit 0.1.0 converted, read as if it were one of ours; nothing is written.

Its rows are padded, ids on the left and audio on the right, and its labels also supervise the header before
an answer and what follows `<|im_end|>`. Here padding is stripped, and rule 23 decides what is learnt. There
is no record to compare with the model, so that every row is checked against the model's tokens instead.
"""

import bisect
import json
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mdl_toolkit.audio import MIN_SAMPLES
from mdl_toolkit.console import say
from mdl_toolkit.dataset import RECORD_FILE, ConvertedDataset, Sample
from mdl_toolkit.errors import DatasetError
from mdl_toolkit.language import Text
from mdl_toolkit.legacy_rows import Integers, Lists, Marks, Part, Places, RowError, places
from mdl_toolkit.tokens import IGNORE_INDEX, Encoder, Tokens

COLUMNS = ("input_ids", "attention_mask", "input_values", "audio_length", "labels")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, pa.ArrowException)


def is_legacy(folder: Path) -> bool:
    """Tell whether a folder is a dataset that 0.1.0 converted; False for whatever cannot be read."""
    if (folder / RECORD_FILE).exists():
        return False
    try:
        with pa.memory_map(str(_shards(folder)[0])) as mapped:
            return set(COLUMNS) <= set(pa.ipc.open_stream(mapped).schema.names)
    except (*_UNREADABLE, IndexError):
        return False


@dataclass
class LegacyDataset:
    """Samples of a dataset of 0.1.0, memory-mapped; may be sent to data-loader workers.

    Opening it checks ids, masks, labels and lengths of all rows; audio is checked when it is read.

    Raises:
        DatasetError: a file is damaged, or a row is not what 0.1.0 made for this model.
        ModelError: the model's tokenizer or chat template cannot be used.
    """

    folder: Path
    encoder: InitVar[Encoder]
    _audio_id: int = field(init=False, repr=False)
    _places: Places = field(init=False, repr=False)

    def __post_init__(self, encoder: Encoder) -> None:
        marks = Marks.of(encoder)
        self._audio_id, self._places = marks.audio, self._checked(marks)
        short = int((self._places.length < MIN_SAMPLES).sum())
        say(
            f"{self.folder}: {len(self)} rows, converted by mdl-toolkit 0.1.0: padding is stripped, the "
            "header is not trained" + (f", {short} clip(s) are padded to 0.2 s" if short else ""),
            f"{self.folder}：{len(self)} 行，由 mdl-toolkit 0.1.0 转换：去除填充，不训练角色标记"
            + (f"，{short} 个音频补零至 0.2 秒" if short else ""),
        )

    def __len__(self) -> int:
        return len(self._places.length)

    def __getitem__(self, index: int) -> Sample:
        tokens, (part, row) = self.tokens(index), self._locate(index)
        waveform = part.audio.row(row)[: int(self._places.length[index])].astype(np.float32)
        if not np.isfinite(waveform).all():
            raise self._refused(Text("NaN or infinite samples", "含有 NaN 或无穷大的采样"), index)
        padded = np.pad(waveform, (0, max(0, MIN_SAMPLES - len(waveform))))
        return Sample(tokens.input_ids, tokens.labels, padded)

    def tokens(self, index: int) -> Tokens:
        """A row's ids and labels; no audio is read."""
        part, row = self._locate(index)
        place = Places(*(column[index] for column in self._places))
        ids = part.ids.row(row)[int(place.skip) :].astype(np.int32)
        labels = np.full_like(ids, IGNORE_INDEX)
        labels[place.answer : place.end] = ids[place.answer : place.end]
        if place.gap >= 0:
            ids = np.insert(ids, place.gap, self._audio_id)
            labels = np.insert(labels, place.gap, IGNORE_INDEX)
        return Tokens(ids, labels)

    def _locate(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        return self._parts[number], index - self._starts[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_audio_id": self._audio_id, "_places": self._places}

    @property
    def positions(self) -> Integers:
        """Positions of every row in the decoder, `[rows]`."""
        return self._places.positions

    @property
    def supervised(self) -> Integers:
        """Supervised positions of every row, `[rows]`."""
        return self._places.end - self._places.answer

    @property
    def samples(self) -> Integers:
        """Audio samples of every row, `[rows]`."""
        return np.maximum(self._places.length, MIN_SAMPLES)

    @cached_property
    def _parts(self) -> list[Part]:
        try:
            return [_part(batch) for file in _shards(self.folder) for batch in _batches(file)]
        except _UNREADABLE as problem:
            reason = Text(f"the dataset is damaged ({problem})", f"数据集已损坏（{problem}）")
            raise self._refused(reason) from problem

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([len(part.lengths) for part in self._parts], dtype=np.int64).tolist()]

    def _checked(self, marks: Marks) -> Places:
        nothing = Places(*(np.zeros(0, np.int64) for _ in Places._fields))
        found = [nothing, *(self._checked_part(number, marks) for number in range(len(self._parts)))]
        return Places(*(np.concatenate(columns) for columns in zip(*found, strict=True)))

    def _checked_part(self, number: int, marks: Marks) -> Places:
        try:
            return places(self._parts[number], marks)
        except RowError as problem:
            raise self._refused(problem.text, self._starts[number] + problem.row) from None

    def _refused(self, reason: Text, row: int | None = None) -> DatasetError:
        en, zh = ("", "") if row is None else (f", row {row} (counted from 0)", f" 第 {row} 行（从 0 计）")
        return DatasetError(
            f"{self.folder}{en}: {reason.en}; convert the CSV again with convert-dataset",
            f"{self.folder}{zh}：{reason.zh}；请用 convert-dataset 重新转换 CSV",
        )


AnyDataset = ConvertedDataset | LegacyDataset  # what training reads


# --- what is on disk ---------------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / Path(file["filename"]).name for file in state["_data_files"]]


def _batches(file: Path) -> list[pa.RecordBatch]:
    with pa.memory_map(str(file)) as mapped:  # the map lives as long as a buffer does; the file is closed
        batches = [batch.select(COLUMNS) for batch in pa.ipc.open_stream(mapped)]
        mapped.seek(-len(_END_OF_STREAM), 2)
        if mapped.read() != _END_OF_STREAM:  # Arrow takes a file that was cut between two batches for whole
            raise ValueError(f"{file.name} was cut off")
    for batch in batches:
        batch.validate(full=True)
    return batches


def _part(batch: pa.RecordBatch) -> Part:
    """The rows of one record batch, as views of the mapped file.

    Raises:
        ValueError: a column is not of the kind that 0.1.0 wrote.
    """
    ids, mask, audio, lengths, labels = (batch.column(name) for name in COLUMNS)
    return Part(
        _lists(ids, "iu"), _lists(mask, "iub"), _lists(audio, "f"), _lists(labels, "iu"),
        _numbers(lengths, "iu").astype(np.int64),
    )  # fmt: skip


def _lists(column: pa.Array, kinds: str) -> Lists:
    """View a column of lists whose numbers are of one of numpy's kinds."""
    if not isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        raise ValueError(f"{column.type} where lists are expected")
    if column.null_count:
        raise ValueError("missing values")
    lengths = pc.list_value_length(column).to_numpy()
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return Lists(_numbers(column.flatten(), kinds), bounds)


def _numbers(column: pa.Array, kinds: str) -> NDArray[Any]:
    if column.null_count:
        raise ValueError("missing values")
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in kinds:
        raise ValueError(f"{column.type} where other numbers are expected")
    return values
