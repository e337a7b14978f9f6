"""A case: a command line in a folder of its own whose input was spoilt, and what became of it."""

import gc
import os
import resource
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mdl_toolkit.cli.main import run

SECONDS, MEGABYTES, CHARACTERS = 60, 1024, 20_000
# Exit statuses of a command that ended by itself: done, could not be done, wrong usage.
ENDS = {0, 1, 2}


@dataclass
class Case:
    """One spoilt input.

    Attributes:
        words: the command line, run in `folder`.
        spoilt: in words, how the input was spoilt.
        limit: bytes of memory that the command may hold.
        check: look at what the command left and return what is wrong with it, or nothing.
    """

    folder: Path
    words: list[str]
    spoilt: str
    limit: int = resource.RLIM_INFINITY
    check: Callable[[int, str], str] = field(default=lambda *_: "")


@dataclass
class Verdict:
    """How a command took its case; `faults` is empty for a clean one."""

    spoilt: str
    words: list[str]
    status: int
    seconds: float
    megabytes: float
    said: str
    faults: list[str]


def judge(case: Case) -> Verdict:
    """Run a case in a forked process with a deadline, and judge its end, its words, its time and memory."""
    said = case.folder / ".said"
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become_command(case, said)
    status, usage = _wait(pid, started + SECONDS)
    seconds, megabytes = time.monotonic() - started, usage.ru_maxrss / 1024
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    faults = [
        fault
        for fault, met in {
            f"ended with {status}": status not in ENDS,
            "a traceback": "Traceback" in text,
            "called a bug of ours": "a bug in mdl-toolkit" in text,
            "failed without a word": status != 0 and not text.strip(),
            "control characters": any(_is_control(letter) for letter in text),
            f"said {len(text):,} characters": len(text) > CHARACTERS,
            f"took {seconds:.0f} s": seconds > SECONDS,
            f"took {megabytes:.0f} MB": megabytes > MEGABYTES,
        }.items()
        if met
    ]
    if not faults and (wrong := case.check(status, text)):
        faults = [wrong]
    return Verdict(case.spoilt, case.words, status, seconds, megabytes, text, faults)


def _become_command(case: Case, said: Path) -> None:
    """Run the command line in this process, which ends with it."""
    # A decoder that is garbage here has threads that this process lacks: to free it would wait for them.
    gc.freeze()
    # Here, since torch refuses to count threads in a process that was forked from one where it did.
    torch.set_num_threads(1)
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (case.limit, resource.RLIM_INFINITY))
    os.chdir(case.folder)
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 99
    try:
        status = run(case.words)
    finally:
        # A traceback of what `run` let through is written by hand: this process must not go on.
        if problem := sys.exception():
            os.write(2, "".join(traceback.format_exception(problem)).encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    """Wait for the end of a process, which is killed with its children at the deadline."""
    pause = 0.002
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc" and letter not in "\n\r\t"


# --- ways to spoil bytes ---------------------------------------------------------------------------------


def spoil_bytes(content: bytes, random: np.random.Generator) -> tuple[bytes, str]:
    """Return the bytes cut, flipped, blanked, doubled or with junk in them, and how."""
    data = bytearray(content)
    size = max(len(data), 1)
    at = int(random.integers(size))
    length = int(min(size - at, 2 ** random.integers(0, 12)))
    junk = random.bytes(length)
    match random.integers(8):
        case 0:
            return bytes(data[:at]), f"cut at {at} of {size}"
        case 1:
            for place in random.integers(0, size, int(random.integers(1, 9))):
                data[place : place + 1] = random.bytes(1)
            return bytes(data), "a few bytes changed"
        case 2:
            data[at : at + length] = bytes(length)
            return bytes(data), f"{length} zeros at {at}"
        case 3:
            data[at : at + length] = junk
            return bytes(data), f"{length} bytes of junk at {at}"
        case 4:
            return bytes(data[:at] + junk + data[at:]), f"{length} bytes of junk put in at {at}"
        case 5:
            return bytes(data[:at] + data[at + length :]), f"{length} bytes taken out at {at}"
        case 6:
            return bytes(data + data[at:]), f"the end from {at} twice"
        case _:
            head = min(64, size)
            place = int(random.integers(head))
            data[place : place + 4] = bytes([255 if random.integers(2) else 0] * 4)
            return bytes(data[:size]), f"an extreme number in the header at {place}"


# --- ways to spoil JSON ----------------------------------------------------------------------------------

STRANGE = (
    None, True, -1, 0, 1, 2**31, 2**63, 1e308, float("nan"), float("inf"), "", "x", "1", "../../etc/passwd",
    [], [[]], {}, {"a": 1}, [None] * 3, "\x1b[2J", "名", 0.5, "9" * 5000,
)  # fmt: skip


def spoil_json(value: object, random: np.random.Generator) -> str:
    """Change one value somewhere in nested lists and dictionaries, in place; return which, and to what."""
    path: list[str] = []
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))  # type: ignore[arg-type, call-overload]
        if not keys:
            return "nothing"
        key = keys[random.integers(len(keys))]
        path.append(str(key))
        child = node[key]  # type: ignore[index]
        if isinstance(child, dict | list) and child and random.integers(3):
            node = child
            continue
        what = random.integers(6)
        if what == 0:
            del node[key]  # type: ignore[attr-defined]
            return f"{'.'.join(path)} is missing"
        new = STRANGE[random.integers(len(STRANGE))]
        if what == 1 and isinstance(child, int | float):
            new = child * int(random.choice([-1, 2, 3, 1000]))
        node[key] = new  # type: ignore[index]
        return f"{'.'.join(path)} is {repr(new)[:30]}"
