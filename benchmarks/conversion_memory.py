"""Conversion: the most memory that each process has, as the number of rows grows a hundredfold.

The rows point at the same few hundred short clips, so that it is the rows that grow and nothing else.
"""

import shutil
import statistics
from pathlib import Path

import numpy as np

from benchmarks import Figure
from benchmarks.clips import make_clips, write_csv
from benchmarks.conversion import Place, prepared
from benchmarks.processes import Usage, toolkit

FILES, SHORTEST, LONGEST = 300, 0.2, 0.6  # seconds
CLIP_RATE = 16_000
ROWS = ((1_000, 5), (10_000, 3), (100_000, 1))  # and how many runs the figures are medians of


def figures() -> list[Figure]:
    """Two lines, parent and largest worker, for each number of rows but the first."""
    with prepared() as place:
        lengths = np.linspace(SHORTEST, LONGEST, FILES)
        files = make_clips(place.folder / "clips", place.phrases, lengths, rate=CLIP_RATE, extension="wav")
        measured = {}
        for rows, runs in ROWS:
            table = write_csv(place.folder / f"{rows}.csv", files, rows)
            measured[rows] = [_run(place, table) for _ in range(runs)]
        few = ROWS[0][0]
        return [
            figure for rows, _ in ROWS[1:] for figure in _compare(rows, measured[rows], few, measured[few])
        ]


def _run(place: Place, rows: Path) -> Usage:
    output = place.folder / "dataset"
    usage = toolkit(*place.words(rows, output), looks=True)
    shutil.rmtree(output)
    return usage


def _compare(rows: int, many: list[Usage], fewer: int, few: list[Usage]) -> list[Figure]:
    what = f"`convert-dataset`, 2 workers, {rows:,} short clips; other: {fewer:,}; peak memory of the"
    lines = []
    for name, of in (("parent", "parent"), ("larger worker", "largest_other")):
        ours, other = (statistics.median(getattr(run, of) for run in runs) for runs in (many, few))
        figure = Figure(f"{what} {name}", f"{ours / 1e6:.0f} MB", f"{other / 1e6:.0f} MB", other / ours)
        lines.append(figure)
    return lines
