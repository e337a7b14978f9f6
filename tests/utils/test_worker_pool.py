"""Work in several processes: in what order, and what happens when one of them dies."""

import fcntl
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from mdl_toolkit.errors import ModelError, RowProblem, RowsError, ToolkitError
from mdl_toolkit.i18n import Verbatim
from mdl_toolkit.utils.worker_pool import WorkerDiedError, work_through
from tests.support.paths import MODEL
from tests.support.processes import is_alive, wait_for
from tests.support.runs import make_csv
from tests.support.worker_tasks import broken, busy, endless, fail, long_message, meet, squares

# --- helpers ---------------------------------------------------------------------------------------------


def bytes_waiting() -> int:
    """How much has come through this process's pipes and is not read."""
    most = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            answer = fcntl.ioctl(int(descriptor.name), termios.FIONREAD, b"0000")
            most = max(most, struct.unpack("i", answer)[0])
    return most


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


# --- all jobs, once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_report_of_every_job(count):
    jobs = [5, 0, 1, 7, 2, 2, 0, 3]
    reports = [*work_through(iter(jobs), squares, count)]
    expected = [(job, number) for job in jobs for number in range(job)]
    assert sorted(report[:2] for report in reports) == sorted(expected)
    pids = {report[2] for report in reports}
    assert (pids == {os.getpid()}) == (count == 1)
    assert len(pids) <= count


