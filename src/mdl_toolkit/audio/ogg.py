"""Check that an Ogg file is whole, page by page (RFC 3533)."""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mdl_toolkit.audio.file_parts import Blocks, Integrity, damage_at, joined_files
from mdl_toolkit.i18n import Localized

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# RFC 3533: flags of a stream's first and last page.
_FIRST, _LAST = 2, 4


class _Page(NamedTuple):
    """Hold the header of an Ogg page.

    Attributes:
        flags: `_FIRST` and `_LAST`.
        end: the end of the packets that end here, in samples; -1 if none does.
        stream: the number of its stream.
        number: its own, in the stream.
        is_intact: its checksum fits.
    """

    flags: int
    end: int
    stream: int
    number: int
    is_intact: bool


def check_ogg(data: Blocks) -> Integrity:
    """Follow the pages of all streams in the file to their ends.

    Raises:
        AudioError: pages are missing, or fail their checksum; or several files are joined.
    """
    head = data.at(0, 40)
    # Per stream: number of the next page.
    expected: dict[int, int] = {}
    open_streams: set[int] = set()
    position = end = 0
    for position, page in _pages(data):
        if page.stream == int.from_bytes(head[14:18], "little"):
            end = max(end, page.end)
        if page.flags & _FIRST:
            if expected and not open_streams:
                raise joined_files("Ogg")
            open_streams.add(page.stream)
        elif page.number != expected.get(page.stream):
            raise damage_at(position, "Ogg", Localized("pages are missing"))
        if not page.is_intact:
            raise damage_at(position, "Ogg", Localized("a page fails its checksum"))
        expected[page.stream] = page.number + 1
        if page.flags & _LAST:
            open_streams.discard(page.stream)
    is_cut = open_streams or not expected
    missing = Localized("the Ogg stream breaks off before its last page")
    # The first packet of Opus says how many samples are skipped (RFC 7845, section 5.1).
    skipped = int.from_bytes(head[38:40], "little")
    seconds = max(0, end - skipped) / 48_000 if head[28:36] == b"OpusHead" else 0.0
    return Integrity(missing if is_cut else None, has_length=True, opus_seconds=seconds)


def _pages(data: Blocks) -> Iterator[tuple[int, _Page]]:
    """Yield each complete page and the byte where it starts; whatever follows the last one is left aside.

    Raises:
        AudioError: there are pages after bytes that are no page.
    """
    position = 0
    while len(head := data.at(position, 27)) == 27 and head[:4] == b"OggS":
        flags, granule, stream, number, checksum, segments = struct.unpack("<5xBqIIIB", head)
        size = 27 + segments + sum(data.at(position + 27, segments))
        if position + size > data.size:
            return
        page = data.at(position, size)
        # Ogg's CRC is zlib's with the bits of each byte and of the result mirrored, without inversion.
        blank = (page[:22] + bytes(4) + page[26:]).translate(_MIRRORED)
        crc = (zlib.crc32(blank, 0xFFFFFFFF) ^ 0xFFFFFFFF).to_bytes(4, "little").translate(_MIRRORED)
        is_intact = int.from_bytes(crc, "big") == checksum
        yield position, _Page(flags, granule, stream, number, is_intact)
        position += size
    if data.find(b"OggS", position + 1) >= 0:
        raise damage_at(position, "Ogg", Localized("bytes that are no page"))
