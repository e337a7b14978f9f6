"""Load a file as mono float32 samples at the model's rate, or raise an error naming format and remedy.

Nothing is cut, padded or clipped without being marked. Addresses are not followed; `http` fetches them.
"""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

from mdl_toolkit.audio.decoders import decode
from mdl_toolkit.audio.file_parts import Blocks, Splice
from mdl_toolkit.audio.integrity import check_integrity
from mdl_toolkit.audio.mixdown import SILENCE, Floats, Mixdown
from mdl_toolkit.audio.mpeg import after_id3
from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.model.constants import SAMPLE_RATE as SAMPLE_RATE
from mdl_toolkit.model.lengths import MIN_SAMPLES


@dataclass(frozen=True, eq=False)
class Clip:
    """Hold a recording as the model takes it.

    Attributes:
        format: name of the source's format.
        samples: float32 `[n]`, mono, at 16 kHz; n is the source's length * 16000 / rate, rounded, but at
            least 3,200.
        stored: float32 `[m]`, the mono mix that a dataset stores: at the source's rate if that is up to
            16 kHz, or up to 24 kHz and 16 bits are exact; else at 16 kHz.
        stored_rate: Hz, of these.
        source_seconds: length of the source.
        source_rate: Hz.
        channels: of the source; all were averaged.
        padded: zeros were added at the end, up to 3,200 samples.
        silent: no sample of the mono mix reaches -80 dBFS.
        clipped: three samples of the mono mix in a row are at full scale: it was recorded too loud.
        full_scale: share of the mono mix's samples that are at full scale, 0 to 1.
        truncated: what the file promised and what came; None if all of it came.
        cancelled: it is silent only because its channels cancel each other out.
        has_length: the file says how long it is, so that a cut is noticed wherever it is.
    """

    format: str
    samples: Floats
    stored: Floats
    stored_rate: int
    source_seconds: float
    source_rate: int
    channels: int
    padded: bool
    silent: bool
    clipped: bool
    full_scale: float
    truncated: Localized | None
    cancelled: bool = False
    has_length: bool = True


def load(path: str | Path, *, allow_truncated: bool = False, max_hours: float = math.inf) -> Clip:
    """Decode a local file, mix it down to mono, resample it to 16 kHz and check it.

    Args:
        path: the file; its extension means nothing.
        allow_truncated: accept a file that was cut off, with what is left of it.
        max_hours: refuse what is longer, as memory grows with it: 0.23 GB an hour.

    Raises:
        AudioError: the file cannot be opened, is empty, is no recording, is damaged, too long or cut off, or
            holds NaN, infinity or no samples at all. The message does not name the file.

    Example:
        ```python
        from mdl_toolkit.audio.loading import load

        clip = load("recordings/0001.flac")
        print(clip.samples.shape, clip.source_seconds, clip.source_rate)
        ```
    """
    try:
        plain = io.FileIO(path)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise AudioError(
            "the file cannot be opened ({reason}); correct the path or its permissions", reason=reason
        ) from problem
    with _File(plain) as whole:
        size = whole.seek(0, 2)
        if not size:
            raise AudioError("the file is empty (0 bytes); get it again")
        file = _File(Splice(whole, (range(after_id3(Blocks(whole)), size),)))
        integrity = check_integrity(file)
        _check_complete(integrity.missing, allow_truncated)
        if integrity.parts:
            file = _File(Splice(file, integrity.parts))
        mixdown = Mixdown()
        decoded = decode(file, integrity, mixdown, max_hours)
    missing = integrity.missing or decoded.missing
    _check_complete(missing, allow_truncated)
    if not mixdown.length:
        raise AudioError("{name}: there are no samples in it; get it again", name=decoded.format)
    samples, stored, stored_rate = mixdown.finish()
    return Clip(
        format=decoded.format,
        samples=samples,
        stored=stored,
        stored_rate=stored_rate,
        source_seconds=mixdown.length / mixdown.rate,
        source_rate=mixdown.rate,
        channels=mixdown.channels,
        padded=mixdown.length * SAMPLE_RATE < (MIN_SAMPLES - 0.5) * mixdown.rate,
        silent=mixdown.peak < SILENCE,
        clipped=mixdown.clipped,
        full_scale=mixdown.loud / mixdown.length,
        truncated=missing,
        cancelled=mixdown.peak < SILENCE <= mixdown.channel_peak,
        has_length=integrity.has_length or decoded.has_length,
    )


class _File(io.BufferedReader):
    """Read a file, returning -1 from a `seek` to an impossible position, as C does.

    Decoders try such positions in damaged files, and an exception there would be printed with a traceback.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError):
            return -1


def _check_complete(missing: Localized | None, allow_truncated: bool) -> None:
    if missing and not allow_truncated:
        raise AudioError(
            "the file was cut off: {missing}; get all of it, or accept it with --allow-truncated",
            missing=missing,
        )
