"""Copies of a recording at another level or rate: alike in where they grow louder and softer.

A fingerprint has a bit for each of 64 borders between segments of equal length: whether the sound below 2 kHz
grows louder there. Level does not matter for it, nor does what a lower rate leaves out.
"""

from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from mdl_toolkit.audio.loading import SAMPLE_RATE

# The rate of what is compared, samples per second.
COMPARED_RATE = 4_000
BITS = 64
# Below this, segments are too short to be told from noise (0.13 s).
LEAST_SAMPLES = 8 * (BITS + 1)
# What grows or falls by a smaller share from segment to segment is steady.
STEADY = 0.01
# Copies differ in so many bits at most; of recordings apart, one pair in 10^13 does.
MOST_DIFFERENT = 4
# They agree in at least one quarter of the bits, by which they are found; recordings that share a quarter
# are sorted, and compared with so many neighbours.
QUARTERS, NEIGHBOURS = 4, 8
# Copies differ in length by so many samples at 16 kHz at most.
LENGTH_TOLERANCE = 64

Facts = NDArray[Any]


def fingerprint(samples: NDArray[np.float32]) -> int:
    """Return the fingerprint of samples at 16 kHz; 0 if there is none, as of silence or a tone.

    Args:
        samples: `[samples]`.
    """
    low = soxr.resample(samples, SAMPLE_RATE, COMPARED_RATE)
    if len(low) < LEAST_SAMPLES:
        return 0
    borders = np.linspace(0, len(low), BITS + 1, endpoint=False).astype(int)
    energy = np.add.reduceat(np.square(low, dtype=np.float64), borders)
    growth = np.diff(energy)
    # Of a steady tone, rounding alone would decide.
    if np.median(np.abs(growth)) < STEADY * energy.mean():
        return 0
    bits = growth > 0
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def find_copies(facts: Facts, earlier: Facts | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Find rows whose recording is like that of another row, but not the same.

    Args:
        facts: `[rows]` of the rows, with `shape` (the fingerprint), `clip`, `samples` and `line`.
        earlier: of other rows, one of which is to be like it; None for those before it.

    Returns:
        The lines of these rows, and for each the line of the first one found.
    """
    before = facts[:0] if earlier is None else earlier
    both = np.concatenate([before, facts])
    # For every row the first one that it is like, or itself.
    first = np.arange(len(both))
    for quarter in range(QUARTERS):
        key = both["shape"] >> np.uint64(BITS // QUARTERS * quarter) & np.uint64(2 ** (BITS // QUARTERS) - 1)
        order = np.lexsort((both["shape"], both["samples"] // LENGTH_TOLERANCE, key))
        order = order[both["shape"][order] > 0]
        for step in range(1, NEIGHBOURS + 1):
            one, two = np.sort([order[:-step], order[step:]], axis=0)
            different = np.bitwise_count(both["shape"][one] ^ both["shape"][two])
            is_copy = (different <= MOST_DIFFERENT) & (both["clip"][one] != both["clip"][two])
            is_copy &= np.abs(both["samples"][one] - both["samples"][two]) <= LENGTH_TOLERANCE
            if earlier is not None:
                is_copy &= (one < len(before)) & (two >= len(before))
            np.minimum.at(first, two[is_copy], one[is_copy])
    is_copy = first < np.arange(len(both))
    return both["line"][is_copy], both["line"][first[is_copy]]
