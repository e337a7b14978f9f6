"""Recordings: a file or address to mono float32 samples at 16 kHz.

Modules:
    loading          `load`: decode, check, resample, pad
    decoders         libsndfile and FFmpeg: a file to samples at its own rate
    integrity        whether a file is all there; nothing is decoded
    flac             samples as FLAC and back
    http             download one address
    download_cache   a cache of downloads
    urls             addresses: tell them from paths, show them without passwords

`mdl_toolkit.audio.load` is part of the Python API.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdl_toolkit.audio.loading import Clip, load

__all__ = ["Clip", "load"]


def __getattr__(name: str) -> Any:
    """Import the decoders when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mdl_toolkit.audio import loading

    return getattr(loading, name)
