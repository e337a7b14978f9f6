"""A file that is no recording is told for what it is, with what to do."""

import numpy as np
import pytest

from mdl_toolkit.audio.loading import load
from mdl_toolkit.errors import AudioError
from tests.support.recordings import by_ffmpeg, save, sound

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 926880\n"
PCM = (sound(2.0, 16_000) * 32767).astype("<i2").tobytes()
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde"


def refuse(folder, content: bytes, name: str = "x.wav") -> str:
    with pytest.raises(AudioError) as caught:
        load(save(folder, content, name))
    assert caught.value.message.zh != caught.value.message.en
    return caught.value.message.en


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"#!SILK_V3" + np.random.default_rng(0).bytes(900), "pilk.decode("),
        (b"\x02#!SILK_V3" + np.random.default_rng(0).bytes(900), "voice message of WeChat or QQ (SILK)"),
        (LFS, "this is a pointer of git-lfs, not the recording; "),
        (b"<!DOCTYPE html>\n<p>Sign in", "this is a web page, not a recording"),
        (b"\xef\xbb\xbf\n<HTML><body>", "this is a web page, not a recording"),
        ("<!DOCTYPE HTML>\n<p>找不到".encode()[:-1], "this is a web page, not a recording"),
        ("字" * 30 + "\n", "a text file that starts with '字字"),
        (PNG, "a PNG image"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(99), "a JPEG image"),
        (b"PK\x03\x04" + bytes(99), "a ZIP archive"),
        (PCM, "ffmpeg -f s16le -ar 16000 -ac 1 -i FILE new.wav"),
        (PCM[1:], "neither libsndfile nor FFmpeg can read it"),
        (bytes(5000), "neither libsndfile nor FFmpeg can read it"),
        (np.random.default_rng(0).bytes(20_000), "neither libsndfile nor FFmpeg can read it"),
        (by_ffmpeg(sound(2.0, 44_100), 44_100, "ipod", "aac")[200:-900], "neither libsndfile nor FFmpeg"),
    ],
)
def test_what_is_no_recording(tmp_path, content, words):
    assert words in refuse(tmp_path, content if isinstance(content, bytes) else content.encode())


def test_channels_that_cancel_each_other_out(tmp_path):
    mono = sound(1.0, 16_000)
    for right, is_silent, is_cancelled in (
        (-mono, True, True),
        (mono, False, False),
        (-0.5 * mono, False, False),
    ):
        clip = load(save(tmp_path, by_ffmpeg(np.stack([mono, right], 1), 16_000, "wav", "pcm_s16le")))
        assert (clip.silent, clip.cancelled) == (is_silent, is_cancelled)
    silent = load(save(tmp_path, by_ffmpeg(np.zeros((16_000, 2)), 16_000, "wav", "pcm_s16le")))
    assert (silent.silent, silent.cancelled) == (True, False)
