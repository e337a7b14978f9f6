"""Check that all of a recording is there: what headers, pages and frames promise, against the bytes.

Decoders return cut-off or damaged files shortened, without a word. What can be told from the structure of a
file is told here, for WAV, RF64, W64, AIFF, AU, NIST Sphere, Ogg and MPEG audio; nothing is decoded. Files
are read in blocks, so that memory does not grow with them.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Localized

# Bytes read at once; an Ogg page has at most 65,307.
BLOCK = 1 << 16


@dataclass(frozen=True)
class Integrity:
    """Hold what the structure of a file says about its being whole.

    Attributes:
        missing: what was promised and is not there, of a file that was cut off.
        least_samples: the fewest samples per channel that a sound decoder returns; 0 if not known.
        is_mpeg: MPEG audio.
        is_streamed: WAV that was written into a pipe, with its size left at 0.
        opus_seconds: how long Ogg Opus is, if it does not start in the middle of a stream.
    """

    missing: Localized | None = None
    least_samples: int = 0
    is_mpeg: bool = False
    is_streamed: bool = False
    opus_seconds: float = 0.0


def check_integrity(file: BinaryIO) -> Integrity:
    """Compare what a file promises with what it holds; a format that is not known here promises nothing.

    Raises:
        AudioError: damage in the middle: Ogg pages that are missing or fail their checksum, bytes between
            MPEG frames that are no frame; or several Ogg files in one.
    """
    file.seek(0)
    head = file.read(40)
    if head[:4] in _CHUNKS and head[8:12] in (b"WAVE", b"AIFF", b"AIFC"):
        return _check_chunks(file, 12, *_CHUNKS[head[:4]])
    if head[:16] == _W64:
        return _check_chunks(file, 40, "<16sQ", b"data")
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        # Sun/NeXT audio, whose magic word is reversed where all its numbers are.
        offset, size = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:12])
        file.seek(offset)
        return _check_size(file, size)
    if head[:8] == b"NIST_1A\n":
        return _check_nist(file)
    if head[:4] == b"OggS":
        return _check_ogg(_Blocks(file))
    is_mpeg = head[:3] == b"ID3" or _frame(head[:4])
    return _check_mpeg(_Blocks(file)) if is_mpeg else Integrity()


class _Blocks:
    """Slice and search a file with one block of it in memory; `size` is in bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = _size(file)
        self._file = file
        self._start, self._block = 0, b""

    def at(self, position: int, count: int) -> bytes:
        """Return some bytes from a position on; fewer where the file ends."""
        self._load(position, count)
        return self._block[position - self._start : position - self._start + count]

    def find(self, wanted: bytes, position: int) -> int:
        """Return the first position, from this one on, of these bytes; -1 if there is none."""
        while self._load(position, len(wanted)):
            offset = self._block.find(wanted, position - self._start)
            if offset >= 0:
                return self._start + offset
            position = self._start + len(self._block) - len(wanted) + 1
        return -1

    def _load(self, position: int, count: int) -> bool:
        """Make the block hold some bytes, and tell whether all of them are in the file."""
        if position < self._start or position + count > self._start + len(self._block):
            self._file.seek(position)
            self._start, self._block = position, self._file.read(max(count, BLOCK))
        return position + count <= self._start + len(self._block)


# --- formats with a size in the header -------------------------------------------------------------------

# By magic word: the header of a chunk (name and size), and the name of the chunk that holds the sound.
_CHUNKS = {
    b"RIFF": ("<4sI", b"data"),
    b"RIFX": (">4sI", b"data"),
    b"RF64": ("<4sI", b"data"),
    b"FORM": (">4sI", b"SSND"),
}
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
# Programs that write into a pipe cannot go back to fill in the size: FFmpeg leaves 0xFFFFFFFF, arecord
# 0x80000000, SoX 0x7FFFF000 in WAV and 0x7F000008 in AIFF, GStreamer 0. Such a size promises nothing.
PLACEHOLDER = 0x7F000000


def _size(file: BinaryIO) -> int:
    """Return the bytes of a file, without moving its position."""
    here = file.tell()
    end = file.seek(0, 2)
    file.seek(here)
    return end


