"""Answer requests as they come: each joins the running batch of its model, and leaves it when it is complete.

What a request becomes is what `inference` makes of the same row: recording stored and read back, prompt of
the training where none is given, tokens, budget.
"""

import asyncio
import itertools
import queue
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Container, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mdl_toolkit.audio.flac import pack_audio, unpack_audio
from mdl_toolkit.audio.loading import load
from mdl_toolkit.data.chat_template import messages_of
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import AudioError, CutOffError, TooLongError, breakdown, is_error
from mdl_toolkit.inference.generate import Answerer, Question, SamplingParams, not_finite
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.serving.protocol import (
    BusyError,
    FailedError,
    Prompt,
    RequestError,
    TooLargeError,
    UnanswerableError,
)
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.machine import describe_oom
from mdl_toolkit.weights.provenance import Prompts

# Requests that wait for each place of a batch before others are refused.
WAITING = 8

# A token, the end of the answer, or why there is none.
Item = int | None | Exception


class ContinuousBatch:
    """Answer questions in a thread of its own; those that come join the ones that are being answered.

    Args:
        answerer: what computes; nothing else may use it.
        places: its batch size.

    Attributes:
        is_alive: questions are answered.
    """

    def __init__(self, answerer: Callable[[], Answerer], places: int) -> None:
        self._make_answerer, self._most = answerer, places * (1 + WAITING)
        self._answerer = answerer()
        self._waiting: queue.SimpleQueue[Question] = queue.SimpleQueue()
        self._listeners: dict[int, Callable[[Item], object]] = {}
        self._keys, self._taken, self.is_alive = itertools.count(), 0, True
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def ends(self) -> set[int]:
        """Return the tokens that end an answer."""
        return self._answerer.ends

    @contextmanager
    def place(self) -> Iterator[None]:
        """Keep a place for a request among those that are answered or wait.

        Raises:
            BusyError: so many are waiting already that one more would wait for long.
            FailedError: no question is answered any more.
        """
        self._check_alive()
        if self._taken >= self._most:
            raise BusyError("too many requests are waiting; try again in a while")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    async def tokens(
        self, sample: Sample, max_new_tokens: int, sampling: SamplingParams
    ) -> AsyncGenerator[int, None]:
        """Yield the tokens of an answer as they come; closing the iterator gives up the rest.

        Raises:
            RequestError: the answer cannot be computed.
        """
        key, loop, items = next(self._keys), asyncio.get_running_loop(), asyncio.Queue[Item]()
        self._listeners[key] = lambda item: loop.call_soon_threadsafe(items.put_nowait, item)
        self._waiting.put(Question(key, sample, max_new_tokens, sampling))
        try:
            self._check_alive()
            while (item := await items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            # Nobody waits for the rest.
            if self._listeners.pop(key, None):
                self._answerer.cancelled.add(key)

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise FailedError("this model answers no more; start the server again")

    def _run(self) -> None:
        try:
            while True:
                arrivals = _Arrivals(self._waiting, self._waiting.get(), self._listeners)
                try:
                    self.answer(arrivals)
                # Whatever it is, only these requests fail of it: the next ones have a new batch.
                except BaseException as problem:
                    if not is_error(problem):
                        raise
                    name = f"{type(problem).__name__}: {problem}"
                    self.fail(arrivals, describe_oom(problem) or breakdown(problem) or name)
                    self._answerer = self._make_answerer()
                    # A device that is lost stays lost: then this thread ends, which `/health` tells.
                    self._answerer.check_device()
        finally:
            self.is_alive = False
            for key in [*self._listeners]:
                self._tell(key, FailedError("this model answers no more; start the server again"))

    def answer(self, arrivals: "_Arrivals") -> None:
        """Answer questions; those without finite logits once more alone, if nothing of them was heard yet."""
        heard: set[int] = set()

        def listen(key: int, token: int) -> None:
            heard.add(key)
            self._tell(key, token)

        answerer = self._answerer
        answerer.listener = listen
        for key, answer in answerer.answers(arrivals):
            text, question = answer, arrivals.given.pop(key)
            if text is None and key not in heard:
                alone = self._make_answerer()
                alone.listener, alone.cancelled = listen, answerer.cancelled
                ((_, text),) = alone.answers([question])
            lost = not_finite(answerer.dtype)
            failed = UnanswerableError("it cannot be answered: {reason}", reason=lost)
            self._tell(key, failed if text is None else None)

    def fail(self, arrivals: "_Arrivals", reason: object) -> None:
        """Tell those that were being answered why they have no answer."""
        failed = [key for key in arrivals.given if key in self._listeners]
        warn("{count} {count:request|requests} failed: {reason}", count=len(failed), reason=reason)
        for key in failed:
            self._tell(key, FailedError("it cannot be answered: {reason}", reason=reason))

    def _tell(self, key: int, item: Item) -> None:
        """Hand an item to whoever waits for it."""
        is_last = not isinstance(item, int)
        listener = self._listeners.pop(key, None) if is_last else self._listeners.get(key)
        if listener is not None:
            listener(item)
        if is_last:
            self._answerer.cancelled.discard(key)


@dataclass
class _Arrivals:
    """Give the questions that have come by now; when more have come, it gives those too.

    Attributes:
        waiting: the questions.
        first: one that comes before them.
        wanted: the keys of those whose answers somebody waits for; others are passed over.
        given: the questions that were given, by key.
    """

    waiting: "queue.SimpleQueue[Question]"
    first: Question | None
    wanted: Container[int]
    given: dict[int, Question] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Question]:
        return self

    def __next__(self) -> Question:
        while True:
            question, self.first = self.first, None
            if question is None:
                try:
                    question = self.waiting.get_nowait()
                except queue.Empty:
                    raise StopIteration from None
            if question.key in self.wanted:
                self.given[question.key] = question
                return question


