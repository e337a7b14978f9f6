"""A segment of a recording is what a file with its samples alone would be."""

import tracemalloc

import numpy as np
import pytest
import soundfile

from mdl_toolkit.audio.loading import Clip, load, load_segments
from mdl_toolkit.audio.segments import OVERSHOOT, Segment, SegmentError, read_channel
from mdl_toolkit.errors import AudioError
from tests.support.recordings import by_ffmpeg, sound

SECONDS = 3.0


def stereo(rate: int) -> np.ndarray:
    """`[n, 2]`: two speakers, one to each side."""
    return np.stack([sound(SECONDS, rate, 1), 0.5 * sound(SECONDS, rate, 2)[::-1]], 1)


def facts(clip: Clip) -> dict:
    values = {
        name: value for name, value in vars(clip).items() if name not in ("stored", "samples", "channels")
    }
    return {**values, "stored": clip.stored.tolist(), "samples": clip.samples.tolist()}


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100])
@pytest.mark.parametrize(("container", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24")])
@pytest.mark.parametrize(("start", "end", "channel"), [
    (0.0, None, "left"), (0.0, 1.0, None), (0.73301, 2.2, 2), (1.5, 1.6, "right"), (2.99, None, "mean"),
])  # fmt: skip
def test_a_segment_is_what_its_own_file_would_be(tmp_path, rate, container, subtype, start, end, channel):
    whole, own = tmp_path / "whole", tmp_path / "own"
    soundfile.write(whole, stereo(rate), rate, format=container, subtype=subtype)
    samples, _ = soundfile.read(whole, dtype="float64")
    first, last = round(start * rate), len(samples) if end is None else round(end * rate)
    side = {"left": [0], "right": [1], 2: [1]}.get(channel, [0, 1])
    soundfile.write(own, samples[first:last, side], rate, format=container, subtype=subtype)
    found = load(whole, start=start, end=end, channel=channel)
    assert facts(found) == facts(load(own))
    assert found.source_seconds == (last - first) / rate
    assert found.channels == 2


@pytest.mark.parametrize(
    ("container", "codec"), [("mp3", "libmp3lame"), ("ipod", "aac"), ("webm", "libopus")]
)
def test_what_ffmpeg_decodes_is_cut_alike(tmp_path, container, codec):
    path = tmp_path / "x"
    path.write_bytes(by_ffmpeg(stereo(48_000), 48_000, container, codec))
    left, right = (load(path, channel=side).stored for side in (1, 2))
    assert np.abs(left - right).max() > 0.1
    # 1.5 s is the 24,000th sample at 16 kHz; beyond a filter's reach from the cuts it is the same sound.
    cut = load(path, start=1.5, end=2.5, channel=2).stored
    assert len(cut) == 16_000
    assert np.abs(cut[200:-200] - right[24_200:39_800]).max() < 1e-4


def test_all_segments_of_a_recording_take_one_decoding(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    soundfile.write(path, stereo(44_100), 44_100)
    starts = np.random.default_rng(0).uniform(0, 2.5, 60).tolist()
    segments = [Segment(start, start + 0.4, channel) for start in starts for channel in (None, 1, 2)]
    expected = [load(path, start=s.start, end=s.end, channel=s.channel) for s in segments]
    opened, real = [], soundfile.SoundFile
    monkeypatch.setattr(soundfile, "SoundFile", lambda *given: opened.append(1) or real(*given))
    found = load_segments(path, segments)
    assert len(opened) == 1
    assert [*map(facts, found)] == [*map(facts, expected)]


@pytest.mark.parametrize(("given", "field", "words"), [
    ({"start": -0.1}, "start", "count seconds from 0"),
    ({"start": float("nan")}, "start", "count seconds from 0"),
    ({"start": 1, "end": 1}, "end", "not after the start, 1 s"),
    ({"end": float("inf")}, "end", "not after"),
    ({"start": SECONDS}, "start", "the recording ends after 3.000 s"),
    ({"end": SECONDS + OVERSHOOT + 0.01}, "end", "the recording ends after 3.000 s"),
    ({"start": 1.00001, "end": 1.00002}, "end", "no sample lies between"),
    ({"channel": 3}, "channel", "the recording has 2 channels"),
    ({"channel": 0}, "channel", "counted from 1"),
    ({"channel": "agent"}, "channel", "give 1, 2, left, right or mean"),
    ({"channel": "inf"}, "channel", "give 1, 2, left, right or mean"),
])  # fmt: skip
def test_what_the_recording_does_not_have_is_refused(tmp_path, given, field, words):
    soundfile.write(tmp_path / "x.wav", stereo(16_000), 16_000)
    with pytest.raises(SegmentError, match=words) as raised:
        load(tmp_path / "x.wav", **given)
    assert raised.value.field == field


def test_an_end_may_be_rounded_up(tmp_path):
    soundfile.write(tmp_path / "x.wav", stereo(16_000), 16_000)
    clip = load(tmp_path / "x.wav", start=2.0, end=SECONDS + OVERSHOOT)
    assert (clip.source_seconds, clip.truncated) == (1.0, None)


def test_channels_have_names():
    given = [None, "", "null", "mean", "left", "right", 1, "2", "2.0", 5]
    assert [*map(read_channel, given)] == [None] * 4 + [1, 2, 1, 2, 2, 5]


def test_a_bad_sample_spoils_its_own_segment_alone(tmp_path):
    samples = stereo(16_000)
    samples[20_000, 0] = np.nan
    soundfile.write(tmp_path / "x.wav", samples, 16_000, subtype="FLOAT")
    segments = [Segment(0.0, 1.0), Segment(1.0, 2.0), Segment(1.0, 2.0, 2)]
    good, bad, other_side = load_segments(tmp_path / "x.wav", segments)
    assert isinstance(good, Clip)
    assert isinstance(bad, AudioError)
    assert "NaN or infinite samples, the first at 1.250 s;" in str(bad)
    assert isinstance(other_side, Clip)


def test_of_a_file_that_was_cut_off_segments_are_as_far_as_they_are_there(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, stereo(16_000), 16_000, subtype="PCM_16")
    path.write_bytes(path.read_bytes()[: 44 + 4 * 32_000])
    segments = [Segment(0.5, 1.5), Segment(1.5, 2.5), Segment(2.5, 3.0)]
    with pytest.raises(AudioError, match="cut off"):
        load_segments(path, segments)
    whole, part, none = load_segments(path, segments, allow_truncated=True)
    assert (whole.source_seconds, whole.truncated) == (1.0, None)
    assert part.source_seconds == 0.5
    assert part.truncated is not None
    assert isinstance(none, SegmentError)


def test_memory_is_that_of_the_segments(tmp_path):
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 48_000, 2, "PCM_16", format="FLAC") as file:
        for _ in range(120):
            file.write(np.zeros((48_000, 2), np.int16))
    load(path, end=1.0)
    tracemalloc.start()
    try:
        clips = load_segments(path, [Segment(10.0 * n, 10.0 * n + 1) for n in range(12)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [clip.source_seconds for clip in clips] == [1.0] * 12
    assert peak < 12 * 16_000 * 4 + 2**20
