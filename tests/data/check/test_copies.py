"""Copies at another level or rate are found, among many others, and what is apart is not."""

import csv
import itertools

import numpy as np
import pytest
import soxr

from mdl_toolkit.audio.loading import load
from mdl_toolkit.data.check.copies import find_copies, fingerprint
from mdl_toolkit.data.check.rows import FACTS
from tests.support.paths import PHRASES


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    with (PHRASES / "train.csv").open(encoding="utf-8", newline="") as file:
        return [load(PHRASES / row["audio"]).samples for row in itertools.islice(csv.DictReader(file), 60)]


def rounded(samples: np.ndarray) -> np.ndarray:
    return (np.rint(np.clip(samples, -1, 1) * 32767) / 32767).astype(np.float32)


def through(samples: np.ndarray, rate: int) -> np.ndarray:
    return soxr.resample(rounded(soxr.resample(samples, 16_000, rate)), rate, 16_000).astype(np.float32)


WAYS = {
    "half as loud": lambda samples: rounded(samples * 0.5),
    "20 dB below": lambda samples: rounded(samples * 0.1),
    "louder, and clipped": lambda samples: rounded(samples * 2),
    "by way of 8 kHz": lambda samples: through(samples, 8_000),
    "by way of 44.1 kHz, 3 dB below": lambda samples: through(samples * 0.7, 44_100),
}


def facts_of(clips: list[np.ndarray]) -> np.ndarray:
    facts = np.zeros(len(clips), FACTS)
    facts["line"], facts["clip"] = (
        np.arange(2, len(clips) + 2),
        [hash(clip.tobytes()) % 2**60 for clip in clips],
    )
    facts["samples"], facts["shape"] = [*map(len, clips)], [*map(fingerprint, clips)]
    return facts


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copies_are_found(clips, way):
    facts = facts_of([*clips, *map(way, clips)])
    lines, others = find_copies(facts)
    assert [*lines] == [*range(62, 122)]
    assert [*others] == [*range(2, 62)]
    lines, others = find_copies(facts[60:], facts[:60])
    assert [*zip(lines, others, strict=True)] == [*zip(range(62, 122), range(2, 62), strict=True)]


def test_what_is_apart_or_the_very_same_is_no_copy(clips):
    assert [*find_copies(facts_of([*clips, *clips]))[0]] == []
    random = np.random.default_rng(0)
    noise = [(0.1 * random.standard_normal(80_000)).astype(np.float32) for _ in range(40)]
    tones = [(0.1 * np.sin(np.arange(80_000) * (0.1 + n / 50))).astype(np.float32) for n in range(40)]
    short = [np.full(1000, n / 10, np.float32) for n in range(5)]
    silence = [np.zeros(80_000 + n, np.float32) for n in range(5)]
    assert [*find_copies(facts_of([*noise, *tones, *short, *silence]))[0]] == []
    assert [*find_copies(facts_of([*noise, rounded(noise[7] * 0.3)]))[1]] == [9]


def test_a_copy_among_many_is_found():
    """Random fingerprints of recordings of one length, and copies of some with three bits changed."""
    random = np.random.default_rng(1)
    facts = np.zeros(200_000, FACTS)
    facts["line"], facts["clip"], facts["samples"] = np.arange(2, 200_002), np.arange(200_000), 160_000
    facts["shape"] = random.integers(1, 2**63, len(facts), dtype=np.uint64)
    for copy in range(199_000, 200_000):
        bits = np.bitwise_or.reduce(np.uint64(1) << random.integers(0, 64, 3, dtype=np.uint64))
        facts["shape"][copy] = facts["shape"][copy - 100_000] ^ bits
    lines, others = find_copies(facts)
    assert [*lines] == [*range(199_002, 200_002)]
    assert [*others] == [*range(99_002, 100_002)]
