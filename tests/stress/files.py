"""What lies on disk, byte for byte."""

from pathlib import Path

from tests.stress.processes import FailedError

Files = dict[str, bytes]


def listing(folder: Path) -> Files:
    """Everything below a folder with its content; folders end with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found.update({f"{name}/": b""} if path.is_dir() else {name: path.read_bytes()})
    return found


def write_listing(folder: Path, files: Files) -> None:
    """The folder again; there are none inside it."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def check_same(found: Files, expected: Files, what: str) -> None:
    """Compare names and every byte."""
    names = sorted(set(found) ^ set(expected))
    different = [name for name in sorted(set(found) & set(expected)) if found[name] != expected[name]]
    if names or different:
        raise FailedError(f"{what}: too many or too few {names}, different {different}")
