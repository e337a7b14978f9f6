"""Recordings are stored exactly where that is possible, and rounded once where it is not."""

import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.audio.flac import PackedAudio, pack_audio, unpack_audio
from tests.support.waves import wave

INT16 = st.lists(st.integers(-32768, 32767), min_size=1, max_size=200)


@settings(max_examples=300, deadline=None)
@given(samples=INT16, quieter=st.integers(0, 15))
def test_16_bit_recordings_are_kept_exactly(samples, quieter):
    waveform = (np.array(samples) >> quieter).astype(np.float32) / np.float32(32768)
    assert_exact(waveform)


@pytest.mark.parametrize("extreme", [[-32768], [32767], [-32768, 32767], [0], [1], [-1], [-32768] * 3200])
def test_extremes_are_kept_exactly(extreme):
    assert_exact(np.array(extreme, np.float32) / np.float32(32768))


def assert_exact(waveform: np.ndarray) -> None:
    packed = pack_audio(waveform)
    assert len(packed.data) <= 2 * len(waveform)
    again = unpack_audio(packed)
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, waveform)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 100),
    length=st.integers(1, 600),
    exponent=st.integers(-90, 90),
    fraction=st.floats(1, 2, width=32),
)
def test_other_recordings_are_rounded_once(seed, length, exponent, fraction):
    """To half a step at any level, from a whisper to far above full scale; 70 dB below the peak or better."""
    shape = np.random.default_rng(seed).uniform(-1, 1, length)
    waveform = (shape / np.abs(shape).max() * fraction * 2.0**exponent).astype(np.float32)
    packed = pack_audio(waveform)
    assert len(packed.data) <= 2 * length
    assert packed.length == length
    error = np.abs(unpack_audio(packed).astype(np.float64) - waveform).max()
    assert error <= packed.scale / 32768 / 2
    assert error <= np.abs(waveform).max() * 10 ** (-70 / 20)


@pytest.mark.parametrize(
    "peak", [1.0, 1 - 2**-17, 1 + 2**-20, 1.99999, 2.0, 30.0, -1.0, -1.00001, -2.0, -4.1]
)
def test_nothing_is_clipped(peak):
    waveform = np.array([peak, peak / 2, -peak / 3], np.float32)
    packed = pack_audio(waveform)
    assert np.abs(unpack_audio(packed) - waveform).max() <= packed.scale / 32768 / 2


def test_silence():
    assert unpack_audio(pack_audio(np.zeros(3200, np.float32))).tolist() == [0.0] * 3200
    assert pack_audio(np.zeros(3200, np.float32)).format == "flac"


def test_flac_is_flac():
    waveform = wave(16_000, 1)
    packed = pack_audio(waveform)
    assert packed.format == "flac"
    about = soundfile.info(io.BytesIO(packed.data))
    assert (about.format, about.subtype, about.samplerate, about.channels, about.frames) == (
        "FLAC", "PCM_16", 16_000, 1, 16_000,
    )  # fmt: skip
    samples, _ = soundfile.read(io.BytesIO(packed.data))
    np.testing.assert_allclose(samples * packed.scale, waveform, atol=packed.scale / 32768)


def test_noise_is_stored_plainly():
    noise = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.float32) / 32768
    packed = pack_audio(noise)
    assert (packed.format, len(packed.data)) == ("pcm16", 8000)
    np.testing.assert_array_equal(np.frombuffer(packed.data, "<i2"), noise * 32768)


@pytest.mark.parametrize("kind", ["flac", "pcm16"])
def test_damaged_bytes(kind):
    with pytest.raises(ValueError, match=r"."):
        unpack_audio(PackedAudio(b"x" * 101, kind, 1.0, 50))
    good = pack_audio(wave(3200, 0)) if kind == "flac" else PackedAudio(bytes(6400), kind, 1.0, 3200)
    with pytest.raises(ValueError, match="3200 of 3201 samples"):
        unpack_audio(replace(good, length=3201))
