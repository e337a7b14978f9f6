"""A CSV comes back exactly as written, with the right line numbers, or all that is wrong is said at once."""

import csv
import io
import os
import pickle
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdl_toolkit.audio.urls import is_url, without_credentials
from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.data.manifest import Manifest, Row, read_manifest
from mdl_toolkit.errors import InputError, Problems, RowProblem, RowsError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with one file `a.wav` that has something in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"x")
    return tmp_path


@dataclass
class Read:
    """A CSV that was read to its end."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def opened(content: str | bytes, **more) -> Manifest:
    Path("x.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    needs_prediction = more.pop("needs_prediction", True)
    return read_manifest("x.csv", ConversionOptions(**more), needs_prediction=needs_prediction)


def read(content: str | bytes, **more) -> Read:
    manifest = opened(content, **more)
    found = Problems()
    for item in manifest:
        if isinstance(item, RowProblem):
            found.add(item)
    manifest.check(found)
    return Read(manifest.columns, tuple(manifest.rows()))


def problems(content: str | bytes, **more) -> list[tuple[int, str, str]]:
    with pytest.raises(RowsError) as caught:
        read(content, **more)
    return [(problem.line, problem.column, problem.value) for problem in caught.value.problems]


def complaint(content: str | bytes, **more) -> str:
    with pytest.raises(InputError) as caught:
        read(content, **more)
    assert caught.value.message.en.startswith("x.csv: ")
    assert caught.value.message.zh.startswith("x.csv：")
    return caught.value.message.en


# --- what is read ----------------------------------------------------------------------------------------

CELL = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
    st.sampled_from(
        ["0012", "True", "None", "NA", "nan", "1.0", "null", " ", '"', "a\r\nb\n\nc", "逗,号", "\ufeff"]
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(CELL.filter(bool), CELL, CELL), min_size=1, max_size=6),
    ending=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_cells_and_line_numbers_come_back_as_written(folder, rows, ending, bom):
    text, lines = io.StringIO(newline=""), []
    writer = csv.writer(text, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerow(["audio", "prediction", "注", "system_prompt"])
    for prediction, note, prompt in rows:
        lines.append(text.getvalue().count("\n") + 1)
        writer.writerow(["a.wav", prediction, note, prompt])
    manifest = read(("\ufeff" * bom + text.getvalue()).encode())
    assert manifest.columns == ("audio", "prediction", "注", "system_prompt")
    assert [row.cells for row in manifest.rows] == [("a.wav", *cells) for cells in rows]
    assert [row.prediction for row in manifest.rows] == [cells[0] for cells in rows]
    assert [row.line for row in manifest.rows] == lines


@pytest.mark.parametrize("text", ["0012", "True", "None", "NA", "nan", "1.0", "null", "  x "])
def test_a_prediction_is_text(folder, text):
    assert read(f"audio,prediction\na.wav,{text}\n").rows[0].prediction == text


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_line_endings(folder, ending, last):
    text = ending.join(["audio,prediction", "a.wav,1", "a.wav,2"]) + ending * last
    assert [(row.line, row.prediction) for row in read(text).rows] == [(2, "1"), (3, "2")]


def test_mixed_line_endings_and_blank_lines(folder):
    rows = read('audio,prediction\r\na.wav,"1\n2\r\n3"\n\n\r\na.wav,4').rows
    assert [(row.line, row.prediction) for row in rows] == [(2, "1\n2\r\n3"), (7, "4")]


def test_a_long_cell(folder):
    assert read(f"audio,prediction\na.wav,{'长' * 500_000}\n").rows[0].prediction == "长" * 500_000


def test_missing_cells_are_empty(folder):
    row = read("audio,prediction,user_prompt,note\na.wav,x\n").rows[0]
    assert row.cells == ("a.wav", "x", "", "")
    assert row.user_prompt is None


@pytest.mark.parametrize(
    ("cell", "option", "expected"),
    [
        ("hi", "default", "hi"),
        ("", "default", "default"),
        ("null", "default", "default"),
        ("", None, None),
        ("null", None, None),
        ("null", "", ""),
        (" ", "default", " "),
        ("Null", "default", "Null"),
        ("None", "default", "None"),
    ],
)
def test_prompts(folder, cell, option, expected):
    text = f"audio,prediction,system_prompt,user_prompt\na.wav,x,{cell},{cell}\n"
    row = read(text, system_prompt=option, user_prompt=option).rows[0]
    assert (row.system_prompt, row.user_prompt) == (expected, expected)


def test_prompts_without_a_column(folder):
    row = read("audio,prediction\na.wav,x\n", system_prompt="s", user_prompt="u").rows[0]
    assert (row.system_prompt, row.user_prompt) == ("s", "u")


def test_inference_needs_no_prediction(folder):
    assert read("audio\na.wav\n", needs_prediction=False).rows[0].prediction is None
    assert read("audio,prediction\na.wav,\n", needs_prediction=False).rows[0].prediction == ""
    assert tuple(opened("audio\n", needs_prediction=False)) == ()


# --- where audio is looked for ---------------------------------------------------------------------------


def test_paths_start_at_base_dir_or_here_and_not_at_the_csv(folder, monkeypatch):
    (folder / "data").mkdir()
    (folder / "data" / "b.wav").write_bytes(b"x")
    here = folder / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "a.wav").write_bytes(b"x")
    assert read("audio,prediction\na.wav,x\n").rows[0].audio == "a.wav"
    for base in (folder / "data", f"{folder}/data", "../data", "../data/"):
        row = read("audio,prediction\nb.wav,x\n", base_dir=str(base)).rows[0]
        assert Path(row.audio).samefile(folder / "data" / "b.wav")
        assert row.audio_text == "b.wav"
    (folder / "x.csv").write_text("audio,prediction\nb.wav,x\n")
    (row,) = read_manifest(folder / "x.csv", ConversionOptions(), needs_prediction=True)
    assert isinstance(row, RowProblem)


def test_absolute_paths_and_addresses_are_left_alone(folder):
    text = f"audio,prediction\n{folder}/a.wav,x\nhttps://h/x y.wav?a=1,x\nHTTP://h/x,x\n"
    rows = read(text, base_dir="/nowhere").rows
    assert [row.audio for row in rows] == [f"{folder}/a.wav", "https://h/x y.wav?a=1", "HTTP://h/x"]
    assert [is_url(row.audio) for row in rows] == [False, True, True]


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read("audio,prediction\n~/a.wav,x\n", base_dir="/nowhere").rows[0].audio == f"{folder}/a.wav"
    assert read("audio,prediction\na.wav,x\n", base_dir="~").rows[0].audio == f"{folder}/a.wav"


# --- what is wrong with rows -----------------------------------------------------------------------------


def test_all_problems_of_all_rows_in_one_message(folder):
    (folder / "empty.wav").touch()
    (folder / "d").mkdir()
    os.mkfifo(folder / "pipe")
    long = "x" * 5000
    text = (
        "audio,prediction\n"
        "missing.wav,x\n"
        'a.wav,"fine\nin two lines"\n'
        ",x\n"
        "a.wav,\n"
        "d,x\n"
        "empty.wav,x\n"
        "pipe,x\n"
        "a.wav/b,x\n"
        f"{long},x\n"
        "ftp://h/a.wav,x\n"
        "file:///a.wav,x\n"
        "s3://b/a.wav,x\n"
        "http:///a.wav,x\n"
        "http://h:x/a.wav,x\n"
        "a.wav,x,y,z\n"
        "a.wav,b\0c\n"
    ).encode() + b'a.wav,"\n\xff"\n'
    assert problems(text) == [
        (2, "audio", "missing.wav"),
        (5, "audio", ""),
        (6, "prediction", ""),
        (7, "audio", "d"),
        (8, "audio", "empty.wav"),
        (9, "audio", "pipe"),
        (10, "audio", "a.wav/b"),
        (11, "audio", long),
        (12, "audio", "ftp://h/a.wav"),
        (13, "audio", "file:///a.wav"),
        (14, "audio", "s3://b/a.wav"),
        (15, "audio", "http:///a.wav"),
        (16, "audio", "http://h:x/a.wav"),
        (17, "3", "y"),
        (18, "prediction", "b\0c"),
        (19, "prediction", "\n\udcff"),
    ]


def test_a_problem_says_where_it_looked_and_what_to_do(folder):
    with pytest.raises(RowsError) as caught:
        read("audio,prediction\n没有.wav,x\n", base_dir="data")
    assert caught.value.message.en == (
        "x.csv: 1 bad row(s):\n"
        "  line 2, column audio '没有.wav': not found (looked for data/没有.wav); "
        "correct the path or --base-dir"
    )
    assert "第 2 行 audio 列" in caught.value.message.zh
    assert "文件不存在（已查找 data/没有.wav）" in caught.value.message.zh


def test_a_nul_in_a_path_is_reported_once(folder):
    assert problems("audio,prediction\na\0.wav,x\n") == [(2, "audio", "a\0.wav")]


def test_empty_predictions(folder):
    text = "audio,prediction\na.wav,\na.wav,x\na.wav\n"
    assert problems(text) == [(2, "prediction", ""), (4, "prediction", "")]
    assert [row.prediction for row in read(text, allow_empty_prediction=True).rows] == ["", "x", ""]


def test_passwords_are_not_shown(folder):
    with pytest.raises(RowsError) as caught:
        read("audio,prediction\nhttp://me:secret@h:x/a,x\n")
    assert "secret" not in str(caught.value)
    row = read("audio,prediction\nhttp://me:secret@h/a@b,x\n").rows[0]
    assert row.shown == "http://h/a@b"
    assert row.audio == "http://me:secret@h/a@b"
    assert without_credentials("a@b.wav") == "a@b.wav"


# --- what is wrong with the file -------------------------------------------------------------------------


def test_files_that_cannot_be_read(folder):
    for path, words in (
        ("no.csv", "no such file"),
        (".", "folder"),
        ("a.wav/x", "cannot be read"),
        ("a\0", "cannot"),
    ):
        with pytest.raises(InputError, match=words):
            read_manifest(path, ConversionOptions(), needs_prediction=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        ("\ufeff", "the file is empty"),
        ("audio\na.wav\n", "'prediction' is missing, the columns are 'audio'; add it"),
        ("a,b\n1,2\n", "'audio' is missing"),
        ("audio,predictions\na.wav,x\n", "rename 'predictions'"),
        ("sound;prediction\na.wav;x\n", "separate cells by commas"),
        ("file,prediction\na.wav,x\n", "the columns are 'file', 'prediction'; rename 'file'"),
        ("Audio,AUDIO,prediction\na.wav,x,y\n", "2 columns 'audio'"),
        ("audio,prediction,audio\na.wav,x,y\n", "2 columns 'audio'"),
        ("audio,prediction,,\na.wav,x,,y\n", "2 columns ''"),
        ("audio,prediction,n\0te\na.wav,x,y\n", "line 1: holds a NUL byte"),
        ('audio,prediction\na.wav,x\na.wav,"x\n\n', "starts on line 3 is no valid CSV"),
        ('audio,prediction\na.wav,"x"y\n', "starts on line 2 is no valid CSV"),
        ("audio,prediction\na.wav,x\ry\n", "starts on line 2 is no valid CSV"),
        (b"audio,pr\xffdiction\na.wav,x\n", "line 1: not UTF-8"),
    ],
)  # fmt: skip
def test_files_that_are_no_good(folder, content, words):
    assert words in complaint(content)


def test_all_missing_columns_are_named(folder):
    said = complaint("x,y\n1,2\n")
    assert "'audio'" in said
    assert "'prediction'" in said


def test_a_pipe_is_refused_as_it_can_be_read_once_only(folder):
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="pipe: this is a device or pipe, and it is read more than once"):
        read_manifest("pipe", ConversionOptions(), needs_prediction=True)


# --- a stream, gone through as often as needed -----------------------------------------------------------


def test_a_file_that_changes_between_two_readings_is_refused(folder):
    manifest = opened("audio,prediction\na.wav,x\n")
    assert len([*manifest]) == 1
    with Path("x.csv").open("a") as file:
        file.write("a.wav,y\n")
    with pytest.raises(InputError, match=r"x\.csv: the file was changed while it was being read"):
        tuple(manifest)


def test_each_row_knows_the_size_and_time_of_its_recording(folder):
    (row,) = opened("audio,prediction\na.wav,x\n").rows()
    status = Path("a.wav").stat()
    assert row.stamp == (1, status.st_mtime_ns)
    (address,) = opened("audio,prediction\nhttp://h/a.wav,x\n").rows()
    assert address.stamp == (0, 0)


def test_rows_can_be_had_when_their_recordings_are_gone(folder):
    manifest = opened("audio,prediction\na.wav,x\na.wav,y\n")
    Path("a.wav").unlink()
    assert [*manifest.rows()] == []
    assert [(row.line, row.prediction) for row in manifest.rows_unchecked()] == [(2, "x"), (3, "y")]


def test_problems_and_rows_come_in_the_file_s_order(folder):
    text = "audio,prediction\na.wav,x\ngone.wav,\na.wav,y,z\na.wav,w\n"
    items = [(type(item).__name__, item.line) for item in opened(text)]
    problem = "RowProblem"
    assert items == [("Row", 2), (problem, 3), (problem, 3), (problem, 4), ("Row", 5)]


def test_only_the_first_problems_are_kept_and_all_are_counted(folder):
    with pytest.raises(RowsError) as caught:
        read("audio,prediction\n" + "gone.wav,x\n" * 70)
    assert [problem.line for problem in caught.value.problems] == [*range(2, 52)]
    assert caught.value.count == 70
    assert caught.value.message.en.endswith("\n  ... and 20 more")
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message


def test_memory_does_not_grow_with_the_rows(folder):
    """Peaks of Python's own memory, while 500 and 50,000 rows are read."""
    peaks = []
    for count in (500, 50_000):
        manifest = opened("audio,prediction\n" + f"a.wav,{'x' * 100}\n" * count)
        tracemalloc.start()
        assert sum(1 for _ in manifest) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * 2**20 + 1.2 * peaks[0]  # pieces of 1 MiB are read, whatever the file's size
