"""Folders and patterns list every recording once, whatever links lead back into them."""

import os
import re

import pytest

from mdl_toolkit.data.listing import SUFFIXES, is_listing, list_recordings
from mdl_toolkit.errors import InputError
from tests.support.paths import DOCS


def make(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    make(tmp_path, "top/b.wav", "top/a/one.FLAC", "top/a/deep/two.opus", "top/.hidden/x.wav", "top/note.txt")
    make(tmp_path, "beside/three.mp3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


HELD = ["top/a/deep/two.opus", "top/a/one.FLAC", "top/b.wav"]


def test_a_folder(tree):
    assert list_recordings("top") == list_recordings("top/") == HELD
    assert list_recordings("./top") == [f"./{name}" for name in HELD]
    assert list_recordings(str(tree / "top")) == [f"{tree}/{name}" for name in HELD]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("top/*.wav", ["top/b.wav"]),
        ("top/**/*.wav", ["top/b.wav"]),
        ("top/**", [*HELD, "top/note.txt"]),
        ("**/*.opus", ["top/a/deep/two.opus"]),
        ("**/deep/**/*", ["top/a/deep/two.opus"]),
        ("*/**/t*.*", ["beside/three.mp3", "top/a/deep/two.opus"]),
        ("top/**a/*", ["top/a/one.FLAC"]),
    ],
)
def test_patterns(tree, pattern, expected):
    assert list_recordings(pattern) == expected


def test_links_into_themselves_are_not_followed(tree):
    for number in range(4):  # followed, each would multiply the ways
        (tree / "top" / "a" / f"up{number}").symlink_to("..")
        (tree / "top" / "a" / "deep" / f"here{number}").symlink_to(".")
    (tree / "top" / "other").symlink_to("../beside")
    (tree / "beside" / "back").symlink_to("../top")
    expected = sorted([*HELD, "top/other/three.mp3"])
    assert list_recordings("top") == expected
    assert [name for name in list_recordings("top/**/*.*") if not name.endswith(".txt")] == expected


def test_links_to_other_folders_and_files_are(tree):
    (tree / "top" / "other").symlink_to("../beside")
    (tree / "top" / "z.mp3").symlink_to("../beside/three.mp3")
    assert list_recordings("top") == sorted([*HELD, "top/other/three.mp3", "top/z.mp3"])


def test_nothing_is_an_error(tree):
    (tree / "empty").mkdir()
    for given in ("empty", "top/*.ogg", "**/*.ogg"):
        with pytest.raises(InputError, match="holds no recordings"):
            list_recordings(given)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_extension_of_the_documents_is_known(language):
    page = (DOCS / f"data.{language}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|(]+ \(([^|]+)\) \|[^|]+\| (?:libsndfile|PyAV)", page, re.MULTILINE)
    named = {name for row in rows for name in row.split(", ")}
    assert {".wav", ".sph", ".wv", ".tta", ".ts"} <= named <= SUFFIXES


def test_a_recording_is_listed_alone(tree):
    (tree / "odd [1].MP3").write_bytes(b"x")
    for name in ("top/b.wav", "odd [1].MP3"):
        assert is_listing(name)
        assert list_recordings(name) == [name]
    assert not is_listing("top/note.txt")


@pytest.mark.parametrize("given", ["top", "top/*", b"top/\xff.wav"])
def test_a_name_that_is_no_text_is_named(tree, given):
    (tree / os.fsdecode(b"top/\xff.wav")).write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        list_recordings(os.fsdecode(given))
    assert r"1 name of a file is not UTF-8, the first is 'top/\udcff.wav'; rename it" in str(caught.value)
    str(caught.value).encode()