def _check_size(file: BinaryIO, promised: int, is_exact: bool = False) -> Integrity:
    """Compare the promised bytes of sound with those from here to the end of the file.

    A size that may be a placeholder promises nothing, unless it `is_exact`.
    """
    present = _size(file) - file.tell()
    if promised <= present or (promised >= PLACEHOLDER and not is_exact):
        return Integrity()
    return Integrity(
        Localized(
            "the header promises {promised} bytes of sound, {present} are there",
            promised=promised,
            present=present,
        )
    )


def _check_chunks(file: BinaryIO, start: int, header: str, sound: bytes) -> Integrity:
    """Check the chunk of sound in RIFF and its kin (RF64: EBU Tech 3306), in AIFF, and in Sony Wave64."""
    header_size, file_size = struct.calcsize(header), _size(file)
    # Wave64: sizes include the header, and chunks are aligned to 8 bytes.
    counted, alignment = (header_size, 8) if header_size == 24 else (0, 2)
    # RF64: the size in the chunk `ds64`, where the one in `data` is 0xFFFFFFFF.
    long_size = 0
    file.seek(start)
    while len(head := file.read(header_size)) == header_size:
        name, size = struct.unpack(header, head)
        size -= counted
        if name[:4] == sound:
            present = file_size - file.tell()
            if size == 0 and present and not counted:
                # Either another chunk starts here, or sound that came from a pipe.
                head = file.read(8)
                is_named = len(head) == 8 and head[:4].rstrip().isalnum()
                is_chunk = is_named and struct.unpack(header, head)[1] + 8 <= present
                return Integrity(is_streamed=not is_chunk)
            is_long = long_size > 0 and size == 0xFFFFFFFF
            return _check_size(file, long_size if is_long else size, is_exact=is_long)
        if not 0 <= size <= file_size:
            break
        if name == b"ds64" and len(sizes := file.read(16)) == 16:
            long_size = struct.unpack("<QQ", sizes)[1]
            file.seek(-16, 1)
        file.seek(size + -size % alignment, 1)
    return Integrity()


def _check_nist(file: BinaryIO) -> Integrity:
    """Check NIST Sphere (TIMIT): the header is text, and its second line says how long it is."""
    file.seek(0)
    header = file.read(1024)
    fields = dict(re.findall(rb"^(\w+) -\w+ (\S+)", header, re.MULTILINE))
    try:
        file.seek(int(header[8:16]))
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        samples, channels, width = (int(fields[name]) for name in names)
    except (KeyError, ValueError, OSError):
        return Integrity()
    is_compressed = b"," in fields.get(b"sample_coding", b"")
    return Integrity() if is_compressed else _check_size(file, samples * channels * width)


# --- Ogg -------------------------------------------------------------------------------------------------

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


def _check_ogg(data: _Blocks) -> Integrity:
    """Follow the pages (RFC 3533) of all streams in the file to their ends."""
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
                raise AudioError(
                    "Ogg: several recordings are joined in this file and only the first would be read; "
                    "convert it first, for example with: ffmpeg -i FILE new.flac"
                )
            open_streams.add(page.stream)
        elif page.number != expected.get(page.stream):
            raise _damaged("Ogg", Localized("pages are missing"), position)
        if not page.is_intact:
            raise _damaged("Ogg", Localized("a page fails its checksum"), position)
        expected[page.stream] = page.number + 1
        if page.flags & _LAST:
            open_streams.discard(page.stream)
    is_cut = open_streams or not expected
    missing = Localized("the Ogg stream breaks off before its last page")
    # The first packet of Opus says how many samples are skipped (RFC 7845, section 5.1).
    skipped = int.from_bytes(head[38:40], "little")
    seconds = max(0, end - skipped) / 48_000 if head[28:36] == b"OpusHead" else 0.0
    return Integrity(missing if is_cut else None, opus_seconds=seconds)


def _pages(data: _Blocks) -> Iterator[tuple[int, _Page]]:
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
        raise _damaged("Ogg", Localized("bytes that are no page"), position)


# --- MPEG audio ------------------------------------------------------------------------------------------

# kbit/s by (is MPEG-1, layer): ISO/IEC 11172-3 section 2.4.2.3 and 13818-3 section 2.4.2.3.
_KBITS = {
    (True, 1): range(0, 449, 32),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)
# Bits of a header that are the same in all frames: sync, version, layer, rate.
_SAME = 0xFFFE0C00
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")
# Most samples that a decoder drops at both ends: LAME's delay and padding (12 bits each), and its own delay.
GAPLESS_MOST = 4095 + 4095 + 529


