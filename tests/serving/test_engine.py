"""Requests that join a batch: those that fail, are given up, or are too many."""

import asyncio
from dataclasses import replace

import pytest

from mdl_toolkit.inference.generate import Answerer, SamplingParams
from mdl_toolkit.serving.engine import WAITING, ContinuousBatch
from mdl_toolkit.serving.protocol import RequestError
from tests.support.processes import wait_for
from tests.support.questions import load_checkpoint, questions

GREEDY = SamplingParams()


@pytest.fixture
def asked(golden):
    """A model of which every answer has as many tokens as it may, and questions."""
    model, tokenizer = load_checkpoint(golden, "A-small")

    def answerer():
        made = Answerer(model, tokenizer, 2)
        made.ends = set()
        return made

    return answerer, [*questions(model, 6)]


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


def test_more_than_can_be_answered_soon_are_refused(asked, monkeypatch):
    answerer, some = asked
    monkeypatch.setattr(Answerer, "answers", lambda *_: iter(()))
    batch = ContinuousBatch(answerer, 2)

    async def many():
        waiting = [asyncio.create_task(ids(batch, some[0])) for _ in range(2 * (1 + WAITING))]
        await asyncio.sleep(0)
        batch_is_full = pytest.raises(RequestError, match="too many requests are waiting; try again")
        with batch_is_full as caught:
            batch.check_room()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        batch.check_room()
        return caught.value.status_code

    assert asyncio.run(many()) == 503


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
