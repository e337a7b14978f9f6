"""Training from a CSV again: what an earlier run converted is used if it is what would come out."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.convert.run import PLAN_FILE, convert_rows
from mdl_toolkit.data.dataset import RECORD_FILE, ConvertedDataset, Record
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, RowsError
from mdl_toolkit.training.run import train
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.commands import data_of, make_place, names
from tests.support.paths import MODEL
from tests.support.runs import make_rows, train_options, write_csv


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current directory, with rows, recordings and a dataset made of them in `out`."""
    folder = make_place(tmp_path / "place")
    monkeypatch.chdir(folder)
    use_or_convert()
    return folder


def use_or_convert(**changes: object) -> Record:
    options = ConvertOptions(**{"model_name": str(MODEL), "input": "rows.csv", "output": "out", **changes})
    manifest = read_manifest("rows.csv", options, needs_prediction=True)
    return convert_rows(
        manifest, Path("out"), ChatTokenizer(read_tokenizer_files(MODEL)), options, reuse=True
    )


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (folder, *folder.iterdir())}


def test_the_same_is_not_converted_again(place):
    before, record = inodes(place / "out"), ConvertedDataset(Path("out")).record
    assert use_or_convert(num_workers=2, tokenizing_batch_size=1) == record
    assert inodes(place / "out") == before
    assert names(place) == {"audio", "rows.csv", "out"}


@pytest.mark.parametrize(("folder", "before"), [(".", "./audio/../"), ("audio", "../"), (".", "link/")])
def test_the_same_spelt_otherwise_is_not_converted_again(place, monkeypatch, capsys, folder, before):
    (place / "link").symlink_to(place)
    rows = Path("rows.csv").read_text(encoding="utf-8")
    Path("rows.csv").write_text(rows.replace(f"{place}/", ""), encoding="utf-8")
    use_or_convert()
    made = inodes(place / "out")
    monkeypatch.chdir(folder)
    options = ConvertOptions(
        model_name=os.path.relpath(MODEL), input=f"{before}rows.csv", output=f"{before}out", base_dir=before
    )
    manifest = read_manifest(options.input, options, needs_prediction=True)
    tokenizer = ChatTokenizer(read_tokenizer_files(Path(options.model_name)))
    convert_rows(manifest, Path(options.output), tokenizer, options, reuse=True)
    assert inodes(place / "out") == made
    assert "converted anew" not in capsys.readouterr().err


def change_a_row() -> None:
    text = Path("rows.csv").read_text(encoding="utf-8")
    Path("rows.csv").write_text(text.replace("click", "clack", 1), encoding="utf-8")


def cut_a_shard() -> None:
    file = next(Path("out").glob("*.arrow"))
    os.truncate(file, file.stat().st_size // 2)


CHANGES = {
    "a row": change_a_row,
    "a recording": lambda: os.utime("audio/clip-0-3.wav"),
    "a shard is damaged": cut_a_shard,
    "a shard is missing": lambda: next(Path("out").glob("*.arrow")).unlink(),
    "the record is damaged": lambda: Path("out", RECORD_FILE).write_text("{}"),
    "the plan is missing": lambda: Path("out", PLAN_FILE).unlink(),
    "the plan is damaged": lambda: Path("out", PLAN_FILE).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_is_converted_anew(place, capsys, change):
    before = inodes(place / "out")["out"]
    CHANGES[change]()
    record = use_or_convert()
    assert ConvertedDataset(Path("out")).record == record
    assert inodes(place / "out")["out"] != before
    assert ("out: damaged, or converted from other" in capsys.readouterr().err) == (
        change != "the plan is missing"
    )
    made = data_of(place / "out")
    shutil.rmtree("out")
    use_or_convert()
    assert data_of(place / "out") == made
    # What is damaged may be a user's own change.
    assert names(place) - {"out.previous-1"} == {"audio", "rows.csv", "out"}


@pytest.mark.parametrize("audio", ["nowhere.wav", "nan.wav"])
def test_a_bad_row_more_is_not_overlooked(place, audio):
    """The rows before it are converted already, all of them."""
    before = data_of(place / "out")
    soundfile.write("nan.wav", np.full(9000, np.nan), 16_000, subtype="FLOAT")
    with Path("rows.csv").open("a", encoding="utf-8", newline="") as file:
        file.write(f"{audio},,x\r\n")
    with pytest.raises(RowsError, match=r"1 bad row\(s\):\n  line 26"):
        use_or_convert()
    assert data_of(place / "out") == before
    assert names(place) == {"audio", "rows.csv", "nan.wav", "out"}


def test_bad_rows_of_both_sets_come_in_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = make_rows(tmp_path / "audio", 2)
    soundfile.write("nan.wav", np.full(9000, np.nan), 16_000, subtype="FLOAT")
    for name, bad in (("eval", "gone.wav"), ("train", "nan.wav")):
        table = write_csv(Path(f"{name}.csv"), [*rows, {**rows[0], "audio": bad}])
        with table.open("ab") as file:
            file.write(b"audio/clip-0-0.wav,\xff,x\n")
    with pytest.raises(InputError) as caught:
        train(train_options(Path("train.csv"), MODEL, Path("run"), eval_dataset="eval.csv"))
    lines = caught.value.message.en.splitlines()
    assert lines[0] == "eval.csv: 2 bad row(s):"
    assert lines[1].startswith("  line 4, column audio 'gone.wav': not found")
    assert lines[2].startswith("  line 5, column user_prompt '\\udcff': not UTF-8 text")
    assert lines[3] == "train.csv: 2 bad row(s):"
    assert lines[4].startswith("  line 4, column audio 'nan.wav': ")
    assert lines[5].startswith("  line 5, column user_prompt '\\udcff': not UTF-8 text")
    assert len(lines) == 6
    assert "eval.csv: 2 rows cannot be used; looking at the training rows too" in capsys.readouterr().err
    assert names(tmp_path) == {"audio", "nan.wav", "eval.csv", "train.csv"}


def test_a_column_that_is_missing_is_told_before_anything_is_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = make_rows(tmp_path / "audio", 2)
    write_csv(Path("eval.csv"), [{**rows[0], "audio": "gone.wav"}])
    write_csv(Path("train.csv"), [{"audio": row["audio"], "label": "x"} for row in rows])
    with pytest.raises(InputError, match="'prediction' is missing, .*; rename 'label'"):
        train(train_options(Path("train.csv"), MODEL, Path("run"), eval_dataset="eval.csv"))
