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
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mdl_toolkit.audio import MIN_SAMPLES
from mdl_toolkit.console import say
from mdl_toolkit.conversation import Message
from mdl_toolkit.dataset import RECORD_FILE, ConvertedDataset, Sample
from mdl_toolkit.errors import DatasetError
from mdl_toolkit.language import Text
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.tokens import IGNORE_INDEX, Encoder

COLUMNS = ("input_ids", "attention_mask", "input_values", "audio_length", "labels")
TURN = "<|im_start|>"  # begins a header
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, pa.ArrowException)

_Integers = NDArray[np.int64]
_Flags = NDArray[np.bool_]


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
    _places: "_Places" = field(init=False, repr=False)

    def __post_init__(self, encoder: Encoder) -> None:
        marks = _Marks.of(encoder)
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
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, row, place = self._locate(index)
        waveform = part.audio.row(row)[: int(place.length)].astype(np.float32)
        if not np.isfinite(waveform).all():
            raise self._refused(Text("NaN or infinite samples", "含有 NaN 或无穷大的采样"), index)
        return Sample(*self.text(index), np.pad(waveform, (0, max(0, MIN_SAMPLES - len(waveform)))))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_audio_id": self._audio_id, "_places": self._places}

    def text(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """`input_ids` and `labels` of a row, `[positions]` each; its audio is not read."""
        part, row, place = self._locate(index)
        ids = part.ids.row(row)[int(place.skip) :].astype(np.int32)
        labels = np.full_like(ids, IGNORE_INDEX)
        labels[place.answer : place.end] = ids[place.answer : place.end]
        if place.gap >= 0:
            ids = np.insert(ids, place.gap, self._audio_id)
            labels = np.insert(labels, place.gap, IGNORE_INDEX)
        return ids, labels

    @property
    def positions(self) -> _Integers:
        """Positions of every row in the decoder, `[rows]`."""
        return self._places.positions

    @property
    def supervised(self) -> _Integers:
        """Supervised positions of every row, `[rows]`."""
        return self._places.end - self._places.answer

    @property
    def samples(self) -> _Integers:
        """Audio samples of every row, `[rows]`."""
        return np.maximum(self._places.length, MIN_SAMPLES)

    @cached_property
    def _parts(self) -> "list[_Part]":
        try:
            return [_Part.of(batch) for file in _shards(self.folder) for batch in _batches(file)]
        except _UNREADABLE as problem:
            reason = Text(f"the dataset is damaged ({problem})", f"数据集已损坏（{problem}）")
            raise self._refused(reason) from problem

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([len(part.lengths) for part in self._parts], dtype=np.int64).tolist()]

    def _locate(self, index: int) -> "tuple[_Part, int, _Places]":
        place = _Places(*(column[index] for column in self._places))
        number = bisect.bisect_right(self._starts, index) - 1
        return self._parts[number], index - self._starts[number], place

    def _checked(self, marks: "_Marks") -> "_Places":
        nothing = _Places(*(np.zeros(0, np.int64) for _ in _Places._fields))
        found = [nothing, *(self._checked_part(number, marks) for number in range(len(self._parts)))]
        return _Places(*(np.concatenate(columns) for columns in zip(*found, strict=True)))

    def _checked_part(self, number: int, marks: "_Marks") -> "_Places":
        try:
            return _places(self._parts[number], marks)
        except _RowError as problem:
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


@dataclass(frozen=True)
class _Lists:
    """A column of lists: row `i` is `values[bounds[i] : bounds[i + 1]]`."""

    values: NDArray[Any]
    bounds: _Integers

    @staticmethod
    def of(column: pa.Array, kinds: str) -> "_Lists":
        """View a column whose numbers are of one of numpy's kinds."""
        if not isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
            raise ValueError(f"{column.type} where lists are expected")
        if column.null_count:
            raise ValueError("missing values")
        lengths = pc.list_value_length(column).to_numpy()
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return _Lists(_numbers(column.flatten(), kinds), bounds)

    def row(self, number: int) -> NDArray[Any]:
        """One list."""
        return self.values[self.bounds[number] : self.bounds[number + 1]]


def _numbers(column: pa.Array, kinds: str) -> NDArray[Any]:
    if column.null_count:
        raise ValueError("missing values")
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in kinds:
        raise ValueError(f"{column.type} where other numbers are expected")
    return values


