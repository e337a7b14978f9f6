"""Tasks for worker processes, which import this file to find them."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.processes import wait_for


def squares(job: int) -> Iterator[tuple[int, int, int]]:
    """As many reports as the job's number says."""
    for number in range(job):
        yield job, number, os.getpid()


def meet(place: Path, job: int) -> Iterator[int]:
    """Two jobs that need each other: each waits until the other one is under way."""
    (place / str(job)).touch()
    wait_for(lambda: (place / str(1 - job)).exists())
    yield job


def fail(error: Exception, job: int) -> Iterator[int]:
    yield job
    if job == 3:
        raise error


def broken(job: int) -> Iterator[int]:
    yield job
    raise LookupError(threading.Lock())  # cannot be sent


def endless(job: int) -> Iterator[int]:
    yield os.getpid()
    while True:
        time.sleep(100)


def busy(job: int) -> Iterator[int]:
    yield os.getpid()
    while True:
        pass


def long_message(job: int) -> Iterator[Any]:
    yield os.getpid()
    yield bytes(50_000_000)
