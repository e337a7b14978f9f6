"""Outputs: kept apart from inputs, put in place whole or not at all, no empty folders left behind.

What is written into them is for others to say.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdl_toolkit.errors import InputError, ToolkitError

try:
    import fcntl
except ImportError:  # no such locks on this platform: what killed processes leave stays there
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS: bool = fcntl is not None


@contextmanager
def writing(place: str, error: type[ToolkitError]) -> Iterator[None]:
    """Turn an operating system's refusal, such as a full disk, into an error that names the place."""
    try:
        yield
    except OSError as problem:
        reason = problem.strerror or problem
        raise error(f"{place}: cannot be written: {reason}", f"{place}：无法写入：{reason}") from problem


def to_disk(path: Path) -> None:
    """Wait until a written file is on the disk, so that a power cut does not undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Give a new folder to fill; it takes the output's place when all went well, and is removed if not.

    The previous content stays until then. Both names lie in one folder, so that putting in place is two
    renames. A link is followed, and stays. What a killed process left behind is removed by the next one.

    Raises:
        InputError: the folder cannot be made or put in place.
    """
    target, place = output.resolve(), f"--output {output}"
    with removing_empty(target.parent), _new(target, Path.mkdir, place) as (work, old):
        yield work
        with writing(place, InputError):
            put_in_place(work, target, old)


@contextmanager
def replacing_file(output: Path, option: str = "--output") -> Iterator[Path]:
    """Give the name of a file to write; it takes the output's place when all went well, else it is removed.

    Raises:
        InputError: it cannot be written or put in place.
    """
    target, place = output.resolve(), f"{option} {output}"
    with (
        removing_empty(target.parent),
        _new(target, Path.touch, place) as (work, _),
        writing(place, InputError),
    ):
        yield work
        if target.exists():
            shutil.copymode(target, work)
        work.replace(target)


@contextmanager
def claimed(folder: Path, option: str = "--output") -> Iterator[None]:
    """Make a folder that one process alone writes into, as long as the context lasts.

    Raises:
        InputError: it cannot be made, or another process of this machine writes into it.
    """
    with removing_empty(folder):
        with writing(f"{option} {folder}", InputError):
            folder.mkdir(parents=True, exist_ok=True)
        lock, is_free = _try_lock(folder)
        if not is_free:
            raise InputError(
                f"{option} {folder}: another run writes into it; wait for its end, or give another folder",
                f"{option} {folder}：另一个任务正在写入该目录；请等待其结束，或指定其他目录",
            )
        try:
            yield
        finally:
            _close(lock)


@contextmanager
def removing_empty(folder: Path) -> Iterator[None]:
    """Leave no folder behind that is new and empty: the given one or any of its parents."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        with suppress(OSError):  # they are not empty if all went well
            for path in new:
                path.rmdir()


def check_file(output: Path, inputs: Iterable[str | Path], option: str = "--output") -> None:
    """Refuse a file to write whose name is a folder's, or that of an input.

    Raises:
        InputError: naming both.
    """
    if output.is_dir():
        raise InputError(
            f"{option} {output}: a folder is there; give the name of a file",
            f"{option} {output}：该位置是目录；请指定文件名",
        )
    for path in inputs:
        check_apart(output, Path(path), option)


def put_in_place(work: Path, target: Path, old: Path) -> None:
    """Give a folder the name `target`; what is there now becomes `old`."""
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


# --- beside the output -----------------------------------------------------------------------------------


@contextmanager
def _new(target: Path, make: Callable[[Path], None], place: str) -> Iterator[tuple[Path, Path]]:
    """A new file or folder beside the target, and where the target may go; both are gone in the end.

    It is locked meanwhile: by that other processes tell it from what a killed one has left.
    """
    with writing(place, InputError):
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(target)
        while True:
            work, old = _beside(target, secrets.token_hex(4))
            make(work)
            lock = _lock(work)
            if work.exists():
                break
            _close(lock)  # who clears up was quicker than the lock
    try:
        yield work, old
    finally:
        _remove(work)
        _remove(old)
        _close(lock)


def _beside(target: Path, mark: str) -> tuple[Path, Path]:
    """What becomes the target, and what was it."""
    return (
        target.with_name(f".{target.name}.partial-{mark}"),
        target.with_name(f".{target.name}.old-{mark}"),
    )


def _clear_up(target: Path) -> None:
    """Put back what a killed process had moved away for a moment, and remove all else that it left."""
    if not HAS_LOCKS:
        return
    name = re.compile(re.escape(f".{target.name}.") + r"(?:partial|old)-([0-9a-f]{8})")
    for mark in {found[1] for path in target.parent.iterdir() if (found := name.fullmatch(path.name))}:
        work, old = _beside(target, mark)
        lock = _lock(work, wait=False)
        if lock is not None or not work.exists():
            if work.exists() and old.exists() and not target.exists():
                old.rename(target)
            _remove(work)
            _remove(old)
        _close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _lock(path: Path, *, wait: bool = True) -> int | None:
    """The descriptor of a file or folder that is locked now; None if it is gone, or cannot be locked."""
    return _try_lock(path, wait=wait)[0]


def _try_lock(path: Path, *, wait: bool = False) -> tuple[int | None, bool]:
    """The descriptor, if it could be locked; and whether no other process has it, as far as can be told."""
    if not HAS_LOCKS:
        return None, True
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None, True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as problem:  # another process has it, or the file system has no locks
        os.close(descriptor)
        return None, problem.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return descriptor, True


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


# --- apart from inputs -----------------------------------------------------------------------------------


def check_apart(output: Path, path: Path, option: str = "--output", other: str | None = None) -> None:
    """Refuse an output that is, holds or lies inside an input or another output.

    Args:
        output: where something is to be written.
        path: the input or the other output.
        option: by which `output` was given.
        other: by which `path` was given; None for an input.

    Raises:
        InputError: naming both.
    """
    target, source = output.absolute().resolve(), path.absolute().resolve()
    if target == source or target in source.parents or source in target.parents:
        en, zh = ("the input", "输入") if other is None else (other, f" {other}")
        raise InputError(
            f"{option} {output}: it is, holds or lies inside {en} {path}; choose another place",
            f"{option} {output}：与{zh} {path} 相同或互相包含；请选择其他位置",
        )
