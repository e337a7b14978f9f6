"""Recordings of every format come in right; what is damaged, cut off or no recording is refused."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from mdl_toolkit.audio.loading import MIN_SAMPLES, SAMPLE_RATE, load
from mdl_toolkit.errors import AudioError
from mdl_toolkit.model.lengths import HOP_LENGTH, PATCH_STRIDE, SUBSAMPLE_FACTOR
from tests.support import recordings
from tests.support.clips import SIXTEEN, likeness, load_bytes, refuse
from tests.support.recordings import by_ffmpeg, by_soundfile, pcm_wav, recording, save, sound

# --- every format ----------------------------------------------------------------------------------------

LOSSLESS = ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "alac", "pcm_s16be", "flac", "wavpack", "tta")
LIKENESS = {"GSM610": 0.85} | dict.fromkeys(LOSSLESS, 0.999_99)


@pytest.mark.parametrize(("maker", "container", "codec", "rate"), recordings.EVERY)
@pytest.mark.parametrize("name", ["x.wav", "x.txt"])
def test_formats(tmp_path, maker, container, codec, rate, name):
    clip = load_bytes(tmp_path, recording(maker, container, codec, rate), name)
    expected = soxr.resample(sound(1.0, rate), rate, SAMPLE_RATE, "HQ")
    assert likeness(clip.samples, expected) > LIKENESS.get(codec, 0.96)
    assert clip.samples.dtype == np.float32
    assert (clip.source_rate, clip.channels) == (rate, 2 if codec == "vorbis" else 1)
    assert (clip.padded, clip.silent, clip.truncated) == (False, False, None)
    if codec in LOSSLESS:
        assert clip.source_seconds == 1
        np.testing.assert_allclose(clip.samples, expected, atol=1e-4)
    assert abs(clip.source_seconds - 1) < 0.05  # delay and padding of the encoder
    assert abs(len(clip.samples) - clip.source_seconds * SAMPLE_RATE) <= 0.5


@pytest.mark.parametrize("name", ["x.wav", "x.mp3", "x.flac", "x.ogg", "x.raw", "x.gsm", "x.m3u8", "x"])
def test_the_extension_means_nothing(tmp_path, name):
    assert np.array_equal(load_bytes(tmp_path, pcm_wav(SIXTEEN), name).samples, SIXTEEN / np.float32(32768))
    assert (
        load_bytes(tmp_path, recording("soundfile", "MP3", "MPEG_LAYER_III", 44_100), name).source_seconds
        == 1
    )


def test_sixteen_bits_at_16_khz_are_exact(tmp_path):
    expected = SIXTEEN / np.float32(32768)
    for content in (
        pcm_wav(SIXTEEN),
        by_soundfile(SIXTEEN, 16_000, "FLAC", "PCM_16"),
        by_ffmpeg(expected, 16_000, "matroska", "flac"),
        by_ffmpeg(expected, 16_000, "matroska", "pcm_s16le"),
    ):
        assert np.array_equal(load_bytes(tmp_path, content).samples, expected)


@pytest.mark.parametrize(
    ("container", "codec", "step"),
    [
        ("matroska", "pcm_u8", 1 / 128),
        ("matroska", "pcm_s32le", 2**-31),
        ("matroska", "pcm_f32le", 0),
        ("matroska", "pcm_f64le", 0),
        ("wav", "pcm_s64le", 2**-31),
    ],
)
def test_ffmpegs_other_sample_formats(tmp_path, container, codec, step):
    values = np.array([-1, -0.5, 0, 0.25, 0.5], np.float32).repeat(1000)
    got = load_bytes(tmp_path, by_ffmpeg(values, 16_000, container, codec)).samples
    np.testing.assert_allclose(got, values, rtol=0, atol=step)


@pytest.mark.parametrize(("container", "codec"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_blocks_are_as_good_as_the_whole(tmp_path, container, codec):
    path = save(tmp_path, by_soundfile(sound(3.0, 16_000), 16_000, container, codec))
    assert np.array_equal(load(path).samples, soundfile.read(path, dtype="float32")[0])


# --- channels and rates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_all_channels_are_averaged(tmp_path, channels):
    samples = np.random.default_rng(1).uniform(-1, 1, (5000, channels)).astype(np.float32)
    clip = load_bytes(tmp_path, by_soundfile(samples, 16_000, "WAV", "FLOAT"))
    np.testing.assert_allclose(clip.samples, samples.mean(1, dtype=np.float64), atol=1e-7)
    assert clip.channels == channels


def test_ffmpegs_channels_are_averaged(tmp_path):
    """Planar (AAC) and interleaved (PCM) frames: a tone on the left alone is half as loud."""
    tone = np.sin(np.arange(16_000) * 0.3)
    for container, codec in (("matroska", "pcm_s16le"), ("ipod", "aac")):
        clip = load_bytes(tmp_path, by_ffmpeg(np.stack([tone, 0 * tone], 1), 16_000, container, codec))
        assert clip.channels == 2
        assert level(clip.samples[2000:14_000]) == pytest.approx(level(tone / 2), abs=1)


def level(samples: np.ndarray) -> float:
    """dB of the middle, where the ends of a tone do not ring."""
    return 20 * np.log10(np.sqrt(np.mean(samples[2000:-2000].astype(np.float64) ** 2)) + 1e-12)


@pytest.mark.parametrize(
    ("rate", "hertz"), [(44_100, 9_000), (44_100, 15_000), (48_000, 8_800), (48_000, 20_000)]
)
def test_nothing_above_8_khz_folds_back(tmp_path, rate, hertz):
    tone = np.sin(2 * np.pi * hertz / rate * np.arange(rate * 2)).astype(np.float32)
    clip = load_bytes(tmp_path, by_soundfile(tone, rate, "WAV", "FLOAT"))
    assert level(clip.samples) < level(tone) - 100


@pytest.mark.parametrize(("rate", "hertz"), [(44_100, 50), (44_100, 7_000), (48_000, 3_000), (8_000, 3_400)])
def test_everything_below_7_khz_stays(tmp_path, rate, hertz):
    tone = np.sin(2 * np.pi * hertz / rate * np.arange(rate * 2)).astype(np.float32)
    clip = load_bytes(tmp_path, by_soundfile(tone, rate, "WAV", "FLOAT"))
    expected = np.sin(2 * np.pi * hertz / 16_000 * np.arange(len(clip.samples)))
    np.testing.assert_allclose(clip.samples[2000:-2000], expected[2000:-2000], atol=1e-3)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 96_000, 12_345])
@pytest.mark.parametrize("count", [6_000, 9_999, 44_101])
def test_length_after_resampling(tmp_path, rate, count):
    clip = load_bytes(tmp_path, pcm_wav(np.full(count, 1000, np.int16), rate))
    assert abs(len(clip.samples) - max(MIN_SAMPLES, count * 16_000 / rate)) <= 0.5
    assert clip.source_seconds == count / rate


def test_nothing_is_clipped(tmp_path):
    loud = 3 * sound(1.0, 16_000)
    assert np.array_equal(load_bytes(tmp_path, by_soundfile(loud, 16_000, "WAV", "FLOAT")).samples, loud)


# --- short, silent, impossible ---------------------------------------------------------------------------


def test_one_audio_token_is_the_least():
    assert MIN_SAMPLES == HOP_LENGTH * PATCH_STRIDE * SUBSAMPLE_FACTOR


@pytest.mark.parametrize("count", [1, 257, 3_199, 3_200, 3_201])
def test_short_clips_are_padded_with_zeros(tmp_path, count):
    clip = load_bytes(tmp_path, pcm_wav(SIXTEEN[:count]))
    assert len(clip.samples) == max(count, 3_200)
    assert clip.padded == (count < 3_200)
    assert np.array_equal(clip.samples[:count], SIXTEEN[:count] / np.float32(32768))
    assert not clip.samples[count:].any()
    assert clip.source_seconds == count / 16_000


def test_silence(tmp_path):
    noise = np.random.default_rng(0).uniform(-1, 1, 8000)
    for samples, silent in ((0 * noise, True), (0.9e-4 * noise, True), (1.2e-4 * noise, False)):
        assert load_bytes(tmp_path, by_soundfile(samples, 16_000, "WAV", "FLOAT")).silent == silent
    opposite = np.stack([noise, -noise], 1)
    assert load_bytes(tmp_path, by_soundfile(opposite, 16_000, "WAV", "FLOAT")).silent


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_numbers_that_are_none(tmp_path, bad, channels):
    samples = np.zeros((8000, channels), np.float32)
    samples[4000, -1] = bad
    said = refuse(tmp_path, by_soundfile(samples, 16_000, "WAV", "FLOAT"))
    assert said == "WAV: NaN or infinite samples, the first at 0.250 s; export it again"
    assert "NaN or infinite" in refuse(
        tmp_path, by_soundfile(samples, 16_000, "WAV", "FLOAT"), allow_truncated=True
    )


def test_sums_that_overflow(tmp_path):
    samples = np.full((4000, 2), 3e38, np.float32)
    assert "infinite" in refuse(tmp_path, by_soundfile(samples, 16_000, "WAV", "FLOAT"))


def test_no_samples(tmp_path):
    assert "no samples" in refuse(tmp_path, pcm_wav(SIXTEEN[:0]))
    tagged = pcm_wav(SIXTEEN[:0], after=b"LIST\x1a\0\0\0INFOISFT\x0e\0\0\0Lavf59.27.100\0")
    assert "no samples" in refuse(tmp_path, tagged)


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_impossible_rates(tmp_path, rate):
    header = bytearray(pcm_wav(SIXTEEN))
    header[24:28] = rate.to_bytes(4, "little")
    assert f"{rate} Hz is no possible sampling rate" in refuse(tmp_path, bytes(header))


# --- what is no recording --------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"RIFF\0\0\0\0WAVE", "neither libsndfile nor FFmpeg can read it"),
        (recordings.only_video(), "QuickTime / MOV: there is no sound track in it"),
    ],
)  # fmt: skip
def test_what_is_no_recording(tmp_path, content, words):
    assert words in refuse(tmp_path, content, "x.wav")


def test_unknown_codecs(tmp_path):
    content = bytearray(pcm_wav(SIXTEEN))
    content[20:22] = b"\x34\x12"
    assert "FFmpeg lacks its codec" in refuse(tmp_path, bytes(content))


def test_files_that_cannot_be_opened(tmp_path):
    for path in (tmp_path / "none.wav", tmp_path, "a\0b", f"{tmp_path}/{'x' * 300}"):
        with pytest.raises(AudioError, match="cannot be opened"):
            load(path)


def test_a_playlist_opens_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, recording("ffmpeg", "adts", "aac", 44_100), "a.aac")
    save(tmp_path, pcm_wav(SIXTEEN), "a.wav")
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nfile://{tmp_path}/a.aac\n#EXT-X-ENDLIST\n"
    for name in ("x.m3u8", "x.wav"):
        assert "a text file" in refuse(tmp_path, hls.encode(), name)
        assert "a text file" in refuse(tmp_path, b"ffconcat version 1.0\nfile a.wav\n", name)


def test_tags_in_any_encoding(tmp_path):
    content = by_ffmpeg(sound(1.0, 44_100), 44_100, "ipod", "aac", metadata={"title": "XXXXXXXX"})
    assert content.count(b"XXXXXXXX") == 1
    assert load_bytes(tmp_path, content.replace(b"XXXXXXXX", "中文标题".encode("gbk"))).source_rate == 44_100


def test_the_sound_of_a_film(tmp_path):
    for container in ("mp4", "matroska"):
        content = by_ffmpeg(sound(1.0, 44_100), 44_100, container, "aac", video=True)
        assert abs(load_bytes(tmp_path, content).source_seconds - 1) < 0.06


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count open files")
def test_files_are_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for content in (pcm_wav(SIXTEEN), PNG, b"x", recording("ffmpeg", "ipod", "aac", 44_100)[:5000]):
        for _ in range(5):
            with contextlib.suppress(AudioError):
                load_bytes(tmp_path, content)
    with pytest.raises(AudioError):
        load(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_nothing_heavy_is_imported():
    heavy = {"av", "torch", "librosa", "datasets"}
    code = f"import mdl_toolkit.audio.loading, sys; print(*{heavy} & {{*sys.modules}})"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "\n"
    )
