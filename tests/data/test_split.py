"""`split`: no recording, copy or group on two sides; shares and labels as asked; the rows as they were."""

import csv
import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mdl_toolkit.cli import main as cli
from mdl_toolkit.config.data import SplitOptions
from mdl_toolkit.data.split import deal, split_dataset
from mdl_toolkit.errors import InputError, RowsError, UsageError
from mdl_toolkit.utils.files import check_file
from tests.support.runs import make_rows, write_csv

PARTS = ("train", "eval", "test")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """120 rows of 12 speakers and 3 answers, some rows of one file, some files copies, some links."""
    folder = tmp_path_factory.mktemp("data")
    files = [row["audio"] for row in make_rows(folder / "audio", 6)]
    rows = []
    for number in range(120):
        file = folder / "audio" / f"{number}.wav"
        # Contents of their own, but for every tenth, which is a copy of the one nine before it.
        shutil.copy(files[number % 6], file)
        with file.open("ab") as content:
            content.write(b"%03d" % (number - 9 if number % 10 == 9 else number))
        audio = file
        if number % 17 == 16:
            audio = folder / "audio" / f"link-{number}.wav"
            audio.symlink_to(folder / "audio" / f"{number - 1}.wav")
        if number % 13 == 12:
            audio = folder / "audio" / f"{number - 2}.wav"
        rows.append(
            {
                "audio": os.path.relpath(audio, folder), "prediction": "abc"[min(number % 20, 2)],
                "speaker": f"s{number % 12}" if number % 7 else "", "note": f'é "{number}", \n',
            }
        )  # fmt: skip
    write_csv(folder / "all.csv", rows)
    return folder


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def parts_of(place, output, **changes):
    options = SplitOptions(
        output=str(output), base_dir=str(place),
        **{"input": str(place / "all.csv"), "eval": "15%", "test": 0.15, **changes},
    )  # fmt: skip
    files = split_dataset(options)
    assert {part: output / f"{part}.csv" for part in files} == files
    return {part: read(file) for part, file in files.items()}


def on_two_sides(parts, key):
    """What is in more than one part, by what a row gives for a key."""
    sets = [{key(row) for row in rows} - {""} for rows in parts.values()]
    return [left & right for left, right in itertools.combinations(sets, 2) if left & right]


@pytest.mark.parametrize(
    "changes",
    [{}, {"group_by": ("speaker",)}, {"stratify": "prediction"}, {"seed": 5}, {"test": 0}],
    ids=str,
)
def test_nothing_is_on_two_sides_and_no_row_is_lost(place, tmp_path, changes):
    parts, before = parts_of(place, tmp_path / "parts", **changes), read(place / "all.csv")
    assert [*parts] == [*PARTS][: 2 if changes.get("test") == 0 else 3]
    order = {row["note"]: number for number, row in enumerate(before)}
    for rows in parts.values():
        numbers = [order[row["note"]] for row in rows]
        assert numbers == sorted(numbers)
    assert sorted((row for rows in parts.values() for row in rows), key=lambda r: order[r["note"]]) == before
    assert not on_two_sides(parts, lambda row: (place / row["audio"]).resolve())
    assert not on_two_sides(parts, lambda row: (place / row["audio"]).read_bytes())
    if "group_by" in changes:
        assert not on_two_sides(parts, lambda row: row["speaker"])
    else:
        assert len(parts["eval"]) == pytest.approx(0.15 * 120, abs=3)
        # Without it speakers are everywhere.
        assert on_two_sides(parts, lambda row: row["speaker"])


def test_labels_have_like_shares(place, tmp_path):
    """Of 6, 6 and 108 rows, 15 % are 0.9 and 16.2: each part has all of them, and no part many more."""
    parts = parts_of(place, tmp_path / "parts", stratify="prediction")
    totals = Counter(row["prediction"] for row in read(place / "all.csv"))
    for part, share in (("train", 0.7), ("eval", 0.15), ("test", 0.15)):
        found = Counter(row["prediction"] for row in parts[part])
        for label, total in totals.items():
            assert abs(found[label] - share * total) <= 2, (part, label)


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_many_groups_are_as_asked(seed):
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(400), random.integers(1, 8, 400)).tolist()
    labels = random.choice(["a", "b", "c", "d"], len(groups), p=[0.7, 0.2, 0.08, 0.02]).tolist()
    shares = {"train": 0.8, "eval": 0.1, "test": 0.1}
    parts = deal(groups, labels, shares, seed)
    for part, share in shares.items():
        for label in "abcd":
            of_label = [its for its, each in zip(parts, labels, strict=True) if each == label]
            assert abs(of_label.count(part) - share * len(of_label)) <= max(4, 0.03 * len(of_label))
    assert len({*zip(groups, parts, strict=True)}) == 400


