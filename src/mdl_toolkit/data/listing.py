"""Recordings without a CSV: a folder or a pattern becomes a CSV that names its files."""

import csv
import glob
from pathlib import Path

from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized

# Names that recordings go by; with a pattern, whatever it matches is taken.
SUFFIXES = frozenset(
    [
        ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b",
        ".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".ra", ".rf64", ".snd",
        ".sph", ".w64", ".wav", ".wave", ".webm", ".wma",
    ]
)  # fmt: skip


def is_listing(given: str) -> bool:
    """Tell whether an input is a folder or a pattern, rather than a CSV file."""
    path = Path(given)
    return path.is_dir() or (not path.exists() and glob.has_magic(given))


def list_recordings(given: str) -> list[str]:
    """List the recordings of a folder and of all folders in it, or those that a pattern matches, sorted.

    Hidden files and folders are left out. Paths start where the folder's or the pattern's does.

    Raises:
        InputError: there is none.
    """
    if Path(given).is_dir():
        names = _matches(f"{glob.escape(given.rstrip('/') or '/')}/**/*")
        files = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
        where = Localized("the folder")
    else:
        files, where = _matches(given), Localized("the pattern")
    files = [name for name in files if Path(name).is_file()]
    if not files:
        raise InputError(
            "{words}: {where} holds no recordings; give a CSV, or a folder or pattern of audio files",
            words=given,
            where=where,
        )
    return files


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - paths stay spelled as the user did


def write_listing(files: list[str], target: Path) -> None:
    """Write a CSV with the column `audio`."""
    with target.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["audio"], *([name] for name in files)])
