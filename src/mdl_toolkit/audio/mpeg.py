"""Check that MPEG audio (MP1, MP2, MP3) is whole, frame by frame, and find the frames between tags.

Joined files have tags and tables of frames in the middle; decoders stumble over them, or play them.
"""

import struct
from functools import lru_cache
from typing import NamedTuple

from mdl_toolkit.audio.file_parts import Blocks, Integrity, damage_at
from mdl_toolkit.i18n import Localized

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


def is_mpeg(head: bytes) -> bool:
    """Tell whether a file starts with a tag or a frame."""
    return head[:3] == b"ID3" or _frame(head[:4]) is not None


def after_id3(data: Blocks) -> int:
    """Return the position after ID3v2 tags at the start of a file, and after zeros in front of a frame."""
    position = 0
    while size := _tag_length(data, position):
        position += size
    start = data.skip_zeros(position)
    return start if _frame(data.at(start, 4)) else position


def before_tags(data: Blocks) -> int:
    """Return the position where ID3v1 and APE tags start at the end of a file."""
    end, length = data.size, -1
    while length and length <= end:
        end -= max(0, length)
        foot, length = data.at(end - 32, 32), 0
        if data.at(end - 128, 3) == b"TAG":
            length = 128
        elif len(foot) == 32 and foot[:8] == b"APETAGEX":
            # Footer and content; the header is counted apart.
            size, _, flags = struct.unpack("<III", foot[12:24])
            length = size + (32 if flags & 1 << 31 else 0)
    return end


def check_mpeg(data: Blocks) -> Integrity:
    """Walk from frame to frame to the end, and compare with the tables of frames on the way.

    Raises:
        AudioError: there are frames after bytes that are neither a frame nor a tag.
    """
    parts: list[range] = []
    position, kind, samples, frames = after_id3(data), -1, 0, 0
    # How many frames there should be in the end, for each table.
    promises: list[int] = []
    is_cut = after_tag = False
    while position < data.size:
        frame = _frame(data.at(position, 4))
        if frame and (frame.kind == kind or _is_followed(data, position, frame)):
            end = position + frame.length
            if end > data.size:
                is_cut = True
                break
            kind, after_tag = frame.kind, False
            promised = _promised_frames(data.at(position, min(frame.length, 64)))
            if promised is None or not parts:
                _extend(parts, position, end)
            if promised is None:
                frames, samples = frames + 1, samples + frame.samples
            else:
                promises.append(frames + promised)
            position = end
        elif size := _tag_length(data, position):
            position, after_tag = data.skip_zeros(position + size), True
        else:
            following = _next_frame(data, position + 1)
            if following < 0:
                is_cut = data.size - position < 4 and data.at(position, 1) == b"\xff"
                break
            if not after_tag:
                raise damage_at(position, "MPEG audio", Localized("bytes that are no frame"))
            position = following
    if not parts:
        return Integrity(is_mpeg=_frame(data.at(0, 4)) is not None)
    missing = Localized("the last MPEG frame is incomplete") if is_cut else None
    # Encoders disagree whether the frame with the table counts, so one frame is not missing.
    if promises and frames < max(promises) - 1:
        missing = Localized(
            "the header promises {promised} MPEG frames, {sounding} are there",
            promised=max(promises),
            sounding=frames,
        )
    least = max(0, samples - GAPLESS_MOST * max(1, len(promises)))
    return Integrity(missing, least, is_mpeg=True, has_length=bool(promises), parts=tuple(parts))


def _extend(parts: list[range], start: int, end: int) -> None:
    """Add some bytes of the file to its parts."""
    if parts and parts[-1].stop == start:
        start = parts.pop().start
    parts.append(range(start, end))


def _is_followed(data: Blocks, position: int, frame: _Frame) -> bool:
    """Tell whether after a frame comes another one of its kind, a tag or the end of the file."""
    end = position + frame.length
    return _is_continued(data, position) or end >= data.size or _tag_length(data, end) > 0


def _is_continued(data: Blocks, position: int) -> bool:
    """Tell whether a frame is at a position, and after it another one of its kind."""
    frame = _frame(data.at(position, 4))
    following = frame and _frame(data.at(position + frame.length, 4))
    return frame is not None and following is not None and following.kind == frame.kind


def _promised_frames(frame: bytes) -> int | None:
    """Return the number of frames in a table, of Xing and LAME or of Fraunhofer; None in a frame of sound."""
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big")
    for name in (b"Info", b"Xing"):
        offset = frame.find(name, 0, 44)
        if offset > 0 and len(frame) >= offset + 12 and frame[offset + 7] & 1:
            return int.from_bytes(frame[offset + 8 : offset + 12], "big")
    return None


def _tag_length(data: Blocks, position: int) -> int:
    """Return the bytes of the tag at a position, of ID3v2, ID3v1, APE or Lyrics3; 0 if there is none."""
    head = data.at(position, 32)
    if head[:3] in (b"ID3", b"3DI") and len(head) >= 10:
        # id3.org, ID3v2.4.0, section 3.1: sizes of seven bits a byte, and a footer.
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
        return 10 if head[:1] == b"3" else size + (20 if head[5] & 0x10 else 10)
    if head[:3] == b"TAG":
        return 227 if head[3:4] == b"+" else 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        # The size leaves the header out; a footer is met only where its tag was not followed.
        size, _, flags = struct.unpack("<III", head[12:24])
        return 32 + (size if flags & 1 << 29 else 0)
    if head[:11] == b"LYRICSBEGIN":
        ends = [data.find(end, position) for end in (b"LYRICS200", b"LYRICSEND")]
        return max(0, min((end + 9 for end in ends if end >= 0), default=0) - position)
    return 0


def _next_frame(data: Blocks, position: int) -> int:
    """Return the next position where a frame is followed by another one of its kind; -1 if there is none."""
    while (position := data.find(b"\xff", position)) >= 0 and not _is_continued(data, position):
        position += 1
    return position