@pytest.mark.parametrize("times", [1, 2, 3])
def test_labels_that_are_too_few_for_a_share_add_up(times):
    """As transcripts do, which come once."""
    labels = [f"text {number // times}" for number in range(300)]
    parts = deal(range(300), labels, {"train": 0.8, "eval": 0.15, "test": 0.05}, 0)
    assert Counter(parts) == {"train": 240, "eval": 45, "test": 15}


@pytest.mark.parametrize(
    "shares", [(0.8, 0.1, 0.1), (0.7, 0.15, 0.15), (0.7, 0.3, 0), (0.9, 0.1, 0)], ids=str
)
def test_small_sets_get_the_shares_asked_for(shares):
    """Every part, and every answer in every part, has the rows asked for, rounded down or up."""
    shares, random = (
        {part: its for part, its in zip(PARTS, shares, strict=True) if its},
        np.random.default_rng(0),
    )
    for seed in range(200):
        labels = [f"answer {number}" for number in random.integers(0, random.integers(1, 8), 5 + seed % 36)]
        parts = deal(range(len(labels)), labels, shares, seed)
        for part, share in shares.items():
            assert abs(parts.count(part) - share * len(labels)) < 1
            for label, total in Counter(labels).items():
                count = [*zip(parts, labels, strict=True)].count((part, label))
                assert abs(count - share * total) < 1


def test_the_seed_decides_and_nothing_else(place, tmp_path):
    found = [
        {part: (tmp_path / name / f"{part}.csv").read_bytes() for part in PARTS}
        for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 1}))
        if parts_of(place, tmp_path / name, **changes)
    ]
    assert found[0] == found[1] != found[2]
    # An earlier split is replaced.
    parts_of(place, tmp_path / "a", seed=1)
    assert (tmp_path / "a/eval.csv").read_bytes() == found[2]["eval"]


def test_the_folder_of_the_parts_is_the_users(place, tmp_path):
    """It may lie beside the input and hold recordings and answers; only the parts' own files are replaced."""
    folder = tmp_path / "here"
    shutil.copytree(place, folder, symlinks=True)
    before = {path for path in folder.rglob("*") if not path.is_dir()}
    parts_of(folder, folder)
    check_file(folder / "answers.csv", [folder / "test.csv"])
    (folder / "answers.csv").write_text("mine")
    parts_of(folder, folder, seed=1)
    # Without a test part that of the earlier split is gone: its rows may be trained on now.
    parts_of(folder, folder, test=0)
    assert {path for path in folder.rglob("*") if not path.is_dir()} - before == {
        folder / name
        for name in ("train.csv", "eval.csv", "answers.csv", "mdl-toolkit.yaml", ".mdl-toolkit-files.json")
    }
    assert before <= {*folder.rglob("*")}
    # A part may be split further, but not in its own place, asked for or not.
    split_dataset(SplitOptions(input=str(folder / "eval.csv"), output=str(folder / "x"), test=0.5,
                               base_dir=str(folder)))  # fmt: skip
    for part, others in (("eval", {"eval": 0.5}), ("train", {"test": 0.5, "eval": 0})):
        with pytest.raises(InputError, match=rf"{part}\.csv: it is, holds or lies inside the input"):
            parts_of(folder, folder, input=str(folder / f"{part}.csv"), **others)
    # What somebody changed or put there is not replaced.
    (folder / "eval.csv").write_text("mine")
    with pytest.raises(InputError, match=r"eval.csv is there, which split did not write"):
        parts_of(folder, folder)
    assert (folder / "eval.csv").read_text() == "mine"


