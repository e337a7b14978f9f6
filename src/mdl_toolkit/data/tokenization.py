"""Spans to `input_ids` and `labels`, by construction.

Labels cover the answer and the token that closes it, nothing else. Special tokens in the user's own words
are encoded as plain text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mdl_toolkit.data.chat_template import AudioMarks, ChatTemplate, Span, messages_of
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import ModelError, is_error, naming_row
from mdl_toolkit.model.constants import IGNORE_INDEX as IGNORE_INDEX
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles

# Examples whose shared prefix is taken for that of all.
PREFIX_SAMPLE_SIZE = 1000
PREFIX_SAMPLE_SEED = 0


@dataclass(frozen=True)
class Tokens:
    """Hold a conversation as token ids.

    Attributes:
        input_ids: `[tokens]` int32, one `<|AUDIO|>` per audio token.
        labels: `[tokens]` int32, the ids to be learnt, -100 elsewhere; not shifted.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class ChatTokenizer:
    """Encode conversations with one model's tokenizer and chat template.

    Attributes:
        files: the texts of `tokenizer.json` and of the chat template.
    """

    files: TokenizerFiles

    def __reduce__(self) -> tuple[type["ChatTokenizer"], tuple[TokenizerFiles]]:
        # A pickled tokenizer forgets `encode_special_tokens`.
        return type(self), (self.files,)

    def encode_row(self, row: Row, audio_tokens: int, *, with_answer: bool) -> Tokens:
        """Encode a row whose recording becomes `audio_tokens` tokens.

        Raises:
            ToolkitError: the tokenizer's library gives up on it, or memory runs out.
        """
        with naming_row(row.line, row.shown):
            spans = self.template.spans(messages_of(row, with_answer=with_answer))
            return self.encode(spans, audio_tokens)

    def shared_prefix_length(self, examples: Iterable[NDArray[np.int32]]) -> int:
        """Count the tokens before the audio that all examples begin with, a system prompt for example.

        Args:
            examples: the `input_ids` of each, `[tokens]`.
        """
        audio_id = self.id_of(self._specials["audio_token"])
        prefix: NDArray[np.int32] | None = None
        for input_ids in examples:
            ids = input_ids[: np.append(np.flatnonzero(input_ids == audio_id), len(input_ids))[0]]
            prefix = ids if prefix is None else prefix
            length = min(len(prefix), len(ids))
            prefix = ids[: int(np.cumprod(prefix[:length] == ids[:length]).sum())]
        return 0 if prefix is None else len(prefix)

    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids that are learnt of an answer: its tokens and the one that closes it."""
        row = Row(0, "", "", None, None, answer, ())
        labels = self.encode_row(row, 1, with_answer=True).labels
        return [*map(int, labels[labels != IGNORE_INDEX])]

    def encode(self, spans: tuple[Span, ...], audio_tokens: int) -> Tokens:
        """Encode a rendered conversation.

        Prompt and answer are encoded apart, so that a training example begins with exactly the ids that
        inference begins with; within each, neighbouring texts are encoded together.
        """
        ids: list[int] = []
        labels: list[int] = []
        for is_answer, run in groupby(spans, lambda span: span.kind == "answer"):
            new = self._encode_run(run, audio_tokens)
            ids += new
            labels += new if is_answer else [IGNORE_INDEX] * len(new)
        return Tokens(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))

    def decode(self, ids: list[int]) -> str:
        """Decode new tokens to text, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int:
        """Return the id of a token.

        Raises:
            ModelError: the tokenizer does not have it.
        """
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ModelError("the tokenizer has no token {token}", token=token)
        return int(token_id)

    @property
    def pad_id(self) -> int:
        """Return the id that fills short examples of a batch."""
        return self.id_of(self._specials["pad_token"])

    @cached_property
    def end_id(self) -> int:
        """Return the id that closes an answer."""
        return self.id_of(self.template.end_of_turn)

    @cached_property
    def template(self) -> ChatTemplate:
        """Return the chat template."""
        names = self._specials
        marks = AudioMarks(names["audio_token"], names["audio_bos_token"], names["audio_eos_token"])
        return ChatTemplate(self.files.chat_template, marks=marks, variables=self.files.specials)

    @cached_property
    def backend(self) -> Tokenizer:
        """Return the tokenizer; it reads special tokens as plain text, but not `<tool_call>` and its like.

        Raises:
            ModelError: `tokenizer.json` does not describe one.
        """
        try:
            tokenizer = Tokenizer.from_str(self.files.tokenizer)
        # The library raises no other kind of error, or gives up.
        except BaseException as problem:
            if not is_error(problem):
                raise
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

    def _encode_run(self, spans: Iterable[Span], audio_tokens: int) -> list[int]:
        """Encode spans that are all prompt (and audio) or all answer."""
        ids: list[int] = []
        text = ""
        for span in spans:
            # Plain text and special tokens in turns.
            parts = [span.text]
            if span.kind == "audio":
                parts = ["", span.text]
            elif span.is_template:
                parts = self._special_pattern.split(span.text)
            for index, part in enumerate(parts):
                if index % 2 == 0:
                    text += part
                    continue
                ids += self._encode_text(text)
                ids += [self.id_of(part)] * (audio_tokens if span.kind == "audio" else 1)
                text = ""
        return ids + self._encode_text(text)

    def _encode_text(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


def prefix_sample(count: int) -> list[int]:
    """Choose which of `count` examples tell the shared prefix: spread, as files are often sorted."""
    return sorted(Random(PREFIX_SAMPLE_SEED).sample(range(count), min(count, PREFIX_SAMPLE_SIZE)))
