"""Answer with a server that speaks OpenAI's chat API with audio, such as `vllm serve` on another machine.

A bounded number of requests is under way at once. What fails for a time is tried again; a server that stays
away ends the inference, which goes on from its last answer with the same command. A row that the server
refuses does so too, or with `--on-error keep` has the refusal in place of its answer.
"""

import asyncio
import base64
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import soundfile

from mdl_toolkit.audio.http import (
    LONGEST_PAUSE,
    TRANSIENT,
    FetchError,
    machine_certificates,
    refusing_proxies,
)
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.chat_template import Message, messages_of
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.errors import ModelError, ToolkitError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.generate import Question
from mdl_toolkit.inference.requests import KEEP, Inputs
from mdl_toolkit.model.constants import SAMPLE_RATE

# Tries of a row, with pauses of 1, 2, 4 and 8 s between them; when it is busy still, with the longest.
TRIES, LONGEST_WAIT = 5, 8.0
# Seconds between two tries, whatever the server asks for.
LEAST_PAUSE = 0.1
# Statuses of a server that has as many requests as it takes.
BUSY = {httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE}
# Seconds: for a connection, and for an answer, which may wait for others.
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
# An address of this machine, to which no proxy leads.
LOOPBACK = re.compile(r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])([:/]|$)", re.IGNORECASE)
# The variable in which vLLM's server itself looks for its key.
KEY = "VLLM_API_KEY"
# Characters of a server's message that are shown.
MOST_SHOWN = 300
# Statuses with which a server refuses a row for what is in it: it cannot be read, or is too large.
ROW = {
    httpx.codes.BAD_REQUEST, httpx.codes.REQUEST_ENTITY_TOO_LARGE, httpx.codes.UNSUPPORTED_MEDIA_TYPE,
    httpx.codes.UNPROCESSABLE_ENTITY,
}  # fmt: skip
# Where a request is silent a server may take these from the model's `generation_config.json`, which
# `inference` does not heed: they leave the probabilities as they are.
NEUTRAL = {
    "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip


@dataclass(frozen=True)
class FoundModel:
    """Hold what a server tells of a model.

    Attributes:
        name: what requests call it.
        has_prompts: where a request has no prompt it takes those of the training, as `serve` does, so that an
            empty one has to be sent for none.
    """

    name: str
    has_prompts: bool


@dataclass(eq=False)
class Traffic:
    """Hold what a server has to do for us.

    Attributes:
        under_way: stands for each request that waits for its answer.
        answered: number of those that have one.
    """

    under_way: set[object] = field(default_factory=set)
    answered: int = 0


class RefusedRowError(ToolkitError):
    """Say why a server refuses one row for good."""


class ServerAnswerer:
    """Answer questions with a server, as many at once as the batch size."""

    def __init__(self, options: InferenceOptions, inputs: Inputs) -> None:
        """Ask the server for its models.

        Args:
            options: the inference's.
            inputs: the rows, for their messages.

        Raises:
            ModelError: the server does not answer, or does not have the model.
        """
        self._options, self._lines = options, inputs.lines
        self._conversations = {
            index: messages_of(row, with_answer=False) for row, indices in inputs for index in indices
        }
        self._model, self._traffic = asyncio.run(find_served_model(options)), Traffic()

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[int, list[str] | Localized]]:
        """Yield each question's key and its answer, as they come, or why the server refuses it.

        Raises:
            ModelError: the server refuses a row, or does not answer.
        """
        waiting, running = iter(questions), set[asyncio.Task[tuple[int, list[str] | Localized]]]()
        # Between two answers the loop stands still, while rows are read and answers recorded.
        loop, client = asyncio.new_event_loop(), make_client(address_of(self._options))
        try:
            while True:
                for question in islice(waiting, self._options.batch_size - len(running)):
                    running.add(loop.create_task(self.ask(client, question)))
                if not running:
                    return
                first = asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                done, running = loop.run_until_complete(first)
                for task in done:
                    yield task.result()
        finally:
            loop.run_until_complete(cancel(running, client))
            loop.close()

    async def ask(self, client: httpx.AsyncClient, question: Question) -> tuple[int, list[str] | Localized]:
        """Send a question, and return its key and its answer, or why it is refused."""
        assert isinstance(question.sample, Sample)
        audio = as_wav(question.sample.waveform)
        body = {
            "model": self._model.name,
            "messages": as_json(
                self._conversations[question.key], audio, has_prompts=self._model.has_prompts
            ),
            "max_tokens": question.max_new_tokens,
            "temperature": self._options.temperature,
            "top_p": self._options.top_p,
            "seed": self._options.seed + question.key,
            **NEUTRAL,
        }
        place = Localized("line {line}", line=int(self._lines[question.key]))
        path = "/v1/chat/completions"
        try:
            address = address_of(self._options) + path
            answer = await send(client, "POST", address, body, place, TRIES, self._traffic)
        except RefusedRowError as problem:
            if self._options.on_error != KEEP:
                raise ModelError(problem.message) from problem
            return question.key, problem.message
        try:
            return question.key, [str(answer["choices"][0]["message"]["content"] or "")]
        except (KeyError, IndexError, TypeError):
            raise ModelError(
                "{address}: what the server answers is no chat completion; give the address of an "
                "OpenAI-compatible server such as `vllm serve`",
                address=address_of(self._options),
            ) from None


