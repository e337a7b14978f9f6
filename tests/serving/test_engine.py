"""Requests that join a batch: those that fail, are given up, or are too many."""

import asyncio
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.inference.generate import Answerer, Question, SamplingParams
from mdl_toolkit.serving.engine import WAITING, ContinuousBatch
from mdl_toolkit.serving.protocol import RequestError
from tests.support.processes import wait_for
from tests.support.questions import endless, load_checkpoint, questions

GREEDY = SamplingParams()


@pytest.fixture
def asked(golden):
    """A model of which every answer has as many tokens as it may, and questions."""
    model, tokenizer = load_checkpoint(golden, "A-small")
    return partial(endless, model, tokenizer), [*questions(model, 6)]


async def ids(batch, question, count=None):
    """The tokens of an answer, or the first ones."""
    found = []
    tokens = batch.tokens(question.sample, question.max_new_tokens, GREEDY)
    async for token in tokens:
        found.append(token)
        if len(found) == count:
            break
    await tokens.aclose()
    return found


async def together(batch, some):
    return await asyncio.gather(*(ids(batch, question) for question in some), return_exceptions=True)


def alone(answerer, question):
    """The tokens of an answer in no company."""
    found, single = [], answerer()
    single.listener = lambda _, token: found.append(token)
    assert [key for key, _ in single.answers([question])] == [question.key]
    return found


def test_every_request_is_answered_as_if_alone(asked):
    answerer, some = asked
    assert asyncio.run(together(ContinuousBatch(answerer, 2), some)) == [alone(answerer, q) for q in some]


def test_an_answer_that_nobody_waits_for_ends(asked):
    answerer, some = asked
    made = []

    def noted():
        made.append(answerer())
        return made[-1]

    batch = ContinuousBatch(noted, 2)
    long = replace(some[0], max_new_tokens=2_000)

    async def give_up():
        heard = await ids(batch, long, 2)
        assert await ids(batch, some[1]) == alone(answerer, some[1])
        return heard

    heard = asyncio.run(give_up())
    assert heard == alone(answerer, replace(some[0], max_new_tokens=2))
    # It has left the batch, and is forgotten.
    wait_for(lambda: not made[0].cancelled)


def test_a_failure_ends_those_that_were_being_answered_and_no_other(asked, monkeypatch, capsys):
    answerer, some = asked
    batch = ContinuousBatch(answerer, 2)
    answers = Answerer.answers

    def failing(self, questions):
        next(iter(questions))
        raise MemoryError

    monkeypatch.setattr(Answerer, "answers", failing)
    (problem,) = asyncio.run(together(batch, some[:1]))
    assert isinstance(problem, RequestError)
    assert problem.status_code == 500
    assert problem.message.en == "it cannot be answered: the machine ran out of memory"
    assert "1 request failed: the machine ran out of memory" in capsys.readouterr().err
    monkeypatch.setattr(Answerer, "answers", answers)
    assert asyncio.run(together(batch, some[:2])) == [alone(answerer, q) for q in some[:2]]
    assert batch.is_alive


def test_more_than_can_be_answered_soon_are_refused(asked):
    """A place is taken before the recording is read, and is free again when the request ends, however."""
    answerer, _ = asked
    batch = ContinuousBatch(answerer, 2)
    with ExitStack() as taken:
        for _ in range(2 * (1 + WAITING)):
            taken.enter_context(batch.place())
        batch_is_full = pytest.raises(RequestError, match="too many requests are waiting; try again")
        with batch_is_full as caught, batch.place():
            pass
    assert caught.value.status_code == 503
    with batch.place():
        pass


