"""A row to messages, and messages to spans: each prompt, audio or answer.

The checkpoint's chat template is data and decides everything around the user's texts. It is rendered with
marks in their stead, so that nothing in a text can pass for a part of the template, and nothing has to be
searched for afterwards.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.bounded import OutOfBoundsError, call_bounded

# What rendering one conversation may take: processor time, bytes allocated, and bytes of text.
SECONDS, MEMORY, LENGTH = 5, 1 << 29, 1 << 20
Role = Literal["system", "user", "assistant"]
# Unicode noncharacters, which no template holds.
_MARK = "\ufdd0{}\ufdd1"
_MARKED = re.compile("\ufdd0(\\d+)\ufdd1")


@dataclass(frozen=True)
class Message:
    """Hold one turn of a conversation.

    Attributes:
        role: who speaks.
        text: the turn's text; None when there is none.
        has_audio: the recording comes before the text.
    """

    role: Role
    text: str | None
    has_audio: bool = False


@dataclass(frozen=True)
class Span:
    """Hold a stretch of a rendered conversation.

    Attributes:
        kind: `answer` is what the model shall learn to say, its closing token included; `audio` stands for
            the recording; all else is `prompt`.
        text: as rendered; for `audio` the placeholder.
        is_template: the text is the template's, and special tokens in it are tokens; in the user's own texts
            they are plain text.
    """

    kind: Literal["prompt", "audio", "answer"]
    text: str
    is_template: bool


@dataclass(frozen=True)
class AudioMarks:
    """Name the tokens around and in the place of a recording."""

    token: str = "<|AUDIO|>"
    begin: str = "<|audio_bos|>"
    end: str = "<|audio_eos|>"


def messages_of(row: Row, *, with_answer: bool) -> tuple[Message, ...]:
    """Return the conversation of a row; an empty system prompt is left out."""
    system = (Message("system", row.system_prompt),) if row.system_prompt else ()
    user = Message("user", row.user_prompt or None, has_audio=True)
    answer = (Message("assistant", row.prediction or ""),) if with_answer else ()
    return (*system, user, *answer)


@dataclass(frozen=True)
class ChatTemplate:
    """Render conversations with a checkpoint's chat template.

    Attributes:
        source: Jinja text.
        end_of_turn: the token that closes an answer.
        marks: the audio tokens.
        variables: what else the template may read, by name: the tokenizer's special tokens.
    """

    source: str
    end_of_turn: str = "<|im_end|>"
    marks: AudioMarks = AudioMarks()
    variables: tuple[tuple[str, str], ...] = ()

    def spans(self, messages: tuple[Message, ...]) -> tuple[Span, ...]:
        """Render a conversation.

        A conversation that ends with an answer begins with exactly what inference renders without it, so
        that the model is trained on the prompt that it will be asked with.

        Raises:
            ModelError: the template fails, leaves out texts or audio, or does not close the answer.
        """
        shape = tuple((m.role, m.text is not None, m.has_audio) for m in messages)
        texts = [m.text for m in messages if m.text is not None]
        return tuple(
            span if span.is_template else replace(span, text=texts[int(span.text)])
            for span in _skeleton(self, shape)
        )


_Shape = tuple[tuple[Role, bool, bool], ...]


@lru_cache(maxsize=64)
def _skeleton(template: ChatTemplate, shape: _Shape) -> tuple[Span, ...]:
    """Render every conversation of one shape at once: role, has a text, has audio, of each message.

    In place of a message's text is its index.

    Raises:
        ModelError: see `ChatTemplate.spans`.
    """
    # Messages as a template takes them, with numbered marks for their texts.
    turns: list[dict[str, Any]] = []
    texts = 0
    for role, has_text, has_audio in shape:
        content: list[dict[str, str]] = [{"type": "audio", "audio": ""}] if has_audio else []
        if has_text:
            content.append({"type": "text", "text": _MARK.format(texts)})
            texts += 1
        turns.append({"role": role, "content": content if has_audio else content[0]["text"]})
    if shape[-1][0] != "assistant":
        return tuple(_prompt_spans(template, _render(template, turns, asking=True), texts))
    prompt = _prompt_spans(template, _render(template, turns[:-1], asking=True), texts - 1)
    rendered = _render(template, turns, asking=False)
    _, mark, after = rendered.partition(_MARK.format(texts - 1))
    if not mark or _MARKED.search(after):
        raise _unfit(_TEXTS_MISSING)
    if template.marks.token in after:
        raise _unfit(_audio_misplaced(template))
    end = template.end_of_turn
    if not after.startswith(end):
        raise _unfit(Localized("it does not close an answer with {end_of_turn}", end_of_turn=end))
    answer = [Span("answer", str(texts - 1), False), Span("answer", end, True)]
    following = after.removeprefix(end)
    return (*prompt, *answer, *([Span("prompt", following, True)] if following else []))


def _prompt_spans(template: ChatTemplate, rendered: str, texts: int) -> list[Span]:
    """Split a rendered prompt at its marks and placeholder, and check that each is there once."""
    spans: list[Span] = []
    for index, part in enumerate(_MARKED.split(rendered)):
        if index % 2:
            spans.append(Span("prompt", part, False))
        elif part:
            spans += _audio_spans(part, template.marks)
    if sorted(int(span.text) for span in spans if not span.is_template) != list(range(texts)):
        raise _unfit(_TEXTS_MISSING)
    if sum(span.kind == "audio" for span in spans) != 1:
        raise _unfit(_audio_misplaced(template))
    return spans


def _audio_spans(text: str, marks: AudioMarks) -> list[Span]:
    """Split the template's text at the placeholder; audio marks are added where neither is there."""
    before, placeholder, after = text.partition(marks.token)
    if not placeholder:
        return [Span("prompt", text, True)]
    if not before.endswith(marks.begin) and not after.startswith(marks.end):
        before, after = before + marks.begin, marks.end + after
    preceding = [Span("prompt", before, True)] if before else []
    return [*preceding, Span("audio", marks.token, True), *(_audio_spans(after, marks) if after else [])]


def _render(template: ChatTemplate, turns: list[dict[str, Any]], *, asking: bool) -> str:
    """Render turns in transformers' sandbox, within bounds; `asking` adds what an answer follows."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render() -> str:
        variables = dict(template.variables)
        (text,), _ = render_jinja_template(
            [turns], chat_template=template.source, add_generation_prompt=asking, **variables
        )
        return str(text)

    try:
        return call_bounded(render, seconds=SECONDS, memory=MEMORY, length=LENGTH)
    # A template is a program, and may fail in every way that one can.
    except ValueError as problem:
        raise _unfit(problem) from problem
    except OutOfBoundsError as problem:
        raise _unfit(
            Localized(
                "it takes more than {seconds} s, {memory} MB or {length} KB of text",
                seconds=SECONDS,
                memory=MEMORY >> 20,
                length=LENGTH >> 10,
            )
        ) from problem


_TEXTS_MISSING = Localized("it repeats words of a message or leaves them out")


def _audio_misplaced(template: ChatTemplate) -> Localized:
    token = template.marks.token
    return Localized("it does not place {token} exactly once", token=token)


def _unfit(reason: Exception | Localized) -> ModelError:
    return ModelError("the model's chat template cannot be used: {reason}", reason=reason)
