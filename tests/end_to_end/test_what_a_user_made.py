"""What a user made, or another command, is never deleted, whatever output is asked for where."""

import hashlib
import os
import select
import shutil
import socket
import stat
from collections import Counter
from pathlib import Path

import pytest

from mdl_toolkit.cli.main import run
from mdl_toolkit.demo import MADE, MARK
from mdl_toolkit.utils.ownership import RECORD, seal
from mdl_toolkit.utils.run_folder import REPORT
from tests.support.paths import MODEL
from tests.support.runs import make_csv

FOLDERS = ("dataset", "run", "merged", "demo", "pictures")
FILES = ("predictions.csv", "scores.json", "page.html", "fixed.csv", "findings.json")


def commands(place: Path) -> dict[str, list[str]]:
    """By the output's name, the words of a quick command that makes it, without the output."""
    train, adapter = str(place / "train.csv"), str(place / "adapter/final")
    model, answers = ["--model-name", str(MODEL)], str(place / "answers.csv")
    quick = [*model, "--gradient-checkpointing", "false", "--verify", "false", "--lora-rank", "2"]
    return {
        "dataset": ["convert-dataset", train, *model, "--num-workers", "1", "--output"],
        "run": ["train", "--train-dataset", train, *quick, "--num-workers", "1", "--output"],
        "merged": ["merge", adapter, "--verify", "false", "--output"],
        "demo": ["demo", "--output"],
        "pictures": ["report", str(place / "adapter"), "--output", str(place / "other.html"), "--png"],
        "predictions.csv": ["inference", train, *model, "--max-new-tokens", "2", "--output"],
        "scores.json": ["evaluate", answers, "--reference", train, "--bootstrap", "0", "--output"],
        "page.html": ["report", str(place / "adapter"), "--output"],
        "fixed.csv": ["check", train, *model, "--num-workers", "1", "--write-fixed"],
        "findings.json": ["check", train, *model, "--num-workers", "1", "--json"],
    }  # fmt: skip


