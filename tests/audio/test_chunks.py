"""Chunks, boxes and sizes: valid files are read whole whatever else is in them, stale sizes are refused."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mdl_toolkit.audio.file_parts import Splice
from mdl_toolkit.audio.integrity import check_integrity
from mdl_toolkit.audio.loading import load
from mdl_toolkit.errors import AudioError
from tests.support.recordings import by_ffmpeg, by_soundfile, save, sound

RATE = 44_100
STEREO = np.stack([sound(1.0, RATE), sound(1.0, RATE, 1)], 1)
WAV = by_soundfile(STEREO, RATE, "WAV", "PCM_16")
DATA = WAV.index(b"data")
COUNTED = RATE * 4
TAG = b"TAG" + bytes(range(125))
ID3 = b"ID3\4\0\0\0\0\x20\0" + bytes(range(256)) * 16
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 32, 1, 0) + bytes(8)


def chunk(name: bytes, size: int) -> bytes:
    return name + struct.pack("<I", size) + b"\xff" * (size + size % 2)


def mono(folder: Path, content: bytes) -> np.ndarray:
    clip = load(save(folder, content))
    assert clip.truncated is None
    return clip.samples


def refuse(folder: Path, content: bytes) -> str:
    with pytest.raises(AudioError) as caught:
        load(save(folder, content))
    assert caught.value.message.zh != caught.value.message.en
    return caught.value.message.en


@pytest.fixture
def whole(tmp_path) -> np.ndarray:
    return mono(tmp_path, WAV)


CHUNKS = [b"PEAK", b"LIST", b"bext", b"cue ", b"smpl", b"acid", b"cart", b"inst", b"id3 ", b"iXML", b"levl"]


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("size", [0, 4, 16, 17, 100, 5000])
def test_chunks_of_any_size_and_place_do_not_matter(tmp_path, whole, name, size):
    more = chunk(name, size)
    assert np.array_equal(mono(tmp_path, WAV[:DATA] + more + WAV[DATA:]), whole)
    assert np.array_equal(mono(tmp_path, WAV[:12] + more + WAV[12:]), whole)
    assert np.array_equal(mono(tmp_path, WAV + more), whole)
    assert np.array_equal(mono(tmp_path, WAV + more + chunk(b"LIST", 30) + b"LIST\xff\xff\0\0cut"), whole)


def test_a_chunk_without_its_padding_does_not_matter(tmp_path, whole):
    odd = b"LIST" + struct.pack("<I", 7) + b"INFOodd"
    assert np.array_equal(mono(tmp_path, WAV[:DATA] + odd + WAV[DATA:]), whole)


KINDS = [(kind, "PCM_16") for kind in ("RF64", "W64", "AIFF", "AU", "CAF", "NIST", "WAVEX", "FLAC")]


@pytest.mark.parametrize(("kind", "codec"), [("WAV", "PCM_16"), *KINDS, ("WAV", "IMA_ADPCM")])
def test_tags_around_a_file_do_not_matter(tmp_path, kind, codec):
    content = by_soundfile(STEREO, RATE, kind, codec)
    expected = mono(tmp_path, content)
    for before, after in ((ID3, b""), (b"", TAG), (ID3, TAG), (b"", ID3 if kind != "FLAC" else TAG)):
        assert np.array_equal(mono(tmp_path, before + content + after), expected)


@pytest.mark.parametrize(("kind", "codec"), [("WAV", "PCM_16"), *KINDS])
def test_joined_files_are_refused(tmp_path, kind, codec):
    content = by_soundfile(STEREO, RATE, kind, codec)
    assert "several recordings are joined in this file" in refuse(tmp_path, content + content)
    assert "several recordings are joined in this file" in refuse(tmp_path, content + content[: -RATE // 2])


def test_joined_files_of_a_phone_are_refused(tmp_path):
    content = by_ffmpeg(STEREO, RATE, "ipod", "aac")
    assert "several recordings are joined in this file" in refuse(tmp_path, content + content)


def test_joined_files_from_pipes_are_refused(tmp_path):
    piped = sized(0xFFFFFFFF)
    assert "several recordings are joined in this file" in refuse(tmp_path, piped + piped)


def sized(size: int) -> bytes:
    return WAV[: DATA + 4] + struct.pack("<I", size) + WAV[DATA + 8 :]


@pytest.mark.parametrize("size", [4, RATE, COUNTED - 1000])
def test_a_stale_size_is_refused(tmp_path, size):
    said = refuse(tmp_path, sized(size))
    assert said.startswith(f"the header counts {size} bytes of sound, and {COUNTED - size} bytes follow that")
    assert said.endswith("ffmpeg -ignore_length 1 -i FILE new.flac")


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36])
def test_a_size_from_a_pipe_is_none(tmp_path, whole, size):
    assert np.array_equal(mono(tmp_path, sized(size)), whole)


@pytest.mark.parametrize(
    ("kind", "mark", "offset", "form", "piped"),
    [
        ("RF64", b"ds64", 16, "<Q", (0, 2**32 - 1, 2**64 - 1)),
        ("W64", b"data\xf3", 16, "<Q", (0, 24, 2**63 - 1, 2**64 - 1)),
        ("AIFF", b"SSND", 4, ">I", (0, 0x7F000008, 0xFFFFFFFF)),
        ("AU", b".snd", 8, ">I", (0, 0xFFFFFFFF)),
        ("CAF", b"data", 4, ">q", (-1,)),
    ],
)
def test_other_sizes(tmp_path, kind, mark, offset, form, piped):
    content = by_soundfile(STEREO, RATE, kind, "PCM_16")
    if mark not in content:
        pytest.skip("this libsndfile writes small RF64 as WAV")
    place = content.index(mark) + offset

    def with_size(size: int) -> bytes:
        return content[:place] + struct.pack(form, size) + content[place + struct.calcsize(form) :]

    for size in piped:
        assert np.array_equal(mono(tmp_path, with_size(size)), mono(tmp_path, content))
    assert "follow that nothing explains" in refuse(tmp_path, with_size(RATE))
    assert "promises" in refuse(tmp_path, with_size(RATE * 40))


@pytest.mark.parametrize(("kind", "codec"), [("WAV", "PCM_16"), *KINDS])
def test_what_is_neither_chunk_nor_tag_is_not_read_as_sound(tmp_path, kind, codec):
    content = by_soundfile(STEREO, RATE, kind, codec)
    refuse(tmp_path, content + np.random.default_rng(0).bytes(5000))
    if kind != "FLAC":
        assert np.array_equal(mono(tmp_path, content + bytes(5000)), mono(tmp_path, content))


CUT = [
    ("ffmpeg", "caf", "alac"),
    ("ffmpeg", "matroska", "flac"),
    ("ffmpeg", "webm", "libopus"),
    ("ffmpeg", "mov", "alac"),
    ("ffmpeg", "avi", "pcm_s16le"),
    ("ffmpeg", "ipod", "aac"),
    ("soundfile", "CAF", "ALAC_16"),
]


@pytest.mark.parametrize(("maker", "container", "codec"), CUT)
def test_bytes_that_are_missing_anywhere_are_noticed(tmp_path, maker, container, codec):
    make = by_soundfile if maker == "soundfile" else by_ffmpeg
    content = make(sound(2.0, 48_000), 48_000, container, codec)
    assert len(mono(tmp_path, content)) >= 2 * 16_000 * 0.9
    half = len(content) // 2
    for missing in (1, len(content) // 20):
        refuse(tmp_path, content[:-missing])
        refuse(tmp_path, content[:half] + content[half + missing :])


@pytest.mark.parametrize("size", [2**31 + 2000, 2**32 + 2000])
def test_more_than_32_bits_of_sound(tmp_path, size):
    """As long as a day; most of the file is a hole on the disk."""
    path = tmp_path / "long.wav"
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    wide = struct.pack("<4sIQQQI", b"ds64", 28, size, size, size // 2, 0)
    path.write_bytes(b"RF64\xff\xff\xff\xffWAVE" + wide + form + b"data\xff\xff\xff\xff")
    with path.open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    with path.open("rb") as file:
        integrity = check_integrity(file)
        assert integrity.missing is None
        with soundfile.SoundFile(io.BufferedReader(Splice(file, integrity.parts))) as seen:
            assert seen.frames == size // 2


def test_matroska_of_unknown_size_has_a_duration(tmp_path):
    """FLAC has no delay that could explain 0.15 s."""
    content = by_ffmpeg(sound(2.0, RATE), RATE, "matroska", "flac")
    place = content.index(b"\x18\x53\x80\x67") + 4
    unknown = content[:place] + b"\x01" + b"\xff" * 7 + content[place + 8 :]
    assert np.array_equal(mono(tmp_path, unknown), mono(tmp_path, content))
    assert "the header promises 2.00 s" in refuse(tmp_path, unknown[: -len(content) * 15 // 200])
