"""What the name of an output says: a workbook, or subtitles of one recording."""

import importlib.util
import re
import sys
import zipfile

import pytest
import soundfile
from openpyxl import load_workbook

from mdl_toolkit.errors import InputError, ModelError, UsageError
from mdl_toolkit.evaluation.csv_table import read_table
from mdl_toolkit.inference import output
from mdl_toolkit.inference.output import Piece, write_subtitles
from mdl_toolkit.inference.run import infer
from tests.support.inferences import infer_options, stop_after
from tests.support.runs import copy_checkpoint, make_csv, make_rows, write_csv
from tests.support.waves import wave


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


PIECES = [
    Piece(3661.0004, 3662.5, ["Tom & <Jerry>\n\n--> run"]),
    Piece(0, 1.9996, [" one "]),
    Piece(2, 3, [" \n"]),
]


def test_subtitles_are_as_their_formats_say(tmp_path):
    write_subtitles(tmp_path / "a.srt", PIECES)
    assert (tmp_path / "a.srt").read_bytes().decode() == (
        "1\n00:00:00,000 --> 00:00:02,000\none\n\n"
        "2\n01:01:01,000 --> 01:01:02,500\nTom & <Jerry>\n--> run\n\n"
    )
    write_subtitles(tmp_path / "a.VTT", PIECES)
    assert (tmp_path / "a.VTT").read_bytes().decode() == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\none\n\n"
        "01:01:01.000 --> 01:01:02.500\nTom &amp; &lt;Jerry&gt;\n--&gt; run\n\n"
    )


def test_ffmpeg_reads_the_subtitles(tmp_path):
    """An independent reader finds the same times and texts."""
    import av

    for name in ("a.srt", "a.vtt"):
        write_subtitles(tmp_path / name, PIECES)
        with av.open(str(tmp_path / name)) as file:
            cues = [packet for packet in file.demux(subtitles=0) if packet.size]
        assert [float(cue.pts * cue.time_base) for cue in cues] == [0, 3661]
        assert [float(cue.duration * cue.time_base) for cue in cues] == [2, 1.5]


@pytest.mark.parametrize("join", ["transcript", "list"])
def test_a_recording_becomes_subtitles(model, tmp_path, join):
    file = tmp_path / "talk.wav"
    soundfile.write(file, wave(6 * 16_000, 3), 16_000, subtype="PCM_16")
    chosen = {"window": 3, "overlap": 1, "join": join}
    answers = infer(infer_options(file, model, tmp_path / "out.srt", **chosen))
    lines = (tmp_path / "out.srt").read_text(encoding="utf-8").splitlines()
    times = [line for line in lines if " --> " in line]
    # Shares of a transcript meet in the middle of the overlaps.
    expected = [("0,000", "2,500"), ("2,500", "4,500"), ("4,500", "6,000")]
    if join == "list":
        expected = [("0,000", "3,000"), ("2,000", "5,000"), ("4,000", "6,000")]
    assert times == [f"00:00:0{start} --> 00:00:0{end}" for start, end in expected]
    assert [bool(answer) for answer in answers] == [True] * 3


def test_rows_of_one_recording_are_its_subtitles(model, tmp_path):
    file = tmp_path / "talk.wav"
    soundfile.write(file, wave(4 * 16_000, 3), 16_000, subtype="PCM_16")
    rows = [{"audio": str(file), "start": start, "end": end} for start, end in (("2", "3.5"), ("0", "1"))]
    infer(infer_options(write_csv(tmp_path / "in.csv", rows), model, tmp_path / "out.vtt"))
    lines = (tmp_path / "out.vtt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if " --> " in line] == [
        "00:00:00.000 --> 00:00:01.000",
        "00:00:02.000 --> 00:00:03.500",
    ]


def test_several_recordings_and_what_subtitles_have_no_place_for_are_refused(model, tmp_path):
    source = make_csv(tmp_path, 2)
    with pytest.raises(InputError, match=r"subtitles are of one recording, and .*train.csv names 2"):
        infer(infer_options(source, model, tmp_path / "out.srt"))
    for changes in ({"report": "a.html"}, {"on_error": "keep"}, {"keep_reference": True}):
        with pytest.raises(UsageError, match="do not go together"):
            infer(infer_options(source, model, tmp_path / "out.srt", **changes))
    assert not [*tmp_path.glob("*out.*")]