def test_reports_of_one_job_come_in_order():
    reports = [*work_through(iter([50, 50]), squares, 2)]
    for pid in {report[2] for report in reports}:
        numbers = [number for _, number, other in reports if other == pid]
        assert numbers == [*range(50)] * (len(numbers) // 50)


@pytest.mark.parametrize("count", [1, 2])
def test_no_job(count):
    assert [*work_through(iter([]), squares, count)] == []


def test_jobs_are_done_at_the_same_time(tmp_path):
    assert sorted(work_through(iter([0, 1]), partial(meet, tmp_path), 2)) == [0, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_jobs_are_taken_when_a_process_is_idle(count):
    """Never more than there are idle processes."""
    taken = []

    def jobs() -> Iterator[int]:
        for number in range(12):
            taken.append(number)
            yield 1

    for done, _ in enumerate(work_through(jobs(), squares, count)):
        assert len(taken) <= done + count
    assert len(taken) == 12


def test_a_message_may_be_long():
    with closing(work_through(iter([1]), long_message, 2)) as messages:
        next(messages)
        assert next(messages) == bytes(50_000_000)


# --- errors ----------------------------------------------------------------------------------------------

ERRORS = [
    ModelError("no"),
    RowsError("x.csv", [RowProblem(3, "audio", "a.wav", Verbatim("bad", "坏"))], 70),
    RowsError("folder", [RowProblem(3, "audio", "a.wav", Verbatim("bad", "坏"))], is_list=True),
    KeyError("what"),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_task_raises_is_raised_here(error, count):
    with pytest.raises(type(error)) as caught:
        list(work_through(iter(range(9)), partial(fail, error), count))
    assert caught.value.args == error.args
    assert getattr(caught.value, "is_list", None) == getattr(error, "is_list", None)
    if isinstance(error, ToolkitError):
        assert caught.value.message == error.message


def test_where_a_task_raised_is_not_lost():
    """`--debug` is to show it."""
    with pytest.raises(KeyError) as caught:
        list(work_through(iter(range(9)), partial(fail, KeyError("what")), 2))
    assert "in fail" in str(caught.value.__cause__)


def test_an_error_that_cannot_be_sent():
    """It is a bug, and must not be told as a lack of memory."""
    with pytest.raises(RuntimeError, match="LookupError"):
        list(work_through(iter([1, 2]), broken, 2))


@pytest.mark.parametrize("count", [1, 2])
def test_what_the_jobs_raise_is_raised_here(count):
    def jobs() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(work_through(jobs(), squares, count))


def test_whoever_stops_leaves_no_process():
    with closing(work_through(iter([1, 2]), busy, 2)) as messages:
        pids = [next(messages), next(messages)]
    assert len({*pids, os.getpid()}) == 3
    assert not any(map(is_alive, pids))


# --- killed ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("task", [endless, busy])
def test_a_killed_worker_is_an_error(task):
    with closing(work_through(iter([1, 2]), task, 2)) as messages:
        pids = [next(messages), next(messages)]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(WorkerDiedError) as caught:
            next(messages)
    assert caught.value.message.en.startswith("a worker process was ended by the system (out of memory?)")
    assert "内存不足" in caught.value.message.zh
    assert not any(map(is_alive, pids))


@pytest.mark.timeout(60)
def test_a_worker_killed_in_the_middle_of_a_message():
    """Half of it has come, the other half never will."""
    with closing(work_through(iter([1]), long_message, 2)) as messages:
        pid = next(messages)
        wait_for(lambda: bytes_waiting() > 10_000)
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            next(messages)


@pytest.mark.timeout(60)
def test_a_worker_killed_when_it_was_idle():
    """That shows when the next job is sent to it."""

    def jobs() -> Iterator[int]:
        yield 1
        yield 1
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        yield 1

    with pytest.raises(WorkerDiedError):
        list(work_through(jobs(), squares, 2))


PARENT = """
import sys
from tests.support import worker_tasks
from mdl_toolkit.utils.worker_pool import work_through

if __name__ == "__main__":
    for message in work_through(iter([1, 2]), getattr(worker_tasks, sys.argv[1]), 2):
        if isinstance(message, int):
            print(message, flush=True)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("task", ["endless", "busy", "long_message"])
def test_workers_end_with_their_parent(tmp_path, task):
    """Also in the middle of a job, or of a message that nobody reads; and they say nothing."""
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, tmp_path / "parent.py", task]
    with (tmp_path / "said").open("wb") as said:
        parent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True, env=environment)
    with parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        if task == "long_message":
            parent.send_signal(signal.SIGSTOP)
        assert all(map(is_alive, pids))
        parent.kill()
    wait_for(lambda: not any(map(is_alive, pids)))
    assert (tmp_path / "said").read_text() == ""


# --- scripts ---------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import mdl_toolkit.data.convert.plan as plan
import mdl_toolkit.data.convert.run as run
from mdl_toolkit import {names}
plan.CHUNK_ROWS, plan.FEWEST_BYTES, run.FEW_ROWS = 2, 1, 1
data, model = {data!r}, {model!r}
{call}
"""
# In a worker process: its pipe ends some time before its exit status can be had.
SLOW_END = """
import os, time
if __name__ == "__mp_main__":
    def end_slowly(status, end=os._exit):
        os.closerange(0, 1024)
        time.sleep(0.3)
        end(status)
    os._exit = end_slowly
"""
CALLS = {
    "convert": "convert_dataset(ConvertOptions(input=data, output='out', model_name=model, num_workers=2))",
    "train": "train(TrainOptions(train_dataset=data, output='out', model_name=model, num_workers=2))",
}
NAMES = ", ".join(
    (
        "ConvertOptions",
        "TrainOptions",
        "InferenceOptions",
        "convert_dataset",
        "train",
        "infer",
        "ToolkitError",
    )
)


@pytest.mark.parametrize("work", ["convert", "train"])
def test_a_script_without_a_guard_is_told_in_one_sentence(tmp_path, work):
    data, script = make_csv(tmp_path, 12), tmp_path / "script.py"
    call = f"try:\n    {CALLS[work]}\nexcept ToolkitError as error:\n    sys.exit(f'{{error}}')"
    text = SLOW_END + SCRIPT.format(names=NAMES, data=str(data), model=str(MODEL), call=call)
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.endswith('put the call under `if __name__ == "__main__":`')
    assert "Traceback" not in done.stderr


def test_a_script_with_a_guard_works(tmp_path):
    data, script = make_csv(tmp_path, 12), tmp_path / "script.py"
    call = f"if __name__ == '__main__':\n    {CALLS['convert']}"
    text = SCRIPT.format(names=NAMES, data=str(data), model=str(MODEL), call=call)
    script.write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "out/state.json").is_file()
