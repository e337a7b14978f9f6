"""Integers are stored exactly, other samples to 28 bits, and as no more bytes than they need."""

import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.audio.flac import PackedAudio, pack_audio, unpack_audio
from mdl_toolkit.model.lengths import MIN_SAMPLES
from tests.support.waves import wave

# One less than the least, so that all lists become long enough.
ZEROS = [0] * (MIN_SAMPLES - 1)


def integers(bits: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), min_size=1, max_size=200)


@settings(max_examples=200, deadline=None)
@given(samples=integers(16), quieter=st.integers(0, 15))
def test_16_bit_recordings_are_kept_exactly(samples, quieter):
    assert_exact((np.array(ZEROS + samples) >> quieter) / 2.0**15, "PCM_16")


@settings(max_examples=200, deadline=None)
@given(samples=integers(24))
def test_24_bit_recordings_are_kept_exactly(samples):
    assert_exact(np.array([*ZEROS, *samples, 2**23 - 1]) / 2.0**23, "PCM_24")


@settings(max_examples=200, deadline=None)
@given(left=integers(16), right=integers(16))
def test_the_mean_of_two_16_bit_channels_is_kept_exactly(left, right):
    both = np.array([[*ZEROS, left[0], 2**15 - 1], [*ZEROS, right[0], 2**15 - 2]])
    assert_exact(both.mean(0) / 2.0**15, "PCM_24")


@pytest.mark.parametrize("extreme", [[-32768], [32767], [-32768, 32767], [0], [1], [-1], [-32768] * 3200])
def test_extremes_are_kept_exactly(extreme):
    assert_exact(np.array(ZEROS + extreme) / 2.0**15, "PCM_16")


def assert_exact(samples: np.ndarray, subtype: str) -> None:
    waveform = samples.astype(np.float32)
    packed = pack_audio(waveform)
    assert packed.format == "flac"
    assert soundfile.info(io.BytesIO(packed.data)).subtype == subtype
    again = unpack_audio(packed)
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, waveform)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 100),
    length=st.integers(1, 600),
    exponent=st.integers(-40, 90),
    fraction=st.floats(1, 2, width=32),
)
def test_other_recordings_are_rounded_once(seed, length, exponent, fraction):
    """To half a step of 2^-26, or of 2^-27 of a peak above full scale; nothing is clipped."""
    shape = np.random.default_rng(seed).uniform(-1, 1, MIN_SAMPLES + length)
    peak = fraction * 2.0**exponent
    waveform = (shape / np.abs(shape).max() * peak).astype(np.float32)
    packed = pack_audio(waveform)
    assert len(packed.data) <= 3.5 * len(waveform) + 1000
    assert packed.length == len(waveform)
    error = np.abs(unpack_audio(packed).astype(np.float64) - waveform).max()
    # A float32 itself has 24 bits.
    assert error <= max(2.0**-27, peak * 2.0**-24)


@pytest.mark.parametrize("peak", [1.0, 1 - 2**-17, 1 + 2**-20, 1.99999, 2.0, 30.0, -1.0, -2.0, -4.1, 3e38])
def test_nothing_is_clipped(peak):
    waveform = np.array([*ZEROS, peak, peak / 2, -peak / 3], np.float32)
    np.testing.assert_allclose(unpack_audio(pack_audio(waveform)), waveform, rtol=2**-23)


@pytest.mark.parametrize("rate", [1_000, 8_000, 11_025, 12_345, 15_999])
def test_low_rates_are_stored_as_they_are_and_resampled_when_read(rate):
    recorded = np.rint(wave(rate, 3) * 32768).astype(np.int16)
    floats = recorded.astype(np.float32) / 32768
    expected = soxr.resample(floats, rate, 16_000, "HQ")
    packed = pack_audio(floats, rate, len(expected))
    samples, stored_rate = soundfile.read(io.BytesIO(packed.data), dtype="int16")
    assert stored_rate == rate
    np.testing.assert_array_equal(samples, recorded)
    np.testing.assert_array_equal(unpack_audio(packed), expected)


def test_a_short_recording_at_a_low_rate_is_padded_as_it_was():
    packed = pack_audio(wave(400, 0), 8_000, MIN_SAMPLES)
    waveform = unpack_audio(packed)
    assert len(waveform) == MIN_SAMPLES
    assert waveform[:800].any()
    assert not waveform[800:].any()


def test_silence():
    packed = pack_audio(np.zeros(3200, np.float32))
    assert unpack_audio(packed).tolist() == [0.0] * 3200
    assert len(packed.data) < 200


def test_flac_is_flac():
    """Also the one with four bits more behind it: to 24 bits it is what any decoder reads."""
    waveform = wave(16_000, 1)
    packed = pack_audio(waveform)
    assert packed.format == "flac28"
    about = soundfile.info(io.BytesIO(packed.data))
    assert (about.format, about.subtype, about.samplerate, about.channels, about.frames) == (
        "FLAC", "PCM_24", 16_000, 1, 16_000,
    )  # fmt: skip
    samples, _ = soundfile.read(io.BytesIO(packed.data))
    np.testing.assert_allclose(samples * packed.scale, waveform, atol=packed.scale / 2**23)


def test_quiet_recordings_take_fewer_bits():
    waveform = wave(16_000, 1)
    quiet, loud = pack_audio(waveform / 1000), pack_audio(waveform)
    assert quiet.format == "flac"
    assert len(quiet.data) < 0.7 * len(loud.data)
    assert np.abs(unpack_audio(quiet) - waveform / 1000).max() <= 2.0**-27


def test_plain_samples_of_earlier_versions_are_read():
    noise = np.random.default_rng(0).integers(-32768, 32768, 4000).astype("<i2")
    packed = PackedAudio(noise.tobytes(), "pcm16", 0.25, 4000)
    np.testing.assert_array_equal(unpack_audio(packed), noise / np.float32(4 * 32768))


@pytest.mark.parametrize("packed", [pack_audio(wave(3200, 0) / 999), pack_audio(wave(3200, 0))])
def test_damaged_bytes(packed):
    with pytest.raises(ValueError, match=r"."):
        unpack_audio(replace(packed, data=b"x" * 6400))
    with pytest.raises(ValueError, match="3200 of 3201 samples"):
        unpack_audio(replace(packed, length=3201))
