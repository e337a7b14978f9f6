"""Read a file in blocks, and show decoders only those parts of it that matter.

What the checks of a file's structure find out is told in `Integrity`.
"""

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, BinaryIO

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
        is_mpeg: MPEG audio, or what looks like it; libsndfile would print warnings without the file's name.
        has_length: the file says how long it is, in bytes, pages or frames, and that was checked.
        opus_seconds: how long Ogg Opus is, if it does not start in the middle of a stream.
        parts: bytes, and ranges of the file, that decoders are to see in its place; none: the file itself.
    """

    missing: Localized | None = None
    least_samples: int = 0
    is_mpeg: bool = False
    has_length: bool = field(default=False, compare=False)
    opus_seconds: float = 0.0
    parts: tuple[bytes | range, ...] = field(default=(), compare=False)


def promise_bytes(promised: int, present: int) -> Localized:
    """Say how many bytes of sound a header promises, and how many are there."""
    return Localized(
        "the header promises {promised} bytes of sound, {present} are there",
        promised=promised,
        present=present,
    )


def damage_at(position: int, name: str, message: Localized) -> AudioError:
    """Return the error for a file that is damaged at a byte."""
    return AudioError(
        "{name}: {message} (at byte {position}): the file is damaged; get it again",
        name=name,
        message=message,
        position=position,
    )


def joined_files(name: str) -> AudioError:
    """Return the error for several recordings in one file, of which a decoder reads the first."""
    return AudioError(
        "{name}: several recordings are joined in this file, byte after byte, and only the first would be "
        "read; give each a file of its own, or join their sound, for example with: sox ONE TWO new.flac",
        name=name,
    )


class Blocks:
    """Slice and search a file with one block of it in memory; `size` is in bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = file.seek(0, 2)
        self._file = file
        self._start, self._block = 0, b""

    def at(self, position: int, count: int) -> bytes:
        """Return some bytes from a position on; fewer where the file ends, none before it starts."""
        if position < 0:
            return b""
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

    def skip_zeros(self, position: int) -> int:
        """Return the first position, from this one on, of another byte than zero, or the end."""
        while block := self.at(position, BLOCK):
            rest = block.lstrip(b"\0")
            position += len(block) - len(rest)
            if rest:
                break
        return position

    def _load(self, position: int, count: int) -> bool:
        """Make the block hold some bytes, and tell whether all of them are in the file."""
        if position < self._start or position + count > self._start + len(self._block):
            self._file.seek(position)
            self._start, self._block = position, self._file.read(max(count, BLOCK))
        return position + count <= self._start + len(self._block)


class Splice(io.RawIOBase):
    """Show some bytes and some ranges of a file, one after the other, as a file."""

    # Without one, decoders cannot go by the extension.
    name = ""

    def __init__(self, file: BinaryIO, parts: Sequence[bytes | range]) -> None:
        self._file, self._parts = file, parts
        self._ends = [*accumulate(len(part) for part in parts)]
        self._position = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be sought in."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a position, which is returned."""
        base = (0, self._position, self._ends[-1])[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Read from the part at the position, and return the number of bytes."""
        number = bisect_right(self._ends, self._position)
        if number == len(self._parts):
            return 0
        part = self._parts[number]
        start = self._position - self._ends[number] + len(part)
        count = min(len(buffer), len(part) - start)
        if isinstance(part, bytes):
            data = part[start : start + count]
        else:
            self._file.seek(part.start + start)
            data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
