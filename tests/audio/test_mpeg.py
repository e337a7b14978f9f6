"""Joined and tagged MP3 files are read to their ends; tags in the middle are neither damage nor sound."""

import contextlib
import struct

import numpy as np
import pytest

from mdl_toolkit.audio.loading import load
from mdl_toolkit.errors import AudioError
from tests.support.recordings import by_soundfile, save, sound

RATE = 44_100


def mp3(seconds: float = 1.0, rate: int = RATE, channels: int = 1, seed: int = 0) -> bytes:
    samples = np.stack([sound(seconds, rate, seed + channel) for channel in range(channels)], 1)
    return by_soundfile(samples, rate, "MP3", "MPEG_LAYER_III")


def without_table(content: bytes) -> bytes:
    assert b"Xing" in content[:200] or b"Info" in content[:200]
    return content[content.index(content[:2], 4) :]


# As in pictures, frames that are none.
PICTURE = b"\xff\xd8\xff\xe0\xff\xfb\x90\x64" * 300
ID3 = b"ID3\4\0\0\0\0" + bytes([len(PICTURE) >> 7, len(PICTURE) & 127]) + PICTURE
FOOTED = b"ID3\4\0\x10\0\0" + ID3[8:] + b"3DI\4\0\x10\0\0" + ID3[8:10]
ID3V1 = b"TAG" + PICTURE[:125]
ENHANCED = b"TAG+" + PICTURE[:223]


def ape(flags: int) -> bytes:
    return b"APETAGEX" + struct.pack("<IIII", 2000, len(PICTURE) + 32, 1, flags) + bytes(8)


APE = ape(0xA0000000) + PICTURE + ape(0x80000000)
LYRICS = b"LYRICSBEGIN" + b"LYR00010words" + b"000024LYRICS200"
TAGS = {
    "ID3v2": ID3,
    "ID3v2 with a footer": FOOTED,
    "ID3v1": ID3V1,
    "ID3v1 and enhanced": ENHANCED + ID3V1,
    "APE": APE,
    "Lyrics3": LYRICS + ID3V1,
    "several": APE + LYRICS + ID3V1 + ID3 + ID3,
    "padded": ID3V1 + ID3 + bytes(2048),
}


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("second_has_table", [True, False])
def test_tags_between_joined_files(tmp_path, name, second_has_table):
    one, two = mp3(), mp3(1.5, seed=5)
    two = two if second_has_table else without_table(two)
    tag = TAGS[name]
    expected = load(save(tmp_path, one + two)).samples
    assert 2.5 * 16_000 <= len(expected) < 2.6 * 16_000
    for content in (one + tag + two, tag + one + tag + two + tag):
        clip = load(save(tmp_path, content))
        assert np.array_equal(clip.samples, expected)
        assert clip.truncated is None
    bare = without_table(one)
    assert np.array_equal(
        load(save(tmp_path, bare + tag + two)).samples, load(save(tmp_path, bare + two)).samples
    )


@pytest.mark.parametrize("size", [0, 31, 2**32 - 1])
def test_a_tag_at_the_end_whose_size_is_nonsense(tmp_path, size):
    foot = b"APETAGEX" + struct.pack("<IIII", 2000, size, 1, 0) + bytes(8)
    flac = by_soundfile(sound(1.0, RATE), RATE, "FLAC", "PCM_16")
    for content in (mp3(), flac):
        with contextlib.suppress(AudioError):
            load(save(tmp_path, content + foot))


def test_a_table_in_the_middle_is_no_sound(tmp_path):
    one, two = mp3(), mp3(1.5, seed=5)
    with_table = load(save(tmp_path, one + two)).samples
    assert np.array_equal(with_table, load(save(tmp_path, one + without_table(two))).samples)


def test_stereo_after_mono(tmp_path):
    clip = load(save(tmp_path, mp3() + ID3 + mp3(channels=2, seed=7)))
    assert 2 <= clip.source_seconds < 2.1


def test_another_rate_in_the_middle_is_refused(tmp_path):
    for tag in (b"", ID3):
        with pytest.raises(AudioError, match="the sampling rate changes in the middle"):
            load(save(tmp_path, mp3() + tag + mp3(rate=48_000)))


def test_junk_between_frames_is_damage(tmp_path):
    one, two = mp3(), mp3(seed=5)
    for junk in (b"\x55" * 40, b"JUNK" + bytes(200), PICTURE):
        with pytest.raises(AudioError, match="bytes that are no frame"):
            load(save(tmp_path, one + junk + two))


def test_frames_missing_from_the_last_part_are_noticed(tmp_path):
    one, two = mp3(), mp3(1.5)
    with pytest.raises(AudioError, match="the header promises"):
        load(save(tmp_path, one + ID3 + two[: len(two) // 2]))


def test_a_part_that_was_split_off(tmp_path):
    """Its first frames may refer to sound before the cut, which no decoder has."""
    content = without_table(mp3(3.0))
    start = content.index(content[:2], len(content) // 2)
    assert 1.3 < load(save(tmp_path, content[start:])).source_seconds < 1.6


NO_FRAMES = [struct.pack(">I", header).ljust(500, b"\x55") * 30 for header in (0xFFFB9000, 0xFFFB0000)]


@pytest.mark.parametrize("content", [*NO_FRAMES, mp3()[:-7], mp3()])
def test_no_library_prints_what_it_thinks(tmp_path, capfd, content):
    with contextlib.suppress(AudioError):
        load(save(tmp_path, content), allow_truncated=True)
    assert capfd.readouterr() == ("", "")
