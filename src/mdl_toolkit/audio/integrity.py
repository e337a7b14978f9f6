"""Check that all of a recording is there: what headers, pages and frames promise, against the bytes.

Decoders return cut-off or damaged files shortened, without a word. What can be told from the structure of a
file is told here; nothing is decoded. Files are read in blocks, so that memory does not grow with them.
"""

from typing import BinaryIO

from mdl_toolkit.audio import chunks
from mdl_toolkit.audio.file_parts import Blocks, Integrity, joined_files
from mdl_toolkit.audio.mpeg import before_tags, check_mpeg, is_mpeg
from mdl_toolkit.audio.ogg import check_ogg


def check_integrity(file: BinaryIO) -> Integrity:
    """Compare what a file promises with what it holds; a format that is not known here promises nothing.

    Raises:
        AudioError: damage in the middle: Ogg pages that are missing or fail their checksum, bytes between
            MPEG frames that are no frame; sound that the header does not count; or several files in one.
    """
    data = Blocks(file)
    head = data.at(0, 16)
    is_riff = head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM")
    if (is_riff and head[8:12] in (b"WAVE", b"AIFF", b"AIFC")) or head == chunks.W64 or head[:4] == b"caff":
        return chunks.check_chunks(data)
    if head[:4] in (b".snd", b"dns."):
        return chunks.check_au(data)
    if head[:8] == b"NIST_1A\n":
        return chunks.check_nist(data)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return chunks.check_mp4(data)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return chunks.check_matroska(data)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return chunks.check_avi(data)
    if head[:4] == b"OggS":
        return check_ogg(data)
    if head[:4] == b"fLaC":
        # It checks itself. The last block of metadata has the highest bit set.
        if any(data.find(start, 8) >= 0 for start in (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")):
            raise joined_files("FLAC")
        # The 36 bits of STREAMINFO that say how many samples there are.
        has_length = int.from_bytes(data.at(21, 5), "big") & (1 << 36) - 1 > 0
        return Integrity(has_length=has_length, parts=(range(before_tags(data)),))
    if is_mpeg(head):
        return check_mpeg(data)
    # The eleven bits that MPEG audio is known by, also where no frame can be read.
    has_sync = head[:2] >= b"\xff\xe0"
    return Integrity(is_mpeg=has_sync, parts=(range(before_tags(data)),))
