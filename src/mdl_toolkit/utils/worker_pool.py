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
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, NamedTuple, TypeVar

from mdl_toolkit.errors import ToolkitError, is_error

JobT = TypeVar("JobT")
ReportT = TypeVar("ReportT")
# A worker sends this when a job is done; no task may yield it.
_END = None
# Set in the environment of a worker process until it has imported the script that started it; and its exit
# status if that script calls us meanwhile.
_STARTING, _UNGUARDED = "MDL_TOOLKIT_WORKER_STARTS", 78


class WorkerDiedError(ToolkitError):
    """Report that a worker process is gone, and with it the job that it had."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was ended by the system (out of memory?); try a smaller --num-workers"
        )


class RemoteTraceback(Exception):  # noqa: N818 - no error itself, but what an error of a worker comes from
    """Show the traceback of a worker process as the cause of an exception."""


class _Failure(NamedTuple):
    """Carry what a task raised, and its traceback, from a worker process to the parent."""

    problem: BaseException
    trace: str


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
        ToolkitError: the script that calls this does so whenever it is imported.
        Exception: the task raised it.
    """
    if count == 1:
        for job in jobs:
            yield from task(job)
        return
    # Forked children of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pipes: list[Any] = []
    processes: list[Any] = []
    try:
        with _blocked_interrupts(context), _marked_environment():
            for _ in range(count):
                ours, theirs = context.Pipe()
                processes.append(context.Process(target=_serve, args=(theirs,), daemon=True))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
        # As an argument of `_serve`, the task would keep each process from starting before the last one has.
        for pipe in pipes:
            _use(pipe.send, task)
        yield from _share_out(jobs, pipes)
    except WorkerDiedError:
        if is_unguarded(processes):
            raise ToolkitError(
                "worker processes import your script, which then starts this work again: put the call under "
                '`if __name__ == "__main__":`'
            ) from None
        raise
    finally:
        # Also in the middle of a job.
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join()


def is_unguarded(processes: Sequence[Any]) -> bool:
    """Tell whether a process ended because the script that it imported starts this work again."""
    # A process closes its pipe a moment before its exit status can be had.
    deadline = time.monotonic() + 5
    while all(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    return any(process.exitcode == _UNGUARDED for process in processes)


def _share_out(jobs: Iterator[Any], pipes: list[Any]) -> Iterator[Any]:
    """Send jobs to idle processes by their pipes, and yield the reports."""
    idle, busy = [*pipes], set[Any]()
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


@contextmanager
def _marked_environment() -> Iterator[None]:
    """Tell processes that are started in this context that they have not come to their work yet."""
    os.environ[_STARTING] = "1"
    try:
        yield
    finally:
        del os.environ[_STARTING]


def end_unguarded_script() -> None:
    """End a worker process whose script calls us while it is imported; the parent says what is wrong."""
    if _STARTING in os.environ:
        os._exit(_UNGUARDED)


def _interrupts() -> set[signal.Signals]:
    """Return the signals that a terminal sends to all its processes."""
    return {signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])}


@contextmanager
def _blocked_interrupts(context: Any) -> Iterator[None]:
    """Block signals of the terminal while processes are started, which then never get them."""
    # The first lock or process starts the one that tracks shared resources, which undoes a signal mask.
    with suppress(OSError, ImportError):
        context.Lock()
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _interrupts())
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
    if isinstance(answer, _Failure):
        raise answer.problem from RemoteTraceback(answer.trace)
    return answer


def _serve(pipe: Any) -> None:
    """Receive a task, then jobs to do with it, until the parent closes the pipe or is gone."""
    os.environ.pop(_STARTING, None)
    # The parent is interrupted too, and ends this process.
    for number in _interrupts():
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        task = pipe.recv()
        while True:
            job = pipe.recv()
            try:
                for report in task(job):
                    pipe.send(report)
                answer = _END
            except BaseException as problem:
                # The parent raises it.
                if not is_error(problem):
                    raise
                trace = "\n" + "".join(traceback.format_exception(problem))
                try:
                    # Pickling a copy makes it anew, as the parent will.
                    pickle.dumps(copy.copy(problem))
                except Exception:  # noqa: BLE001 - whatever its own methods raise
                    problem = RuntimeError(f"{type(problem).__name__}: {problem}")
                answer = _Failure(problem, trace)
            pipe.send(answer)


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, also in the middle of a long job."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
