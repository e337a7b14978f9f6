"""Wait for conditions, and look at the processes of this machine."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds; everything here takes a few.
PATIENCE = 120.0


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Return the condition's value as soon as it is true."""
    ends = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < ends, "it does not happen"
        # Others want to compute meanwhile.
        time.sleep(0.005)
    return answer


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = (path for path in Path("/proc").iterdir() if path.name.isdecimal())
    return [int(path.name) for path in found if _parent(path) == pid]


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    # It has ended.
    except OSError:
        return 0


def is_alive(pid: int) -> bool:
    """Tell whether there is such a process, other than one that has ended and waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