# --- workbooks ---


def test_a_workbook_holds_every_cell_as_text(model, tmp_path):
    """A reader of the file's XML finds no formula, number or error among the cells."""
    rows = make_rows(tmp_path / "audio", 3)
    notes = ['=HYPERLINK("http://localhost","x")', "0012", "#N/A"]
    others = ["+1", " two\nlines ", "bell\x07"]
    source = write_csv(
        tmp_path / "in.csv",
        [{**row, "note": note, "=more": more} for row, note, more in zip(rows, notes, others, strict=True)],
    )
    answers = infer(infer_options(source, model, tmp_path / "out.xlsx"))
    with zipfile.ZipFile(tmp_path / "out.xlsx") as file:
        sheet = file.read("xl/worksheets/sheet1.xml").decode()
    assert "<f>" not in sheet
    assert set(re.findall(r'<c [^>]*t="(\w+)"', sheet)) == {"inlineStr"}
    written = [[*row] for row in load_workbook(tmp_path / "out.xlsx").active.iter_rows(values_only=True)]
    assert written[0] == ["audio", "user_prompt", "prediction", "note", "=more"]
    # XML has no control characters.
    shown = [re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", answer) for answer in answers]
    assert [row[2] for row in written[1:]] == shown
    assert [row[3] for row in written[1:]] == notes
    assert [row[4] for row in written[1:]] == [*others[:2], "bell\N{REPLACEMENT CHARACTER}"]
    # What we write we read, and a CSV of the same says the same.
    csv = infer_options(source, model, tmp_path / "out.csv")
    assert infer(csv) == answers
    assert read_table(tmp_path / "out.xlsx").column("note") == read_table(tmp_path / "out.csv").column("note")


def test_a_text_that_no_cell_of_a_workbook_holds_is_not_cut(model, tmp_path):
    (row,) = make_rows(tmp_path / "audio", 1)
    source = write_csv(tmp_path / "in.csv", [{**row, "note": "x" * 32_768}])
    with pytest.raises(InputError, match=r"32,768 characters, and a cell of a workbook holds 32,767"):
        infer(infer_options(source, model, tmp_path / "out.xlsx"))
    assert not (tmp_path / "out.xlsx").exists()
    # As the message says, the answers are kept under another name.
    (tmp_path / ".out.xlsx.partial").rename(tmp_path / ".out.csv.partial")
    with pytest.MonkeyPatch.context() as patch:
        asked = stop_after(patch, 99)
        assert len(infer(infer_options(source, model, tmp_path / "out.csv"))) == 1
    assert asked == []


def test_more_rows_than_a_sheet_holds_are_refused_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "MOST_ROWS", 3)
    source, asked = make_csv(tmp_path, 3), stop_after(monkeypatch, 99)
    with pytest.raises(InputError, match=r"3 rows, and a sheet of a workbook holds 3 .* ends in \.csv"):
        infer(infer_options(source, model, tmp_path / "out.xlsx"))
    assert asked == []
    assert not (tmp_path / ".out.xlsx.partial").exists()
    assert len(infer(infer_options(make_csv(tmp_path, 2), model, tmp_path / "out.xlsx"))) == 2


def test_more_windows_than_a_sheet_holds_are_refused_with_their_answers_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "MOST_ROWS", 3)
    soundfile.write(tmp_path / "long.wav", wave(71 * 1600, 3), 16_000, subtype="PCM_16")
    source = write_csv(tmp_path / "in.csv", [{"audio": str(tmp_path / "long.wav"), "user_prompt": "?"}])
    with pytest.raises(InputError, match="more rows than the 3 of a workbook"):
        infer(infer_options(source, model, tmp_path / "out.xlsx", window=3, overlap=1, join="list"))
    assert not (tmp_path / "out.xlsx").exists()
    assert (tmp_path / ".out.xlsx.partial").is_dir()


def test_a_workbook_needs_its_extra_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ModelError, match=r"--output .*out.xlsx needs the package openpyxl: pip install"):
        infer(infer_options(tmp_path / "in.csv", model, tmp_path / "out.xlsx"))
