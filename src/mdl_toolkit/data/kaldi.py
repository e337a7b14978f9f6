"""Kaldi's data folder as cells by column: `wav.scp` or `segments`, with `text` and `utt2spk` where they are.

A line of each file is a name, and what is said of it. Pipes are commands, and are never run.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mdl_toolkit.data.csv_format import CsvFormat, csv_error
from mdl_toolkit.data.listing import SEGMENTS, WAV_SCP
from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized

# What lists say of an utterance, by our columns.
LISTS = {"speaker": "utt2spk", "prediction": "text"}
# As the end of a segment it is that of the recording.
END_OF_FILE = re.compile(r"^-1(\.0*)?$")


def lists_beside(path: Path) -> tuple[Path, ...]:
    """Return the other files that the rows of `wav.scp`, or of `segments`, are read from."""
    names = [WAV_SCP] * (path.name == SEGMENTS) + [*LISTS.values()]
    return tuple(path.with_name(name) for name in names if path.with_name(name).is_file())


def read_kaldi_rows(path: Path, file: BinaryIO, form: CsvFormat) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the cells of each utterance by column, with its line; the lists beside are held in memory.

    Args:
        path: `wav.scp` or `segments`.
        file: the same, open.
        form: how it is written.

    Raises:
        InputError: naming the first line that is none of such a list.
    """
    tables: dict[str, dict[str, str]] = {}
    for other in lists_beside(path):
        with other.open("rb") as opened:
            tables[other.name] = {name: rest for _, name, rest in read_list(other, opened, form)}
    for number, name, rest in read_list(path, file, form):
        cells = {"utterance": name, "audio": rest}
        if path.name == SEGMENTS:
            recording, *times = rest.split() or [""]
            if len(times) not in (2, 3) or not all(map(str.isdecimal, times[2:])):
                reason = Localized("expected an utterance, a recording, its start and end")
                raise _wrong_line(path, number, reason)
            if recording not in tables[WAV_SCP]:
                raise _wrong_line(path, number, Localized("{name!r} is not in wav.scp", name=recording))
            start, end, *channels = times
            cells |= {"audio": tables[WAV_SCP][recording], "start": start, "end": END_OF_FILE.sub("", end)}
            if channels:
                # Counted from 0.
                cells["channel"] = str(int(channels[0]) + 1)
        cells |= {column: tables[other].get(name, "") for column, other in LISTS.items() if other in tables}
        yield number, cells


def read_list(path: Path, file: BinaryIO, form: CsvFormat) -> Iterator[tuple[int, str, str]]:
    """Yield the number of each line that is not blank, its name and the rest.

    Raises:
        InputError: a name alone where more is needed, or one that is there twice.
    """
    text, names = form.text(file), set[str]()
    try:
        for number, line in enumerate(text, 1):
            name, rest = [*line.split(None, 1), "", ""][:2]
            if name in names:
                raise _wrong_line(path, number, Localized("{name!r} is there a second time", name=name))
            if name:
                names.add(name)
                yield number, name, rest.strip()
    finally:
        text.detach()


def _wrong_line(path: Path, number: int, reason: Localized) -> InputError:
    reason = Localized(
        "line {number}: {reason}; Kaldi's utils/validate_data_dir.sh finds such lines",
        number=number,
        reason=reason,
    )
    return csv_error(path, reason)
