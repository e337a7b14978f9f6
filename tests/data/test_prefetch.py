"""Batches ahead of time: in order, not too many, with errors where they belong and no hanging threads."""

import threading
import time

import pytest

from mdl_toolkit.data.prefetch import Prefetcher
from tests.support.processes import wait_for


class Kitchen:
    """Makes what is asked for, and remembers what was begun and done; `hold` keeps makers waiting."""

    def __init__(self):
        self.begun, self.done, self.hold, self.slow = [], [], threading.Event(), {}
        self.hold.set()
        self.lock = threading.Lock()

    def make(self, rows):
        with self.lock:
            self.begun.append(rows)
        self.hold.wait(60)
        time.sleep(self.slow.get(rows, 0))
        if rows == "bad":
            raise ValueError("bad rows")
        self.done.append(rows)
        return f"batch {rows}"


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    before = {*threading.enumerate()}  # other tests' trainings may have left idle ones
    yield
    wait_for(lambda: not {*our_threads()} - before, 10)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_order_is_kept(threads):
    kitchen = Kitchen()
    kitchen.slow = {number: 0.02 * (number % 3 == 0) for number in range(20)}  # others overtake these
    made = list(Prefetcher(kitchen.make, threads).batches(range(20)))
    assert made == [f"batch {number}" for number in range(20)]
    assert sorted(kitchen.begun) == [*range(20)]


def test_nothing_wanted_is_nothing_made():
    assert list(Prefetcher(Kitchen().make, 2).batches([])) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_comes_at_its_batch(threads):
    batches = Prefetcher(Kitchen().make, threads).batches([0, 1, 2, "bad", 4, 5])
    assert [next(batches) for _ in range(3)] == ["batch 0", "batch 1", "batch 2"]
    with pytest.raises(ValueError, match="bad rows"):
        next(batches)


@pytest.mark.parametrize("threads", [1, 3])
def test_only_so_many_are_made_ahead(threads):
    kitchen, asked = Kitchen(), []

    def wanted():
        for number in range(100):
            asked.append(number)
            yield number

    batches = Prefetcher(kitchen.make, threads).batches(wanted())
    for taken in range(1, 11):
        next(batches)
        wait_for(lambda taken=taken: len(kitchen.begun) == taken + threads + 1)
        time.sleep(0.02)  # time for more, if anybody wanted to
        assert len(kitchen.begun) == len(asked) == taken + threads + 1
    batches.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_consumer_may_stop_early(threads):
    kitchen, before = Kitchen(), {*threading.enumerate()}
    batches = Prefetcher(kitchen.make, threads).batches(range(100))
    next(batches)
    wait_for(lambda: len(kitchen.done) >= 2)
    kitchen.hold.clear()
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 5  # it does not wait for batches that nobody wants
    kitchen.hold.set()
    wait_for(lambda: not {*our_threads()} - before, 10)
    assert len(kitchen.begun) <= 2 + threads + 1


def test_an_early_end_by_an_error_of_the_consumer():
    def consume():
        for _ in Prefetcher(Kitchen().make, 2).batches(range(100)):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        consume()


def test_waiting_is_counted_but_for_the_first_batch():
    kitchen = Kitchen()
    kitchen.slow = {0: 0.3, 2: 0.2}
    loader = Prefetcher(kitchen.make, 1)
    batches = loader.batches(range(3))
    next(batches)
    assert loader.waited == 0
    next(batches)
    next(batches)
    assert 0.15 < loader.waited < 10


def test_what_is_ready_is_not_waited_for():
    kitchen = Kitchen()
    kitchen.slow = dict.fromkeys(range(5), 0.05)
    loader = Prefetcher(kitchen.make, 1)
    for number, _ in enumerate(loader.batches(range(5))):
        wait_for(lambda number=number: len(kitchen.done) >= min(5, number + 2))
    assert loader.waited < 0.1  # half of what making them takes
