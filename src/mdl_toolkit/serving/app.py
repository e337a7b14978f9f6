"""The addresses of the server: OpenAI's for chats, transcriptions and models, health, and the page.

Whatever cannot be answered is refused with a status, and one sentence in OpenAI's form of an error.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from mdl_toolkit.errors import ToolkitError
from mdl_toolkit.inference.generate import SamplingParams
from mdl_toolkit.serving.engine import Answer, ServedModel, answers
from mdl_toolkit.serving.gate import BodyLimit, Gate, error_of, error_response
from mdl_toolkit.serving.page import page_and_policy
from mdl_toolkit.serving.protocol import (
    ChatRequest,
    GoneError,
    Prompt,
    RequestError,
    TranscriptionRequest,
    UnknownModelError,
    read_messages,
)

# What a transcription asks where neither the request nor the training has a prompt.
TRANSCRIBE = "Transcribe the recording."


async def closing_stack() -> AsyncIterator[AsyncExitStack]:
    """Give a request what closes when its response has been sent, or its client is gone."""
    async with AsyncExitStack() as stack:
        yield stack


# The argument of that name of a request's handler.
Closing = Annotated[AsyncExitStack, Depends(closing_stack)]


@dataclass(frozen=True)
class Limits:
    """Limit what a request may ask.

    Attributes:
        request_mb: megabytes of its body.
        audio_seconds: of its recording.
        new_tokens: of its answer.
    """

    request_mb: float
    audio_seconds: float
    new_tokens: int


@dataclass(frozen=True)
class Service:
    """Answer requests with the models that are served.

    Attributes:
        models: by name; the first is taken where a request names none.
        limits: of requests.
    """

    models: Mapping[str, ServedModel]
    limits: Limits

    async def page(self) -> HTMLResponse:
        """Return the page to try it."""
        page, policy = page_and_policy()
        return HTMLResponse(
            page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        )

    async def health(self) -> JSONResponse:
        """Say whether every model answers."""
        is_well = all(model.batch.is_alive for model in self.models.values())
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    async def list_models(self) -> JSONResponse:
        """List the models, with the prompts that they were trained with."""
        listed = [
            {
                "id": model.name,
                "object": "model",
                "created": model.created,
                "owned_by": "mdl-toolkit",
                "parent": model.parent,
                "prompts": {"system": model.prompts.system, "user": model.prompts.user},
            }
            for model in self.models.values()
        ]
        return JSONResponse({"object": "list", "data": listed, "limits": vars(self.limits)})

    async def chat(self, request: Request, asked: ChatRequest, closing: Closing) -> Response:
        """Answer a chat."""
        asked.check()
        model, prompt = self.model(asked.model), read_messages(asked.messages)
        most = asked.max_completion_tokens or asked.max_tokens
        length, coming = await self.begin(closing, model, prompt, most, asked.sampling)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
        if asked.stream:
            has_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return streamed(request, chat_chunks(head, coming, length if has_usage else None))
        answer = await whole_answer(request, coming)
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        whole = {"object": "chat.completion", "choices": [choice], "usage": _usage(length, answer)}
        return JSONResponse({**head, **whole})

    async def transcribe(self, request: Request, closing: Closing) -> Response:
        """Answer a form with a recording, by the prompt of the training if it has none."""
        async with request.form(max_files=1) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise RequestError(
                    "file: expected a recording, sent as a file of a form (multipart/form-data)"
                )
            texts = {name: value for name, value in form.items() if isinstance(value, str) and value}
            recording = await file.read()
        asked = TranscriptionRequest.model_validate(texts)
        asked.check()
        model = self.model(asked.model)
        prompt = Prompt(None, asked.prompt or model.prompts.user or TRANSCRIBE, recording)
        most = asked.max_completion_tokens or asked.max_tokens
        _, coming = await self.begin(closing, model, prompt, most, asked.sampling)
        if asked.stream:
            return streamed(request, transcript_events(coming))
        answer = await whole_answer(request, coming)
        is_plain = asked.response_format == "text"
        return PlainTextResponse(answer.text) if is_plain else JSONResponse({"text": answer.text})

    def model(self, name: str | None) -> ServedModel:
        """Return a model by its name.

        Raises:
            RequestError: there is none.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            names = ", ".join(self.models)
            raise UnknownModelError("no model {name}; there are: {names}", name=name, names=names)
        return self.models[name]

    async def begin(
        self,
        closing: AsyncExitStack,
        model: ServedModel,
        prompt: Prompt,
        most: int | None,
        sampling: SamplingParams,
    ) -> tuple[int, AsyncIterator[Answer]]:
        """Decode a prompt, and return the number of its tokens and the answer to come.

        Raises:
            RequestError: the recording cannot be used, or a limit does not allow it.
        """
        limit = self.limits.new_tokens
        if most is not None and most > limit:
            raise RequestError(
                "max_tokens {most}: at most {limit} are given here (--max-new-tokens)", most=most, limit=limit
            )
        closing.enter_context(model.batch.place())
        sample = await asyncio.to_thread(model.sample_of, prompt, self.limits.audio_seconds)
        length, budget = len(sample.input_ids), limit if most is None else most
        if length + budget > model.context:
            raise RequestError(
                "the prompt takes {length} tokens and the answer up to {budget}; this model has room for "
                "{context}: send less, or ask for fewer with max_tokens",
                length=length,
                budget=budget,
                context=model.context,
            )
        coming = answers(model, sample, budget, sampling)
        return length, await closing.enter_async_context(aclosing(coming))


