"""Say what a file is that no decoder reads, and what to do: by its first bytes, or by its samples."""

from typing import BinaryIO

import numpy as np

from mdl_toolkit.errors import AudioError
from mdl_toolkit.i18n import Localized

# By their first bytes.
LOOKS = {
    b"\x89PNG": Localized("a PNG image"),
    b"\xff\xd8\xff": Localized("a JPEG image"),
    b"GIF8": Localized("a GIF image"),
    b"%PDF": Localized("a PDF document"),
    b"PK\x03\x04": Localized("a ZIP archive"),
    b"\x1f\x8b": Localized("a gzip archive"),
    b"PAR1": Localized("a Parquet table"),
}
SILK = (b"#!SILK_V3", b"\x02#!SILK_V3")
LFS = b"version https://git-lfs"
PAGES = (b"<!doctype html", b"<html")
# Correlation of neighbouring 16-bit samples above which bytes are taken for sound without a header: speech
# has 0.8 and more, compressed data none.
SMOOTH = 0.6


def is_web_page(head: bytes) -> bool:
    """Tell whether a file that starts so is HTML."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(PAGES)


def explain_content(file: BinaryIO) -> AudioError | None:
    """Return the error for a file that is something well known; None for any other."""
    file.seek(0)
    head = file.read(1 << 16)
    if head.startswith(SILK):
        return AudioError(
            "this is a voice message of WeChat or QQ (SILK), which FFmpeg does not read; convert it to WAV "
            "first, for example with the Python package pilk: pilk.decode(FILE, 'new.pcm', pcm_rate=16000), "
            "and then: ffmpeg -f s16le -ar 16000 -ac 1 -i new.pcm new.wav"
        )
    if head.startswith(LFS):
        return AudioError(
            "this is a pointer of git-lfs, not the recording; fetch the recordings in their repository with: "
            "git lfs pull"
        )
    if is_web_page(head):
        return AudioError(
            "this is a web page, not a recording, as a login or a network's sign-in page is saved under the "
            "name of a download; fetch the recording again"
        )
    looks = next((name for start, name in LOOKS.items() if head.startswith(start)), None)
    head = head[:80]
    text = head.decode("utf-8", "ignore")
    # The last character may be cut.
    is_text = len(text.encode()) > len(head) - 4
    if looks is None and is_text and all(one.isprintable() or one in "\r\n\t" for one in text):
        looks = Localized("a text file that starts with {start!r}", start=" ".join(text.split())[:40])
    if looks is not None:
        return AudioError("this is {looks}, not a recording; correct the path", looks=looks)
    return _raw_pcm(file)


def _raw_pcm(file: BinaryIO) -> AudioError | None:
    """Return the error for what looks like 16-bit samples without a header; None for anything else."""
    file.seek(0)
    data = file.read(1 << 18)
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float64)
    if len(samples) < 1000 or not samples[1:].std() or not samples[:-1].std():
        return None
    if np.corrcoef(samples[1:], samples[:-1])[0, 1] < SMOOTH:
        return None
    return AudioError(
        "no header says what this is; if it is raw PCM, give it one, with its own rate and channels: "
        "ffmpeg -f s16le -ar 16000 -ac 1 -i FILE new.wav"
    )
