"""Store recordings as FLAC, so exactly that their log-mel is that of the recording itself.

The source's own samples are stored and resampled when they are read, where that takes fewer bytes: up to
16 kHz, and of 16 bits up to 24 kHz. Integers of up to 24 bits are exact, anything else keeps 28 bits.
"""

import io
from dataclasses import dataclass

import numpy as np
import soundfile
from numpy.typing import NDArray

from mdl_toolkit.audio.resample import to_model_rate
from mdl_toolkit.model.constants import SAMPLE_RATE

# Samples are rounded to 2**-26 of full scale, or of the power of two below the peak where that is 2 or more.
STEP_BITS = 26
# Bits below the 24 that FLAC takes.
FINE_BITS = 4


@dataclass(frozen=True)
class PackedAudio:
    """Hold a recording as it is stored.

    Attributes:
        data: the bytes.
        format: `flac`, mono of 16 or 24 bits at the rate in its header; `flac28`, the same, and after it four
            bits more of each sample, two samples to a byte; or, in datasets of earlier versions, `pcm16`.
        scale: power of two that the samples, between -1 and 1, are multiplied with when read.
        length: samples when read, at 16 kHz.
    """

    data: bytes
    format: str
    scale: float
    length: int


def pack_audio(
    samples: NDArray[np.float32], rate: int = SAMPLE_RATE, length: int | None = None
) -> PackedAudio:
    """Store a recording in 16, 24 or 28 bits, the fewest that hold all steps which its samples use.

    Args:
        samples: float32 `[samples]`.
        rate: of these, in Hz.
        length: samples when it is read; None for as many as are given.
    """
    exponent = int(np.frexp(np.abs(samples).max(initial=0.0))[1])
    step = 2.0 ** (max(exponent - 1, 0) - STEP_BITS)
    steps = np.rint(samples * np.float32(1 / step)).astype(np.int32)
    used = int(np.bitwise_or.reduce(steps))
    # The lowest bit that any sample uses.
    lowest = (used & -used) or 1
    steps, step = steps // lowest, step * lowest
    bits = 1 + max(int(steps.max(initial=0)).bit_length(), int(~steps.min(initial=0)).bit_length())
    length = len(samples) if length is None else length
    if bits <= 16:
        return PackedAudio(_flac(steps.astype(np.int16), rate, "PCM_16"), "flac", step * 2.0**15, length)
    if bits <= 24:
        return PackedAudio(_flac(steps << 8, rate, "PCM_24"), "flac", step * 2.0**23, length)
    coarse, fine = steps >> FINE_BITS << 8, np.append(steps & 15, [0] * (len(steps) % 2)).astype(np.uint8)
    data = _flac(coarse, rate, "PCM_24") + (fine[::2] << 4 | fine[1::2]).tobytes()
    return PackedAudio(data, "flac28", step * 2.0 ** (23 + FINE_BITS), length)


def _flac(samples: NDArray[np.integer], rate: int, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype=subtype)
    return buffer.getvalue()


def unpack_audio(packed: PackedAudio) -> NDArray[np.float32]:
    """Return the waveform at 16 kHz, `[length]` float32.

    Raises:
        ValueError: the bytes are damaged.
    """
    rate = SAMPLE_RATE
    if packed.format == "pcm16":
        samples = np.frombuffer(packed.data, dtype="<i2").astype(np.int32) << 16
    else:
        try:
            samples, rate = soundfile.read(io.BytesIO(packed.data), dtype="int32")
        except soundfile.SoundFileError as problem:
            raise ValueError(str(problem)) from problem
    if packed.format == "flac28":
        # Below the 24 bits, which stand in the upper ones of 32.
        pairs = np.frombuffer(packed.data, np.uint8)[-((len(samples) + 1) // 2) :]
        samples |= np.stack((pairs & 0xF0, pairs << 4), 1).ravel()[: len(samples)]
    waveform = samples.astype(np.float32)
    waveform *= np.float32(packed.scale / 2.0**31)
    waveform = to_model_rate(waveform, rate)
    if len(waveform) != packed.length:
        raise ValueError(f"{len(waveform)} of {packed.length} samples")
    return waveform
