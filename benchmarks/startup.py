"""Start-up: `mdl-toolkit train --help`, against a command that imports torch before it looks at its words."""

import subprocess
import sys

from benchmarks import Figure, timed

RUNS = 9


def figures() -> list[Figure]:
    """Two lines: against importing torch, and against Python that does nothing at all."""
    what = "`train --help`"
    return [
        timed(f"{what}; other: `import torch`", _help, lambda: _python("-c", "import torch"), RUNS),
        timed(f"{what}; other: Python alone", _help, lambda: _python("-c", "pass"), RUNS),
    ]


def _help() -> None:
    _python("-m", "mdl_toolkit", "train", "--help")


def _python(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
