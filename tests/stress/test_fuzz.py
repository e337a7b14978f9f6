"""A sample of `make fuzz`: spoilt inputs of every kind are taken cleanly, and a fault would be told."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stress.fuzz import cases
from tests.stress.fuzz.__main__ import KINDS

ROOT = Path(__file__).parents[2]
# Of the cases of a whole run. It has at least one case of each kind.
SCALE = 0.02
# Megabytes that a command may hold beyond what this process does.
ALLOWED = 300


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sample_of_every_kind_is_taken_cleanly():
    words = f"-m tests.stress.fuzz --scale {SCALE} --seed 20261201 --seconds 300".split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) / (\d+) / (\d+) \|", done.stdout, re.MULTILINE)
    found = {kind: (int(count), int(clean)) for kind, count, clean, *_ in rows}
    assert found == {kind: (round(SCALE * whole),) * 2 for kind, (_, whole, _) in KINDS.items()}, (
        done.stdout + done.stderr
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Some were good enough all the same, and some were not.
    for kind, _, _, good, refused, _ in rows:
        assert kind not in {"tables", "recordings", "models"} or min(int(good), int(refused)) > 0, done.stdout


def fail_silently(_):
    return 1


def raise_bug(_):
    raise LookupError("lost")


def say_control_characters(_):
    os.write(2, b"error: a\x1b[2Jb\n")
    return 1


def call_it_a_bug(_):
    os.write(2, b"error: a bug in mdl-toolkit: lost\n")
    return 1


def talk(_):
    os.write(2, b"error " * 10_000)
    return 1


def take_memory(_):
    # A forked process holds less than this one: pages of files are not among its own before it touches them.
    bytearray(b"x") * int(cases.MEGABYTES * 2**20)
    return 0


def hang(_):
    time.sleep(600)


@pytest.fixture(autouse=True)
def _allow_what_pytest_holds(monkeypatch):
    """A forked process begins with the pages of this one."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    monkeypatch.setattr(cases, "MEGABYTES", pages * resource.getpagesize() / 2**20 + ALLOWED)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (fail_silently, "failed without a word"),
        (raise_bug, "a traceback"),
        (say_control_characters, "control characters"),
        (call_it_a_bug, "called a bug of ours"),
        (talk, "said 60,000 characters"),
        (take_memory, r"took \d+ MB"),
        (hang, "ended with -9"),
    ],
)
def test_each_fault_is_found(tmp_path, monkeypatch, command, fault):
    monkeypatch.setattr(cases, "run", command)
    monkeypatch.setattr(cases, "SECONDS", 2 if command is hang else 200)
    verdict = cases.judge(cases.Case(tmp_path, ["check"], "nothing"))
    assert any(re.match(fault, found) for found in verdict.faults), verdict


def test_what_a_case_itself_finds_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "run", lambda _: 0)
    assert cases.judge(cases.Case(tmp_path, [], "")).faults == []
    wrong = cases.Case(tmp_path, [], "", check=lambda status, _: f"wrong after {status}")
    assert cases.judge(wrong).faults == ["wrong after 0"]