def test_a_killed_split_leaves_no_mixture(place, tmp_path, monkeypatch):
    """Whatever rename fails, files of two splits do not lie side by side."""
    parts_of(place, tmp_path / "one", seed=1)
    new = {part: (tmp_path / "one" / f"{part}.csv").read_bytes() for part in PARTS}
    parts_of(place, tmp_path / "old")
    rename = Path.rename
    for last in range(4):
        shutil.copytree(tmp_path / "old", tmp_path / f"{last}")
        calls = itertools.count()

        def fail(path, target, calls=calls, last=last):
            if next(calls) == last:
                raise OSError(28, "full")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(InputError, match="full"):
            parts_of(place, tmp_path / f"{last}", seed=1)
        monkeypatch.undo()
        left = {part: tmp_path / f"{last}" / f"{part}.csv" for part in PARTS}
        found = {part: file.read_bytes() for part, file in left.items() if file.exists()}
        assert found.items() <= new.items()
        assert not [*(tmp_path / f"{last}").glob(".split*")]
        parts_of(place, tmp_path / f"{last}", seed=1)
        assert {part: file.read_bytes() for part, file in left.items()} == new


def test_what_cannot_be_split_is_said(place, tmp_path):
    with pytest.raises(UsageError, match="--eval and --test: give at least one"):
        parts_of(place, tmp_path / "x", eval=0, test=0)
    with pytest.raises(UsageError, match="less than 100 %"):
        parts_of(place, tmp_path / "x", eval=0.5, test=0.5)
    with pytest.raises(InputError, match="no column 'talker'; there are audio, prediction, speaker, note"):
        parts_of(place, tmp_path / "x", group_by=("talker",))
    write_csv(place / "one.csv", [{**row, "speaker": "one"} for row in read(place / "all.csv")])
    with pytest.raises(InputError, match=r"hang together in 1 group, too few for eval\.csv, test\.csv"):
        split_dataset(
            SplitOptions(
                input=str(place / "one.csv"), output=str(tmp_path / "x"), base_dir=str(place), eval=0.1,
                test=0.1, group_by=("speaker",),
            )
        )  # fmt: skip
    # Relative paths start somewhere else.
    with pytest.raises(RowsError, match="line 2"):
        split_dataset(SplitOptions(input=str(place / "all.csv"), output=str(tmp_path / "x"), eval=0.1))
    assert not (tmp_path / "x").exists()


def test_columns_are_found_in_any_case_and_are_read(place, tmp_path, capsys):
    rows = [
        {"Speaker" if key == "speaker" else key: cell for key, cell in row.items()}
        for row in read(place / "all.csv")
    ]
    write_csv(place / "cased.csv", rows)
    capsys.readouterr()
    parts = parts_of(
        place, tmp_path / "x", input=str(place / "cased.csv"), group_by=("speaker",), stratify="PREDICTION"
    )
    assert not on_two_sides(parts, lambda row: row["Speaker"])
    assert "columns that are not read: 'note'" in capsys.readouterr().err


def test_another_encoding_comes_out_as_plain_csv(place, tmp_path):
    words = place.joinpath("all.csv").read_text().splitlines()
    rows = [
        *csv.reader(words[:1]),
        *([row["audio"], "是的，对", row["speaker"], ""] for row in read(place / "all.csv")),
    ]
    text = "\n".join(";".join(row) for row in rows)
    (place / "gb.csv").write_bytes(text.encode("gb18030"))
    parts = parts_of(place, tmp_path / "x", input=str(place / "gb.csv"))
    assert {row["prediction"] for row in parts["test"]} == {"是的，对"}


def test_the_command_says_what_it_made(place, tmp_path, capsys):
    write_csv(
        tmp_path / "all.csv",
        [{"audio": f"http://example.org/{n}.wav", "prediction": "x" if n else "once"} for n in range(10)],
    )
    words = ["split", tmp_path / "all.csv", "--output", tmp_path / "p", "--eval", "20%", "--seed", "3"]
    assert cli.run([*map(str, words)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/p/train.csv: 8 rows (80.0%) in 8 groups",
        f"{tmp_path}/p/eval.csv: 2 rows (20.0%) in 2 groups",
    ]
