"""Bytes loaded as recordings, and refused as such."""

from pathlib import Path

import numpy as np
import pytest

from mdl_toolkit.audio.loading import Clip, load
from mdl_toolkit.errors import AudioError
from tests.support.chinese import wrong_in
from tests.support.recordings import save

SIXTEEN = np.random.default_rng(0).integers(-32768, 32768, 8000).astype(np.int16)


def load_bytes(folder: Path, content: bytes, name: str = "x.bin", **more) -> Clip:
    return load(save(folder, content, name), **more)


def refuse(folder: Path, content: bytes, name: str = "x.bin", **more) -> str:
    with pytest.raises(AudioError) as caught:
        load_bytes(folder, content, name, **more)
    assert caught.value.message.zh != caught.value.message.en
    assert not wrong_in(caught.value.message.zh)
    assert str(folder) not in str(caught.value)
    return caught.value.message.en


def likeness(one: np.ndarray, two: np.ndarray) -> float:
    """The highest correlation of two sounds over all shifts; 1 if they are equal."""
    size = len(one) + len(two)
    shifted = np.fft.irfft(np.fft.rfft(one, size) * np.conj(np.fft.rfft(two, size)), size)
    return float(shifted.max() / np.sqrt(np.sum(one**2) * np.sum(two**2)))