def make_demo(folder: Path) -> None:
    """What a demonstration leaves, without its work."""
    for name in ("model/config.json", "phrases/train.csv", "train.csv", "run/final/config.json", MARK):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of a demonstration")
    seal(folder, "demo", is_whole=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One output of every command."""
    place = tmp_path_factory.mktemp("made")
    shutil.copyfile(make_csv(place, 4), place / "answers.csv")
    words = commands(place)
    assert run([*words["run"], str(place / "adapter"), "--merge-lora", "false"]) == 0
    make_demo(place / "demo")
    for name in (*FOLDERS, *FILES):
        if name != "demo":
            assert run([*words[name], str(place / name)]) == 0, name
    return place


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    return tmp_path / "place"


def contents(folder: Path) -> Counter[str]:
    """How often each content is there, under whatever name; records of files apart."""
    files = [path for path in folder.rglob("*") if path.name != RECORD and not path.is_dir()]
    return Counter(
        str(path.readlink()) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    )


@pytest.mark.parametrize("other", FOLDERS)
@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_no_command_takes_anything_from_another_one_s_folder(place, name, other, capsys):
    if name == other:
        return
    before = contents(place)
    words = commands(place)[name]
    if name in FOLDERS:
        targets = [place / other]
    else:
        suffix = Path(name).suffix
        targets = [place / other / f"new{suffix}"]
        # A run's page is made anew by whoever makes pages.
        there = [path for path in (place / other).rglob(f"*{suffix}") if path.name not in (RECORD, REPORT)]
        targets += [path for path in there if not path.is_dir()][:2]
    for target in targets:
        status = run([*words, str(target)])
        lines = capsys.readouterr().err.splitlines()
        assert status in (0, 1)
        assert status == 0 or lines[-1].startswith("error: --"), lines
        missing = before - contents(place)
        assert not missing, [path for path in place.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", ["mine", *FILES])
def test_no_command_replaces_a_file_that_it_did_not_write(place, name, other):
    target = place / f"{Path(other).stem}{Path(name).suffix}"
    if name == other:
        return
    if not target.exists():
        target.write_text("mine\n")
    before = contents(place)
    assert run([*commands(place)[name], str(target)]) == 0
    assert not before - contents(place)


def folders_of(name: str, made: Path) -> list[str]:
    below = [path.relative_to(made / name).as_posix() for path in (made / name).rglob("*") if path.is_dir()]
    return [".", *(path for path in below if not path.startswith("."))]


DEPTHS = {"dataset": 1, "run": 3, "merged": 1, "demo": 5, "pictures": 1}


@pytest.mark.parametrize("kind", ["notes.txt", ".DS_Store", "link", "sub/.hidden/notes.txt"])
@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, depth in DEPTHS.items() for n in range(depth) if name != "demo"]
)
def test_a_foreign_file_at_any_depth_outlives_the_folder_s_own_command(place, made, name, number, kind):
    folders = folders_of(name, made)
    assert len(folders) == DEPTHS[name]
    file = place / name / folders[number] / kind
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        file.symlink_to("/nowhere/mine")
    else:
        file.write_text("mine")
    mine = contents(file.parent) & Counter({"/nowhere/mine": 1, hashlib.sha256(b"mine").hexdigest(): 1})
    assert mine
    status = run([*commands(place)[name], str(place / name)])
    assert status == (1 if kind in ("notes.txt", "link") and name in ("dataset", "merged") else status)
    assert not mine - contents(place)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_foreign_file_in_a_demonstration_is_kept(place, made, number, is_killed, monkeypatch, capsys):
    class StoppedError(Exception):
        pass

    def stop():
        raise StoppedError

    monkeypatch.setattr("mdl_toolkit.demo.quiet_libraries", stop)
    if is_killed:
        (place / "demo" / RECORD).unlink()
    file = place / "demo" / folders_of("demo", made)[number] / "notes.txt"
    file.write_text("mine")
    before = contents(place)
    status = run(["demo", "--output", str(place / "demo")])
    assert status == 1
    assert not before - contents(place)
    if not is_killed or number == 0:
        assert str(file.relative_to(place)) in capsys.readouterr().err
    assert MARK in MADE


@pytest.mark.parametrize("name", ["dataset", "merged"])
def test_a_file_that_somebody_changed_is_not_replaced(place, name, capsys):
    for file in sorted((place / name).iterdir()):
        if file.name == RECORD:
            continue
        whole, times = file.read_bytes(), file.stat()
        changed = bytes([whole[0] ^ 1]) + whole[1:]
        file.write_bytes(changed)
        assert run([*commands(place)[name], str(place / name)]) == 1
        assert str(file) in capsys.readouterr().err or file.name == "mdl-toolkit.yaml"
        assert file.read_bytes() == changed
        file.write_bytes(whole)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run([*commands(place)[name], str(place / name)]) == 0
    assert not list(place.glob("*.previous-*"))


@pytest.mark.parametrize("name", ["dataset", "merged"])
def test_an_output_without_a_record_is_accepted_and_set_aside(place, name):
    """As versions before the record left it."""
    (place / name / RECORD).unlink()
    before = contents(place / name)
    assert run([*commands(place)[name], str(place / name)]) == 0
    assert contents(place / f"{name}.previous-1") == before


@pytest.mark.parametrize("name", FILES)
def test_a_command_s_own_file_is_replaced_and_a_changed_one_set_aside(place, name):
    words = [*commands(place)[name], str(place / name)]
    assert run(words) == 0
    assert not list(place.glob("*.previous-*"))
    with (place / name).open("a") as file:
        file.write("\nmine")
    changed = (place / name).read_bytes()
    assert run(words) == 0
    assert (place / f"{name}.previous-1").read_bytes() == changed
    assert (place / name).read_bytes() != changed


def make_socket(path):
    # A whole path may be too long for one.
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)


def make_null_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make one")


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
@pytest.mark.parametrize("make", [os.mkfifo, make_socket, make_null_device])
def test_what_is_no_file_is_refused_and_stays(place, name, make, capsys, monkeypatch):
    monkeypatch.chdir(place)
    target = place / f"strange{Path(name).suffix}"
    make(target)
    before = target.lstat()
    words = commands(place)[name]
    assert run([*words, str(target / "x" if name == "pictures" else target)]) == 1
    assert "strange" in capsys.readouterr().err.splitlines()[-1]
    assert (target.lstat().st_ino, target.lstat().st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_a_link_to_a_terminal_is_refused_and_nothing_appears_there(place, name, capsys):
    reader, terminal = os.openpty()
    link = place / f"strange{Path(name).suffix}"
    link.symlink_to(device := os.ttyname(terminal))
    words = commands(place)[name]
    assert run([*words, str(link / "x" if name == "pictures" else link)]) == 1
    assert "strange" in capsys.readouterr().err.splitlines()[-1]
    assert stat.S_ISCHR(Path(device).stat().st_mode)
    assert str(link.readlink()) == device
    assert not select.select([reader], [], [], 0)[0]
    os.close(reader)
    os.close(terminal)


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_followed_and_its_target_replaced(place, name):
    (place / "elsewhere").mkdir()
    target, link = place / "elsewhere" / name, place / f"link{Path(name).suffix}"
    target.write_text("mine")
    link.symlink_to(target)
    assert run([*commands(place)[name], str(link)]) == 0
    assert link.readlink() == target
    assert target.read_bytes() != b"mine"
    assert (place / "elsewhere" / f"{name}.previous-1").read_text() == "mine"
