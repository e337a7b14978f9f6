"""Addresses that a page can play, for the cells of the column `audio`: links, or the sound itself."""

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import soundfile

from mdl_toolkit.audio.embedded import split_reference
from mdl_toolkit.audio.loading import SAMPLE_RATE, Clip, load_segments
from mdl_toolkit.audio.segments import Segment
from mdl_toolkit.audio.urls import is_url, without_credentials
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, read_settings
from mdl_toolkit.data.column_names import AUDIO
from mdl_toolkit.data.listing import is_listing
from mdl_toolkit.data.segment_columns import segment_or_whole
from mdl_toolkit.errors import AudioError, InputError
from mdl_toolkit.utils.console import warn


def folder_of(predictions: Path, base_dir: str | None) -> str | None:
    """Return the folder that relative audio paths in a file of predictions start from.

    Args:
        predictions: the CSV file.
        base_dir: the folder that the user named; if None, the one of the inference that wrote the file.
    """
    settings_file = predictions.with_name(f"{predictions.name}.{SETTINGS_FILE}")
    if base_dir is not None or not settings_file.is_file():
        return base_dir
    # The settings may be those of another command or version.
    with suppress(InputError):
        settings = read_settings(settings_file, InferenceOptions)
        is_listed = is_listing(str(settings.get("input", "")))
        return None if is_listed else settings.get("base_dir")
    return None


def audio_values(
    rows: Sequence[Mapping[str, str]], base_dir: str | None, page: Path, embedded: int = 0
) -> dict[str, Any] | None:
    """Return the recordings that the page plays, row by row.

    Args:
        rows: the cells of each by column, in the order in which they are shown.
        base_dir: folder that relative paths start from; the current directory if None.
        page: the HTML file, from whose folder links start.
        embedded: so many of the first rows have their sound in the page.

    Returns:
        `folder`, the common start of all links; `names`, their ends, percent-encoded and with the seconds of
        a segment, `[rows]`, empty where there is no recording; `embedded`, `data:` addresses by row. None if
        there is no recording at all.
    """
    cells, segments = [row.get(AUDIO, "") for row in rows], [*map(segment_or_whole, rows)]
    if not any(cells):
        return None
    start = os.path.dirname(os.path.abspath(page))  # noqa: PTH100, PTH120 - no link is followed
    links, missing = [], []
    for cell in cells:
        path = _path(cell, base_dir)
        if not cell or is_url(cell) or split_reference(path):
            links.append(without_credentials(cell) if is_url(cell) else "")
            continue
        # Path.is_file refuses names that cannot be.
        if not os.path.isfile(path):  # noqa: PTH113
            missing.append(path)
        try:
            links.append(quote(Path(os.path.relpath(path, start)).as_posix()))
        except ValueError:
            # It is on another drive.
            links.append(path.as_uri())
    links = [link and link + _times(segment) for link, segment in zip(links, segments, strict=True)]
    # The common start, cut at its last slash.
    folder = re.sub(r"[^/]*$", "", os.path.commonprefix([link for link in links if link]))  # noqa: RUF071
    if missing:
        warn(
            "{count} of {rows} recordings {count:is|are} not there, the first is {first}; --base-dir says "
            "where paths start",
            count=len(missing),
            rows=len(cells),
            first=missing[0],
        )
    return {
        "folder": folder,
        "names": [link.removeprefix(folder) for link in links],
        "embedded": _embedded(cells[:embedded], segments[:embedded], base_dir),
    }


def _path(cell: str, base_dir: str | None) -> Path:
    return Path(base_dir or "").expanduser().absolute() / os.path.expanduser(cell)  # noqa: PTH111


def _times(segment: Segment) -> str:
    """Return the end of an address that plays a segment alone (Media Fragments URI 1.0)."""
    if not segment.start and segment.end is None:
        return ""
    return f"#t={segment.start}" + ("" if segment.end is None else f",{segment.end}")


def _embedded(cells: Sequence[str], segments: Sequence[Segment], base_dir: str | None) -> dict[int, str]:
    """Return `data:` addresses by row of the files that can be read, and warn of the other recordings.

    The sound is as the model hears it (16 kHz mono): MP3, or FLAC where libsndfile makes no MP3.
    """
    name = "MP3" if "MP3" in soundfile.available_formats() else "FLAC"
    media_type = {"MP3": "audio/mpeg", "FLAC": "audio/flac"}[name]
    addresses: dict[int, str] = {}
    linked: list[str] = []
    rows_of: dict[str, list[int]] = {}
    for row, cell in enumerate(cells):
        rows_of.setdefault(cell, []).append(row)
    for cell, rows in rows_of.items():
        if is_url(cell):
            linked.append(without_credentials(cell))
        if not cell or is_url(cell):
            continue
        clips: Sequence[Clip | AudioError]
        try:
            clips = load_segments(_path(cell, base_dir), [segments[row] for row in rows], True)
        except AudioError as problem:
            clips = [problem] * len(rows)
        for row, clip in zip(rows, clips, strict=True):
            if isinstance(clip, AudioError):
                linked.append(f"{cell}: {clip.message}")
                continue
            file = io.BytesIO()
            soundfile.write(file, clip.samples, SAMPLE_RATE, format=name)
            addresses[row] = f"data:{media_type};base64,{base64.b64encode(file.getvalue()).decode()}"
    if linked:
        warn(
            "{count} {count:recording is|recordings are} linked, not embedded, the first is {first}",
            count=len(linked),
            first=linked[0],
        )
    return addresses
