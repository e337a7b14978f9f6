"""Files of rows that spreadsheets and others write: read as what they are, or refused with what to do."""

import codecs
import csv
import io
import random
import sys
import warnings
import zipfile
from datetime import date, time
from pathlib import Path

import pytest
from openpyxl import Workbook

from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.data.csv_reader import open_rows
from mdl_toolkit.data.manifest import Row, read_manifest
from mdl_toolkit.errors import InputError
from mdl_toolkit.evaluation.csv_table import read_table

CHINESE = [
    "这是什么语言？",
    "英语",
    "普通话",
    "粤语",
    "婴儿哭声",
    "狗叫",
    "雨声",
    "打开空调",
    "请把音量调大一点",
]
JAPANESE = [
    "これは何語ですか",
    "英語",
    "日本語",
    "犬が吠えている",
    "雨の音",
    "エアコンをつけて",
    "音楽を再生して",
]
GERMAN = ["Müller grüßt", "größer", "fröhliche Hündin", "Straße für Käse", "Überraschung", "Tür schließen"]

JAPANESE_SENTENCES = [
    "どの言語ですか、これはどの言語でしょうか答えてください", "この録音では何が話されていますか",
    "はい、お願いします。明日の午後三時に会議があります",
]  # fmt: skip
TAIWANESE = [
    "這段錄音說的是哪種語言？",
    "請把這段話寫成文字",
    "好的，謝謝您，我明天下午三點去開會",
    "您好，這裡是客服中心",
]
KOREAN = [
    "이 녹음은 어떤 언어입니까?",
    "이 음성을 글로 옮겨 주세요",
    "네, 감사합니다. 내일 오후 세 시에 회의가 있습니다",
]
RUSSIAN = [
    "На каком языке говорят?",
    "Запишите эту запись словами",
    "Да, спасибо. Завтра в три часа у нас собрание",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"x")
    return tmp_path


def table_of(words: list[str], rows: int = 12, seed: int = 0) -> list[list[str]]:
    rng = random.Random(seed)
    return [["a.wav", rng.choice(words), rng.choice(words)] for _ in range(rows)]


def as_text(rows: list[list[str]], delimiter: str = ",", end: str = "\r\n") -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerows([["audio", "user_prompt", "prediction"], *rows])
    return text.getvalue()


def read(content: bytes, name: str = "x.csv") -> list[Row]:
    Path(name).write_bytes(content)
    rows = [*read_manifest(name, ConversionOptions(), needs_prediction=True)]
    assert all(isinstance(row, Row) for row in rows), rows
    return rows


def cells(rows: list[Row]) -> list[list[str]]:
    return [[*row.cells] for row in rows]


