"""Run jobs in several worker processes, and report the death of one of them.

Each process sits at a pipe of its own. When it is killed its pipe ends, even in the middle of an answer.
(With the shared queue of `ProcessPoolExecutor` the parent would then wait for the other half for ever.)
"""

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from mdl_toolkit.errors import ToolkitError, UsageError

MOST_WORKERS = 32
CGROUP = Path("/sys/fs/cgroup")
# Microseconds of CPU time per period of so many: version 2 and version 1 of cgroups.
CPU_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))

Job = TypeVar("Job")
Message = TypeVar("Message")
# A worker sends this when a job is done; no job may report it.
_END = None


class WorkerDiedError(ToolkitError):
    """Report that a worker process is gone, and with it the job that it had."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was ended by the system (out of memory?); try a smaller --num-workers"
        )


class RemoteTraceback(Exception):  # noqa: N818 - no error itself, but what an error of a worker comes from
    """Show, as the cause of an exception, the lines of a worker process where it was raised."""


@dataclass(frozen=True)
class Failure:
    """Carry what a task raised from a worker process to the parent.

    Attributes:
        problem: the exception, such that it can be pickled.
        trace: the lines where it was raised.
    """

    problem: Exception
    trace: str


@dataclass(frozen=True)
class Ranks:
    """Hold the rank of this process among those that a launcher started."""

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read rank and count from the environment that a launcher such as torchrun sets.

        Raises:
            UsageError: RANK or WORLD_SIZE is nonsense.
        """
        words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if all(word.isdecimal() for word in words) and int(words[0]) < int(words[1]):
            return cls(*map(int, words))
        raise UsageError(
            "RANK={rank} and WORLD_SIZE={size} in the environment do not fit; unset or correct them",
            rank=words[0],
            size=words[1],
        )


# --- how many ------------------------------------------------------------------------------------------


def default_workers() -> int:
    """Return half the CPUs that this process may use, at least 1 and at most 32."""
    return max(1, min(MOST_WORKERS, available_cpus() // 2))


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, by affinity and cgroup quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *_granted()]))


def _granted() -> Iterator[int]:
    """Yield the CPUs that this container's cgroup grants, if there is a limit."""
    for files in CPU_QUOTAS:
        # There is no such file, or it holds the word `max`.
        with suppress(OSError, ValueError):
            text = " ".join((CGROUP / file).read_text(encoding="ascii") for file in files)
            quota, period = map(int, text.split())
            if quota > 0:
                yield quota // period


# --- the work ------------------------------------------------------------------------------------------


def work_through(
    jobs: Iterator[Job], task: Callable[[Job], Iterator[Message]], count: int
) -> Generator[Message, None, None]:
    """Do all jobs in some processes, and yield what they report as it comes, in no order.

    Args:
        jobs: taken one by one, whenever a process is idle; must be picklable.
        task: what to do with a job: yields reports; must be picklable.
        count: of processes; 1 is this process itself.

    Raises:
        WorkerDiedError: a process was killed.
        Exception: what the task raised.
    """
    if count == 1:
        for job in jobs:
            yield from task(job)
        return
    pool = _Pool[Job, Message](count)
    try:
        yield from pool.work_through(jobs, task)
    finally:
        pool.close()


class _Pool(Generic[Job, Message]):
    """Hold worker processes and the pipes to them."""

    def __init__(self, count: int) -> None:
        # Forked children of a process with threads may hang.
        context = multiprocessing.get_context("spawn")
        # The first lock or process starts the one that tracks shared resources, which undoes a signal mask.
        with suppress(OSError, ImportError):
            context.Lock()
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _interrupted_later():
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def work_through(
        self, jobs: Iterator[Job], task: Callable[[Job], Iterator[Message]]
    ) -> Iterator[Message]:
        # As an argument of `_serve`, the task would keep each process from starting before the last one has.
        words = pickle.dumps(task)
        for pipe in self._pipes:
            _through(pipe.send_bytes, words)
        idle, busy = [*self._pipes], set[Any]()
        while True:
            for job in islice(jobs, len(idle)):
                busy.add(pipe := idle.pop())
                _through(pipe.send, job)
            if not busy:
                return
            for ready in wait([*busy]):
                message = _through(ready.recv)  # type: ignore[union-attr]
                if message is _END:
                    busy.remove(ready)
                    idle.append(ready)
                else:
                    yield message

    def close(self) -> None:
        """End all processes, whatever they are at."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Block SIGINT for the context; a process that is started in it never gets the signal."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _through(use_pipe: Callable[..., Any], *words: Any) -> Any:
    try:
        answer = use_pipe(*words)
    except (EOFError, OSError) as problem:
        raise WorkerDiedError from problem
    if isinstance(answer, Failure):
        raise answer.problem from RemoteTraceback(answer.trace)
    return answer


def _serve(pipe: Any) -> None:
    """Receive a task, then jobs to do with it, until the parent closes the pipe or is gone."""
    # The parent is interrupted too, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        task = pipe.recv()
        while True:
            job = pipe.recv()
            try:
                for message in task(job):
                    pipe.send(message)
                answer = _END
            except Exception as problem:  # noqa: BLE001 - the parent raises it
                answer = _failure(problem)
            pipe.send(answer)


def _failure(problem: Exception) -> Failure:
    """Return an exception with its traceback as text; one that cannot be pickled becomes a RuntimeError."""
    trace = "".join(traceback.format_exception(problem))
    try:
        # Pickling a copy makes it anew, as the parent will.
        pickle.dumps(copy.copy(problem))
    except Exception:  # noqa: BLE001 - whatever its own methods raise
        problem = RuntimeError(f"{type(problem).__name__}: {problem}")
    return Failure(problem, f"\n{trace}")


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, also in the middle of a long job."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
