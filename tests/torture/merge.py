"""Kill a merging at random moments, let the same command go on, and compare every byte of the end.

`python -m tests.torture.merge --tries 50 [--seed N] [--only N]` in the repository's root, or `make torture`.
How it is killed is told in `tries.py`. In every other try an earlier result is there already, in every third
one nothing is proven. After each kill the output must be whole, or what it was, or, between two renames, whole
where the next run puts it back from; at the end it must be that of the unbroken run, and nothing else be left.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.shards_of import reshard
from tests.torture.files import Files, check_same, listing, write_listing
from tests.torture.inputs import MODEL
from tests.torture.processes import FailedError
from tests.torture.tries import OUT, Attempt, Try, main

RANK = 4


class Merging(Attempt):
    """A merging that is killed."""

    KINDS = ("clock", "operation", "operation")
    MOST = 1

    @staticmethod
    def make_inputs(place: Path) -> None:
        """A base in shards, two adapters for it, and what comes of the second one."""
        shutil.copytree(MODEL, place / "base")
        reshard(place / "base")
        for seed, name in enumerate(("adapter", "other")):
            _make_adapter(place / "base", place / name, seed)

    @classmethod
    def variant(cls, tried: Try) -> str:
        """Proven or not."""
        return "not proven" if tried.number % 3 == 2 else "proven"
