"""Turn a recording, a file or an address, into mono float32 samples at 16 kHz.

Modules:
    loading          `load`: decode, check, resample, pad
    decoders         decode with libsndfile or FFmpeg, block by block
    unreadable       what a file is that no decoder reads, and what to do
    segments         cut seconds and a channel from decoded sound, exact to the sample
    resample         average channels and resample to 16 kHz, block by block
    integrity        check that a file is complete, without decoding it
    chunks           the same for files of chunks or boxes: sizes in headers against the file
    ogg              the same for Ogg, page by page
    mpeg             the same for MP3 and its kin, frame by frame, between tags
    embedded         recordings inside Parquet files, by file and row
    file_parts       read a file in blocks; show decoders only parts of it
    flac             store samples as FLAC, and read them back
    http             download one address
    connections      how long a server may be silent, and where redirections may lead
    download_cache   download each address once, and keep its content
    urls             tell addresses from paths, show them without passwords

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
