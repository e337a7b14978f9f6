"""Locks between processes, and what is put in place under them: who is kept out, what a kill leaves."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from mdl_toolkit.errors import InputError
from mdl_toolkit.utils.files import replace_file, replace_folder
from mdl_toolkit.utils.locks import hold_lock
from mdl_toolkit.utils.ownership import RECORD

HOLD = "from mdl_toolkit.utils.locks import hold_lock\nwith hold_lock(path): wait()"
FILE = """
from mdl_toolkit.utils.files import replace_file
with replace_file(path, "x") as work:
    work.write_text("theirs")
    wait()
"""
COUNT = """
from mdl_toolkit.utils.locks import hold_lock
for _ in range(60):
    with hold_lock(path.with_suffix(".lock"), remove=True):
        path.write_text(str(int(path.read_text()) + 1))
"""


@contextmanager
def other(path, code):
    """Another process that runs some code until a line is written to it."""
    wait = "def wait():\n    print('in', flush=True)\n    input()\n"
    words = [sys.executable, "-c", f"from pathlib import Path\npath = Path({str(path)!r})\n{wait}{code}"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def is_held(path):
    try:
        with hold_lock(path, InputError("busy")):
            return False
    except InputError:
        return True


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_lock_is_held_until_its_process_ends(tmp_path, is_killed):
    with other(tmp_path / "lock", HOLD) as process:
        assert process.stdout.readline() == "in\n"
        assert is_held(tmp_path / "lock")
        if is_killed:
            process.kill()
        else:
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait() == (-9 if is_killed else 0)
        assert not is_held(tmp_path / "lock")


def test_a_lock_is_waited_for(tmp_path):
    with other(tmp_path / "lock", HOLD) as process:
        assert process.stdout.readline() == "in\n"
        threading.Timer(0.5, process.kill).start()
        began = time.monotonic()
        with hold_lock(tmp_path / "lock") as is_there:
            assert is_there
            assert 0.3 < time.monotonic() - began < 30


def test_a_lock_file_that_is_deleted_each_time_keeps_all_others_out(tmp_path):
    """Also those who had opened the file before it was deleted."""
    count = tmp_path / "count"
    count.write_text("0")
    code = f"from pathlib import Path\npath = Path({str(count)!r})\n{COUNT}"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert count.read_text() == "240"
    assert [*tmp_path.iterdir()] == [count]


def test_a_lock_whose_folder_is_removed_is_made_anew(tmp_path):
    path, inside = tmp_path / "work/lock", []

    def enter():
        with hold_lock(path):
            inside.append(path.exists())

    with hold_lock(path):
        waiting = threading.Thread(target=enter)
        waiting.start()
        time.sleep(0.1)
        assert not inside
        shutil.rmtree(path.parent)
    waiting.join()
    assert inside == [True]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_nothing_is_taken_for_a_killed_process_s(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with (
        hold_lock(tmp_path / "lock", remove=True) as first,
        hold_lock(tmp_path / "lock", remove=True) as second,
    ):
        assert (first, second) == (False, False)
    with replace_file(tmp_path / "out", "x") as work:
        work.write_text("first")
        with replace_file(tmp_path / "out", "x") as another:
            another.write_text("second")
        assert (tmp_path / "out").read_text() == "second"
    assert (tmp_path / "out").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "out"]


def test_what_another_process_writes_is_left_alone_until_it_is_killed(tmp_path):
    output = tmp_path / "out"
    with other(output, FILE) as process:
        assert process.stdout.readline() == "in\n"
        with replace_file(output, "x") as work:
            work.write_text("mine")
        (theirs,) = tmp_path.glob(".out.partial-*")
        assert theirs.read_text() == "theirs"
        process.kill()
        process.wait()
        # The file and its lock.
        assert len([*tmp_path.glob(".out.*")]) == 2
    with replace_file(output, "x") as work:
        work.write_text("last")
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "out"]


def test_a_name_that_is_a_pattern_means_itself(tmp_path):
    """What stands beside another output is no leftover of this one's."""
    (tmp_path / ".a.partial-0123abcd").mkdir()
    (tmp_path / ".[ab].partial-0123abcd").mkdir()
    with replace_folder(tmp_path / "[ab]", "x"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"[ab]", ".a.partial-0123abcd"}
