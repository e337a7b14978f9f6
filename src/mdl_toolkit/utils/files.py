"""Write files and folders whole or not at all, apart from inputs, and leave no empty folders behind.

An output is written as `.NAME.partial-MARK` in its folder first; for the moment between two renames the
previous content is `.NAME.old-MARK`, and `.NAME.lock-MARK` is locked meanwhile. By that lock the next process
tells whether the writer still runs; if not, it puts back the previous content and removes all else.
"""

import fnmatch
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import InputError, ToolkitError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.locks import hold_lock
from mdl_toolkit.utils.ownership import check_not_inside, discard, is_ours, remember, seal, set_aside

INPUT = Localized("the input")
NOT_REGULAR = Localized("a device, a FIFO or a socket is there; give the name of a file")
_TEMPORARY = re.compile(r"\.(.+)\.(?:partial|old|lock)-([0-9a-f]{8})")


@contextmanager
def report_write_errors(place: str, error: type[ToolkitError]) -> Iterator[None]:
    """Turn an OSError of the context, such as a full disk, into an error that names the file or option.

    Args:
        place: the file or folder as the message names it, with the option that gave it.
        error: its kind.
    """
    try:
        yield
    except OSError as problem:
        raise error(
            Localized("{place}: cannot be written: {reason}", place=place, reason=problem)
        ) from problem


def refuse_devices(folder: Path, error: type[ToolkitError]) -> None:
    """Refuse a folder with FIFOs, sockets or devices, or links to them, which may never end when read.

    Raises:
        ToolkitError: of the given type, naming the first one.
    """
    paths: list[Path] = []
    # A folder that cannot be listed is refused by whoever reads in it.
    with suppress(OSError):
        paths = sorted(folder.iterdir())
    for path in paths:
        if is_special(path):
            message = Localized(
                "{path}: a FIFO, socket or device, which is never read here; remove it", path=path
            )
            raise error(message)


def fsync(path: Path) -> None:
    """Wait until a written file or folder is on the disk, so that a power cut does not undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- put in place ----------------------------------------------------------------------------------------


@contextmanager
def replace_folder(output: Path, kind: str) -> Iterator[Path]:
    """Yield a new folder to fill; it becomes the output when the context ends well, and is removed if not.

    The previous content stays until then; what is not ours in it stays for good (`utils/ownership.py`). A
    link is followed, and stays.

    Args:
        output: the folder.
        kind: of output, for the record of its files.

    Raises:
        OSError: the folder cannot be made or put in place.
    """
    target = output.resolve()
    with removing_empty(target.parent), _reserve(target, kind) as (work, old):
        work.mkdir()
        yield work
        seal(work, kind)
        put_in_place(work, target, old)
        fsync(target.parent)


@contextmanager
def replace_file(output: Path, kind: str) -> Iterator[Path]:
    """Yield a new file to write; it becomes the output when the context ends well, and is removed if not.

    Permissions of a previous file stay. One that is not ours is set aside, unless it is empty. A link is
    followed, and stays.

    Args:
        output: the file.
        kind: of output, for the record of the folder's files.

    Raises:
        OSError: the file cannot be made or put in place, or no regular file is there.
    """
    target = output.resolve()
    with removing_empty(target.parent), _reserve(target, kind) as (work, _):
        work.touch()
        yield work
        if is_special(output):
            raise OSError(NOT_REGULAR.en)
        if target.exists():
            shutil.copymode(target, work)
            if target.stat().st_size and not is_ours(target, kind):
                set_aside(target, target)
        remember(target, kind, work)
        work.replace(target)
        remember(target, kind)


@contextmanager
def replace_files(folder: Path, names: Iterable[str], kind: str) -> Iterator[Path]:
    """Yield an empty folder to fill; its files replace those of given names when the context ends well.

    The previous ones, if they are ours, are removed before the first new one is put in place, so that a kill
    leaves no mixture. All else in the folder stays.

    Args:
        folder: where they are to lie; it is there, and this process alone writes such files into it.
        names: of all files that an earlier call may have written.
        kind: of output, for the record of the folder's files.

    Raises:
        OSError: a file cannot be written or put in place.
    """
    target = folder.resolve()
    with _reserve(target / kind, kind) as (work, _):
        work.mkdir()
        yield work
        for path in (target / name for name in names):
            if is_ours(path, kind):
                path.unlink()
        for new in sorted(work.iterdir()):
            path = target / new.name
            if os.path.lexists(path):
                set_aside(path, path)
            remember(path, kind, new)
            new.rename(path)
        fsync(target)


def is_there(path: Path) -> bool:
    """Tell whether there is something at a path that can be seen; `Path.exists` raises for long names."""
    return os.path.exists(path)  # noqa: PTH110


def is_special(path: Path) -> bool:
    """Tell whether a path is that of a device, a FIFO or a socket."""
    return is_there(path) and not path.is_file() and not path.is_dir()


def remove_folder(folder: Path, kind: str) -> None:
    """Remove a folder whole or not at all: its name never stands for a part of it.

    If it holds what is not ours, it is set aside.

    Raises:
        OSError: it cannot be moved away.
    """
    with _reserve(folder, kind) as (_, old):
        folder.rename(old)


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds; unlike `json.loads`, call endless nesting a ValueError too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, and wait until it is on the disk.

    For files that only one process writes at a time: unlike `replace_file` it takes no lock, and does not
    look for what killed processes left.

    Raises:
        OSError: it cannot be written.
    """
    with partial_name(path) as work:
        work.write_text(text, encoding="utf-8")
        fsync(work)
        work.replace(path)
        fsync(path.parent)