async def cancel(running: Iterable[asyncio.Task[Any]], client: httpx.AsyncClient) -> None:
    """Cancel requests that are under way, and close their connections."""
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.aclose()


async def find_served_model(options: InferenceOptions) -> FoundModel:
    """Find what a server calls the model of `--model-name`; it may be its only model.

    Raises:
        ModelError: the server does not answer, or has several models and none of that name.
    """
    address, name = address_of(options), options.model_name
    async with make_client(address) as client:
        answer = await send(client, "GET", f"{address}/v1/models")
    listed = answer.get("data") if isinstance(answer, dict) else None
    models = [each for each in listed or () if isinstance(each, dict) and each.get("id")]
    # vLLM tells the folder of a model or adapter as its root.
    found = {str(alias): each for each in models for alias in (each.get("root"), each["id"])}
    folder = Path(name).expanduser().resolve()
    wanted = [found[each] for each in (name, str(folder), folder.name) if each in found]
    if wanted or len(models) == 1:
        model = (wanted or models)[0]
        return FoundModel(str(model["id"]), "prompts" in model)
    raise ModelError(
        "{address}: the server has no model called {name}, but {names}; start it with "
        "--served-model-name {name}, or name the folder as one of these",
        address=address,
        name=folder.name,
        names=", ".join(str(each["id"]) for each in models) or Localized("none"),
    )


def address_of(options: InferenceOptions) -> str:
    """Return a server's address without the path of the API's version."""
    return options.engine.rstrip("/").removesuffix("/v1")


def make_client(address: str) -> httpx.AsyncClient:
    """Make a client with the environment's key, and its proxies unless the server is on this machine.

    Raises:
        ModelError: there is a proxy that httpx cannot use.
    """
    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with refusing_proxies():
            return httpx.AsyncClient(
                timeout=TIMEOUT,
                headers=headers,
                verify=machine_certificates(),
                trust_env=not LOOPBACK.match(address),
            )
    except FetchError as failure:
        raise ModelError(
            "{server}: {reason}; set NO_PROXY for a server that needs no proxy",
            server=address,
            reason=failure.reason,
        ) from failure


