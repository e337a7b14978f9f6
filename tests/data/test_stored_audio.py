"""What is stored gives the log-mel of the recording itself: decoded, averaged, resampled, never rounded."""

import functools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from mdl_toolkit.audio.loading import load
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.model.configuration import MiDashengEncoderConfig
from mdl_toolkit.model.mel import log_mel
from tests.support.paths import MODEL, PHRASES
from tests.support.runs import write_csv

RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
# Container, encoding, and the rates that it knows.
FORMATS = {
    "16-bit": ("WAV", "PCM_16", RATES),
    "24-bit": ("FLAC", "PCM_24", RATES),
    "float": ("WAV", "FLOAT", RATES),
    "mp3": ("MP3", "MPEG_LAYER_III", RATES[:-1]),
    "opus": ("OGG", "OPUS", (8_000, 16_000, 24_000, 48_000)),
}
# Peaks of the recordings; above full scale in floats only.
PEAKS = {"loud": 0.99, "at -60 dBFS": 0.001, "above full scale": 3.7}
CASES = {
    f"{form} {rate} Hz {channels} ch {level}": (*codec[:2], rate, channels, peak)
    for form, codec in FORMATS.items()
    for rate in codec[2]
    for level, peak in PEAKS.items()
    for channels in (1, 2)
    if peak < 1 or form == "float"
}


@functools.cache
def speech(rate: int, channels: int) -> np.ndarray:
    """A phrase with nothing above 4 kHz, then noise in all bands and silence, `[n, channels]`, peak 1."""
    phrase, recorded = soundfile.read(min((PHRASES / "audio").glob("en-*.flac")))
    random = np.random.default_rng(rate)
    noise = random.standard_normal((rate // 4, channels)) * np.linspace(0, 0.3, rate // 4)[:, None] ** 2
    voice = soxr.resample(phrase[:recorded], recorded, rate, "VHQ")
    voice = np.stack([np.roll(voice, 37 * channel) for channel in range(channels)], 1)
    whole = np.concatenate([voice / np.abs(voice).max(), noise, np.zeros((rate // 8, channels))])
    return whole / np.abs(whole).max()


def heard(path: Path) -> np.ndarray:
    """The float path: `[n]` float32 at 16 kHz; of what is exact, by soundfile and soxr alone."""
    if path.suffix in (".mp3", ".ogg"):
        # Two decoders differ in the last bit, which is 1 dB where nothing is to be heard.
        return load(path).samples
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(1, dtype=np.float32)
    return mono if rate == 16_000 else soxr.resample(mono, rate, 16_000, "HQ")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The recordings of all cases, and what is read of each from the converted dataset."""
    folder = tmp_path_factory.mktemp("stored")
    files = {}
    for number, (name, (container, encoding, rate, channels, peak)) in enumerate(CASES.items()):
        files[name] = folder / f"{number}.{container.lower()}"
        soundfile.write(files[name], peak * speech(rate, channels), rate, format=container, subtype=encoding)
    csv = write_csv(folder / "rows.csv", [{"audio": str(file), "prediction": "x"} for file in files.values()])
    convert_dataset(ConvertOptions(input=str(csv), output=str(folder / "data"), model_name=str(MODEL)))
    return files, dict(
        zip(files, map(ConvertedDataset(folder / "data").__getitem__, range(len(files))), strict=True)
    )


def mel(waveform: np.ndarray) -> np.ndarray:
    return log_mel(torch.from_numpy(waveform)[None], [len(waveform)], MiDashengEncoderConfig())[0].numpy()


@pytest.mark.parametrize("name", CASES)
def test_the_model_hears_what_was_recorded(stored, name):
    files, samples = stored
    expected = heard(files[name])
    found = samples[name].waveform
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    difference = np.abs(mel(found) - mel(expected))
    assert difference.mean() <= 0.02
    assert difference.max() <= 0.5


@pytest.mark.parametrize("name", [name for name in CASES if "above" in name])
def test_peaks_above_full_scale_are_kept(stored, name):
    files, samples = stored
    expected = heard(files[name])
    assert np.abs(expected).max() > 1.5
    assert np.abs(samples[name].waveform).max() == pytest.approx(np.abs(expected).max(), rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (_, encoding, rate, channels, _) in CASES.items()
        if (rate <= 16_000 and (encoding in ("PCM_16", "PCM_24")))
        or (rate <= 24_000 and (encoding, channels) == ("PCM_16", 1))
    ],
)
def test_integers_at_low_rates_are_exact(stored, name):
    files, samples = stored
    np.testing.assert_array_equal(samples[name].waveform, heard(files[name]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1:4] == ("PCM_16", 16_000, 1)])
def test_what_is_16_bit_at_16_khz_stays_so(stored, name):
    files, samples = stored
    expected, _ = soundfile.read(files[name], dtype="int16")
    assert expected.any()
    np.testing.assert_array_equal(samples[name].waveform * 32768, expected)
