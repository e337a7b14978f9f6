"""Run jobs in several worker processes, and report the death of one of them.

Each process has a pipe of its own. When it is killed its pipe ends, even in the middle of a report.
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
from typing import Any, Generic, TypeVar

from mdl_toolkit.errors import ToolkitError

JobT = TypeVar("JobT")
ReportT = TypeVar("ReportT")
# A worker sends this when a job is done; no task may yield it.
_END = None


class WorkerDiedError(ToolkitError):
    """Report that a worker process is gone, and with it the job that it had."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was ended by the system (out of memory?); try a smaller --num-workers"
        )


class RemoteTraceback(Exception):  # noqa: N818 - no error itself, but what an error of a worker comes from
    """Show the traceback of a worker process as the cause of an exception."""


@dataclass(frozen=True)
class Failure:
    """Carry what a task raised from a worker process to the parent.

    Attributes:
        problem: the exception, or one in its place that can be pickled.
        trace: its traceback as text.
    """

    problem: Exception
    trace: str

    @staticmethod
    def of(problem: Exception) -> "Failure":
        """Carry an exception; one that cannot be pickled becomes a RuntimeError."""
        trace = "".join(traceback.format_exception(problem))
        try:
            # Pickling a copy makes it anew, as the parent will.
            pickle.dumps(copy.copy(problem))
        except Exception:  # noqa: BLE001 - whatever its own methods raise
            problem = RuntimeError(f"{type(problem).__name__}: {problem}")
        return Failure(problem, f"\n{trace}")


def work_through(
    jobs: Iterator[JobT], task: Callable[[JobT], Iterator[ReportT]], count: int
) -> Generator[ReportT, None, None]:
    """Run a task on all jobs in several processes, and yield its reports as they come, in no order.

    Args:
        jobs: taken one by one, whenever a process is idle; must be picklable.
        task: takes a job and yields reports; must be picklable.
        count: of processes; 1 is this process itself.

    Raises:
        WorkerDiedError: a process was killed.
        Exception: the task raised it.
    """
    if count == 1:
        for job in jobs:
            yield from task(job)
        return
    pool = _Pool[JobT, ReportT](count)
    try:
        yield from pool.work_through(jobs, task)
    finally:
        pool.close()


class _Pool(Generic[JobT, ReportT]):
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
            with _blocked_interrupts():
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def work_through(
        self, jobs: Iterator[JobT], task: Callable[[JobT], Iterator[ReportT]]
    ) -> Iterator[ReportT]:
        # As an argument of `_serve`, the task would keep each process from starting before the last one has.
        pickled = pickle.dumps(task)
        for pipe in self._pipes:
            _use(pipe.send_bytes, pickled)
        idle, busy = [*self._pipes], set[Any]()
        while True:
            for job in islice(jobs, len(idle)):
                busy.add(pipe := idle.pop())
                _use(pipe.send, job)
            if not busy:
                return
            for ready in wait([*busy]):
                report = _use(ready.recv)  # type: ignore[union-attr]
                if report is _END:
                    busy.remove(ready)
                    idle.append(ready)
                else:
                    yield report

    def close(self) -> None:
        """End all processes, also in the middle of a job."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Block SIGINT for the context; a process that is started in it never gets the signal."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _use(pipe_method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of a pipe; raise what a task raised, or WorkerDiedError if the pipe has ended."""
    try:
        answer = pipe_method(*arguments)
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
                for report in task(job):
                    pipe.send(report)
                answer = _END
            except Exception as problem:  # noqa: BLE001 - the parent raises it
                answer = Failure.of(problem)
            pipe.send(answer)


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, also in the middle of a long job."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
