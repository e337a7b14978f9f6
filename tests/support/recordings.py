"""Recordings in every format that the tests read, made by soundfile and by FFmpeg's encoders."""

import io
import struct
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile


def sound(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """float32 `[n]`: two swelling tones and a little noise, the same for a seed."""
    t = np.arange(round(seconds * rate)) / rate
    tones = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * np.sin(2 * np.pi * 1300 * t)
    noise = np.random.default_rng(seed).standard_normal(t.size) * 0.003
    return (tones * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)) + noise).astype(np.float32)


def by_soundfile(samples: np.ndarray, rate: int, container: str, codec: str, **more) -> bytes:
    """A file's bytes; samples are `[n]` or `[n, channels]`."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=codec, **more)
    return file.getvalue()


def by_ffmpeg(
    samples: np.ndarray,
    rate: int,
    container: str,
    codec: str,
    *,
    video: bool = False,
    metadata: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """A file's bytes; samples are `[n]` or `[n, 2]`, `options` are the container's."""
    planes = np.ascontiguousarray(samples.reshape(len(samples), -1).T, np.float32)
    layout = "mono" if len(planes) == 1 else "stereo"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        with av.open(path, "w", format=container, options=options) as output:
            output.metadata.update(metadata or {})
            stream = _add_sound(output, codec, rate, layout)
            if video:
                _add_video(output, len(samples) / rate)
            resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or 1024)
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
                output.mux(stream.encode(piece))
        return path.read_bytes()


def _add_sound(output, codec: str, rate: int, layout: str):
    stream = output.add_stream(codec, rate=rate, layout=layout, options={"strict": "experimental"})
    formats = {format.name for format in stream.codec_context.codec.audio_formats}
    stream.format = next((name for name in ("s16", "s16p", "fltp") if name in formats), stream.format)
    if codec.startswith("wma"):
        stream.bit_rate = 64_000
    return stream


def _add_video(output, seconds: float) -> None:
    stream = output.add_stream("mpeg4", rate=10)
    stream.width = stream.height = 32
    for number in range(round(seconds * 10)):
        picture = av.VideoFrame(32, 32, "yuv420p")
        picture.pts, picture.time_base = number, Fraction(1, 10)
        output.mux(stream.encode(picture))
    output.mux(stream.encode(None))


def only_video() -> bytes:
    """An MP4 without sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        _add_video(output, 1.0)
    return file.getvalue()


def pcm_wav(samples: np.ndarray, rate: int = 16_000, *, size: int | None = None, after: bytes = b"") -> bytes:
    """A 16-bit mono WAV from int16 `[n]`, with `size` in its header whatever there is."""
    data = samples.astype("<i2").tobytes()
    size = len(data) if size is None else size
    header = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16) + struct.pack(
        "<4sI", b"data", size
    )
    return struct.pack("<4sI4s", b"RIFF", min(36 + size, 2**32 - 1), b"WAVE") + header + data + after


SOUNDFILE = [
    *(("WAV", codec, 44_100) for codec in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")),
    *(("WAV", codec, 8_000) for codec in ("ALAW", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610")),
    *(("FLAC", codec, 48_000) for codec in ("PCM_16", "PCM_24")),
    ("MP3", "MPEG_LAYER_III", 44_100),
    ("OGG", "VORBIS", 22_050),
    ("OGG", "OPUS", 48_000),
    *((container, "PCM_16", 32_000) for container in ("WAVEX", "AIFF", "AU", "CAF", "NIST", "RF64", "W64")),
]
FFMPEG = [
    ("ipod", "aac", 44_100),  # m4a
    ("mp4", "aac", 48_000),
    ("ipod", "alac", 44_100),
    ("3gp", "aac", 16_000),
    ("mov", "pcm_s16be", 48_000),
    ("adts", "aac", 44_100),
    ("mpegts", "aac", 48_000),
    ("webm", "libopus", 48_000),
    ("webm", "vorbis", 44_100),
    ("matroska", "flac", 44_100),
    ("matroska", "aac", 44_100),
    ("asf", "wmav1", 44_100),  # wma
    ("asf", "wmav2", 44_100),
    ("wav", "wmav2", 44_100),
    # PyAV 19 still reads AMR but cannot write it any more.
    *([("amr", "libopencore_amrnb", 8_000)] if "libopencore_amrnb" in av.codecs_available else []),
    ("ac3", "ac3", 48_000),
    ("eac3", "eac3", 48_000),
    ("wv", "wavpack", 44_100),
    ("tta", "tta", 44_100),
    ("mp2", "mp2", 44_100),
    ("flv", "libmp3lame", 44_100),
    ("avi", "libmp3lame", 44_100),
    ("ogg", "flac", 44_100),
    ("caf", "alac", 44_100),
]


def recording(maker: str, container: str, codec: str, rate: int, seconds: float = 1.0) -> bytes:
    """A mono recording of `sound`."""
    samples = sound(seconds, rate)
    if maker == "soundfile":
        return by_soundfile(samples, rate, container, codec)
    # FFmpeg's own Vorbis encoder takes stereo alone.
    return by_ffmpeg(np.stack([samples] * 2, 1) if codec == "vorbis" else samples, rate, container, codec)


EVERY = [("soundfile", *row) for row in SOUNDFILE] + [("ffmpeg", *row) for row in FFMPEG]


def save(folder: Path, content: bytes, name: str = "x.bin") -> Path:
    """A file with this content."""
    path = folder / name
    path.write_bytes(content)
    return path
