"""Blocks give what the whole gives, in the memory of the result."""

import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr

from mdl_toolkit.audio.loading import load
from mdl_toolkit.audio.resample import CLIPPED, FULL_SCALE, Mixdown, to_model_rate


def mixed(samples: np.ndarray, rate: int, size: int) -> tuple[np.ndarray, Mixdown]:
    """Mix `[channels, n]` down in blocks of a size."""
    mixdown = Mixdown()
    for start in range(0, samples.shape[1], size):
        mixdown.add("x", samples[:, start : start + size], rate, start)
    return to_model_rate(*mixdown.finish()), mixdown


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("size", [1, 999, 10**6])
def test_blocks_are_as_good_as_the_whole(rate, size):
    samples = np.random.default_rng(0).standard_normal((2, 10_000)).astype(np.float32)
    expected = soxr.resample(samples.sum(0) / np.float32(2), rate, 16_000, "HQ")
    assert np.array_equal(mixed(samples, rate, size)[0], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("run", [1, CLIPPED - 1, CLIPPED])
def test_full_scale_is_found_across_blocks(size, run):
    samples = np.zeros((1, 100), np.float32)
    samples[0, 10 : 10 + run] = -FULL_SCALE
    samples[0, 50] = 2.0
    _, mixdown = mixed(samples, 16_000, size)
    assert (mixdown.clipped, mixdown.loud, mixdown.peak) == (run == CLIPPED, run + 1, 2.0)


def test_memory_is_that_of_the_result(tmp_path):
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 48_000, 2, "PCM_16", format="FLAC") as file:
        for _ in range(120):
            file.write(np.zeros((48_000, 2), np.int16))
    tracemalloc.start()
    try:
        clip = load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert clip.samples.nbytes == 120 * 16_000 * 4
    assert peak < 1.4 * clip.samples.nbytes
