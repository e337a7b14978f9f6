"""What a command needs, together with the processes that it starts: seconds, memory, bytes written.

Linux only: it is read from /proc, and from what the system counts for a process when it ends.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 512  # bytes, the unit of `ru_oublock`
INTERVAL = 0.05  # seconds between two looks; each takes some milliseconds of CPU time
KIBIBYTE = 1024


@dataclass
class Usage:
    """What a command needed.

    Attributes:
        seconds: from its start to its end.
        written: bytes handed to the file system for the disk (not to a pipe), by all processes.
        together: bytes of memory, the most that all processes had at one moment. Each page counts once,
            however many of them share it (Pss); 0 if nobody looked.
        peaks: bytes of memory, the most that each process had (VmHWM), shared pages included; by process id.
        first: process id of the command itself.
    """

    seconds: float = 0.0
    written: int = 0
    together: int = 0
    peaks: dict[int, int] = field(default_factory=dict)
    first: int = 0

    @property
    def parent(self) -> int:
        """Bytes, the peak of the command's own process."""
        return self.peaks[self.first]

    @property
    def largest_other(self) -> int:
        """Bytes, the largest peak among the processes that it started."""
        return max(peak for pid, peak in self.peaks.items() if pid != self.first)


def toolkit(*words: str, looks: bool) -> Usage:
    """Run `mdl-toolkit` to its end, and look at its memory meanwhile, which costs some time, or do not."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "mdl_toolkit", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    usage = Usage(first=process.pid)
    while not (ended := os.wait4(process.pid, os.WNOHANG if looks else 0))[0]:
        _look(usage)
        time.sleep(INTERVAL)
    usage.seconds, usage.written = time.monotonic() - began, ended[2].ru_oublock * BLOCK
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise RuntimeError(f"{words}: exit status {process.returncode}")
    return usage


class Others:
    """How busy the CPUs are with what is not this process and its children, from here on."""

    def __init__(self) -> None:
        self._busy, self._all, self._own = self._read()

    def share(self) -> float:
        """Part of all CPU time, 0 to 1; processes of ours that still run count as others'."""
        busy, everything, own = self._read()
        return max(0.0, busy - self._busy - (own - self._own)) / max(everything - self._all, 1e-9)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds of CPU time since the machine was started: busy, all of it, and our own."""
        with Path("/proc/stat").open(encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        user, nice, system, idle, waiting, *more = (each / os.sysconf("SC_CLK_TCK") for each in ticks)
        busy = user + nice + system + sum(more)
        return busy, busy + idle + waiting, sum(os.times()[:4])


def _look(usage: Usage) -> None:
    together = 0
    for pid in _tree(usage.first):
        with suppress(OSError, KeyError):  # it has just ended
            together += _kibibytes(pid, "smaps_rollup", "Pss") * KIBIBYTE
            usage.peaks[pid] = _kibibytes(pid, "status", "VmHWM") * KIBIBYTE
    usage.together = max(usage.together, together)


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        return [pid, *(each for child in children for each in _tree(int(child)))]
    return []


def _kibibytes(pid: int, file: str, name: str) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace").splitlines()
    return int(dict(line.split(":", 1) for line in lines if ":" in line)[name].split()[0])