class _Frame(NamedTuple):
    """Hold what the header of an MPEG frame says.

    Attributes:
        kind: the bits of `_SAME` in its header.
        length: bytes.
        samples: per channel.
    """

    kind: int
    length: int
    samples: int


@lru_cache(maxsize=4096)
def _frame(head: bytes) -> _Frame | None:
    """Read a frame's header of four bytes; None if they are no header, or one of free format."""
    if len(head) < 4:
        return None
    header = int.from_bytes(head, "big")
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    bitrate, rate, padding = header >> 12 & 15, header >> 10 & 3, header >> 9 & 1
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz = _RATES[rate] >> (0 if first else 1 if version == 2 else 2)
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    slot = 4 if layer == 1 else 1
    bits = _KBITS[first, layer][bitrate] * 1000 * samples
    return _Frame(header & _SAME, (bits // (8 * slot * hertz) + padding) * slot, samples)


def _check_mpeg(data: _Blocks) -> Integrity:
    """Walk from frame to frame to the end, and compare with the table in the first frame, if there is one."""
    start = _skip_id3(data)
    first = _frame(data.at(start, 4))
    if first is None:
        return Integrity()
    frames, is_cut = _count_frames(data, start, first)
    # The first frame may hold a table, of Xing and LAME or of Fraunhofer, that says how many frames follow.
    head = data.at(start, first.length)
    promised = int.from_bytes(head[50:54], "big") if head[36:40] == b"VBRI" else None
    for name in (b"Info", b"Xing"):
        offset = head.find(name)
        if 0 < offset <= 40 and len(head) >= offset + 12 and head[offset + 7] & 1:
            promised = int.from_bytes(head[offset + 8 : offset + 12], "big")
    sounding = frames - (promised is not None)
    least = max(0, sounding * first.samples - GAPLESS_MOST)
    missing = Localized("the last MPEG frame is incomplete") if is_cut else None
    # Encoders disagree whether the frame with the table counts, so one frame is not missing.
    if promised is not None and sounding < promised - 1:
        missing = Localized(
            "the header promises {promised} MPEG frames, {sounding} are there",
            promised=promised,
            sounding=sounding,
        )
    return Integrity(missing, least, is_mpeg=True)


def _skip_id3(data: _Blocks) -> int:
    """Return the position where the frames start: after ID3v2 tags (id3.org, section 3.1) and zeros."""
    position = 0
    while len(head := data.at(position, 10)) == 10 and head[:3] == b"ID3":
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        position += size + (20 if head[5] & 0x10 else 10)
    while block := data.at(position, BLOCK):
        rest = block.lstrip(b"\0")
        position += len(block) - len(rest)
        if rest:
            break
    return position


def _count_frames(data: _Blocks, start: int, first: _Frame) -> tuple[int, bool]:
    """Return the number of complete frames, and whether another one is cut off by the end of the file.

    Raises:
        AudioError: there are frames after bytes that are neither a frame nor a tag.
    """
    position, frames = start, 0
    while head := data.at(position, max(map(len, _TAGS))):
        frame = _frame(head[:4])
        if frame and frame.kind == first.kind:
            if position + frame.length > data.size:
                return frames, True
            position, frames = position + frame.length, frames + 1
            continue
        following = _next_frame(data, position + 1, first)
        if following is None:
            return frames, len(head) < 4 and head[0] == 0xFF
        if not head.startswith(_TAGS):
            raise _damaged("MPEG audio", Localized("bytes that are no frame"), position)
        position = following
    return frames, False


def _next_frame(data: _Blocks, position: int, first: _Frame) -> int | None:
    """Return the next position where a frame like the first is followed by another one."""
    while (position := data.find(b"\xff", position)) >= 0:
        frame = _frame(data.at(position, 4))
        if frame and frame.kind == first.kind:
            following = _frame(data.at(position, frame.length + 4)[frame.length :])
            if following and following.kind == first.kind:
                return position
        position += 1
    return None


def _damaged(name: str, message: Localized, position: int) -> AudioError:
    """Return the error for a file that is damaged at a byte."""
    return AudioError(
        "{name}: {message} (at byte {position}): the file is damaged; get it again",
        name=name,
        message=message,
        position=position,
    )
