"""What was cut off, damaged or written into a pipe is read whole, marked or refused."""

import numpy as np
import pytest
import soundfile

from mdl_toolkit.audio.loading import MIN_SAMPLES, load
from mdl_toolkit.errors import AudioError
from tests.support import recordings
from tests.support.clips import SIXTEEN, likeness, load_bytes, refuse
from tests.support.recordings import by_ffmpeg, by_soundfile, pcm_wav, recording, save, sound

# --- written into a pipe, without a table, or joined -----------------------------------------------------


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000])
def test_wav_from_a_pipe(tmp_path, size):
    content = pcm_wav(SIXTEEN, size=size)
    assert np.array_equal(load_bytes(tmp_path, content).samples, SIXTEEN / np.float32(32768))


def test_flac_from_a_pipe(tmp_path):
    content = bytearray(by_soundfile(SIXTEEN.repeat(5), 16_000, "FLAC", "PCM_16"))
    assert content[:5] == b"fLaC\0"
    content[21] &= 0xF0  # the 36 bits of STREAMINFO that say how many samples there are
    content[22:26] = bytes(4)
    assert np.array_equal(load_bytes(tmp_path, bytes(content)).samples, SIXTEEN.repeat(5) / np.float32(32768))


def without_table(mp3: bytes) -> bytes:
    """Cut the first frame, which holds the table of frames and no sound."""
    assert b"Xing" in mp3[:200] or b"Info" in mp3[:200]
    return mp3[mp3.index(mp3[:2], 4) :]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_mp3_without_a_table_of_frames(tmp_path, mode):
    """libsndfile stops at an estimate there, far too early when the bit rate falls."""
    samples = sound(6.0, 44_100) * 0.01
    samples[:44_100] = np.random.default_rng(0).uniform(-1, 1, 44_100)
    whole = by_soundfile(samples, 44_100, "MP3", None, bitrate_mode=mode, compression_level=0.1)
    path = save(tmp_path, without_table(whole))
    assert mode == "CONSTANT" or len(soundfile.read(path)[0]) < 4 * 44_100
    assert 6 <= load(path).source_seconds < 6.1


def test_joined_mp3_files_are_read_to_the_end(tmp_path):
    one = recording("soundfile", "MP3", "MPEG_LAYER_III", 44_100)
    assert len(soundfile.read(save(tmp_path, one + one))[0]) < 1.1 * 44_100
    assert 2 <= load_bytes(tmp_path, one + one).source_seconds < 2.1


def test_joined_ogg_files_are_refused(tmp_path):
    one = recording("soundfile", "OGG", "VORBIS", 22_050)
    assert "several recordings are joined" in refuse(tmp_path, one + one)


# --- cut off ---------------------------------------------------------------------------------------------

# What is still read to its end after a cut, as nothing in it says how long it should be; see the reference.
SHARP = [
    row
    for row in recordings.EVERY
    if row[1] not in ("mpegts", "adts", "ac3", "eac3", "amr", "avi", "flv", "mp2")
]
FROM_THE_END = ("ipod", "mp4", "3gp", "mov", "caf", "CAF")  # the index stands at the end: nothing is left


@pytest.mark.parametrize(("maker", "container", "codec", "rate"), SHARP)
def test_what_was_cut_off_is_refused_or_marked(tmp_path, maker, container, codec, rate):
    whole = recording(maker, container, codec, rate, 3.0)
    full = load_bytes(tmp_path, whole)
    for share in (0.3, 0.5, 0.8, 0.9):
        content = whole[: int(len(whole) * share)]
        refuse(tmp_path, content)
        if container in FROM_THE_END or (share < 0.5 and container in ("OGG", "ogg", "tta", "wv")):
            continue  # not one whole page or frame is left
        clip = load_bytes(tmp_path, content, allow_truncated=True)
        assert clip.truncated is not None
        assert 0.2 < clip.source_seconds < full.source_seconds
        same = min(len(clip.samples), len(full.samples)) - 2000
        assert likeness(clip.samples[:same], full.samples[:same]) > 0.99


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        *((name, "PCM_16") for name in ("WAV", "FLAC", "AIFF", "AU")),
        ("OGG", "OPUS"),
        ("OGG", "VORBIS"),
        ("MP3", None),
    ],
)
def test_one_missing_byte_is_enough(tmp_path, container, codec):
    whole = by_soundfile(sound(1.0, 48_000), 48_000, container, codec)
    assert "cut off" in refuse(tmp_path, whole[:-1])


