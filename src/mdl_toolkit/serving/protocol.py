"""Read requests as OpenAI's interface has them, and say what they ask for.

One question is answered: at most one system message, and one user message with one recording and a text.
What would change the answer and is not supported, or is not known, is refused by name, never ignored.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.generate import SamplingParams

# Fields that clients send and that no answer depends on, whatever they say.
HARMLESS = frozenset(
    {
        "chunking_strategy", "language", "metadata", "parallel_tool_calls", "prediction", "priority",
        "prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier", "service_tier",
        "store", "stream_options", "user",
    }
)  # fmt: skip
# What a request may say of fields that are not supported: what is usual anyway.
USUAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stop": ("", []), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],),
    "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "frequency_penalty": (0,),
    "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "modalities": (["text"],),
    "top_k": (0, -1), "min_p": (0,),
}  # fmt: skip


class RequestError(HTTPException):
    """Refuse a request.

    Args:
        template: why, in one sentence, with fields as `str.format` has them, or the message itself.
        fields: their values.

    Attributes:
        status: of the response.
        message: the sentence in the reader's language.
    """

    status = 400

    def __init__(self, template: str | Localized, /, **fields: Any) -> None:
        self.message = Localized.of(template, fields)
        super().__init__(self.status, str(self.message))


class UnauthorizedError(RequestError):
    """Refuse a request without the token."""

    status = 401


class ForbiddenError(RequestError):
    """Refuse a request that a page of another site sends."""

    status = 403


class UnknownModelError(RequestError):
    """Refuse a request to a model that is not served."""

    status = 404


class TooLargeError(RequestError):
    """Refuse a request that is larger, or whose recording is longer, than is taken."""

    status = 413


class UnanswerableError(RequestError):
    """Say that the model has no answer to this request, however often it is asked."""

    status = 422


class GoneError(RequestError):
    """End a request whose client has hung up."""

    status = 499


class FailedError(RequestError):
    """Say that an answer could not be computed."""

    status = 500


class BusyError(RequestError):
    """Refuse a request while too many are waiting."""

    status = 503


class TextPart(BaseModel):
    """Hold a text of a message."""

    type: Literal["text"]
    text: str


class InputAudio(BaseModel):
    """Hold a recording: a file of any format, in base64."""

    data: str


class AudioPart(BaseModel):
    """Hold the recording of a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class ChatMessage(BaseModel):
    """Hold one message: a text, or parts."""

    role: str
    content: str | list[Annotated[TextPart | AudioPart, Field(discriminator="type")]]

    @property
    def text(self) -> str | None:
        """Return the message's texts, line by line; None if it has none."""
        if isinstance(self.content, str):
            return self.content
        texts = [part.text for part in self.content if isinstance(part, TextPart)]
        return "\n".join(texts) if texts else None

    @property
    def recordings(self) -> list[str]:
        """Return the message's recordings in base64."""
        parts = [] if isinstance(self.content, str) else self.content
        return [part.input_audio.data for part in parts if isinstance(part, AudioPart)]


class RequestSampling(SamplingParams):
    """Choose tokens with random numbers that depend on the seed alone."""

    def generator(self, key: int) -> Any:  # noqa: ARG002 - the signature of SamplingParams
        """Make the random generator of a request, whatever its number."""
        return super().generator(0)


class StreamOptions(BaseModel):
    """Say what a stream holds beside the answer."""

    include_usage: bool = False


class AnswerRequest(BaseModel):
    """Hold what both kinds of requests have: model, length, and how tokens are chosen."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**32)

    @property
    def sampling(self) -> SamplingParams:
        """Return the settings, with the defaults of `inference`."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "seed")}
        return RequestSampling(**{name: value for name, value in given.items() if value is not None})

    def check(self) -> None:
        """Refuse fields that would change the answer and are not supported, and those that nobody knows.

        Raises:
            RequestError: naming the first of them.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in HARMLESS and value is not None and value not in USUAL.get(name, ()):
                raise RequestError("{name} is not supported here; leave it out", name=name)


class ChatRequest(AnswerRequest):
    """Hold a request to `/v1/chat/completions`."""

    messages: list[ChatMessage]
    stream_options: StreamOptions | None = None


class TranscriptionRequest(AnswerRequest):
    """Hold the fields of a request to `/v1/audio/transcriptions`, but for the file; numbers come as texts."""

    __pydantic_extra__: dict[str, Annotated[float | str, Field(union_mode="left_to_right")]] = Field(
        init=False
    )

    prompt: str | None = None
    response_format: Literal["json", "text"] = "json"


@dataclass(frozen=True)
class Prompt:
    """Hold what a request asks.

    Attributes:
        system: the system prompt; None for that of the training, an empty one for none.
        user: the text about the recording, likewise.
        recording: a file of any format.
    """

    system: str | None
    user: str | None
    recording: bytes


def read_messages(messages: Sequence[ChatMessage]) -> Prompt:
    """Read the messages of a chat.

    Raises:
        RequestError: they are other ones than a system message, if any, and a user message with a recording.
    """
    roles = [message.role for message in messages]
    if roles not in (["user"], ["system", "user"], ["developer", "user"]):
        raise RequestError(
            "messages: expected a user message, and a system message before it if there is one, not {roles}; "
            "earlier turns are not taken",
            roles=", ".join(roles) or Localized("none"),
        )
    question = messages[-1]
    if len(question.recordings) != 1 or any(message.recordings for message in messages[:-1]):
        raise RequestError(
            "messages: expected one recording, as a part {part} of the user message, not {count}",
            part='{"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}',
            count=sum(len(message.recordings) for message in messages),
        )
    try:
        recording = base64.b64decode(question.recordings[0], validate=True)
    except (binascii.Error, ValueError) as problem:
        raise RequestError("input_audio.data: no base64 ({reason})", reason=problem) from problem
    system = messages[0].text if len(messages) > 1 else None
    return Prompt(system, question.text, recording)
