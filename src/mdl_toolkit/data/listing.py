"""What an input is: a file of rows, or a folder or pattern of recordings, which becomes a CSV of them."""

import csv
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import is_there

# Names that recordings go by, of whatever decoders read; with a pattern, whatever it matches is taken.
SUFFIXES = frozenset(
    [
        ".3g2", ".3gp", ".aac", ".ac3", ".adts", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".asf", ".au",
        ".avi", ".avr", ".awb", ".bwf", ".caf", ".dsf", ".dts", ".eac3", ".ec3", ".f4a", ".f4v", ".flac",
        ".flv", ".htk", ".ircam", ".m1a", ".m2a", ".m2ts", ".m4a", ".m4b", ".m4r", ".m4v", ".mka", ".mkv",
        ".mov", ".mp1", ".mp2", ".mp3", ".mp4", ".mpc", ".mpeg", ".mpg", ".mpga", ".mts", ".nist", ".oga",
        ".ogg", ".ogv", ".opus", ".paf", ".pvf", ".ra", ".rf64", ".rm", ".sd2", ".sf", ".snd", ".sph",
        ".spx", ".svx", ".tak", ".ts", ".tta", ".voc", ".w64", ".wav", ".wave", ".webm", ".wma", ".wmv",
        ".wv", ".wve", ".xi",
    ]
)  # fmt: skip

# Of Kaldi's data folders: the recordings, and their segments where there are any.
WAV_SCP, SEGMENTS = "wav.scp", "segments"


def rows_file(given: str | Path) -> Path:
    """Return the file that has a line for each row: of a data folder of Kaldi's, `segments` or `wav.scp`."""
    path = Path(given)
    folder = path.parent if path.name == WAV_SCP else path
    names = [name for name in (SEGMENTS, WAV_SCP) if is_there(folder / name)]
    return folder / names[0] if WAV_SCP in names else path


def is_listing(given: str) -> bool:
    """Tell whether an input is a recording, a folder or a pattern, rather than a file of rows."""
    path = rows_file(given)
    if path.is_file():
        return path.suffix.lower() in SUFFIXES
    return path.is_dir() or (not path.exists() and glob.has_magic(given))


def list_recordings(given: str) -> list[str]:
    """List a recording, those of a folder and all folders in it, or those that a pattern matches, sorted.

    Hidden files and folders are left out, and links to a folder that they lie in are not followed. Paths
    start where the folder's or the pattern's does.

    Raises:
        InputError: there is none, or a name that no CSV can hold.
    """
    if Path(given).is_dir():
        names = _matches(f"{glob.escape(given.rstrip('/') or '/')}/**/*")
        files = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
        where = Localized("the folder")
    elif Path(given).is_file():
        files, where = [given], Localized("the file")
    else:
        files, where = _matches(given), Localized("the pattern")
    files = [name for name in files if Path(name).is_file()]
    if not files:
        raise InputError(
            "{words}: {where} holds no recordings; give a CSV, or a folder or pattern of audio files",
            words=given,
            where=where,
        )
    # Python has the bytes that are no text as lone surrogates.
    odd = [name for name in files if re.search("[\udc80-\udcff]", name)]
    if odd:
        raise InputError(
            "{words}: {count} {count:name of a file is|names of files are} not UTF-8, the first is "
            "{name!r}; rename {count:it|them}",
            words=given,
            count=len(odd),
            name=odd[0],
        )
    return files


def _matches(pattern: str) -> list[str]:
    """Return what a pattern matches, spelt as it is, sorted; `**` is all folders below but hidden ones."""
    if pattern.endswith("**"):
        pattern += "/*"
    recursive = re.fullmatch(r"(|.*?/)\*\*/(.*)", pattern, re.DOTALL)
    if not recursive:
        # Paths stay spelled as the user did.
        return sorted(glob.glob(pattern))  # noqa: PTH207
    base, rest = recursive.groups()
    starts = _matches(base) if base else [""]
    folders = (folder for start in starts for folder in _folders(start, ()))
    return sorted({found for folder in folders for found in _matches(glob.escape(folder) + rest)})


def _folders(start: str, above: tuple[Path, ...]) -> Iterator[str]:
    """Yield a folder and all below it, each with a slash, but for links to a folder that holds them."""
    real = Path(start or ".").resolve()
    if any(folder.is_relative_to(real) for folder in above):
        return
    yield start
    try:
        entries = sorted(os.scandir(start or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(".") and entry.is_dir():
            yield from _folders(f"{start}{entry.name}/", (*above, real))


def write_listing(files: list[str], target: Path) -> None:
    """Write a CSV with the column `audio`."""
    with target.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["audio"], *([name] for name in files)])
