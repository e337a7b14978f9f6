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
class Finding:
    """Hold what the structure of a file says.

    Attributes:
        missing: what was promised and is not there, of a file that was cut off.
        least_samples: the fewest samples per channel that a sound decoder returns; 0 if not known.
        is_counted: MPEG audio with a table that says how many frames there are, rightly, and that libsndfile
            knows.
        is_streamed: WAV that was written into a pipe, with its size left at 0.
        opus_seconds: how long Ogg Opus is, if it does not start in the middle of a stream.
    """

    missing: Localized | None = None
    least_samples: int = 0
    is_counted: bool = False
    is_streamed: bool = False
    opus_seconds: float = 0.0


def examine(file: BinaryIO) -> Finding:
    """Compare what a file promises with what it holds; a format that is not known here promises nothing.

    Raises:
        AudioError: damage in the middle: Ogg pages that are missing or fail their checksum, bytes between
            MPEG frames that are no frame; or several Ogg files in one.
    """
    file.seek(0)
    head = file.read(40)
    if head[:4] in _CHUNKED and head[8:12] in (b"WAVE", b"AIFF", b"AIFC"):
        return _chunked(file, *_CHUNKED[head[:4]])
    if head[:16] == _W64:
        return _sized(_w64_promise(file))
    if head[:4] in (b".snd", b"dns."):
        return _sized(_au_promise(file, head))
    if head[:8] == b"NIST_1A\n":
        return _sized(_nist_promise(file))
    if head[:4] == b"OggS":
        return _ogg(_Blocks(file))
    return _mpeg(_Blocks(file)) if head[:3] == b"ID3" or _frame(head[:4]) else Finding()


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
        """Return the first place from a position on where these bytes are; -1 if there is none."""
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

_CHUNKED = {
    b"RIFF": ("<", b"data"),
    b"RIFX": (">", b"data"),
    b"RF64": ("<", b"data"),
    b"FORM": (">", b"SSND"),
}
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
# Programs that write into a pipe cannot go back to fill in the size: FFmpeg leaves 0xFFFFFFFF, arecord
# 0x80000000, SoX 0x7FFFF000 in WAV and 0x7F000008 in AIFF, GStreamer 0. Such a size promises nothing.
PLACEHOLDER = 0x7F000000


class _Promise(NamedTuple):
    """Count the bytes of sound: as the header says, and as there are."""

    promised: int
    present: int


def _sized(promise: _Promise | None) -> Finding:
    if promise is None or promise.promised <= promise.present:
        return Finding()
    return Finding(
        Localized(
            "the header promises {promised} bytes of sound, {present} are there",
            promised=promise.promised,
            present=promise.present,
        )
    )


def _size(file: BinaryIO) -> int:
    here = file.tell()
    end = file.seek(0, 2)
    file.seek(here)
    return end


def _promise(file: BinaryIO, promised: int) -> _Promise | None:
    """Return a promise for the bytes from here on, unless the size is a placeholder."""
    present = _size(file) - file.tell()
    return _Promise(promised, present) if promised < PLACEHOLDER else None


def _chunked(file: BinaryIO, order: str, wanted: bytes) -> Finding:
    promise = _chunk_promise(file, order, wanted)
    if promise and promise.promised == 0 and promise.present:
        # Either another chunk starts here, or sound that came from a pipe.
        head = file.read(8)
        is_named = len(head) == 8 and head[:4].rstrip().isalnum()
        is_chunk = is_named and struct.unpack(f"{order}I", head[4:])[0] + 8 <= promise.present
        return Finding(is_streamed=not is_chunk)
    return _sized(promise)


def _chunk_promise(file: BinaryIO, order: str, wanted: bytes) -> _Promise | None:
    """Find the chunk that holds the sound, in RIFF and its kin (RF64: EBU Tech 3306) and in AIFF."""
    file.seek(12)
    # RF64: the size in the chunk `ds64`, where the one in `data` is 0xFFFFFFFF.
    wide = 0
    while len(head := file.read(8)) == 8:
        name, size = struct.unpack(f"{order}4sI", head)
        if name == wanted:
            present = _size(file) - file.tell()
            return _Promise(wide, present) if wide and size == 0xFFFFFFFF else _promise(file, size)
        if name == b"ds64" and len(sizes := file.read(16)) == 16:
            wide = struct.unpack("<QQ", sizes)[1]
            file.seek(-16, 1)
        file.seek(size + size % 2, 1)
    return None