@contextmanager
def partial_name(target: Path) -> Iterator[Path]:
    """Yield an unused path in the folder of a target; what is there when the context ends is removed."""
    work = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        yield work
    finally:
        _remove(work)


def put_in_place(work: Path, target: Path, old: Path) -> None:
    """Rename a folder to `target`; what is there now becomes `old`, and comes back if that fails."""
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def recover_outputs(folder: Path, *names: str, kind: str) -> None:
    """Put back the outputs that a killed process had renamed for a moment, and remove all else that it left.

    Args:
        folder: in which it wrote.
        names: of its outputs, as patterns; temporary files of others stay.
        kind: of output.

    Raises:
        OSError: the folder cannot be read, or an output not be put back.
    """
    matches = [match for path in folder.iterdir() if (match := _TEMPORARY.fullmatch(path.name))]
    for name, mark in sorted({(match[1], match[2]) for match in matches}):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
            continue
        target = folder / name
        work, old, lock = _temporary_paths(target, mark)
        with suppress(BlockingIOError), hold_lock(lock, BlockingIOError(), remove=True) as is_held:
            if not is_held:
                continue
            if old.exists() and not target.exists():
                old.rename(target)
            _remove(work)
            if old.exists():
                discard(old, target, kind, work)


@contextmanager
def _reserve(target: Path, kind: str) -> Iterator[tuple[Path, Path]]:
    """Yield paths for the new and the previous content of a target; what is there in the end is removed."""
    if not target.parent.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
    recover_outputs(target.parent, glob.escape(target.name), kind=kind)
    work, old, lock = _temporary_paths(target, secrets.token_hex(4))
    with hold_lock(lock, remove=True):
        try:
            yield work, old
        finally:
            _remove(work)
            if old.exists():
                discard(old, target, kind, work)


def _temporary_paths(target: Path, mark: str) -> tuple[Path, Path, Path]:
    """Return the paths of the new content of a target, of its previous content, and of the lock."""
    partial, old, lock = (
        target.with_name(f".{target.name}.{kind}-{mark}") for kind in ("partial", "old", "lock")
    )
    return partial, old, lock


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there, and as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


# --- folders ---------------------------------------------------------------------------------------------


@contextmanager
def claim_folder(folder: Path, option: str = "--output") -> Iterator[None]:
    """Make a folder that this process alone writes into while the context lasts.

    Raises:
        InputError: it cannot be made, its path is not UTF-8, or another process writes into it.
    """
    # safetensors opens no others.
    if str(folder.absolute()).encode(errors="replace") != os.fsencode(folder.absolute()):
        raise InputError(
            "{option} {folder}: its path is not UTF-8; choose another place", option=option, folder=folder
        )
    busy = InputError(
        "{option} {folder}: another run writes into it; wait for its end, or give another folder",
        option=option,
        folder=folder,
    )
    with removing_empty(folder):
        with report_write_errors(f"{option} {folder}", InputError):
            folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder / ".lock", busy, remove=True):
            yield


@contextmanager
def removing_empty(folder: Path) -> Iterator[None]:
    """Remove a folder and its parents when the context ends, if they are new and empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        # They are not empty if the context ended well.
        with suppress(OSError):
            for path in new:
                path.rmdir()


# --- apart from inputs -----------------------------------------------------------------------------------


def check_file(output: Path, inputs: Iterable[str | Path], option: str = "--output") -> None:
    """Refuse a file to write that is a folder, a device or an input, or lies in a dataset or a model.

    Raises:
        InputError: naming both.
    """
    if is_special(output):
        raise InputError("{option} {output}: {reason}", option=option, output=output, reason=NOT_REGULAR)
    if output.is_dir():
        raise InputError(
            "{option} {output}: a folder is there; give the name of a file", option=option, output=output
        )
    check_not_inside(output, option)
    for path in inputs:
        check_apart(output, Path(path), option)


def check_apart(output: Path, path: Path, option: str = "--output", other: str | Localized = INPUT) -> None:
    """Refuse an output that is, holds or lies inside an input or another output.

    Args:
        output: the file or folder to write.
        path: the input or the other output.
        option: by which `output` was given.
        other: by which `path` was given.

    Raises:
        InputError: naming both.
    """
    target, source = output.absolute().resolve(), path.absolute().resolve()
    if target == source or target in source.parents or source in target.parents:
        raise InputError(
            "{option} {output}: it is, holds or lies inside {other} {path}; choose another place",
            option=option,
            output=output,
            other=other,
            path=path,
        )
