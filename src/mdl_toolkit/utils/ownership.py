"""Know what the toolkit wrote, file by file, so that nothing else is ever replaced or removed.

Each folder that something is written into has a record, `.mdl-toolkit-files.json`: names of files, each with
a digest of its content and of the kind of output. Whatever is not in it, or has changed since, is the user's.
An output folder that holds such a file is refused; where one comes up later, the folder is set aside, and not
removed. Hidden files, such as `.DS_Store`, do not make a folder the user's: they go over to the new one.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import InputError
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.locks import hold_lock

RECORD, SETTINGS = ".mdl-toolkit-files.json", "mdl-toolkit.yaml"
# Of a larger file so many blocks are digested, and it must not be newer than the record by so many seconds.
BLOCK, BLOCKS, TOLERANCE = 1 << 16, 16, 2.0
# In place of a digest: any content.
ANY = "any"
# Folders of these commands are replaced as a whole.
REPLACED_WHOLE = ("convert-dataset", "merge")


# --- the record ------------------------------------------------------------------------------------------


def seal(folder: Path, kind: str, *, is_whole: bool = True) -> None:
    """Record all files of a folder, at every depth.

    Args:
        folder: it has just been written.
        kind: of output, such as the command.
        is_whole: nothing else is to be written into it.
    """
    files = {name: _digest(folder / name, kind) for name in _files_below(folder) if name != RECORD}
    # The same rows converted with more processes give the same bytes: only its age tells of a change.
    if SETTINGS in files:
        files[SETTINGS] = ANY
    (folder / RECORD).write_text(_to_json({"files": files, "is_whole": is_whole}), encoding="utf-8")


def remember(file: Path, kind: str, coming: Path | None = None) -> None:
    """Add a file to the record of its folder; without a word if that is not possible.

    Args:
        file: it has just been written.
        kind: of output.
        coming: what is about to be renamed to it, and is recorded beside what was there.
    """
    with suppress(OSError), hold_lock(file.with_name(f"{RECORD}.lock"), remove=True):
        record = _read(file.parent)
        files = {name: value for name, value in record["files"].items() if (file.parent / name).exists()}
        work = file.with_name(f"{RECORD}.partial")
        before = str(files.get(file.name, "")).split() if coming else []
        digests = [*before, _digest(coming or file, kind)]
        text = _to_json({**record, "files": {**files, file.name: " ".join(digests)}})
        work.write_text(text, encoding="utf-8")
        work.replace(file.with_name(RECORD))


def _read(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return {"files": dict(record["files"]), "is_whole": bool(record["is_whole"])}
    return {"files": {}, "is_whole": False}


def _to_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, sort_keys=True) + "\n"


def _files_below(folder: Path) -> Iterator[str]:
    """Yield whatever is no folder, links included, as paths from the folder, in order."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (Path(root) / name).relative_to(folder).as_posix()


def _digest(file: Path, kind: str) -> str:
    """Return a digest of the kind, the size, and the content, or blocks of it throughout a large file."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{kind} {size}\n".encode())
    with file.open("rb") as content:
        for number in range(BLOCKS):
            content.seek(max(0, size - BLOCK) * number // (BLOCKS - 1) if size > BLOCK * BLOCKS else 0)
            digest.update(content.read(BLOCK if size > BLOCK * BLOCKS else -1))
            if size <= BLOCK * BLOCKS:
                break
    return digest.hexdigest()


# --- what is ours ----------------------------------------------------------------------------------------


def is_ours(file: Path, kind: str) -> bool:
    """Tell whether a file is as the toolkit wrote it, as an output of the same kind."""
    return _is_recorded(file.parent, file.name, kind, _read(file.parent)["files"])


def _is_recorded(folder: Path, name: str, kind: str, files: dict[str, str]) -> bool:
    file = folder / name
    if name not in files or file.is_symlink() or not file.is_file():
        return False
    with suppress(OSError):
        about, recorded = file.stat(), (folder / RECORD).stat().st_mtime
        is_old = about.st_mtime <= recorded + TOLERANCE
        if files[name] == ANY:
            return is_old
        return (is_old or about.st_size <= BLOCK * BLOCKS) and _digest(file, kind) in str(files[name]).split()
    return False


def foreign_files(folder: Path, kind: str, *, hidden: bool = False) -> Iterator[Path]:
    """Yield the files of a folder, at every depth, that are not as the toolkit wrote them.

    Args:
        folder: an output of the toolkit.
        kind: of output.
        hidden: yield those that are hidden, or lie in a hidden folder; otherwise yield the others.
    """
    files = _read(folder)["files"]
    for name in _files_below(folder):
        is_hidden = name not in files and any(part.startswith(".") for part in name.split("/"))
        if name != RECORD and is_hidden == hidden and not _is_recorded(folder, name, kind, files):
            yield folder / name


def maker(folder: Path) -> str | None:
    """Return the command whose settings file lies in a folder; None if there is none."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    with suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        head, _, command = file.readline().strip().partition("# mdl-toolkit ")
        return None if head else command
    return None