def _w64_promise(file: BinaryIO) -> _Promise | None:
    """Read Sony Wave64: 16-byte names, 8-byte sizes that include the 24 bytes of both, alignment to 8."""
    file.seek(40)
    while len(head := file.read(24)) == 24:
        name, size = struct.unpack("<16sQ", head)
        if name[:4] == b"data":
            return _promise(file, size - 24)
        if not 24 <= size <= _size(file):
            return None
        file.seek((size + 7) // 8 * 8 - 24, 1)
    return None


def _au_promise(file: BinaryIO, head: bytes) -> _Promise | None:
    """Read Sun/NeXT audio, whose magic word is reversed where all its numbers are."""
    if len(head) < 12:
        return None
    offset, size = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:12])
    file.seek(offset)
    return _promise(file, size)


def _nist_promise(file: BinaryIO) -> _Promise | None:
    """Read NIST Sphere (TIMIT): the header is text, and its second line says how long it is."""
    file.seek(0)
    header = file.read(1024)
    fields = dict(re.findall(rb"^(\w+) -\w+ (\S+)", header, re.MULTILINE))
    try:
        file.seek(int(header[8:16]))
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        samples, channels, width = (int(fields[name]) for name in names)
    except (KeyError, ValueError, OSError):
        return None
    return None if b"," in fields.get(b"sample_coding", b"") else _promise(file, samples * channels * width)


# --- Ogg -------------------------------------------------------------------------------------------------

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# RFC 3533: flags of a stream's first and last page.
_FIRST, _LAST = 2, 4


class _Page(NamedTuple):
    flags: int
    end: int  # in samples, of the packets that end here; -1 if none does
    stream: int
    number: int
    is_intact: bool  # its checksum fits


def _ogg(data: _Blocks) -> Finding:
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
    return Finding(missing if is_cut else None, opus_seconds=seconds)


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
        is_intact = _ogg_checksum(data.at(position, size)) == checksum
        yield position, _Page(flags, granule, stream, number, is_intact)
        position += size
    if data.find(b"OggS", position + 1) >= 0:
        raise _damaged("Ogg", Localized("bytes that are no page"), position)


def _ogg_checksum(page: bytes) -> int:
    """Compute Ogg's CRC: zlib's with the bits of each byte and of the result mirrored, without inversion."""
    blank = page[:22] + bytes(4) + page[26:]
    mirrored = zlib.crc32(blank.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED), "big")


# --- MPEG audio ------------------------------------------------------------------------------------------

# kbit/s by (is MPEG-1, layer), ISO/IEC 11172-3 section 2.4.2.3 and 13818-3 section 2.4.2.3
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
    kind: int  # what `_SAME` leaves of its header
    length: int  # bytes
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


def _mpeg(data: _Blocks) -> Finding:
    """Walk from frame to frame to the end, and compare with the table in the first frame, if there is one."""
    start = _after_id3(data)
    first = _frame(data.at(start, 4))
    if first is None:
        return Finding()
    frames, is_cut = _walk(data, start, first)
    head = data.at(start, first.length)
    promised = _table(head)
    sounding = frames - (promised is not None)
    least = max(0, sounding * first.samples - GAPLESS_MOST)
    # Encoders disagree whether the frame with the table counts, so one frame is neither missing nor too many.
    is_counted = promised is not None and sounding <= promised + 1 and head[36:40] != b"VBRI"
    missing = Localized("the last MPEG frame is incomplete") if is_cut else None
    if promised is not None and sounding < promised - 1:
        missing = Localized(
            "the header promises {promised} MPEG frames, {sounding} are there",
            promised=promised,
            sounding=sounding,
        )
    return Finding(missing, least, is_counted)


def _after_id3(data: _Blocks) -> int:
    """Return where the frames start: after ID3v2 tags (id3.org, section 3.1) and zeros."""
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


def _walk(data: _Blocks, start: int, first: _Frame) -> tuple[int, bool]:
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
    """Return the next place where a frame like the first is followed by another one."""
    while (position := data.find(b"\xff", position)) >= 0:
        frame = _frame(data.at(position, 4))
        if frame and frame.kind == first.kind:
            following = _frame(data.at(position, frame.length + 4)[frame.length :])
            if following and following.kind == first.kind:
                return position
        position += 1
    return None


def _table(frame: bytes) -> int | None:
    """Read how many frames follow from the table of Xing and LAME or of Fraunhofer in the first frame."""
    for name in (b"Xing", b"Info"):
        place = frame.find(name)
        if 0 < place <= 40 and len(frame) >= place + 12 and frame[place + 7] & 1:
            return int.from_bytes(frame[place + 8 : place + 12], "big")
    return int.from_bytes(frame[50:54], "big") if frame[36:40] == b"VBRI" else None


def _damaged(name: str, message: Localized, position: int) -> AudioError:
    return AudioError(
        "{name}: {message} (at byte {position}): the file is damaged; get it again",
        name=name,
        message=message,
        position=position,
    )
