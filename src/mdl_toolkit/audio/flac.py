"""Store waveforms in 16 bits: as FLAC, or as plain samples where FLAC would not be smaller."""

import io
from dataclasses import dataclass

import numpy as np
import soundfile
from numpy.typing import NDArray

from mdl_toolkit.audio.loading import SAMPLE_RATE

# Smallest exponent of a scale: 32768 / scale must be a float32.
QUIETEST = -100


@dataclass(frozen=True)
class PackedAudio:
    """Hold a waveform as it is stored: 16-bit FLAC, or 16-bit samples where FLAC would not be smaller.

    Attributes:
        data: the bytes.
        format: `flac` or `pcm16`.
        scale: power of two that the samples are multiplied with when read.
        length: samples.
    """

    data: bytes
    format: str
    scale: float
    length: int


def pack_audio(waveform: NDArray[np.float32]) -> PackedAudio:
    """Store a waveform, `[samples]` float32, in 16 bits.

    The scale keeps loud clips (above full scale) from clipping and gives quiet ones at least 12 bits, so
    that rounding noise stays 77 dB below a clip's peak; 16-bit recordings at 16 kHz are kept exactly.
    """
    lowest, highest = float(waveform.min(initial=0.0)), float(waveform.max(initial=0.0))
    # The peak is below two to the power of this, and not below half of that.
    exponent = int(np.frexp(max(-lowest, highest))[1])
    scale = 2.0 ** max(min(exponent + 3, 0), QUIETEST)
    while np.rint(highest * 32768.0 / scale) > 32767 or np.rint(lowest * 32768.0 / scale) < -32768:
        scale *= 2.0
    samples = np.rint(waveform * np.float32(32768.0 / scale)).astype("<i2")
    raw = samples.tobytes()
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    flac = buffer.getvalue()
    smaller = len(flac) < len(raw)
    return PackedAudio(flac if smaller else raw, "flac" if smaller else "pcm16", scale, len(samples))


def unpack_audio(packed: PackedAudio) -> NDArray[np.float32]:
    """Return the waveform given to `pack_audio`, `[samples]` float32.

    Raises:
        ValueError: the bytes are damaged.
    """
    if packed.format == "flac":
        try:
            samples, _ = soundfile.read(io.BytesIO(packed.data), dtype="int16")
        except soundfile.SoundFileError as problem:
            raise ValueError(str(problem)) from problem
    else:
        samples = np.frombuffer(packed.data, dtype="<i2")
    if len(samples) != packed.length:
        raise ValueError(f"{len(samples)} of {packed.length} samples")
    waveform: NDArray[np.float32] = samples.astype(np.float32)
    waveform *= np.float32(packed.scale / 32768.0)
    return waveform