# --- outputs ---------------------------------------------------------------------------------------------


def visible(folder: Path) -> list[Path]:
    """List what is in a folder and not hidden."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def check_output_folder(output: Path, command: str, option: str = "--output") -> None:
    """Refuse a folder to replace that holds anything that the command did not write.

    One of a version that kept no record is accepted; it is set aside when it is replaced.

    Raises:
        InputError: naming a file.
    """
    file: Path | None = None
    if output.is_dir():
        if _read(output)["is_whole"]:
            file = next(foreign_files(output, command), None)
        elif (shown := visible(output)) and maker(output) != command:
            file = shown[0]
    elif output.exists():
        file = output
    if file is not None:
        refuse(output, file, command, option)


def check_output_files(output: Path, names: Iterable[str], command: str, option: str = "--output") -> None:
    """Refuse a folder in which a file to write is there and was not written by the command.

    Raises:
        InputError: naming the file, or the dataset or model that the folder belongs to.
    """
    check_not_inside(output / SETTINGS, option)
    if output.exists() and not output.is_dir():
        refuse(output, output, command, option)
    for file in (output / name for name in names):
        if os.path.lexists(file) and not is_ours(file, command):
            refuse(output, file, command, option)


def refuse(output: Path, file: Path, command: str, option: str = "--output") -> None:
    """Refuse an output for a file that a command did not write.

    Raises:
        InputError: always.
    """
    raise InputError(
        "{option} {output}: {file} is there, which {command} did not write, or which was changed since; give "
        "another place, or move it away",
        option=option,
        output=output,
        file=file,
        command=command,
    )


def check_not_inside(output: Path, option: str = "--output") -> None:
    """Refuse a file to write in a dataset, a model or a checkpoint, which it would spoil.

    Raises:
        InputError: naming the folder.
    """
    for folder in output.absolute().resolve().parents:
        if _read(folder)["is_whole"] or maker(folder) in REPLACED_WHOLE:
            raise InputError(
                "{option} {output}: {folder} is a dataset, a model or a checkpoint, which another file would "
                "spoil; choose another place",
                option=option,
                output=output,
                folder=folder,
            )


def discard(old: Path, target: Path, kind: str, trash: Path) -> None:
    """Remove what was at a target, as far as it is ours; what is not is kept.

    What is removed is renamed to `trash` first, a path that whoever comes next removes: of a process that is
    killed meanwhile nothing is left that could be put back, or taken for the user's.

    Hidden files of others go over to what is at the target now. If anything else is not ours, the whole is
    set aside.

    Raises:
        OSError: something cannot be moved.
    """
    hidden = [*foreign_files(old, kind, hidden=True)]
    places = [target / path.relative_to(old) for path in hidden]
    is_kept = any(place.exists() or not target.is_dir() for place in places)
    if is_kept or next(foreign_files(old, kind), None) is not None:
        set_aside(old, target)
        return
    for path, place in zip(hidden, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    shutil.rmtree(trash, ignore_errors=True)
    old.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def unused(path: Path) -> Path:
    """Return the first of `PATH-1`, `PATH-2` and so on where nothing is."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(each for each in numbered if not os.path.lexists(each))


def set_aside(path: Path, target: Path) -> Path:
    """Rename what was at a target to an unused `NAME.previous-N` beside it, say so, and return that.

    A file keeps its own name too, until something is put in its place.

    Raises:
        OSError: it cannot be renamed.
    """
    place = unused(target.with_name(f"{target.name}.previous"))
    try:
        os.link(path, place)
    except OSError:
        path.rename(place)
    say(
        "{target}: what was there is not, or not only, recorded as written by this command; it is now in "
        "{place}",
        target=target,
        place=place,
    )
    return place