def test_a_question_that_nobody_waits_for_any_more_is_not_computed(asked, monkeypatch):
    answerer, some = asked
    taken, is_open = [], threading.Event()
    answers = Answerer.answers

    def noted(self, questions):
        is_open.wait(60)
        return answers(self, (taken.append(each.key) or each for each in questions))

    monkeypatch.setattr(Answerer, "answers", noted)
    batch = ContinuousBatch(answerer, 2)

    async def give_up():
        # The first one is taken at once, and is waited for by the others.
        tasks = [asyncio.create_task(ids(batch, question)) for question in some[:3]]
        await asyncio.sleep(0.1)
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        is_open.set()
        return [await tasks[0], await tasks[2]]

    assert asyncio.run(give_up()) == [alone(answerer, some[0]), alone(answerer, some[2])]
    assert 1 not in taken
    assert len(taken) >= 2


class PanicException(BaseException):
    """What a library in Rust raises that gives up."""


def test_a_library_that_gives_up_ends_those_requests_alone(asked, monkeypatch):
    answerer, some = asked
    batch, answers = ContinuousBatch(answerer, 2), Answerer.answers

    def panicking(self, questions):
        next(iter(questions))
        raise PanicException("no")

    monkeypatch.setattr(Answerer, "answers", panicking)
    (problem,) = asyncio.run(asyncio.wait_for(together(batch, some[:1]), 60))
    assert problem.message.en == "it cannot be answered: a library gave up on it: no"
    monkeypatch.setattr(Answerer, "answers", answers)
    assert asyncio.run(together(batch, some[:1])) == [alone(answerer, some[0])]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_no_batch_can_be_made_any_more_nobody_waits_for_ever(asked, monkeypatch):
    answerer, some = asked
    made = []

    def once():
        if made:
            raise RuntimeError("the device is lost")
        made.append(answerer())
        return made[0]

    def failing(self, questions):
        next(iter(questions))
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Answerer, "answers", failing)
    before = {*threading.enumerate()}
    batch = ContinuousBatch(once, 2)
    problems = asyncio.run(asyncio.wait_for(together(batch, some[:2]), 60))
    assert {problem.status_code for problem in problems} == {500}
    # Its thread ends with the error, which is no business of the next test.
    wait_for(lambda: {*threading.enumerate()} <= before)
    assert not batch.is_alive
    with pytest.raises(RequestError, match="answers no more"), batch.place():
        pass
    (problem,) = asyncio.run(asyncio.wait_for(together(batch, some[:1]), 60))
    assert "answers no more" in str(problem.message)


def test_a_row_without_numbers_takes_no_other_with_it(golden):
    """They share a prefix, through which NaN gets from one row to the other."""
    model, tokenizer = load_checkpoint(golden, "A-small")
    mark, sample = 399, next(questions(model, 1)).sample
    with torch.no_grad():
        model.decoder.model.embed_tokens.weight[mark] = float("nan")
    ids_good = np.where(sample.input_ids == mark, 5, sample.input_ids)
    ids_lost = np.append(ids_good, np.int32(mark))
    good, lost = (
        Question(0, Sample(each, np.full_like(each, -100), sample.waveform), 3)
        for each in (ids_good, ids_lost)
    )

    def answerer():
        return Answerer(model, tokenizer, 4)

    found = asyncio.run(together(ContinuousBatch(answerer, 4), [lost, good, good]))
    assert found[1:] == [alone(answerer, good)] * 2
    assert "NaN" in str(found[0].message)
    # Not of the kind that may be gone at the next try.
    assert found[0].status_code == 422


def test_rows_may_be_drawn_each_in_its_own_way(asked):
    """Greedy and drawn rows share a batch: each is what it is alone."""
    answerer, some = asked
    ways = [GREEDY, SamplingParams(1.2, 0.9, 3), SamplingParams(0.7, 1.0, 4)]
    batch = ContinuousBatch(answerer, 3)

    async def drawn(question, way):
        return [token async for token in batch.tokens(question.sample, 12, way)]

    async def all_of_them():
        return await asyncio.gather(*map(drawn, some, ways))

    mixed = asyncio.run(all_of_them())
    assert mixed[0] == alone(answerer, replace(some[0], max_new_tokens=12))
    assert len({*map(tuple, mixed)}) == 3