@pytest.mark.parametrize(
    ("encoding", "words", "name"),
    [
        ("gb18030", CHINESE, "GB18030 text"), ("cp932", JAPANESE, "Shift-JIS text"),
        ("cp1252", GERMAN, "Windows-1252 text"), ("utf-16", CHINESE, "UTF-16 text"),
        ("utf-16-le", CHINESE, "UTF-16 text"), ("utf-16-be", JAPANESE, "UTF-16 text"),
        # One sentence in each row, as prompts are; of U+4E00, the lower byte is zero.
        ("cp932", JAPANESE_SENTENCES[:1], "Shift-JIS text"), ("cp932", JAPANESE_SENTENCES, "Shift-JIS text"),
        ("big5", TAIWANESE[:1], "Big5 text"), ("big5", TAIWANESE, "Big5 text"),
        ("cp949", KOREAN[:1], "CP949 text"), ("cp949", KOREAN, "CP949 text"),
        ("cp1251", RUSSIAN, "Windows-1251 text"),
        ("utf-16-le", ["这是哪一种语言，请一一回答"], "UTF-16 text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(5))
def test_other_encodings_are_read_and_named(folder, capsys, encoding, words, name, seed):
    rows = table_of(words, seed=seed)
    assert cells(read(as_text(rows).encode(encoding))) == rows
    assert capsys.readouterr().err == f"x.csv: taken for {name}\n"


def test_utf_8_is_never_taken_for_anything_else(folder, capsys):
    for words in (CHINESE, JAPANESE, GERMAN, ["plain"]):
        for rows in (1, 3, 40):
            for mark in (b"", codecs.BOM_UTF8):
                table = table_of(words, rows)
                assert cells(read(mark + as_text(table).encode())) == table
    assert capsys.readouterr().err == ""


def test_a_row_in_another_encoding_is_named_among_others(folder):
    rows = as_text(table_of(CHINESE, 9)).encode() + "a.wav,你好,英语\n".encode("gb18030") + b"gone.wav,x,y\n"
    Path("x.csv").write_bytes(rows)
    problems = [*read_manifest("x.csv", ConversionOptions(), needs_prediction=True)][9:]
    assert [(each.line, each.column) for each in problems] == [
        (11, "user_prompt"), (11, "prediction"), (12, "audio"),
    ]  # fmt: skip
    assert "not UTF-8 text; save the file as UTF-8" in problems[0].reason.en


def test_too_little_text_to_tell_an_encoding_is_not_guessed_at(folder):
    Path("x.csv").write_bytes("audio,prediction\na.wav,英语\n".encode("gb18030"))
    (problem,) = read_manifest("x.csv", ConversionOptions(), needs_prediction=True)
    assert "not UTF-8 text" in problem.reason.en


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_other_separators_are_read_and_named(folder, capsys, delimiter, name, end):
    rows = [["a.wav", "one, two", "x"], ["a.wav", 'say "1;2"', "y\tz|"]]
    assert cells(read(as_text(rows, delimiter, end).encode())) == rows
    assert capsys.readouterr().err == f"x.csv: taken for cells separated by {name}\n"


def test_commas_are_commas_whatever_else_is_in_a_name(folder, capsys):
    rows = read(b"audio,prediction,a;b\na.wav,x;y,1;2\n")
    assert rows[0].cells == ("a.wav", "x;y", "1;2")
    assert "taken for" not in capsys.readouterr().err


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_excel_s_line_that_names_the_separator(folder, first):
    rows = read(f"{first}\r\naudio;prediction\r\na.wav;x,y\r\n".encode())
    assert [(row.line, row.prediction) for row in rows] == [(3, "x,y")]


def test_semicolons_in_another_encoding_with_a_separator_line(folder, capsys):
    rows = table_of(CHINESE)
    assert cells(read(f"sep=;\r\n{as_text(rows, ';')}".encode("utf-16"))) == rows
    assert capsys.readouterr().err == "x.csv: taken for UTF-16 text, cells separated by semicolons\n"


# --- what spreadsheets leave behind ----------------------------------------------------------------------


def test_empty_columns_at_the_end_and_rows_of_commas_are_left_out(folder, capsys):
    rows = read(b"audio,prediction,,\r\n,,,\r\na.wav,x,,\r\na.wav,y\r\n,,,\r\n")
    assert [(row.line, row.cells) for row in rows] == [(3, ("a.wav", "x")), (4, ("a.wav", "y"))]
    said = "x.csv: left out: 2 empty columns at the end, 2 rows of empty cells\n"
    assert capsys.readouterr().err == said


def test_a_column_without_a_name_that_holds_something_stays(folder):
    (row,) = read(b"audio,prediction,,\na.wav,x,look again,\n")
    assert row.cells == ("a.wav", "x", "look again")


# --- workbooks -------------------------------------------------------------------------------------------


def make_workbook(path: Path, rows: list[list[object]]) -> None:
    book = Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def test_a_workbook_is_read(folder, capsys):
    rows = [
        ["audio", "prediction", "note", None], ["a.wav", "英语, ja", 12, None], [None, None, None, None],
        ["a.wav", True, 0.1, None], ["a.wav", 3.0, date(2026, 1, 2), None],
    ]  # fmt: skip
    make_workbook(folder / "x.xlsx", rows)
    found = [*read_manifest("x.xlsx", ConversionOptions(), needs_prediction=True)]
    assert [(row.line, row.cells) for row in found] == [
        (2, ("a.wav", "英语, ja", "12")), (4, ("a.wav", "TRUE", "0.1")),
        (5, ("a.wav", "3", "2026-01-02")),
    ]  # fmt: skip
    assert "x.xlsx: taken for a workbook, its active sheet\n" in capsys.readouterr().err
    target = io.BytesIO()
    open_rows(Path("x.xlsx"), ["audio"]).copy_rows(target, lambda line: line != 4)
    assert target.getvalue().decode() == (
        '\ufeffaudio,prediction,note\r\na.wav,"英语, ja",12\r\na.wav,3,2026-01-02\r\n'
    )
    assert read_table("x.xlsx", ["prediction"]).column("prediction") == ["英语, ja", "TRUE", "3"]


def test_times_are_as_the_sheet_shows_them(folder):
    """What is typed as 1:02 is kept as an hour and two minutes, and shown as 1:02."""
    book = Workbook()
    book.active.append(["audio", "start", "end", "prediction"])
    book.active.append(["a.wav", time(1, 2), time(0, 1, 3, 500_000), "x"])
    book.active["B2"].number_format, book.active["C2"].number_format = "h:mm", "mm:ss.0"
    book.save("x.xlsx")
    (row,) = read_manifest("x.xlsx", ConversionOptions(), needs_prediction=True)
    assert (row.segment.start, row.segment.end) == (62, 63.5)


def test_the_size_that_a_sheet_claims_is_not_believed(folder):
    make_workbook(folder / "x.xlsx", [["audio", "prediction"], *(["a.wav", "x"] for _ in range(9))])
    with zipfile.ZipFile("x.xlsx") as book, zipfile.ZipFile("y.xlsx", "w") as other:
        for name in book.namelist():
            content = book.read(name).replace(b'<dimension ref="A1:B10"', b'<dimension ref="A1"')
            other.writestr(name, content)
    assert len([*read_manifest("y.xlsx", ConversionOptions(), needs_prediction=True)]) == 9


def test_a_damaged_workbook_and_no_openpyxl_say_what_to_do(folder, monkeypatch):
    make_workbook(folder / "x.xlsx", [["audio", "prediction"], ["a.wav", "x"]])
    with monkeypatch.context() as without, warnings.catch_warnings():
        without.setitem(sys.modules, "openpyxl", None)
        assert "install the extra `xlsx`, or save it as CSV UTF-8" in refused("x.xlsx")
    content = Path("x.xlsx").read_bytes()
    Path("x.xlsx").write_bytes(content.replace(b"xl/workbook.xml", b"xl/workbook.xmx", 1))
    assert "save it as CSV UTF-8" in refused("x.xlsx")
    # The list of the archive's files is no such list.
    Path("x.xlsx").write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x03"))
    assert "this is a zip archive" in refused("x.xlsx")


# --- what is no file of rows -----------------------------------------------------------------------------


def refused(name: str) -> str:
    with pytest.raises(InputError) as caught:
        read_manifest(name, ConversionOptions(), needs_prediction=True)
    assert caught.value.message.en.startswith(f"{name}: ")
    return caught.value.message.en


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"audio": "a.wav"}\n{"audio": 1,\n}\n', "line 2 is no valid JSON"),
        ("x.json", b'[{"audio": "a.wav"}, 3]', "line 2: expected an object, not 3"),
        ("train.scp", b"utt1 /data/a.wav\nutt2 /data/b.wav\n", "Kaldi's; call it wav.scp, with `text`"),
        ("list", b"utt1 sox a.flac -t wav - |\n", "'audio' is missing"),
        ("train.scp", b"utt1 sox a.flac -t wav - |\n", "Kaldi's; call it wav.scp, with `text`"),
        ("x.csv", b"PK\x03\x04rest", "this is a zip archive; unpack it first"),
        ("x.csv.gz", b"\x1f\x8b\x08", "this is compressed with gzip; unpack it first"),
        ("x.xls", b"\xd0\xcf\x11\xe0\xa1", "this is an Excel workbook that is old or has a password"),
        ("x.mp3", b"ID3\x03", "this is a recording; give a CSV"),
    ],
)
def test_other_files_are_refused_with_what_to_do(folder, name, content, said):
    Path(name).write_bytes(content)
    assert said in refused(name)


# --- a copy without some rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_copy_without_some_rows_is_byte_for_byte(folder, encoding, end):
    rows = table_of(CHINESE, 20)
    rows[4][1] = f"in two{end}lines"
    content = as_text(rows, end=end).encode(encoding)
    Path("x.csv").write_bytes(content)
    file, target = open_rows(Path("x.csv"), ["audio"]), io.BytesIO()
    lines = [line.number for line in file]
    file.copy_rows(target, lambda line: line not in (lines[4], lines[7]))
    kept = [row for number, row in enumerate(rows) if number not in (4, 7)]
    assert target.getvalue() == as_text(kept, end=end).encode(encoding)
