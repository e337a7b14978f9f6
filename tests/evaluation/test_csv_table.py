"""CSVs without recordings, and which row of one belongs to which row of another."""

import pytest

from mdl_toolkit.errors import InputError, RowsError
from mdl_toolkit.evaluation.csv_table import join_tables, read_table
from tests.support.runs import write_csv


def table(folder, name, audio=None, count=0):
    rows = [{"audio": each, "x": "1"} for each in audio] if audio else [{"x": str(n)} for n in range(count)]
    return read_table(write_csv(folder / name, rows))


def test_cells_are_text_and_short_rows_are_filled_up(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffa,b\r\n0012,"x\ny"\r\n\r\nNA\r\n'.encode())
    read = read_table(tmp_path / "a.csv", ["b"])
    assert read.columns == ("a", "b")
    assert read.cells == (("0012", "x\ny"), ("NA", ""))
    assert read.lines == (2, 5)
    assert (len(read), read.column("a")) == (2, ["0012", "NA"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty; a CSV starts with a line of column names"),
        ("prediction\n", "there is no row below the column names; add one"),
        ("predictions\nx\n", "the column 'prediction' is missing, the columns are 'predictions'; rename"),
        ("prediction,a,a\nx,1,2\n", "there are 2 columns 'a'; rename or remove one"),
    ],
)
def test_what_cannot_be_used(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError) as refused:
        read_table(tmp_path / "a.csv", ["prediction"])
    assert message in str(refused.value)


def test_all_bad_rows_at_once(tmp_path):
    (tmp_path / "a.csv").write_text("prediction\nx,y\nfine\na,b,c\n")
    with pytest.raises(RowsError) as refused:
        read_table(tmp_path / "a.csv")
    assert [problem.line for problem in refused.value.problems] == [2, 4]


def test_what_a_model_may_write_can_be_read(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"prediction": 'b\0\r\n\x07\ufffd, "'}])
    assert read_table(path).cells == (('b\0\r\n\x07\ufffd, "',),)


# --- joining ---------------------------------------------------------------------------------------------


def test_by_audio_in_any_order(tmp_path):
    left, right = table(tmp_path, "l.csv", ["b", "a", "c"]), table(tmp_path, "r.csv", ["a", "b", "c"])
    found, by = join_tables(left, right)
    assert found.column("audio") == ["b", "a", "c"]
    assert found.lines == (3, 2, 4)
    assert by.en == "joined by the column audio"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (["a.wav", "a.wav"], ["a.wav", "a.wav"]),  # not unique
        (["x/a.wav", "x/b.wav"], ["/data/a.wav", "C:\\y\\b.wav"]),  # spelled in another way
        (None, ["a.wav", "b.wav"]),
        (None, None),
    ],
)
def test_by_number_otherwise(tmp_path, left, right):
    other = table(tmp_path, "r.csv", right, 2)
    found, by = join_tables(table(tmp_path, "l.csv", left, 2), other)
    assert found == other
    assert by.en == "joined by row number"


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (
            ["a", "b", "c", "d", "e"],
            ["a"],
            "l.csv: 4 of 5 recordings are not in {}/r.csv ('b' on line 3, 'c' on line 4, 'd' on line 5, ...)",
        ),
        (
            ["a"],
            ["b", "a"],
            "r.csv: 1 of 2 recordings is not in {}/l.csv ('b' on line 2); give files with the",
        ),
        (
            ["a", "b", "a"],
            ["a", "b"],
            "and they cannot be joined by audio ({}/l.csv has 'a' on lines 2 and 4)",
        ),
        (
            ["a", "b"],
            None,
            "l.csv has 2 rows and {0}/r.csv 3, and they cannot be joined by audio ({0}/r.csv has no",
        ),
        (
            ["x/a", "x/b"],
            ["y/a"],
            "cannot be joined by audio (none is written alike in both: 'x/a' on line 2, 'y/a' on line 2)",
        ),
        (
            ["x/a", "x/b"],
            ["y/b", "y/a"],
            "different recordings in 2 of 2 rows ('x/a' on line 2 is beside 'y/b' on line 2, 'x/b' on",
        ),
        (["https://me:secret@host/a", "b"], ["b", "c"], "'https://host/a' on line 2"),
    ],
)
def test_a_mismatch_is_one_clear_sentence(tmp_path, left, right, message):
    with pytest.raises(InputError) as refused:
        join_tables(table(tmp_path, "l.csv", left, 3), table(tmp_path, "r.csv", right, 3))
    assert message.format(tmp_path) in refused.value.message.en
    assert len(refused.value.message.en.splitlines()) == len(refused.value.message.zh.splitlines()) == 1
    assert "secret" not in f"{refused.value.message}"


def test_segments_of_one_recording_are_joined_by_their_times(tmp_path):
    """However these are written; where they are not unique, by the row's number."""
    left = [{"audio": "a", "start": f"{n}", "end": f"{n + 1}.0", "x": f"{n}"} for n in range(4)]
    right = [{"audio": "a", "offset": f"{n}.00", "duration": "1", "x": f"{n}"} for n in (3, 0, 2, 1)]
    tables = [read_table(write_csv(tmp_path / f"{n}.csv", rows)) for n, rows in enumerate((left, right))]
    found, by = join_tables(*tables)
    assert found.column("x") == ["0", "1", "2", "3"]
    assert by.en == "joined by recording and segment"
    right[0]["offset"] = "0.5"
    with pytest.raises(InputError, match="1 of 4 recordings is not in"):
        join_tables(tables[0], read_table(write_csv(tmp_path / "1.csv", right)))
    right[0]["offset"] = "1"
    found, by = join_tables(tables[0], read_table(write_csv(tmp_path / "1.csv", right)))
    assert by.en == "joined by row number"