def render_template(tokenizer: ChatTokenizer) -> None:
    """Render the chat template once for each kind of prompt, which forks, while there are no threads yet.

    Raises:
        ModelError: the template cannot be used.
    """
    for system, user in itertools.product((None, "a"), repeat=2):
        row = Row(0, "", "", system, user, None, ())
        tokenizer.template.spans(messages_of(row, with_answer=False))


@dataclass(frozen=True)
class ServedModel:
    """Serve one model under a name.

    Attributes:
        name: what requests call it.
        parent: the name of the base, where it is an adapter's.
        tokenizer: its tokenizer and chat template.
        prompts: those of its training.
        context: the most tokens of prompt and answer together.
        batch: what answers.
        created: seconds since 1970.
    """

    name: str
    parent: str | None
    tokenizer: ChatTokenizer
    prompts: Prompts
    context: int
    batch: ContinuousBatch
    created: int = field(default_factory=lambda: int(time.time()))

    def sample_of(self, prompt: Prompt, max_seconds: float) -> Sample:
        """Decode and encode a prompt as `inference` does a row of a CSV.

        Raises:
            RequestError: the recording cannot be used.
        """
        with tempfile.NamedTemporaryFile(prefix="mdl-toolkit-") as file:
            file.write(prompt.recording)
            file.flush()
            try:
                clip = load(Path(file.name), max_hours=max_seconds / 3600)
            except TooLongError as problem:
                raise TooLargeError(
                    "the recording is longer than {seconds:g} s, the most that is taken here "
                    "(--max-audio-seconds)",
                    seconds=max_seconds,
                ) from problem
            except CutOffError as problem:
                missing = problem.message.fields["missing"]
                raise RequestError(
                    "the recording was cut off: {missing}; send all of it", missing=missing
                ) from problem
            except AudioError as problem:
                raise RequestError("the recording: {reason}", reason=problem.message) from problem
        system = self.prompts.system if prompt.system is None else prompt.system
        user = self.prompts.user if prompt.user is None else prompt.user
        count = audio_token_count(len(clip.samples))
        row = Row(0, "", "", system, user, None, ())
        tokens = self.tokenizer.encode_row(row, count, with_answer=False)
        packed = pack_audio(clip.stored, clip.stored_rate, len(clip.samples))
        return Sample(tokens.input_ids, tokens.labels, unpack_audio(packed))


@dataclass(frozen=True)
class Answer:
    """Hold an answer, as far as it has come.

    Attributes:
        ids: its tokens.
        text: of these.
        finish_reason: `stop` at an end token, `length` at the limit; None while it goes on.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None


async def answers(
    model: ServedModel, sample: Sample, max_new_tokens: int, sampling: SamplingParams
) -> AsyncGenerator[Answer, None]:
    """Yield an answer again and again, longer each time; the last one is complete.

    A letter of several bytes is shown when all of them are there.
    """
    ids: list[int] = []
    ends, decode = model.batch.ends, model.tokenizer.decode
    async with aclosing(model.batch.tokens(sample, max_new_tokens, sampling)) as tokens:
        async for token in tokens:
            ids.append(token)
            if token in ends or len(ids) == max_new_tokens:
                continue
            text = decode(ids)
            if not text.endswith("\ufffd"):
                yield Answer(tuple(ids), text)
    has_end = ids[-1] in ends
    yield Answer(tuple(ids), decode(ids[:-1] if has_end else ids), "stop" if has_end else "length")