@dataclass(frozen=True)
class _Part:
    """The rows of one record batch; views of the mapped file."""

    ids: _Lists
    mask: _Lists
    audio: _Lists
    labels: _Lists
    lengths: _Integers

    @staticmethod
    def of(batch: pa.RecordBatch) -> "_Part":
        """Raises ValueError if a column is not of the kind that 0.1.0 wrote."""
        ids, mask, audio, lengths, labels = (batch.column(name) for name in COLUMNS)
        return _Part(
            _Lists.of(ids, "iu"), _Lists.of(mask, "iub"), _Lists.of(audio, "f"), _Lists.of(labels, "iu"),
            _numbers(lengths, "iu").astype(np.int64),
        )  # fmt: skip


# --- what is where in a row --------------------------------------------------------------------------


class _Places(NamedTuple):
    """What is where in every row, `[rows]` each; `answer`, `end` and `gap` count from the first real id."""

    skip: _Integers  # padding before the first real id
    answer: _Integers  # where the answer begins
    end: _Integers  # where it ends, `<|im_end|>` included
    gap: _Integers  # where a clip too short for an audio token lacks it; -1 where none is missing
    positions: _Integers  # real ids, and that audio token
    length: _Integers  # samples of audio without padding


@dataclass(frozen=True)
class _Marks:
    """Ids of the model by which a row is understood."""

    audio: int
    begin: int  # before audio
    end: int  # after audio
    turn: int
    closing: int  # `<|im_end|>`
    header: NDArray[np.int32]  # `[ids]`, what the chat template writes before an answer
    vocabulary: int  # one more than the highest id

    @staticmethod
    def of(encoder: Encoder) -> "_Marks":
        """The marks of a model's tokenizer and chat template."""
        turn, names = encoder.id_of(TURN), encoder.template.marks
        messages = (Message("user", None, has_audio=True), Message("assistant", ""))
        tokens = encoder.encode(encoder.template.segments(messages), 1)
        prompt = tokens.input_ids[: np.flatnonzero(tokens.labels != IGNORE_INDEX)[0]]
        begins = [*np.flatnonzero(prompt == turn).tolist(), len(prompt)]
        audio, begin, end = (encoder.id_of(name) for name in (names.token, names.begin, names.end))
        highest = max(encoder.tokenizer.get_vocab(with_added_tokens=True).values())
        return _Marks(audio, begin, end, turn, encoder.end_id, prompt[begins[-2:][0] :], highest + 1)


class _RowError(Exception):
    """A row of a part that cannot be used."""

    def __init__(self, row: int, text: Text) -> None:
        super().__init__(row, text)
        self.row, self.text = row, text


def _refuse(bad: _Flags, en: str, zh: str, **numbers: _Integers) -> None:
    """Raise _RowError for the first bad row; `{name}` in the texts stands for its number of that name."""
    if bad.any():
        row = int(np.argmax(bad))
        found = {name: int(column[row]) for name, column in numbers.items()}
        raise _RowError(row, Text(en.format(**found), zh.format(**found)))


