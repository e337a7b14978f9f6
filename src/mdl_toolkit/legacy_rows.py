"""Rows as mdl-toolkit 0.1.0 wrote them: whether they are that, and what is where in them.

All rows of a part are looked at together, ids behind ids. Where padding, answer and audio lie follows from
the model's tokens, as rule 23 has it, not from the labels alone. No file is opened here.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.audio import MIN_SAMPLES
from mdl_toolkit.conversation import Message
from mdl_toolkit.language import Text
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.tokens import IGNORE_INDEX, Encoder

TURN = "<|im_start|>"  # begins a header

Integers = NDArray[np.int64]
_Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Lists:
    """A column of lists: row `i` is `values[bounds[i] : bounds[i + 1]]`."""

    values: NDArray[Any]
    bounds: Integers

    def row(self, number: int) -> NDArray[Any]:
        """One list."""
        return self.values[self.bounds[number] : self.bounds[number + 1]]


@dataclass(frozen=True)
class Part:
    """Some rows, column by column.

    Attributes:
        ids: input_ids, padded on the left.
        mask: attention_mask, 0 where there is padding.
        audio: samples at 16 kHz, padded on the right.
        labels: beside the ids.
        lengths: samples without padding, `[rows]`.
    """

    ids: Lists
    mask: Lists
    audio: Lists
    labels: Lists
    lengths: Integers


class Places(NamedTuple):
    """What is where in every row, `[rows]` each; `answer`, `end` and `gap` count from the first real id."""

    skip: Integers  # padding before the first real id
    answer: Integers  # where the answer begins
    end: Integers  # where it ends, `<|im_end|>` included
    gap: Integers  # where a clip too short for an audio token lacks it; -1 where none is missing
    positions: Integers  # real ids, and that audio token
    length: Integers  # samples of audio without padding


@dataclass(frozen=True)
class Marks:
    """Ids of the model by which a row is understood."""

    audio: int
    begin: int  # before audio
    end: int  # after audio
    turn: int
    closing: int  # `<|im_end|>`
    header: NDArray[np.int32]  # `[ids]`, what the chat template writes before an answer
    vocabulary: int  # one more than the highest id

    @staticmethod
    def of(encoder: Encoder) -> "Marks":
        """The marks of a model's tokenizer and chat template."""
        turn, names = encoder.id_of(TURN), encoder.template.marks
        messages = (Message("user", None, has_audio=True), Message("assistant", ""))
        tokens = encoder.encode(encoder.template.segments(messages), 1)
        prompt = tokens.input_ids[: np.flatnonzero(tokens.labels != IGNORE_INDEX)[0]]
        begins = [*np.flatnonzero(prompt == turn).tolist(), len(prompt)]
        audio, begin, end = (encoder.id_of(name) for name in (names.token, names.begin, names.end))
        highest = max(encoder.tokenizer.get_vocab(with_added_tokens=True).values())
        return Marks(audio, begin, end, turn, encoder.end_id, prompt[begins[-2:][0] :], highest + 1)


class RowError(Exception):
    """A row of a part that cannot be used: its number there, and why."""

    def __init__(self, row: int, text: Text) -> None:
        super().__init__(row, text)
        self.row, self.text = row, text


def places(part: Part, marks: Marks) -> Places:
    """Check the rows of a part, audio apart, and find what is where.

    Within the checks places are those in the part's flat ids, row behind row.

    Raises:
        RowError: a row is not what 0.1.0 made for this model.
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
    return Places(
        first - starts, answer - first, end - first, gap, stops - first + missing, part.lengths
    )  # fmt: skip


def _refuse(bad: _Flags, en: str, zh: str, **numbers: Integers) -> None:
    """Raise RowError for the first bad row; `{name}` in the texts stands for its number of that name."""
    if bad.any():
        row = int(np.argmax(bad))
        found = {name: int(column[row]) for name, column in numbers.items()}
        raise RowError(row, Text(en.format(**found), zh.format(**found)))


def _count(where: _Flags, starts: Integers, stops: Integers) -> Integers:
    """How many flags are set in each stretch, `[stretches]`."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(where, dtype=np.int64)])
    counts: Integers = total[stops] - total[starts]
    return counts


def _after_padding(part: Part) -> Integers:
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


def _supervised(part: Part, first: Integers) -> tuple[Integers, Integers]:
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
    ids: NDArray[Any], first: Integers, begin: Integers, stop: Integers, header: NDArray[np.int32]
) -> Integers:
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


def _after_answer(ids: NDArray[Any], answer: Integers, stop: Integers, marks: Marks) -> Integers:
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


def _check_audio(part: Part, first: Integers, marks: Marks) -> _Flags:
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


def _gaps(ids: NDArray[Any], first: Integers, answer: Integers, missing: _Flags, marks: Marks) -> Integers:
    """Where the missing audio tokens belong; of other rows, anywhere."""
    empty = np.zeros(len(ids) + 1, dtype=np.bool_)
    empty[1:-1] = (ids[:-1] == marks.begin) & (ids[1:] == marks.end)
    _refuse(
        missing & (_count(empty, first + 1, answer) != 1),
        "its clip has no audio token, and no place for one", "音频没有对应的词元，也没有放置词元的位置",
    )  # fmt: skip
    where = np.append(np.flatnonzero(empty), len(ids))
    return where[np.searchsorted(where, first + 1)]
