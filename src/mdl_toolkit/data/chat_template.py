"""A row to messages, and messages to segments: each prompt, audio or answer.

The checkpoint's chat template is data and decides everything around the user's words. It is rendered with
marks in their places, so that nothing in the words can pass for a part of the template, and nothing has to
be searched for afterwards.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox

from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized

Role = Literal["system", "user", "assistant"]
_MARK = "\ufdd0{}\ufdd1"  # Unicode noncharacters: no template holds them
_MARKED = re.compile("\ufdd0(\\d+)\ufdd1")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        text: the words; None when there are none.
        has_audio: the recording comes before the words.
    """

    role: Role
    text: str | None
    has_audio: bool = False


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation.

    Attributes:
        kind: `answer` is what the model shall learn to say, its closing token included; `audio` stands for
            the recording; all else is `prompt`.
        text: as rendered; for `audio` the placeholder.
        is_template: the text is the template's, and special tokens in it are tokens; in the user's own words
            they are plain text.
    """

    kind: Literal["prompt", "audio", "answer"]
    text: str
    is_template: bool


@dataclass(frozen=True)
class AudioMarks:
    """The tokens around and in the place of a recording."""

    token: str = "<|AUDIO|>"
    begin: str = "<|audio_bos|>"
    end: str = "<|audio_eos|>"


def messages_of(row: Row, *, with_answer: bool) -> tuple[Message, ...]:
    """The conversation of a row; an empty system prompt is none (rule 2)."""
    system = (Message("system", row.system_prompt),) if row.system_prompt else ()
    user = Message("user", row.user_prompt or None, has_audio=True)
    answer = (Message("assistant", row.prediction or ""),) if with_answer else ()
    return (*system, user, *answer)


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template.

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

    def segments(self, messages: tuple[Message, ...]) -> tuple[Segment, ...]:
        """Render a conversation.

        A conversation that ends with an answer begins with exactly what inference renders without it, so
        that the model is trained on the prompt that it will be asked with.

        Raises:
            ModelError: the template fails, leaves out words or audio, or does not close the answer.
        """
        shape = tuple((m.role, m.text is not None, m.has_audio) for m in messages)
        words = [m.text for m in messages if m.text is not None]
        return tuple(
            Segment(piece.kind, words[piece.word], False) if piece.word is not None
            else Segment(piece.kind, piece.text, True)
            for piece in _skeleton(self, shape)
        )  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """A segment of which the words are not filled in yet: `word` is their number."""

    kind: Literal["prompt", "audio", "answer"]
    text: str = ""
    word: int | None = None


_Shape = tuple[tuple[Role, bool, bool], ...]


@lru_cache(maxsize=64)
def _skeleton(template: ChatTemplate, shape: _Shape) -> tuple[_Piece, ...]:
    """The pieces of every conversation of one shape; a template is rendered once per shape."""
    turns, words = _marked_turns(shape), sum(has_text for _, has_text, _ in shape)
    if shape[-1][0] != "assistant":
        return tuple(_prompt_pieces(template, _render(template, turns, asking=True), words))
    prompt = _prompt_pieces(template, _render(template, turns[:-1], asking=True), words - 1)
    rest = _after_answer(template, _render(template, turns, asking=False), words - 1)
    return (
        *prompt,
        _Piece("answer", word=words - 1),
        _Piece("answer", template.end_of_turn),
        *([_Piece("prompt", rest)] if rest else []),
    )


def _after_answer(template: ChatTemplate, rendered: str, answer: int) -> str:
    """What the template writes after an answer and the token that closes it."""
    _, mark, after = rendered.partition(_MARK.format(answer))
    if not mark or _MARKED.search(after):
        raise _unfit(_WORDS)
    if template.marks.token in after:
        raise _unfit(_audio_words(template))
    if not after.startswith(template.end_of_turn):
        raise _unfit(
            Localized("it does not close an answer with {end_of_turn}", end_of_turn=template.end_of_turn)
        )
    return after[len(template.end_of_turn) :]


def _marked_turns(shape: _Shape) -> list[dict[str, Any]]:
    turns, word = [], 0
    for role, has_text, has_audio in shape:
        parts: list[dict[str, str]] = [{"type": "audio", "audio": ""}] if has_audio else []
        if has_text:
            parts.append({"type": "text", "text": _MARK.format(word)})
            word += 1
        turns.append({"role": role, "content": parts if has_audio else parts[0]["text"]})
    return turns


def _prompt_pieces(template: ChatTemplate, rendered: str, words: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    for index, part in enumerate(_MARKED.split(rendered)):
        if index % 2:
            pieces.append(_Piece("prompt", word=int(part)))
        elif part:
            pieces += _audio_pieces(part, template.marks)
    if sorted(piece.word for piece in pieces if piece.word is not None) != list(range(words)):
        raise _unfit(_WORDS)
    if sum(piece.kind == "audio" for piece in pieces) != 1:
        raise _unfit(_audio_words(template))
    return pieces


def _audio_pieces(text: str, marks: AudioMarks) -> list[_Piece]:
    """Split the template's text at the placeholder; marks around it are added where neither is there."""
    before, found, after = text.partition(marks.token)
    if not found:
        return [_Piece("prompt", text)]
    if not before.endswith(marks.begin) and not after.startswith(marks.end):
        before, after = before + marks.begin, marks.end + after
    following = _audio_pieces(after, marks) if after else []
    return [*([_Piece("prompt", before)] if before else []), _Piece("audio", marks.token), *following]


def _render(template: ChatTemplate, turns: list[dict[str, Any]], *, asking: bool) -> str:
    variables = dict(template.variables)
    try:
        return _compile(template.source).render(
            messages=turns, add_generation_prompt=asking, tools=None, documents=None, **variables
        )
    except Exception as problem:  # a template is a program, and may fail in every way that one can
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise _unfit(reason) from problem


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which a template may say what is an answer: here its content, nothing else."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Read up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """Compile in a sandbox, with what transformers offers a template (its `chat_template_utils`)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


_WORDS = Localized("it repeats words of a message or leaves them out")


def _audio_words(template: ChatTemplate) -> Localized:
    token = template.marks.token
    return Localized("it does not place {token} exactly once", token=token)


def _unfit(reason: str | Localized) -> ModelError:
    return ModelError("the model's chat template cannot be used: {reason}", reason=reason)