def _count(where: _Flags, starts: _Integers, stops: _Integers) -> _Integers:
    """How many flags are set in each stretch, `[stretches]`."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(where, dtype=np.int64)])
    counts: _Integers = total[stops] - total[starts]
    return counts


def _places(part: _Part, marks: _Marks) -> _Places:
    """Check the rows of a part, audio apart, and find what is where; raises _RowError.

    Within the checks places are those in the part's flat ids, row behind row.
    """
    starts, stops = part.ids.bounds[:-1], part.ids.bounds[1:]
    first = _after_padding(part)
    ids = part.ids.values
    _refuse(
        _count((ids < 0) | (ids >= marks.vocabulary), first, stops) > 0,
        "an id that the model's tokenizer does not have", "含有模型的分词器中没有的 id",
    )  # fmt: skip
    begin, stop = _supervised(part, first)
    answer = _after_header(ids, first, begin, stop, marks.header)
    end = _after_answer(ids, answer, stop, marks)
    missing = _check_audio(part, first, marks)
    gap = np.where(missing, _gaps(ids, first, answer, missing, marks) - first, -1)
    return _Places(
        first - starts, answer - first, end - first, gap, stops - first + missing, part.lengths
    )  # fmt: skip


def _after_padding(part: _Part) -> _Integers:
    """Where the real ids of each row begin."""
    for other in (part.mask, part.labels):
        _refuse(
            np.diff(other.bounds) != np.diff(part.ids.bounds),
            "input_ids, attention_mask and labels differ in length",
            "input_ids、attention_mask 与 labels 长度不同",
        )
    real = part.mask.values != 0
    starts, stops = part.ids.bounds[:-1], part.ids.bounds[1:]
    count = _count(real, starts, stops)
    _refuse(
        _count(real, stops - count, stops) != count,
        "attention_mask shows padding elsewhere than on the left", "attention_mask 的填充不在左侧",
    )  # fmt: skip
    return stops - count


def _supervised(part: _Part, first: _Integers) -> tuple[_Integers, _Integers]:
    """Where what the labels of each row supervise begins and ends."""
    ids, labels, stops = part.ids.values, part.labels.values, part.ids.bounds[1:]
    learnt = labels != IGNORE_INDEX
    count = _count(learnt, first, stops)
    _refuse(count == 0, "its labels supervise nothing", "标签未监督任何内容")
    where = np.flatnonzero(learnt)
    begin, last = where[np.searchsorted(where, first)], where[np.searchsorted(where, stops) - 1]
    _refuse(last + 1 - begin != count, "its labels supervise more than one stretch", "标签监督的部分不连续")
    _refuse(
        _count(learnt & (labels != ids), first, stops) > 0,
        "labels that differ from the ids", "标签与 input_ids 不一致",
    )  # fmt: skip
    return begin, last + 1


def _after_header(
    ids: NDArray[Any], first: _Integers, begin: _Integers, stop: _Integers, header: NDArray[np.int32]
) -> _Integers:
    """Where the answer of each row begins, however much of the header before it is supervised."""
    answer = np.full_like(begin, -1)
    for supervised in range(len(header) + 1):
        after = begin + supervised
        fits = (answer < 0) & (after - len(header) >= first) & (after <= stop)
        windows = after[fits, None] + np.arange(-len(header), 0)
        fits[fits] = (ids[windows] == header).all(axis=1)
        answer[fits] = after[fits]
    _refuse(
        answer < 0, "the header of the model's chat template is not before its answer",
        "回答之前不是模型的对话模板中的角色标记",
    )  # fmt: skip
    return answer


def _after_answer(ids: NDArray[Any], answer: _Integers, stop: _Integers, marks: _Marks) -> _Integers:
    """Where the answer of each row ends: after the last `<|im_end|>` that is supervised."""
    closing = np.concatenate([np.full(1, -1), np.flatnonzero(ids == marks.closing)])
    end = closing[np.searchsorted(closing, stop) - 1] + 1
    _refuse(end <= answer, "no <|im_end|> is supervised", "标签未监督 <|im_end|>")
    _refuse(
        _count(ids == marks.turn, answer, end) > 0,
        f"its labels supervise more than one turn ({TURN} after the header)",
        f"标签监督了不止一轮对话（角色标记之后还有 {TURN}）",
    )
    return end


def _check_audio(part: _Part, first: _Integers, marks: _Marks) -> _Flags:
    """Which rows lack the one audio token that a clip shorter than 0.2 s becomes when it is padded.

    0.1.0 padded no clip, and a clip without a token could not be trained; rule 15 pads it.
    """
    lengths, stored = part.lengths, np.diff(part.audio.bounds)
    _refuse(
        (lengths < 1) | (lengths > stored),
        "audio_length is {length}, and {stored} samples are there",
        "audio_length 为 {length}，实际有 {stored} 个采样", length=lengths, stored=stored,
    )  # fmt: skip
    due = np.array([audio_token_count(max(n, MIN_SAMPLES)) for n in lengths.tolist()], dtype=np.int64)
    count = _count(part.ids.values == marks.audio, first, part.ids.bounds[1:])
    missing: _Flags = (lengths < MIN_SAMPLES) & (count == 0)
    _refuse(
        (count != due) & ~missing,
        "{count} audio tokens, and its audio becomes {due}: another model's tokenizer, or damage",
        "有 {count} 个音频词元，而音频对应 {due} 个：分词器属于另一模型，或数据已损坏", count=count, due=due,
    )  # fmt: skip
    return missing


def _gaps(
    ids: NDArray[Any], first: _Integers, answer: _Integers, missing: _Flags, marks: _Marks
) -> _Integers:
    """Where the missing audio tokens belong; of other rows, anywhere."""
    empty = np.zeros(len(ids) + 1, dtype=np.bool_)
    empty[1:-1] = (ids[:-1] == marks.begin) & (ids[1:] == marks.end)
    _refuse(
        missing & (_count(empty, first + 1, answer) != 1),
        "its clip has no audio token, and no place for one", "音频没有对应的词元，也没有放置词元的位置",
    )  # fmt: skip
    where = np.append(np.flatnonzero(empty), len(ids))
    return where[np.searchsorted(where, first + 1)]