def create_app(service: Service, token: str | None, host: str) -> FastAPI:
    """Make the application.

    Args:
        service: what answers.
        token: what requests have to send; None for nothing.
        host: the name or address that is listened at.
    """
    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(title="mdl-toolkit", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=service.limits.request_mb)
    app.add_middleware(Gate, token=token, host=host)
    for problem in (RequestValidationError, ValidationError, HTTPException, ToolkitError):
        app.add_exception_handler(problem, error_response)
    app.add_api_route("/", service.page)
    app.add_api_route("/health", service.health)
    app.add_api_route("/v1/models", service.list_models)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/audio/transcriptions", service.transcribe, methods=["POST"])
    return app


async def whole_answer(request: Request, coming: AsyncIterator[Answer]) -> Answer:
    """Wait for the whole answer.

    Raises:
        GoneError: the client has hung up.
    """

    async def last() -> Answer:
        async for answer in coming:
            found = answer
        return found

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    whole, gone = asyncio.create_task(last()), asyncio.create_task(hang_up())
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise GoneError("the client has hung up")
        return whole.result()
    finally:
        whole.cancel()
        gone.cancel()
        await asyncio.gather(whole, gone, return_exceptions=True)


def _usage(length: int, answer: Answer) -> dict[str, int]:
    count = len(answer.ids)
    return {"prompt_tokens": length, "completion_tokens": count, "total_tokens": length + count}


def streamed(request: Request, events: AsyncIterator[Any]) -> StreamingResponse:
    """Send events as they come; what goes wrong on the way becomes the last one, worded as a refusal."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        except HTTPException as problem:
            error = {"error": error_of(request, problem)}
            yield f"data: {json.dumps(error, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def chat_chunks(
    head: Mapping[str, Any], coming: AsyncIterator[Answer], length: int | None
) -> AsyncIterator[Any]:
    """Yield the chunks of a chat: who speaks, texts, why it ends, and its tokens where `length` is given."""
    head, sent = {**head, "object": "chat.completion.chunk"}, ""

    def chunk(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]}

    yield chunk({"role": "assistant", "content": ""})
    async for answer in coming:
        if len(answer.text) > len(sent):
            yield chunk({"content": answer.text[len(sent) :]})
            sent = answer.text
    yield chunk({}, answer.finish_reason)
    if length is not None:
        yield {**head, "choices": [], "usage": _usage(length, answer)}


async def transcript_events(coming: AsyncIterator[Answer]) -> AsyncIterator[Any]:
    """Yield the events of a transcription: texts as they come, and the whole."""
    sent = ""
    async for answer in coming:
        if len(answer.text) > len(sent):
            yield {"type": "transcript.text.delta", "delta": answer.text[len(sent) :]}
            sent = answer.text
    yield {"type": "transcript.text.done", "text": answer.text}