WITHOUT_LENGTH = [row for row in recordings.EVERY if row[1] in ("adts", "ac3", "mp2", "mpegts", "amr")]


@pytest.mark.parametrize("row", WITHOUT_LENGTH, ids=lambda row: row[1])
def test_streams_without_a_length_show_a_cut_in_the_middle_of_a_frame(tmp_path, row):
    whole = recording(*row, 3.0)
    refuse(tmp_path, whole[: len(whole) // 2 + 100])


def test_m4a_with_its_index_in_front(tmp_path):
    whole = by_ffmpeg(sound(3.0, 44_100), 44_100, "ipod", "aac", movflags="+faststart")
    said = refuse(tmp_path, whole[: len(whole) // 2])
    assert said.startswith("the file was cut off: ")
    assert said.endswith("; get all of it, or accept it with --allow-truncated")
    clip = load_bytes(tmp_path, whole[: len(whole) // 2], allow_truncated=True)
    assert clip.truncated is not None
    assert 1 < clip.source_seconds < 2


def test_a_wav_says_what_is_missing(tmp_path):
    content = pcm_wav(SIXTEEN)[:-4001]
    assert refuse(tmp_path, content) == (
        "the file was cut off: the header promises 16000 bytes of sound, 11999 are there; "
        "get all of it, or accept it with --allow-truncated"
    )
    clip = load_bytes(tmp_path, content, allow_truncated=True)
    assert np.array_equal(clip.samples, SIXTEEN[:5999] / np.float32(32768))
    assert clip.truncated.en == "the header promises 16000 bytes of sound, 11999 are there"


# --- damaged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "container", "codec", "rate"),
    [
        row
        for row in recordings.EVERY
        if row[1] in ("FLAC", "OGG", "MP3", "ogg", "ipod", "adts", "tta", "wv", "mp2")
    ],
)
@pytest.mark.parametrize("allow_truncated", [False, True])
def test_damage_in_the_middle_is_refused(tmp_path, maker, container, codec, rate, allow_truncated):
    whole = recording(maker, container, codec, rate, 4.0)
    middle = len(whole) // 2
    for junk in (bytes(1500), np.random.default_rng(0).bytes(1500), b""):
        if container == "ipod" and not junk:
            continue  # the index is no longer where the file says
        refuse(tmp_path, whole[:middle] + junk + whole[middle + 1500 :], allow_truncated=allow_truncated)


@pytest.mark.parametrize(("container", "codec"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_one_wrong_bit_in_a_format_with_checksums(tmp_path, container, codec):
    whole = bytearray(by_soundfile(sound(1.0, 48_000), 48_000, container, codec))
    whole[len(whole) // 2] ^= 1
    assert "the file is damaged" in refuse(tmp_path, bytes(whole))


def test_a_damaged_header_is_not_left_to_the_lenient_decoder(tmp_path):
    whole = bytearray(by_soundfile(SIXTEEN, 16_000, "FLAC", "PCM_16"))
    assert whole[42:46] == b"\x84\0\0\x28"  # the second block of metadata: its kind and length
    whole[45] += 1
    assert "raw FLAC: libsndfile says" in refuse(tmp_path, bytes(whole))


def test_no_damage_raises_anything_but_an_audio_error(tmp_path):
    rng = np.random.default_rng(0)
    for row in recordings.EVERY:
        whole = recording(*row, 0.3)
        for _ in range(12):
            content = bytearray(whole)
            for place in rng.integers(0, rng.choice([100, len(whole)]), rng.integers(1, 9)):
                content[place % len(whole)] = rng.integers(256)
            try:
                clip = load_bytes(
                    tmp_path, bytes(content[: rng.integers(20, len(whole) + 1)]), allow_truncated=True
                )
            except AudioError:
                continue
            assert np.isfinite(clip.samples).all()
            assert len(clip.samples) >= MIN_SAMPLES
