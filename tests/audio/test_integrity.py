"""The structure of files is followed to the end: sizes, pages and frames, as the standards say."""

import io
import itertools
import struct
import tracemalloc

import numpy as np
import pytest

from mdl_toolkit.audio.file_parts import Integrity
from mdl_toolkit.audio.integrity import check_integrity
from mdl_toolkit.errors import AudioError
from tests.support.ogg import crc
from tests.support.recordings import by_ffmpeg, by_soundfile, pcm_wav, sound

WHOLE = Integrity()
# Of what has the bits that MPEG audio is known by.
NO_FRAMES = Integrity(is_mpeg=True)


def of(content: bytes) -> Integrity:
    return check_integrity(io.BytesIO(content))


def missing(content: bytes) -> str:
    message = of(content).missing
    assert message is not None
    assert message.zh != message.en
    return message.en


def damage(content: bytes) -> str:
    with pytest.raises(AudioError) as caught:
        of(content)
    return caught.value.message.en


# --- sizes in headers ------------------------------------------------------------------------------------


def riff(magic: bytes, order: str, *chunks: tuple[bytes, int, bytes], form: bytes = b"WAVE") -> bytes:
    """A file of chunks, each a name, the size that it claims, and what it holds."""
    body = b"".join(name + struct.pack(f"{order}I", size) + held for name, size, held in chunks)
    return magic + struct.pack(f"{order}I", len(body) + 4) + form + body


FORMAT = (b"fmt ", 16, bytes(16))


@pytest.mark.parametrize(("magic", "order"), [(b"RIFF", "<"), (b"RIFX", ">")])
def test_wav(magic, order):
    odd = (b"JUNK", 3, b"abc\0")  # chunks are padded to an even length
    assert of(riff(magic, order, odd, FORMAT, (b"data", 100, bytes(100)))) == WHOLE
    assert of(riff(magic, order, FORMAT, (b"data", 100, bytes(100)), (b"LIST", 4, b"INFO"))) == WHOLE
    said = missing(riff(magic, order, odd, FORMAT, (b"data", 100, bytes(99))))
    assert said == "the header promises 100 bytes of sound, 99 are there"


@pytest.mark.parametrize("placeholder", [0xFFFFFFFF, 0x80000000, 0x7FFFF000, 0xFFFFFFFF - 36])
def test_a_placeholder_promises_nothing(placeholder):
    assert of(riff(b"RIFF", "<", FORMAT, (b"data", placeholder, bytes(100)))) == WHOLE


