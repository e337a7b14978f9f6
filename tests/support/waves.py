"""The waveforms of the golden numbers, and a batch of them."""

import numpy as np


def wave(samples: int, seed: int) -> np.ndarray:
    """Four tones, slowly swelling, and some noise: `[samples]` float32, always the same for a seed."""
    r = np.random.default_rng(seed)
    amplitudes, frequencies, phases = r.uniform(0.02, 0.2, 4), r.uniform(80, 7000, 4), r.uniform(0, 6, 4)
    t = np.arange(samples) / 16000
    tones = zip(amplitudes, frequencies, phases, strict=True)
    tone = sum(a * np.sin(2 * np.pi * f * t + p) for a, f, p in tones)
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * 0.7 * t)
    return (tone * swell + 0.01 * r.standard_normal(samples)).astype(np.float32)


def padded(waves: list[np.ndarray]) -> np.ndarray:
    """Waves of different lengths in one array, zero-padded on the right: `[clips, longest]`."""
    batch = np.zeros((len(waves), max(map(len, waves))), dtype=np.float32)
    for row, clip in zip(batch, waves, strict=True):
        row[: len(clip)] = clip
    return batch
