"""Outputs: kept apart from inputs, put in place whole or not at all, no empty folders left behind.

What is written into them is for others to say.
"""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdl_toolkit.errors import InputError, ToolkitError


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
    renames. A link is followed, and stays. What a killed process left behind is in nobody's way.

    Raises:
        InputError: the folder cannot be made or put in place.
    """
    target, mark = output.resolve(), secrets.token_hex(4)
    work = target.with_name(f".{target.name}.partial-{mark}")
    old = target.with_name(f".{target.name}.old-{mark}")
    with removing_empty(target.parent):
        try:
            with writing(f"--output {output}", InputError):
                work.mkdir(parents=True)
            yield work
            with writing(f"--output {output}", InputError):
                put_in_place(work, target, old)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing_file(output: Path, option: str = "--output") -> Iterator[Path]:
    """Give the name of a file to write; it takes the output's place when all went well, else it is removed.

    Raises:
        InputError: it cannot be written or put in place.
    """
    target = output.resolve()
    work = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with removing_empty(target.parent), writing(f"{option} {output}", InputError):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield work
            if target.exists():
                shutil.copymode(target, work)
            work.replace(target)
        finally:
            work.unlink(missing_ok=True)


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


def check_apart(output: Path, path: Path, option: str = "--output") -> None:
    """Refuse an output that is, holds or lies inside an input.

    Raises:
        InputError: naming both.
    """
    target, source = output.absolute().resolve(), path.absolute().resolve()
    if target == source or target in source.parents or source in target.parents:
        raise InputError(
            f"{option} {output}: it is, holds or lies inside the input {path}; choose another place",
            f"{option} {output}：与输入 {path} 相同或互相包含；请选择其他位置",
        )