def test_a_size_of_0_is_sound_from_a_pipe_unless_a_chunk_follows():
    def streamed(after: bytes) -> bool:
        return len(of(pcm_wav(np.zeros(0), size=0, after=after)).parts[1]) > 0

    assert not streamed(b"")
    assert streamed(bytes(100))
    assert streamed(b"\1\2\3")
    assert not streamed(b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert not streamed(b"id3 " + struct.pack("<I", 4) + b"INFO")
    assert streamed(b"abcd" + struct.pack("<I", 5) + b"INFO")


def test_rf64_has_its_size_elsewhere():
    def file(size: int) -> bytes:
        wide = (b"ds64", 28, struct.pack("<QQQI", 0, size, 0, 0))
        return riff(b"RF64", "<", wide, FORMAT, (b"data", 0xFFFFFFFF, bytes(100)))

    assert of(file(100)) == WHOLE
    assert of(file(0)) == WHOLE
    assert "promises 8589934592 bytes" in missing(file(2**33))


def test_aiff():
    for form in (b"AIFF", b"AIFC"):
        common = (b"COMM", 18, bytes(18))
        assert of(riff(b"FORM", ">", common, (b"SSND", 100, bytes(100)), form=form)) == WHOLE
        assert "promises 101" in missing(riff(b"FORM", ">", common, (b"SSND", 101, bytes(100)), form=form))


@pytest.mark.parametrize("order", ["<", ">"])
def test_au(order):
    def file(size: int) -> bytes:
        magic = b".snd" if order == ">" else b"dns."
        return magic + struct.pack(f"{order}IIIII", 28, size, 3, 16_000, 1) + b"note" + bytes(100)

    assert of(file(100)) == WHOLE
    assert of(file(0xFFFFFFFF)) == WHOLE
    assert "promises 101 bytes of sound, 100 are" in missing(file(101))


def test_nist():
    def file(count: int, coding: str = "pcm") -> bytes:
        lines = f"NIST_1A\n   1024\nchannel_count -i 2\nsample_count -i {count}\nsample_n_bytes -i 2\n"
        return f"{lines}sample_coding -s{len(coding)} {coding}\nend_head\n".encode().ljust(1024) + bytes(400)

    assert of(file(100)) == WHOLE
    assert "promises 404 bytes of sound, 400 are" in missing(file(101))
    assert of(file(101, "pcm,embedded-shorten-v2.00")) == WHOLE


@pytest.mark.parametrize(
    "magic", [b"", b"RIFF\0\0\0\0WAVE", b"NIST_1A\n", b"NIST_1A\n  -1\n", b".snd", b"riff.\x91"]
)
def test_headers_that_break_off(magic):
    """It is the decoder that refuses them."""
    assert of(magic) == WHOLE


# --- Ogg -------------------------------------------------------------------------------------------------


def page(stream: int, number: int, flags: int = 0, body: bytes = b"sound") -> bytes:
    segments = [255] * (len(body) // 255) + [len(body) % 255]
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, 0, stream, number, 0, len(segments)) + bytes(segments)
    whole = bytearray(head + body)
    whole[22:26] = struct.pack("<I", crc(bytes(whole)))
    return bytes(whole)


FIRST, LAST = 2, 4
STREAM = [page(7, 0, FIRST), page(7, 1, body=bytes(range(256)) * 3), page(7, 2, LAST)]


def test_ogg_is_whole():
    assert of(b"".join(STREAM)) == WHOLE
    assert of(page(7, 0, FIRST | LAST)) == WHOLE
    assert of(b"".join(STREAM) + b"TAG of some program") == WHOLE
    both = [page(1, 0, FIRST), page(2, 0, FIRST), page(1, 1), page(2, 1, LAST), page(1, 2, LAST)]
    assert of(b"".join(both)) == WHOLE
    assert "before its last page" in missing(b"".join(both[:-1]))


def test_ogg_cut_anywhere():
    whole = b"".join(STREAM)
    for size in range(4, len(whole)):
        assert "before its last page" in missing(whole[:size])


def test_ogg_damaged():
    assert "pages are missing (at byte 33)" in damage(STREAM[0] + STREAM[2])
    assert "pages are missing (at byte 0)" in damage(b"".join(STREAM[1:]))
    assert "no page (at byte 33)" in damage(STREAM[0] + b"junk" + b"".join(STREAM[1:]))
    assert "joined" in damage(b"".join(STREAM) + page(8, 0, FIRST) + page(8, 1, LAST))
    for place in range(27, 33):
        content = bytearray(b"".join(STREAM))
        content[place] ^= 1
        damage(bytes(content))


# --- MPEG audio ------------------------------------------------------------------------------------------

HEADERS = [  # frame header, its length in bytes and samples: LAME's and the ISO tables
    (0xFFFB9000, 417, 1152),  # MPEG-1 layer III, 128 kbit/s, 44.1 kHz
    (0xFFFB9200, 418, 1152),  # the same with padding
    (0xFFFBE400, 960, 1152),  # 320 kbit/s, 48 kHz
    (0xFFFA90C4, 417, 1152),  # with checksum, mono
    (0xFFF380C4, 208, 576),  # MPEG-2 layer III, 64 kbit/s, 22.05 kHz
    (0xFFE318C4, 72, 576),  # MPEG-2.5 layer III, 8 kbit/s, 8 kHz
    (0xFFFDA400, 576, 1152),  # MPEG-1 layer II, 192 kbit/s, 48 kHz
    (0xFFF584C4, 384, 1152),  # MPEG-2 layer II, 64 kbit/s, 24 kHz
    (0xFFFFC400, 384, 384),  # MPEG-1 layer I, 384 kbit/s, 48 kHz
]


@pytest.mark.parametrize(("header", "length", "samples"), HEADERS)
def test_frames(header, length, samples):
    frame = struct.pack(">I", header).ljust(length, b"\x55")
    integrity = of(frame * 50)
    assert integrity == Integrity(least_samples=max(0, 50 * samples - 8719), is_mpeg=True)
    assert missing(frame * 49 + frame[:-1]) == "the last MPEG frame is incomplete"
    for leftover in (1, 2, 3, 4, length // 2):
        assert "incomplete" in missing(frame * 49 + frame[:leftover])
    assert "no frame" in damage(frame * 20 + b"\x55" * 40 + frame * 20)


@pytest.mark.parametrize("header", [0xFFFB0000, 0xFFFBF000, 0xFFFB9C00, 0xFFEB9000, 0xFFF99000, 0xFFF15080])
def test_what_is_no_frame(header):
    """Free format, forbidden bit rate, rate, version and layer; AAC."""
    assert of(struct.pack(">I", header).ljust(500, b"\x55") * 3) == NO_FRAMES


FRAME = struct.pack(">I", 0xFFFB9000).ljust(417, b"\x55")


def table(frames: int, name: bytes = b"Xing", place: int = 36) -> bytes:
    return (FRAME[:4].ljust(place, b"\0") + name + struct.pack(">II", 1, frames)).ljust(417, b"\0")


@pytest.mark.parametrize(("name", "place"), [(b"Xing", 36), (b"Info", 36), (b"Info", 21)])
def test_a_table_of_frames(name, place):
    for promised in (49, 50, 51):  # encoders disagree whether the table's own frame counts
        assert of(table(promised, name, place) + FRAME * 50).missing is None
    said = missing(table(50, name, place) + FRAME * 30 + FRAME[:100])
    assert said == "the header promises 50 MPEG frames, 30 are there"


def test_a_table_by_fraunhofer():
    first = (FRAME[:4].ljust(36, b"\0") + b"VBRI" + bytes(10) + struct.pack(">I", 50)).ljust(417, b"\0")
    assert "promises 50" in missing(first + FRAME * 40)


def test_tags_are_no_damage():
    size = bytes([0, 0, 2, 0x10])  # 7 bits each: 272 bytes
    id3 = b"ID3\4\0\0" + size + b"\xff\xfb\x90\x00" * 68
    footer = b"ID3\4\0\x10" + size + bytes(272) + b"3DI\4\0\x10" + size
    plain = of(FRAME * 50)
    for before in (b"", id3, footer, id3 + footer, id3 + bytes(100)):
        for after in (b"", b"TAG" + bytes(125), b"APETAGEX" + bytes(50), bytes(300), id3, b"rubbish"):
            assert of(before + FRAME * 50 + after) == plain
    assert of(FRAME * 20 + b"TAG" + bytes(125) + id3 + FRAME * 30) == plain
    assert of(id3[:200]) == WHOLE
    assert of(id3 + b"fLaC" + bytes(500)) == WHOLE


def test_real_encoders_agree():
    samples = sound(2.0, 44_100)
    for mode in ("CONSTANT", "AVERAGE", "VARIABLE"):
        integrity = of(by_soundfile(samples, 44_100, "MP3", None, bitrate_mode=mode, compression_level=0.5))
        assert integrity.missing is None
        assert 2 * 44_100 - 9000 < integrity.least_samples <= 2 * 44_100
    for write_xing in ("0", "1"):
        integrity = of(by_ffmpeg(samples, 44_100, "mp3", "libmp3lame", write_xing=write_xing))
        assert integrity.missing is None
    assert of(by_ffmpeg(samples, 44_100, "adts", "aac")) == NO_FRAMES


# --- memory ----------------------------------------------------------------------------------------------

MEGABYTE = 1_000_000
LONG = {  # what a file of at least 3 MB is repeated from, what is in front of it and behind it
    "MPEG": (FRAME, b"", b""),
    "zeros behind MPEG": (bytes(MEGABYTE), FRAME * 50, b""),
    "zeros in front of MPEG": (bytes(MEGABYTE), b"ID3\4\0\0" + bytes(4), FRAME * 50),
    "tag in front of MPEG": (b"\xff\xfb" * 1000, b"ID3\4\0\0" + bytes([7, 127, 127, 127]), FRAME * 50),
    "false starts behind MPEG": (b"\xff\xfb\x90\x00" + bytes(8), FRAME * 50, b""),
    "bytes behind Ogg": (b"OggR" * 1000, page(7, 0, FIRST | LAST), b""),
}


def peak_of(path) -> tuple[Integrity, int]:
    """Return the integrity of a file, and the most bytes of memory that the check took at once."""
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            return check_integrity(file), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LONG)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    unit, before, after = LONG[name]
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.write(before)
        for _ in range(3 * MEGABYTE // len(unit) + 1):
            file.write(unit)
        file.write(after)
    integrity, peak = peak_of(path)
    assert integrity.missing is None
    assert peak < 2 * MEGABYTE


def test_memory_does_not_grow_with_ogg(tmp_path):
    path = tmp_path / "long"
    large = [page(7, number, body=bytes(254 * 255)) for number in range(1, 24)]
    path.write_bytes(b"".join([page(7, 0, FIRST), *large, page(7, 24, LAST)]))
    integrity, peak = peak_of(path)
    assert integrity == WHOLE
    assert peak < path.stat().st_size / 2


def test_where_blocks_meet_is_nothing_special():
    """Tags, damage and ends, at each place around the end of the first block that is read."""
    for size, offset in itertools.product((417, 418), range(-12, 12)):
        filling = bytes(65_536 + offset - 100 * 417)
        plain = b"ID3\4\0\0" + bytes(4)
        assert of(plain + filling + FRAME * 200).least_samples == of(FRAME * 200).least_samples
        frames = FRAME * (65_536 // 417)
        length = 65_536 - len(frames) + offset
        tag = b"ID3\4\0\0\0\0\0" + bytes([length]) + bytes(length)
        assert of(frames + tag + FRAME * 30) == of(frames + FRAME * 30)
        assert "no frame" in damage(frames + tag[1:] + FRAME * 30)
        assert "incomplete" in missing(frames + tag + FRAME * 30 + FRAME[: size - 400])
    whole = page(7, 0, FIRST) + page(7, 1, LAST)
    for offset in range(-12, 12):
        filling = bytes(65_536 - len(whole) + offset)
        assert of(whole + filling) == WHOLE
        assert "no page" in damage(whole + filling + b"OggS")
