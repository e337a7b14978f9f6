"""A terminal that can be closed while a command still writes to it."""

import os
import subprocess
from pathlib import Path


class Terminal:
    """Show a command a terminal, and append to a file what it writes there.

    A process of its own holds the other end: with it the terminal is closed, whatever is just being read.

    Attributes:
        name: the device to open.
    """

    def __init__(self, log: Path) -> None:
        other_end, descriptor = os.openpty()
        self._device = os.fdopen(descriptor, "rb", buffering=0)
        self.name = os.ttyname(descriptor)
        with log.open("ab") as file, os.fdopen(other_end, "rb", buffering=0) as read:
            self._reader = subprocess.Popen(["cat"], stdin=read, stdout=file, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """Close it, as when its window goes: its session gets a SIGHUP, and can write no more."""
        self._reader.kill()
        self._reader.wait()
        self._device.close()


def own_terminal(name: str) -> int:
    """Open a terminal, or a file to append to; a session that has no terminal has it from now on."""
    # One that is only written to is nobody's.
    return os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
