"""Mix decoded sound down to mono and resample it to the model's rate, block by block.

Memory is that of the result: neither all channels nor a rate above 24 kHz are held longer than a block.
"""

from typing import Any

import numpy as np
import soxr

from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.model.constants import SAMPLE_RATE
from mdl_toolkit.model.lengths import MIN_SAMPLES

Floats = np.ndarray[Any, np.dtype[np.float32]]

CONVERT = Localized("convert it first, for example with: ffmpeg -i FILE new.flac")
# -80 dBFS; the dither of 16-bit files stays below -90 dBFS.
SILENCE = 1e-4
# The largest 16-bit sample.
FULL_SCALE = 32767 / 32768
# Samples in a row at full scale; a healthy peak touches it once or twice.
CLIPPED = 3
# soxr's: aliases below -100 dB. FFmpeg's own resampler leaves -62 dB at 9 kHz.
QUALITY = "HQ"
# Hz; up to this, 16-bit samples take fewer bytes than resampled ones, which need 28 bits.
HIGHEST_STORED_RATE = 24_000
# Hz; a rate beyond these is a damaged header, not a recording.
RATES = range(1_000, 1_000_001)


class Mixdown:
    """Take blocks of decoded sound, and hold their average over all channels, at 16 kHz or up to 24 kHz.

    Attributes:
        rate: Hz, of the source; 0 before the first block.
        length: samples per channel so far.
        peak: the largest magnitude of the mono mix.
        channel_peak: that of any channel, while the mono mix is silent.
        loud: samples of the mono mix at full scale.
        clipped: as many as `CLIPPED` of them follow one another.
    """

    def __init__(self) -> None:
        self.rate = self.length = self.loud = 0
        self.peak, self.channel_peak, self.clipped = 0.0, 0.0, False
        # A bytearray grows in place, and untouched room in it takes no memory.
        self._samples = bytearray()
        self._resampler: soxr.ResampleStream | None = None
        # The last samples' being at full scale.
        self._tail = np.zeros(CLIPPED - 1, bool)

    def add(self, name: str, block: Floats, rate: int, start: int) -> None:
        """Add decoded samples, `[channels, n]` float32, averaged; `start` is the first one's in the source.

        Raises:
            AudioError: a sample is NaN or infinite; with the format's name.
        """
        self.rate = rate
        # Added up one by one, so that every machine rounds alike; infinity and NaN are found below.
        mono: Floats = block[0].copy()
        with np.errstate(over="ignore", invalid="ignore"):
            for channel in block[1:]:
                mono += channel
            mono /= np.float32(len(block))
        bad = np.flatnonzero(~np.isfinite(mono))
        if len(bad):
            raise AudioError(
                "{name}: NaN or infinite samples, the first at {seconds:.3f} s; export it again",
                name=name,
                seconds=(start + bad[0]) / rate,
            )
        self.length += len(mono)
        level = np.abs(mono)
        self.peak = max(self.peak, float(level.max(initial=0)))
        loud = level >= FULL_SCALE
        self.loud += int(loud.sum())
        joined = np.concatenate([self._tail, loud])
        self._tail = joined[len(loud) :]
        runs = [joined[start : start + len(loud)] for start in range(CLIPPED)]
        self.clipped |= bool(np.logical_and.reduce(runs).any())
        if self.peak < SILENCE:
            self.channel_peak = max(self.channel_peak, float(np.abs(block).max(initial=0)))
        self._resample(mono)

    def _resample(self, mono: Floats, last: bool = False) -> None:
        if self.rate > HIGHEST_STORED_RATE:
            self._resampler = self._resampler or soxr.ResampleStream(
                self.rate, SAMPLE_RATE, 1, quality=QUALITY
            )
            mono = self._resampler.resample_chunk(mono, last=last)
        self._samples += mono.data

    def finish(self) -> tuple[Floats, int]:
        """Return all samples that a dataset stores, and the rate of these."""
        self._resample(np.zeros(0, np.float32), last=True)
        stored = np.frombuffer(self._samples, np.float32)
        rate = SAMPLE_RATE if self._resampler else self.rate
        if rate > SAMPLE_RATE:
            steps = stored * np.float32(2.0**15)
            # A remainder takes ten times as long.
            if (steps != np.rint(steps)).any():
                return to_model_rate(stored, rate), SAMPLE_RATE
        return stored, rate


def to_model_rate(mono: Floats, rate: int) -> Floats:
    """Resample to 16 kHz, and pad with zeros what is too short for one audio token."""
    samples = mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, QUALITY)
    padding = max(0, MIN_SAMPLES - len(samples))
    return np.pad(samples, (0, padding)) if padding else samples
