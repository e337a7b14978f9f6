"""Outputs are put in place whole or not at all, apart from inputs."""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mdl_toolkit.errors import InputError
from mdl_toolkit.utils.files import check_apart, remove_folder, replace_file, replace_folder
from mdl_toolkit.utils.ownership import RECORD, seal

# --- putting in place ------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, str]:
    """Everything below a folder, hidden files and empty folders too, but for records of files."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if path.name != RECORD
    }


NEW = {"new": "new"}


def fill(work: Path) -> None:
    (work / "new").write_text("new")


def test_a_new_output(tmp_path):
    with replace_folder(tmp_path / "out", "x") as work:
        assert list(work.iterdir()) == []
        assert work.parent == tmp_path
        fill(work)
        assert not (tmp_path / "out").exists()
    assert content(tmp_path) == {"out": "folder", "out/new": "new"}


@pytest.fixture
def old(tmp_path):
    """An output with something in it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    (tmp_path / "out/.hidden").write_text("hidden")
    seal(tmp_path / "out", "x")
    return tmp_path / "out"


def test_an_output_is_replaced_whole(old, tmp_path):
    with replace_folder(old, "x") as work:
        fill(work)
        assert (old / "old").read_text() == "old"
    assert content(tmp_path) == {"out": "folder", "out/new": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(old, tmp_path, error):
    before = content(tmp_path)
    with pytest.raises(error):
        fail(old, error)
    assert content(tmp_path) == before


def fail(output: Path, error: type[BaseException]) -> None:
    with replace_folder(output, "x") as work:
        fill(work)
        raise error


def test_a_failure_leaves_no_new_folders(tmp_path):
    with pytest.raises(ValueError, match=r"^$"):
        fail(tmp_path / "a/b/out", ValueError)
    assert content(tmp_path) == {}
    with replace_folder(tmp_path / "a/b/out", "x") as work:
        fill(work)
    assert content(tmp_path) == {"a": "folder", "a/b": "folder", "a/b/out": "folder", "a/b/out/new": "new"}


def test_what_cannot_be_put_in_place_leaves_what_was_there(old, tmp_path):
    before = content(tmp_path)
    with pytest.raises(FileNotFoundError), replace_folder(old, "x") as work:
        shutil.rmtree(work)
    assert content(tmp_path) == before


def test_a_link_is_followed_and_stays(old, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere/link"
    link.symlink_to(old)
    with replace_folder(link, "x") as work:
        fill(work)
    assert link.is_symlink()
    assert content(tmp_path / "out") == {"new": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


def test_the_current_directory(old, monkeypatch):
    monkeypatch.chdir(old)
    with replace_folder(Path(), "x") as work:
        fill(work)
    assert content(old) == {"new": "new"}


def test_what_a_killed_process_left_behind_is_in_nobody_s_way(old, tmp_path):
    """Process numbers come again, in containers soon: each work folder has a name of its own."""
    with replace_folder(old, "x") as first:
        kept = first.with_name("kept")
        shutil.copytree(first, kept)
        with replace_folder(old, "x") as second:
            assert first != second
            fill(second)
        fill(first)
    assert content(old) == {"new": "new"}


@pytest.mark.parametrize("is_moved_away", [False, True])
def test_what_a_killed_process_left_behind_is_removed_or_put_back(old, tmp_path, is_moved_away):
    before = content(old)
    (tmp_path / ".out.partial-0123abcd").mkdir()
    (tmp_path / ".out.partial-0123abcd/half").write_text("half")
    if is_moved_away:
        old.rename(tmp_path / ".out.old-0123abcd")
    else:
        shutil.copytree(old, tmp_path / ".out.old-4567abcd")
    others = {".out.partial-mine", ".output.partial-0123abcd"}
    for name in others:
        (tmp_path / name).mkdir()
    with replace_folder(old, "x") as work:
        assert content(old) == before
        fill(work)
    assert content(old) == {"new": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"} | others


def replace(output: Path) -> None:
    with replace_folder(output, "x") as work:
        fill(work)


@pytest.mark.parametrize("act", [replace, lambda output: remove_folder(output, "x")])
def test_a_process_killed_at_any_change_leaves_what_was_there_or_what_is_new_and_no_rest(old, tmp_path, act):
    (old / "more").write_text("more")
    seal(old, "x")
    before = content(old)
    for number in itertools.count(1):
        place = tmp_path / f"place-{number}"
        shutil.copytree(old, place / "out")
        is_killed = kill_before(number, act, place / "out")
        with replace_folder(place / "out", "x") as work:
            assert not (place / "out").exists() or content(place / "out") in (before, NEW)
            fill(work)
        assert content(place) == {"out": "folder", "out/new": "new"}
        if not is_killed:
            break
    assert number > len(before) + 2


def test_a_file_replaced_by_a_process_killed_at_any_change_stays_known_as_ours(tmp_path):
    for number in itertools.count(1):
        place = tmp_path / f"place-{number}"
        write(place / "out", "old")
        is_killed = kill_before(number, lambda output: write(output, "new"), place / "out")
        assert (place / "out").read_text() in ("old", "new")
        write(place / "out", "newer")
        assert content(place) == {"out": "newer"}
        if not is_killed:
            break
    assert number > 4


def write(output: Path, text: str) -> None:
    with replace_file(output, "x") as work:
        work.write_text(text)


def kill_before(number: int, act: Callable[[Path], object], output: Path) -> bool:
    """Act in a process that is killed before a change of folders, counted from 1; tell whether it was."""
    child = os.fork()
    if not child:
        changes = itertools.count(1)

        def hear(event: str, _: object) -> None:
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hear)
        act(output)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_an_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError), replace_folder(tmp_path / "file/out", "x"):
        pass
    assert content(tmp_path) == {"file": "x"}


# --- which outputs are refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "source", "fine"),
    [
        ("a", "a", False),
        ("a", "a/b/c.csv", False),
        ("a/b", "a", False),
        ("a/x/../b", "a/b", False),
        ("link", "a", False),
        ("link/b", "a", False),
        ("a", "ab", True),
        ("ab", "a", True),
        ("a/b", "a/c", True),
        ("new", "a/c.csv", True),
    ],
)
def test_outputs_apart_from_inputs(tmp_path, monkeypatch, output, source, fine):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    for first, second in ((output, source), (str(tmp_path / output), source)):
        if fine:
            check_apart(Path(first), Path(second))
        else:
            with pytest.raises(InputError) as caught:
                check_apart(Path(first), Path(second))
            assert caught.value.message.en.startswith(f"--output {first}: ")
            assert second in caught.value.message.en
