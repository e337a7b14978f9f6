"""Segments to `input_ids` and `labels`, by construction.

Labels cover the answer and the token that closes it, nothing else. Special tokens in the user's own words
are encoded as plain text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mdl_toolkit.data.chat_template import AudioMarks, ChatTemplate, Segment, messages_of
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import ModelError
from mdl_toolkit.model.constants import IGNORE_INDEX as IGNORE_INDEX
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles

PREFIX_SAMPLE_SIZE = 1000  # rows whose common beginning is taken for that of all
SEED = 0  # of the choice among more


@dataclass(frozen=True)
class Tokens:
    """A conversation as numbers.

    Attributes:
        input_ids: `[positions]` int32, one `<|AUDIO|>` per audio token.
        labels: `[positions]` int32, the ids to be learnt, -100 elsewhere; not shifted.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class ChatTokenizer:
    """Rows to tokens for one model's tokenizer and chat template."""

    files: TokenizerFiles

    def __reduce__(self) -> tuple[type["ChatTokenizer"], tuple[TokenizerFiles]]:
        return type(self), (self.files,)  # a pickled tokenizer forgets `encode_special_tokens`

    def encode_row(self, row: Row, audio_tokens: int, *, with_answer: bool) -> Tokens:
        """Tokens of a row whose recording becomes `audio_tokens` tokens."""
        segments = self.template.segments(messages_of(row, with_answer=with_answer))
        return self.encode(segments, audio_tokens)

    def shared_prefix_length(self, rows: Iterable[NDArray[np.int32]]) -> int:
        """How many ids before the audio all rows have in common, a system prompt for example."""
        prompts = map(self._before_audio, rows)
        return len(reduce(_common, prompts, next(prompts, np.zeros(0, np.int32))))

    def answer_ids(self, answer: str) -> list[int]:
        """What is learnt of a row with this answer: its tokens and the one that closes it."""
        row = Row(0, "", "", None, None, answer, ())
        labels = self.encode_row(row, 1, with_answer=True).labels
        return [*map(int, labels[labels != IGNORE_INDEX])]

    def encode(self, segments: tuple[Segment, ...], audio_tokens: int) -> Tokens:
        """Tokens of rendered segments.

        Prompt and answer are encoded apart, so that a training row begins with exactly the ids that
        inference begins with; within each, neighbouring texts are encoded together.
        """
        ids: list[int] = []
        labels: list[int] = []
        for is_answer, run in _runs(segments):
            new = self._encode_run(run, audio_tokens)
            ids += new
            labels += new if is_answer else [IGNORE_INDEX] * len(new)
        return Tokens(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))

    def decode(self, ids: list[int]) -> str:
        """Text of new tokens, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int:
        """The id of a token.

        Raises:
            ModelError: the tokenizer does not have it.
        """
        found = self.backend.token_to_id(token)
        if found is None:
            raise ModelError("the tokenizer has no token {token}", token=token)
        return int(found)

    @property
    def pad_id(self) -> int:
        """The id that fills short rows."""
        return self.id_of(self._specials["pad_token"])

    @cached_property
    def end_id(self) -> int:
        """The id that closes an answer."""
        return self.id_of(self.template.end_of_turn)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template."""
        names = self._specials
        marks = AudioMarks(names["audio_token"], names["audio_bos_token"], names["audio_eos_token"])
        return ChatTemplate(self.files.chat_template, marks=marks, variables=self.files.specials)

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer; special tokens are plain text to it, `<tool_call>` and its like stay tokens.

        Raises:
            ModelError: `tokenizer.json` does not describe one.
        """
        try:
            tokenizer = Tokenizer.from_str(self.files.tokenizer)
        except Exception as problem:  # the only kind of error that this library raises
            raise ModelError("tokenizer.json cannot be used: {reason}", reason=problem) from problem
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _specials(self) -> dict[str, str]:
        return dict(self.files.specials)

    @cached_property
    def _special_pattern(self) -> "re.Pattern[str]":
        added = self.backend.get_added_tokens_decoder().values()
        tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, tokens)) + ")")

    def _before_audio(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        places = np.flatnonzero(ids == self.id_of(self._specials["audio_token"]))
        return ids[: places[0]] if len(places) else ids

    def _encode_text(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _encode_run(self, segments: list[Segment], audio_tokens: int) -> list[int]:
        """Ids of segments that are all prompt (and audio) or all answer."""
        ids: list[int] = []
        text = ""
        for token, piece in self._pieces(segments):
            if token:
                ids += self._encode_text(text)
                ids += [self.id_of(token)] * (audio_tokens if piece == "audio" else 1)
                text = ""
            else:
                text += piece
        return ids + self._encode_text(text)

    def _pieces(self, segments: list[Segment]) -> list[tuple[str, str]]:
        """Pairs of a special token and `audio` or nothing, or of nothing and plain text."""
        pieces = []
        for segment in segments:
            if segment.kind == "audio":
                pieces.append((segment.text, "audio"))
            elif segment.is_template:
                parts = self._special_pattern.split(segment.text)
                pieces += [(part, "") if i % 2 else ("", part) for i, part in enumerate(parts)]
            else:
                pieces.append(("", segment.text))
        return pieces


def prefix_sample(count: int) -> list[int]:
    """Which of so many rows tell what all begin with: some from all over, as files are often in order."""
    return sorted(Random(SEED).sample(range(count), min(count, PREFIX_SAMPLE_SIZE)))


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.int32]:
    """What both begin with."""
    length = min(len(one), len(other))
    return one[: int(np.cumprod(one[:length] == other[:length]).sum())]


def _runs(segments: tuple[Segment, ...]) -> list[tuple[bool, list[Segment]]]:
    runs: list[tuple[bool, list[Segment]]] = []
    for segment in segments:
        is_answer = segment.kind == "answer"
        if not runs or runs[-1][0] != is_answer:
            runs.append((is_answer, []))
        runs[-1][1].append(segment)
    return runs
