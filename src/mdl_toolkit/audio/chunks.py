"""Check that sizes in headers fit the file: WAV, RF64, W64, AIFF, CAF, AU, NIST Sphere, MP4, Matroska, AVI.

Decoders are shown the format and the sound of WAV and AIFF alone, with the right size: they refuse files for
the sake of other chunks, and trust sizes that a program never filled in.
"""

import re
import struct
from typing import NamedTuple

from mdl_toolkit.audio.file_parts import Blocks, Integrity, joined_files, promise_bytes
from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Localized

# Programs that write into a pipe cannot go back to fill in the size: FFmpeg leaves 0xFFFFFFFF, arecord
# 0x80000000, SoX 0x7FFFF000 in WAV and 0x7F000008 in AIFF, GStreamer 0. Such a size promises nothing; one of
# 64 bits does below `PLACEHOLDER_64`.
PLACEHOLDER, PLACEHOLDER_64 = 0x7F000000, 1 << 62
# Bytes after the sound that need not be chunks: programs that count their own header, or add a line.
LEFTOVER = 512
# Chunks that follow the sound, and may be cut off there; and tags.
ADDED = (
    *(b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"cue ", b"smpl", b"_PMX", b"afsp", b"JUNK", b"FLLR"),
    *(b"APPL", b"ANNO", b"NAME", b"AUTH", b"(c) ", b"MARK", b"INST", b"COMT", b"info", b"free", b"pakt"),
    *(b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN"),
)
# Chunks that say what the sound is.
FORMATS = (b"fmt ", b"fact", b"COMM", b"ds64")
W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


class _Layout(NamedTuple):
    """Hold how a file of chunks is laid out.

    Attributes:
        name: of the format.
        start: where the first chunk is.
        header: of a chunk, name and size, as `struct` has it.
        sound: the name of the chunk that holds the sound.
        counted: bytes of the header that a size includes.
        alignment: of chunks.
    """

    name: str
    start: int
    header: str
    sound: bytes = b"data"
    counted: int = 0
    alignment: int = 2


_LAYOUTS = {
    b"RIFF": _Layout("WAV", 12, "<4sI"),
    b"RIFX": _Layout("WAV", 12, ">4sI"),
    # RF64 and BW64 (EBU Tech 3306): the size of the sound is in the chunk `ds64`.
    b"RF64": _Layout("RF64", 12, "<4sI"),
    b"BW64": _Layout("BW64", 12, "<4sI"),
    b"FORM": _Layout("AIFF", 12, ">4sI", b"SSND"),
    # Sony Wave64.
    b"riff": _Layout("W64", 40, "<16sQ", counted=24, alignment=8),
    b"caff": _Layout("CAF", 8, ">4sq", alignment=1),
}


def check_chunks(data: Blocks) -> Integrity:
    """Check the chunk of sound in RIFF and its kin, AIFF, Wave64 and CAF.

    Raises:
        AudioError: after the sound comes something that is no chunk, or another recording.
    """
    magic = data.at(0, 4)
    layout = _LAYOUTS[magic]
    formats: dict[bytes, bytes] = {}
    sound = missing = None
    position = layout.start
    while chunk := _chunk(data, layout, position):
        name, start, size = chunk
        if sound is None and name == layout.sound:
            promised = _sound_size(size, formats.get(b"ds64", b""), data.size - start)
            if promised is None and data.find(b"WAVEfmt ", start) >= 0:
                raise joined_files(layout.name)
            size = data.size - start if promised is None else promised
            sound = range(start, start + size)
        elif sound is not None and name in _LAYOUTS:
            raise joined_files(layout.name)
        elif not 0 <= size <= data.size - start:
            break
        elif name in FORMATS:
            formats[name] = data.at(start, min(size, 1 << 16))
        position = start + size + -size % layout.alignment
    if sound is None:
        return Integrity()
    if sound.stop > data.size:
        missing = promise_bytes(len(sound), data.size - sound.start)
    # A size that was left at 0, if nothing follows.
    if missing or (not sound and position == sound.stop):
        sound = range(sound.start, data.size)
    else:
        check_uncounted(data, position, len(sound))
    # Layers 1 and 2, and 3.
    is_mpeg = formats.get(b"fmt ", b"")[:2] in (b"\x50\0", b"\x55\0")
    parts = _parts(data, magic, layout, sound, formats)
    return Integrity(missing, is_mpeg=is_mpeg, has_length=True, parts=parts)


def _chunk(data: Blocks, layout: _Layout, position: int) -> tuple[bytes, int, int] | None:
    """Return name, start and size of the chunk at a position, or at the odd byte before it; None if none."""
    length = struct.calcsize(layout.header)
    for place in (position, position - 1)[: layout.alignment]:
        head = data.at(place, length)
        if len(head) == length:
            name, size = struct.unpack(layout.header, head)
            if re.fullmatch(rb"[ -~]{4}", name[:4]):
                return name[:4], place + length, size - layout.counted
    return None


def _sound_size(size: int, wide: bytes, present: int) -> int | None:
    """Return the promised bytes of sound; None where nothing is promised."""
    if len(wide) >= 16 and size == 0xFFFFFFFF:
        (long,) = struct.unpack("<Q", wide[8:16])
        return long if 0 < long < PLACEHOLDER_64 and long != size else None
    is_placeholder = size < 0 or size >= PLACEHOLDER_64 or (PLACEHOLDER <= size < 1 << 32 and size > present)
    return None if is_placeholder else size


def check_uncounted(data: Blocks, position: int, counted: int) -> None:
    """Raise an error if what follows the sound may be sound that its size does not count.

    Raises:
        AudioError: the size is stale, or the file damaged.
    """
    more = data.size - position
    if (
        more > LEFTOVER
        and data.skip_zeros(position) < data.size
        and not data.at(position, 16).startswith(ADDED)
    ):
        raise AudioError(
            "the header counts {counted} bytes of sound, and {more} {more:byte follows|bytes follow} that "
            "nothing explains: its size is stale, or the file damaged; export it again, or read all of a "
            "WAV with: ffmpeg -ignore_length 1 -i FILE new.flac",
            counted=counted,
            more=more,
        )


def _parts(
    data: Blocks, magic: bytes, layout: _Layout, sound: range, formats: dict[bytes, bytes]
) -> tuple[bytes | range, ...]:
    """Return the parts that decoders see: of WAV and AIFF format and sound; none of what lacks its format."""
    if magic == b"caff":
        return range(sound.start - 8), struct.pack(">q", len(sound)), range(sound.start, data.size)
    order, size = layout.header[0], len(sound)
    head = b"".join(
        struct.pack(f"{order}4sI", name, len(formats[name])) + formats[name] + bytes(len(formats[name]) % 2)
        for name in (b"fmt ", b"fact", b"COMM")
        if name in formats
    )
    length = size + len(head) + 12
    if b"COMM" in formats:
        start = struct.pack(">4sI4s", b"FORM", length, data.at(8, 4))
        return start + head + struct.pack(">4sI", b"SSND", size), sound
    if b"fmt " not in formats:
        return ()
    if length < PLACEHOLDER:
        start = struct.pack(f"{order}4sI4s", b"RIFX" if order == ">" else b"RIFF", length, b"WAVE")
        return start + head + struct.pack(f"{order}4sI", b"data", size), sound
    wide = struct.pack("<4sI4s4sIQQQI", b"RF64", 2**32 - 1, b"WAVE", b"ds64", 28, length + 36, size, 0, 0)
    return wide + head + struct.pack("<4sI", b"data", 2**32 - 1), sound


def check_au(data: Blocks) -> Integrity:
    """Check Sun/NeXT audio, whose magic word is reversed where all its numbers are."""
    magic = data.at(0, 4)
    order = ">II" if magic == b".snd" else "<II"
    offset, size = struct.unpack(order, data.at(4, 8).ljust(8, b"\0"))
    if size == 0 or size >= PLACEHOLDER:
        size = max(0, data.size - offset)
    # Decoders see the size that is right.
    sized = magic + struct.pack(order, offset, min(size, max(0, data.size - offset)))
    return _check_size(data, "AU", offset, size, sized)


def check_nist(data: Blocks) -> Integrity:
    """Check NIST Sphere (TIMIT): the header is text, and its second line says how long it is."""
    header = data.at(0, 1024)
    fields = dict(re.findall(rb"^(\w+) -\w+ (\S+)", header, re.MULTILINE))
    try:
        offset = int(header[8:16])
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        samples, channels, width = (int(fields[name]) for name in names)
    except (KeyError, ValueError):
        return Integrity()
    if offset < 0 or b"," in fields.get(b"sample_coding", b""):
        return Integrity()
    return _check_size(data, "NIST", offset, samples * channels * width, b"")


def _check_size(data: Blocks, name: str, offset: int, promised: int, head: bytes) -> Integrity:
    """Compare the promised bytes of sound from an offset on with the file's, whose head is replaced."""
    end = min(offset + promised, data.size)
    parts = (head, range(len(head), end))
    if offset + promised > data.size:
        missing = promise_bytes(promised, max(0, data.size - offset))
        return Integrity(missing, has_length=True, parts=parts)
    if data.at(end, 8)[:4] in (b".snd", b"dns.", b"NIST"):
        raise joined_files(name)
    check_uncounted(data, end, promised)
    return Integrity(has_length=True, parts=parts)


# --- files of boxes ----------------------------------------------------------------------------------------


def check_mp4(data: Blocks) -> Integrity:
    """Check the boxes of MP4, M4A, MOV and 3GP (ISO/IEC 14496-12, section 4.2).

    Raises:
        AudioError: there are two indexes, so two files.
    """
    position, indexes = 0, 0
    while position < data.size and len(head := data.at(position, 16)) >= 8:
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8 or not re.fullmatch(rb"[ -~\xa9]{4}", head[4:8]):
            break
        indexes += head[4:8] == b"moov"
        if indexes == 2:
            raise joined_files("MP4")
        position += size
    return _check_end(data, position)


def check_matroska(data: Blocks) -> Integrity:
    """Check the size of the segment in Matroska and WebM (RFC 8794, section 6)."""
    position = 0
    # The header, and the segment.
    for _ in range(2):
        head = data.at(position, 12)
        length = 9 - int.from_bytes(head[4:5], "big").bit_length()
        mask = (1 << 7 * length) - 1
        size = int.from_bytes(head[4 : 4 + length], "big") & mask
        # All ones: unknown, as from a pipe.
        if length > 8 or size == mask:
            return Integrity()
        position += 4 + length + size
    return _check_end(data, position)


def check_avi(data: Blocks) -> Integrity:
    """Check the size of the whole file in AVI."""
    size = int.from_bytes(data.at(4, 4), "little")
    return _check_end(data, 8 + size) if size < PLACEHOLDER else Integrity()


def _check_end(data: Blocks, end: int) -> Integrity:
    """Compare the end that a file promises with its own."""
    if end <= data.size:
        return Integrity()
    return Integrity(
        Localized(
            "its header promises {promised} bytes, {present} are there", promised=end, present=data.size
        )
    )
