"""No recording takes more time and memory than its longest length allows."""

import struct
import time

import pytest

from mdl_toolkit.audio.loading import load
from mdl_toolkit.errors import AudioError
from tests.support.recordings import recording, save

LONG = [
    ("soundfile", "WAV", "PCM_16"),
    ("soundfile", "FLAC", "PCM_16"),
    ("soundfile", "OGG", "VORBIS"),
    ("soundfile", "MP3", "MPEG_LAYER_III"),
    ("ffmpeg", "adts", "aac"),
    ("ffmpeg", "ipod", "aac"),
    ("ffmpeg", "matroska", "flac"),
]


@pytest.mark.parametrize(("maker", "container", "codec"), LONG)
def test_a_recording_has_a_longest_length(tmp_path, maker, container, codec):
    path = save(tmp_path, recording(maker, container, codec, 44_100, 3.0))
    assert load(path, max_hours=3.2 / 3600).source_seconds == pytest.approx(3, abs=0.1)
    with pytest.raises(AudioError, match="longer than 0.000805556 hours; cut it, or set --max-audio-hours"):
        load(path, max_hours=2.9 / 3600)


def test_a_long_recording_is_refused_before_it_is_decoded(tmp_path):
    """Ten days, of which most is a hole on the disk."""
    path, size = tmp_path / "long.wav", 2 * 16_000 * 86_400 * 10
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    wide = struct.pack("<4sIQQQI", b"ds64", 28, size, size, size // 2, 0)
    path.write_bytes(b"RF64\xff\xff\xff\xffWAVE" + wide + form + b"data\xff\xff\xff\xff")
    with path.open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    started = time.monotonic()
    with pytest.raises(AudioError, match="longer than 10 hours"):
        load(path, max_hours=10)
    assert time.monotonic() - started < 5
