"""Sound comes out as long, as loud and the same as from FFmpeg alone; the table of formats is true."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from mdl_toolkit.audio.decoders import decode
from mdl_toolkit.audio.integrity import check_integrity
from mdl_toolkit.audio.loading import SAMPLE_RATE, Clip, load
from mdl_toolkit.audio.segments import Cutter
from tests.support import recordings
from tests.support.ogg import crc
from tests.support.paths import DOCS
from tests.support.recordings import by_ffmpeg, by_soundfile, recording, save

SECONDS = 1.3


def song(rate: int, channels: int) -> np.ndarray:
    """float32 `[n, channels]`: swelling tones up to 7 kHz, and noise; unlike at the start and at the end."""
    t = np.arange(round(SECONDS * rate)) / rate
    columns = []
    for channel in range(channels):
        tones = [
            0.15 * np.sin(2 * np.pi * f * t + channel) for f in (310, 1250, 3300, 6900) if f < 0.4 * rate
        ]
        noise = 0.003 * np.random.default_rng(channel).standard_normal(t.size)
        columns.append(sum(tones) * (0.6 + 0.4 * np.sin(7 * t**2 + channel)) + noise)
    return np.stack(columns, 1).astype(np.float32)


def plainly(content: bytes, folder: Path, decoder: str | None = None) -> tuple[np.ndarray, int]:
    """What FFmpeg makes of a file by its defaults, or by that decoder: float64 mono, and its rate."""
    blocks = []
    with av.open(save(folder, content, "plain.bin")) as container:
        stream = container.streams.best("audio")
        context = stream.codec_context
        if decoder:
            context = av.CodecContext.create(decoder, "r")
            context.extradata, context.layout = stream.codec_context.extradata, stream.codec_context.layout
            context.sample_rate = stream.codec_context.sample_rate
        for packet in container.demux(stream):
            for frame in context.decode(packet if packet.size else None):
                samples = frame.to_ndarray()
                samples = samples if frame.format.is_planar else samples.reshape(frame.samples, -1).T
                blocks.append(scaled(samples).mean(0))
                rate = frame.sample_rate
    return np.concatenate(blocks), rate


def scaled(samples: np.ndarray) -> np.ndarray:
    if samples.dtype.kind == "f":
        return samples.astype(np.float64)
    half = 2.0 ** (8 * samples.itemsize - 1)
    return samples / half - (samples.dtype.kind == "u")


def decibels(samples: np.ndarray) -> float:
    """Of all its energy, so that silence at the ends does not count."""
    return 10 * float(np.log10(np.sum(np.square(samples, dtype=np.float64)) + 1e-20))


def difference(one: np.ndarray, two: np.ndarray, most: int) -> float:
    """How many dB the difference of two sounds lies below the second, at the best shift of up to `most`."""
    return max(_below(one, two, shift) for shift in range(-most, most + 1))


def _below(one: np.ndarray, two: np.ndarray, shift: int) -> float:
    one, two = one[max(0, shift) :], two[max(0, -shift) :]
    size = min(len(one), len(two))
    return decibels(two[:size]) - decibels(one[:size] - two[:size])


def same(clip: Clip, expected: tuple[np.ndarray, int], *, frame: int = 0, below: float = 40) -> None:
    """Hold a clip against FFmpeg's samples: equal length, or up to a frame, equal level, equal wave."""
    samples, rate = expected
    assert abs(clip.source_seconds * rate - len(samples)) <= max(frame, rate / clip.source_rate)
    samples = samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE, "HQ")
    assert abs(decibels(clip.samples) - decibels(samples)) < 0.1
    assert difference(clip.samples, samples, frame * SAMPLE_RATE // rate) > below


def reader(path: Path) -> str:
    with path.open("rb") as file:
        name = decode(file, check_integrity(file), Cutter(())).format
    return "libsndfile" if name in soundfile.available_formats() else "PyAV"


# --- MP3 -------------------------------------------------------------------------------------------------


def id3(version: int) -> bytes:
    """A tag with a picture in it, whose bytes look like MPEG frames now and then."""
    picture = b"\0image/jpeg\0\3\0" + b"\xff\xfb\x90\x64\xff\xd8" * 9000
    size = len(picture)
    bits = struct.pack(">I", size) if version == 3 else _sevens(size)
    return b"ID3" + bytes([version, 0, 0]) + _sevens(size + 10) + b"APIC" + bits + b"\0\0" + picture


def _sevens(size: int) -> bytes:
    return bytes(size >> shift & 127 for shift in (21, 14, 7, 0))


def split(mp3: bytes) -> tuple[bytes, bytes]:
    """The first frame, with its table, and the others."""
    assert b"Xing" in mp3[:200] or b"Info" in mp3[:200]
    place = mp3.index(mp3[:2], 4)
    return mp3[:place], mp3[place:]


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_mp3(tmp_path, rate, channels, mode):
    samples = song(rate, channels)
    whole = by_soundfile(samples, rate, "MP3", "MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.5)
    _, bare = split(whole)
    for tag in (b"", id3(3), id3(4)):
        path = save(tmp_path, tag + whole)
        assert load(path).source_seconds == len(samples) / rate  # LAME tells what it added at both ends
        same(load(path), plainly(tag + whole, tmp_path), below=100)
        path = save(tmp_path, tag + bare)
        same(load(path), plainly(tag + bare, tmp_path), below=100)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("xing", ["0", "1"])
@pytest.mark.parametrize("version", ["0", "3", "4"])
def test_mp3_by_ffmpeg(tmp_path, rate, channels, xing, version):
    content = by_ffmpeg(
        song(rate, channels),
        rate,
        "mp3",
        "libmp3lame",
        metadata={"title": "A title 标题" * 40},
        write_xing=xing,
        id3v2_version=version,
    )
    assert content.startswith(b"ID3") == (version != "0")
    same(load(save(tmp_path, content)), plainly(content, tmp_path), below=100)


def test_mp3_whose_table_does_not_tell_the_delay(tmp_path):
    """Only FFmpeg leaves the delay of the decoder (529 samples) in the sound."""
    samples = song(16_000, 1)
    first, bare = split(by_soundfile(samples, 16_000, "MP3", "MPEG_LAYER_III"))
    content = first[: first.index(b"LAME")].ljust(len(first), b"\0") + bare
    same(load(save(tmp_path, content)), plainly(content, tmp_path), frame=576)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_mp3_with_a_table_by_fraunhofer(tmp_path, mode):
    """libsndfile does not know it, and would stop at an estimate: here, before the end."""
    samples = np.concatenate([song(44_100, 1), 0.001 * song(44_100, 1), 0.001 * song(44_100, 1)])
    first, bare = split(by_soundfile(samples, 44_100, "MP3", "MPEG_LAYER_III", bitrate_mode=mode))
    place = max(first.find(b"Info"), first.find(b"Xing"))
    frames = int.from_bytes(first[place + 8 : place + 12], "big")
    header = struct.pack(">HHHIIHHHH", 1, 0, 75, len(first + bare), frames, 0, 1, 2, 1)
    content = (first[:4] + bytes(32) + b"VBRI" + header).ljust(len(first), b"\0") + bare
    same(load(save(tmp_path, content)), plainly(content, tmp_path), below=100)


# --- Opus ------------------------------------------------------------------------------------------------


def pages(ogg: bytes) -> Iterator[bytearray]:
    while ogg:
        body = 27 + ogg[26]
        size = body + sum(ogg[27:body])
        yield bytearray(ogg[:size])
        ogg = ogg[size:]


def repaged(ogg: bytes, *, head: tuple[int, bytes] = (0, b""), later: int = 0) -> bytes:
    """Ogg Opus with other bytes at a place in its first packet, and all positions `later`."""
    whole = list(pages(ogg))
    start = whole[0].index(b"OpusHead") + head[0]
    whole[0][start : start + len(head[1])] = head[1]
    for number, page in enumerate(whole):
        if number > 1:  # the first two hold the headers
            struct.pack_into("<q", page, 6, struct.unpack_from("<q", page, 6)[0] + later)
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", crc(bytes(page)))
    return b"".join(map(bytes, whole))


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("container", ["ogg", "webm", "matroska", "mp4", "soundfile"])
def test_opus(tmp_path, rate, channels, container):
    samples = song(rate, channels)
    if container == "soundfile":
        content = by_soundfile(samples, rate, "OGG", "OPUS", compression_level=0.5)
    else:
        content = by_ffmpeg(samples, rate, container, "libopus")
    path = save(tmp_path, content)
    assert reader(path) == ("libsndfile" if content[:4] == b"OggS" and rate >= 16_000 else "PyAV")
    same(load(path), plainly(content, tmp_path))
    if container != "mp4":  # FFmpeg writes no edit list for the padding at its end
        assert load(path).source_seconds == pytest.approx(len(samples) / rate, abs=1e-4)


@pytest.mark.skipif("libopus" not in av.codecs_available, reason="this PyAV has no libopus")
@pytest.mark.parametrize("rate", [24_000, 48_000])
def test_opus_for_speech(tmp_path, rate):
    """FFmpeg's own decoder resamples this mode (SILK) another way; libopus is the one that defines it."""
    content = by_soundfile(recordings.sound(SECONDS, rate), rate, "OGG", "OPUS", compression_level=1.0)
    assert len(content) < SECONDS * 2000
    clip = load(save(tmp_path, content))
    same(clip, plainly(content, tmp_path, "libopus"), below=35)
    same(clip, plainly(content, tmp_path), frame=960, below=10)


@pytest.mark.parametrize("named", [0, 8_000, 11_025, 12_000, 16_000, 44_100, 96_000])
def test_the_rate_that_opus_names_is_only_a_remark(tmp_path, named):
    """RFC 7845, section 5.1: not the rate to decode at, and 0 if unknown; libsndfile decodes at it."""
    whole = by_ffmpeg(song(48_000, 1), 48_000, "ogg", "libopus")
    content = repaged(whole, head=(12, struct.pack("<I", named)))
    same(load(save(tmp_path, content)), plainly(whole, tmp_path))
    cut = load(save(tmp_path, content[:-1000]), allow_truncated=True)  # a page holds a second
    assert cut.truncated is not None
    assert 0.9 < cut.source_seconds < SECONDS - 0.2


@pytest.mark.parametrize("quieter", [-1536, 0, 512])
def test_the_gain_that_opus_names_is_applied(tmp_path, quieter):
    """RFC 7845, section 5.1: in steps of 1/256 dB."""
    whole = by_ffmpeg(song(48_000, 1), 48_000, "ogg", "libopus")
    content = repaged(whole, head=(16, struct.pack("<h", quieter)))
    same(load(save(tmp_path, content)), plainly(content, tmp_path))
    gained = decibels(load(save(tmp_path, content)).samples) - decibels(load(save(tmp_path, whole)).samples)
    assert gained == pytest.approx(quieter / 256, abs=0.01)


@pytest.mark.parametrize("skipped", [0, 312, 3_840])
@pytest.mark.parametrize("later", [0, 100, 480_000])
def test_opus_that_starts_in_the_middle_of_a_stream(tmp_path, skipped, later):
    """RFC 7845, section 4.3. libsndfile would play what is to be skipped, and lose as much at the end."""
    whole = by_ffmpeg(song(48_000, 1), 48_000, "ogg", "libopus")
    content = repaged(whole, head=(10, struct.pack("<H", skipped)), later=later)
    path = save(tmp_path, content)
    assert load(path).source_seconds * 48_000 == pytest.approx(SECONDS * 48_000 + 312 - skipped)
    assert reader(path) == ("PyAV" if later else "libsndfile")
    same(load(path), plainly(content, tmp_path), below=100)


# --- everything else -------------------------------------------------------------------------------------


MORE = [
    *(("soundfile", "CAF", codec, 44_100) for codec in ("ALAC_16", "ULAW")),
    *(("soundfile", "AIFF", codec, 44_100) for codec in ("PCM_24", "FLOAT", "ULAW")),
    *(("soundfile", "AU", codec, 8_000) for codec in ("FLOAT", "ALAW", "ULAW")),
    *(("soundfile", "NIST", codec, 8_000) for codec in ("ALAW", "ULAW")),
    *(("ffmpeg", "mp4", codec, 48_000) for codec in ("alac", "flac", "libmp3lame", "libopus", "ac3", "eac3")),
    *(("ffmpeg", "mov", codec, 44_100) for codec in ("aac", "alac")),
    *(("ffmpeg", "matroska", codec, 48_000) for codec in ("pcm_s16le", "libmp3lame", "libopus", "ac3")),
    *(("ffmpeg", "mpegts", codec, 48_000) for codec in ("mp2", "libmp3lame", "libopus", "ac3")),
    *(("ffmpeg", "avi", codec, 44_100) for codec in ("pcm_s16le", "aac", "ac3")),
    *[("ffmpeg", "3gp", "libopencore_amrnb", 8_000)] * ("libopencore_amrnb" in av.codecs_available),
    ("ffmpeg", "wav", "libmp3lame", 44_100),
    ("ffmpeg", "flv", "aac", 44_100),
]  # fmt: skip
TRIED = [*recordings.EVERY, *MORE]
# FFmpeg 8 itself loses the end of ALAC in CAF; libsndfile writes GSM a block too long, and reads all of it.
UNLIKE = [("caf", "alac"), ("CAF", "ALAC_16"), ("WAV", "GSM610")]


@pytest.mark.parametrize(
    ("maker", "container", "codec", "rate"), [row for row in TRIED if row[1:3] not in UNLIKE]
)
def test_every_format(tmp_path, maker, container, codec, rate):
    content = recording(maker, container, codec, rate)
    same(load(save(tmp_path, content)), plainly(content, tmp_path))


PCM_ELSEWHERE = [
    *(("mov", codec) for codec in ("pcm_s16be", "pcm_s16le", "pcm_f32le", "pcm_mulaw")),
    *(("matroska", codec) for codec in ("pcm_s16le", "pcm_f32le")),
    *(("avi", codec) for codec in ("pcm_s16le", "pcm_mulaw", "adpcm_ms", "adpcm_ima_wav")),
]


@pytest.mark.parametrize(("container", "codec"), PCM_ELSEWHERE)
@pytest.mark.parametrize("fork", ["._", ".AppleDouble"])
def test_what_lies_in_the_current_directory_does_not_matter(tmp_path, monkeypatch, container, codec, fork):
    """libsndfile takes these for the resource fork of any file that it does not recognise."""
    monkeypatch.chdir(tmp_path)
    if fork == ".AppleDouble":
        (tmp_path / fork).mkdir()
    else:
        (tmp_path / fork).write_bytes(b"")
    content = by_ffmpeg(song(44_100, 1), 44_100, container, codec)
    same(load(save(tmp_path, content)), plainly(content, tmp_path), below=100)


# --- the table in the documents --------------------------------------------------------------------------

FILES = {
    "ipod": "M4A",
    "mp4": "MP4",
    "mov": "MOV",
    "3gp": "3GP",
    "adts": "ADTS",
    "mpegts": "MPEG-TS",
    "webm": "WebM",
    "matroska": "Matroska",
    "asf": "ASF",
    "amr": "AMR",
    "ac3": "AC-3",
    "eac3": "E-AC-3",
    "wv": "WavPack",
    "tta": "TTA",
    "mp2": "MP2",
    "flv": "FLV",
    "avi": "AVI",
    "ogg": "Ogg",
    "NIST": "NIST SPHERE",
    "OGG": "Ogg",
    "WAVEX": "WAV",
}
CODECS = {
    "FLOAT": "float",
    "DOUBLE": "float",
    "ALAW": "A-law",
    "ULAW": "μ-law",
    "IMA_ADPCM": "ADPCM",
    "MS_ADPCM": "ADPCM",
    "GSM610": "GSM 6.10",
    "MPEG_LAYER_III": "MP3",
    "libmp3lame": "MP3",
    "libopus": "Opus",
    "libopencore_amrnb": "AMR-NB",
    "wmav1": "WMA 1",
    "wmav2": "WMA 2",
    "ac3": "AC-3",
    "eac3": "E-AC-3",
    "wavpack": "WavPack",
    "vorbis": "Vorbis",
    "VORBIS": "Vorbis",
    "OPUS": "Opus",
}


def codec_name(codec: str) -> str:
    plain = "PCM" if codec.lower().startswith("pcm_") else codec.split("_")[0].upper()
    return CODECS.get(codec, plain)


def tried(folder: Path) -> set[tuple[str, str, str]]:
    """File, codec and reader of every recording that can be made here; each is decoded."""
    found = set()
    for maker, container, codec, rate in TRIED:
        path = save(folder, recording(maker, container, codec, rate))
        found.add((FILES.get(container, container.upper()), codec_name(codec), reader(path)))
    return found


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_in_the_documents(tmp_path, language):
    page = (DOCS / f"data.{language}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ((?:libsndfile|PyAV)[^|]*) \|$", page, re.MULTILINE)
    named = {
        (file.split(" (")[0], codec, who)
        for file, codecs, readers in rows
        for codec in codecs.split(", ")
        for who in readers.split(", ")
    }
    if "libopencore_amrnb" not in av.codecs_available:
        named = {row for row in named if row[1] != "AMR-NB"}
    assert named == tried(tmp_path)