async def send(
    client: httpx.AsyncClient,
    method: str,
    address: str,
    body: Mapping[str, Any] | None = None,
    place: Localized | None = None,
    tries: int = 1,
    traffic: Traffic | None = None,
) -> Any:
    """Send a request, and return the JSON of its answer.

    Args:
        client: whose connections are used.
        method: GET or POST.
        address: where to.
        body: JSON.
        place: what it is about, for messages.
        tries: how often it is sent, if the failure is of a passing kind; a server that is busy with
            other requests of ours does not use one up.
        traffic: these.

    Raises:
        RefusedRowError: the server refuses it for what is in it.
        ModelError: the server refuses it for another reason, or does not answer at the last try.
    """
    server, sent, failed, traffic = address.partition("/v1/")[0], 0, 0, traffic or Traffic()
    while True:
        status, pause, mark = 0, min(2.0**sent, LONGEST_WAIT), object()
        earlier, answered = {*traffic.under_way}, traffic.answered
        traffic.under_way.add(mark)
        try:
            response = await client.request(method, address, json=body)
        except (httpx.TransportError, httpx.InvalidURL) as problem:
            reason = str(problem) or type(problem).__name__
        else:
            status = response.status_code
            if response.is_success:
                traffic.answered += 1
                return response.json() if is_json(response) else None
            if status not in TRANSIENT:
                raise refusal(server, response, place)
            reason = reason_of(response)
            pause = wanted_pause(response, pause)
        finally:
            traffic.under_way.remove(mark)
        is_at_work = traffic.answered > answered or bool(earlier & traffic.under_way)
        sent, failed = sent + 1, failed + (status not in BUSY or not is_at_work)
        if failed >= tries:
            raise no_answer(server, reason, is_busy=status in BUSY and place is not None)
        await asyncio.sleep(pause)


def wanted_pause(response: httpx.Response, usual: float) -> float:
    """Return the seconds after which a server wants to be asked again, within limits; or else the usual."""
    wait = response.headers.get("Retry-After", "")
    return min(max(float(wait), LEAST_PAUSE) if wait.isdecimal() else usual, LONGEST_PAUSE)


def no_answer(server: str, reason: str, *, is_busy: bool) -> ModelError:
    """Return the error for a server that has not answered at the last try, or takes no more requests."""
    if is_busy:
        return ModelError(
            "{server}: the server takes no further request ({reason}); lower --batch-size, or give the same "
            "command when the server has less to do: it goes on from here",
            server=server,
            reason=reason,
        )
    return ModelError(
        "{server}: the server does not answer ({reason}); is it running, and is the address right?",
        server=server,
        reason=reason,
    )


def refusal(server: str, response: httpx.Response, place: Localized | None) -> ToolkitError:
    """Return the error that says why a server refuses a request for good."""
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return ModelError(
            "{server}: the server wants a key; set the environment variable {variable}",
            server=server,
            variable=KEY,
        )
    message = Localized(
        "{server}: the server refuses {place} ({reason})",
        server=server,
        place=place or Localized("the request"),
        reason=reason_of(response),
    )
    is_of_row = place is not None and response.status_code in ROW
    return RefusedRowError(message) if is_of_row else ModelError(message)


def reason_of(response: httpx.Response) -> str:
    """Return status and message of an answer that is an error, in one line."""
    message: Any = response.json() if is_json(response) else ""
    for key in ("error", "message"):
        if isinstance(message, dict) and key in message:
            message = message[key]
    words = f"{response.status_code} {response.reason_phrase}: {message if isinstance(message, str) else ''}"
    return " ".join(words.split()).removesuffix(":")[:MOST_SHOWN]


def is_json(response: httpx.Response) -> bool:
    """Tell whether an answer can be read as JSON."""
    try:
        response.json()
    except ValueError:
        return False
    return True


def as_wav(waveform: Any) -> str:
    """Return samples as base64 of a WAV file of floats, from which a server reads them as they are."""
    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return base64.b64encode(file.getvalue()).decode()


def as_json(messages: Sequence[Message], audio: str, *, has_prompts: bool) -> list[dict[str, Any]]:
    """Return a conversation as OpenAI's API takes it, the recording before the text.

    Args:
        messages: of the row.
        audio: base64 of a WAV file.
        has_prompts: empty prompts are there too, as the server would fill them in.
    """
    turns: list[dict[str, Any]] = []
    if has_prompts and messages[0].role != "system":
        turns.append({"role": "system", "content": ""})
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.text}
        if message.has_audio:
            recording = {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}}
            text = [{"type": "text", "text": message.text or ""}] if message.text or has_prompts else []
            turn["content"] = [recording, *text]
        turns.append(turn)
    return turns
