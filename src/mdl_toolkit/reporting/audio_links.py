"""Cells of the column `audio` to addresses that a page can play: links, or the sound in the address."""

import base64
import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import soundfile

from mdl_toolkit.audio.loading import SAMPLE_RATE, load
from mdl_toolkit.audio.urls import is_url, without_credentials
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, read_settings
from mdl_toolkit.data.listing import is_listing
from mdl_toolkit.errors import AudioError, InputError
from mdl_toolkit.utils.console import warn


def folder_of(predictions: Path, base_dir: str | None) -> str | None:
    """Where relative paths in a file start: as given, or as the inference was told that wrote the file."""
    beside = predictions.with_name(f"{predictions.name}.{SETTINGS_FILE}")
    if base_dir is not None or not beside.is_file():
        return base_dir
    with suppress(InputError):  # of another command or version
        settings = read_settings(beside, InferenceOptions)
        is_listed = is_listing(str(settings.get("input", "")))
        return None if is_listed else settings.get("base_dir")
    return None


def audio_values(cells: Sequence[str], base_dir: str | None, page: Path, embedded: int = 0) -> dict[str, Any]:
    """What the page plays for each row.

    Args:
        cells: of the column `audio`, `[rows]`, in the order in which they are shown.
        base_dir: folder that relative paths start from; the current directory if None.
        page: the HTML file, from whose folder links start.
        embedded: so many of the first rows have their sound in the page.

    Returns:
        `folder`, what all links begin with; `names`, their rest, percent-encoded, `[rows]`, empty where there
        is no recording; `embedded`, `data:` addresses by row.
    """
    start = os.path.dirname(os.path.abspath(page))  # noqa: PTH100, PTH120 - no link is followed
    links = [_link(cell, base_dir, start) for cell in cells]
    folder = re.sub(r"[^/]*$", "", _common_start([link for link in links if link]))
    _warn_missing(cells, base_dir)
    return {
        "folder": folder,
        "names": [link.removeprefix(folder) for link in links],
        "embedded": _embedded(cells[:embedded], base_dir),
    }


def _common_start(links: Sequence[str]) -> str:
    """What all begin with; it is enough to look at the first and the last in order."""
    if not links:
        return ""
    pairs = zip(min(links), max(links), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _path(cell: str, base_dir: str | None) -> Path:
    return Path(base_dir or "").expanduser().absolute() / Path(cell).expanduser()


def _link(cell: str, base_dir: str | None, start: str) -> str:
    """An address as it is, without a password; a file by the way to it from the page's folder."""
    if not cell or is_url(cell):
        return without_credentials(cell)
    path = _path(cell, base_dir)
    try:
        return quote(Path(os.path.relpath(path, start)).as_posix())
    except ValueError:  # another drive
        return path.as_uri()


def _warn_missing(cells: Sequence[str], base_dir: str | None) -> None:
    missing = [cell for cell in cells if cell and not is_url(cell) and not _is_there(cell, base_dir)]
    if missing:
        warn(
            "{count} of {rows} recordings are not there, the first is {first}; --base-dir says where "
            "paths start",
            count=len(missing),
            rows=len(cells),
            first=_path(missing[0], base_dir),
        )


def _is_there(cell: str, base_dir: str | None) -> bool:
    return os.path.isfile(_path(cell, base_dir))  # noqa: PTH113 - Path's refuses names that cannot be


# --- sound in the page -----------------------------------------------------------------------------------


def _embedded(cells: Sequence[str], base_dir: str | None) -> dict[int, str]:
    """`data:` addresses of the recordings that are files and can be read; of the others it is told."""
    found: dict[int, str] = {}
    left: list[str] = []
    for row, cell in enumerate(cells):
        if cell and not is_url(cell):
            try:
                found[row] = _address(_path(cell, base_dir))
                continue
            except AudioError as problem:
                left.append(f"{cell}: {problem.message}")
        elif cell:
            left.append(without_credentials(cell))
    if left:
        warn(
            "{count} recordings are linked, not embedded, the first is {first}",
            count=len(left),
            first=left[0],
        )
    return found


def _address(path: Path) -> str:
    """A recording as the model hears it (16 kHz mono), as MP3, or FLAC where libsndfile makes no MP3."""
    samples, file = load(path, allow_truncated=True).samples, io.BytesIO()
    name = "MP3" if "MP3" in soundfile.available_formats() else "FLAC"
    soundfile.write(file, samples, SAMPLE_RATE, format=name)
    kind = {"MP3": "audio/mpeg", "FLAC": "audio/flac"}[name]
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
