"""A lack of memory, or a library in Rust that gives up, is told with the file or row at which it happened."""

import openpyxl
import pytest
from tokenizers import Tokenizer

from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.cli.main import run
from mdl_toolkit.data import csv_reader, open_audio
from mdl_toolkit.data.check import rows as inspection
from mdl_toolkit.data.convert import worker
from tests.support.paths import MODEL
from tests.support.runs import make_rows, write_csv


class PanicException(BaseException):
    """What a library in Rust raises when it gives up."""


LACK = "the machine ran out of memory"
PANIC = "a library gave up on it: no char boundary"
PROBLEMS = {LACK: MemoryError(), PANIC: PanicException("no char boundary")}
MODULES = {"check": inspection, "convert-dataset": worker}


@pytest.fixture(params=PROBLEMS)
def reason(request):
    return request.param


@pytest.fixture(params=MODULES)
def command(request, tmp_path, monkeypatch):
    """A command over two rows, the second of them a recording on its own."""
    monkeypatch.chdir(tmp_path)
    rows = make_rows(tmp_path / "audio", 2)
    rows[1]["audio"] = "audio/clip-0-1.wav"
    write_csv(tmp_path / "rows.csv", rows)
    words = [request.param, "rows.csv", "--model-name", str(MODEL), "--num-workers", "1"]
    return words + ["--output", "out"] * (request.param != "check")


def refused(words, capsys):
    assert run(words) == 1
    said = capsys.readouterr()
    return said.out + said.err


def failing(function, reason, where):
    """The function, but for the arguments in which something is."""

    def fails(*given, **more):
        if where(given):
            raise PROBLEMS[reason]
        return function(*given, **more)

    return fails


def test_decoding(command, reason, monkeypatch, capsys):
    is_second = lambda given: "clip-0-1" in str(given[0])  # noqa: E731
    monkeypatch.setattr(open_audio, "load_segments", failing(open_audio.load_segments, reason, is_second))
    said = refused(command, capsys)
    assert f"line 3, column audio 'audio/clip-0-1.wav': it cannot be decoded: {reason}" in said
    assert "line 2, column" not in said


def test_packing(command, reason, monkeypatch, capsys):
    module, calls = MODULES[command[0]], []
    is_second = lambda given: calls.append(given) or len(calls) == 2  # noqa: E731
    monkeypatch.setattr(module, "pack_audio", failing(module.pack_audio, reason, is_second))
    assert f"error: line 3 (audio/clip-0-1.wav): {reason}" in refused(command, capsys)


def test_fetching(command, reason, tmp_path, monkeypatch, capsys):
    """In a thread, whose end is waited for."""
    write_csv(tmp_path / "rows.csv", [{"audio": "http://127.0.0.1:9/x.wav", "prediction": "yes"}])
    monkeypatch.setattr(Downloads, "path_of", failing(None, reason, lambda _: True))
    assert f"'http://127.0.0.1:9/x.wav': it cannot be decoded: {reason}" in refused(command, capsys)


def test_reading_a_csv(command, monkeypatch, capsys):
    monkeypatch.setattr(csv_reader.csv, "reader", failing(None, LACK, lambda _: True))
    assert f"error: rows.csv: cannot be read ({LACK})." in refused(command, capsys)


def test_reading_a_workbook(command, tmp_path, monkeypatch, capsys):
    openpyxl.Workbook().save(tmp_path / "rows.xlsx")
    monkeypatch.setattr(openpyxl, "load_workbook", failing(None, LACK, lambda _: True))
    said = refused(["rows.xlsx" if word == "rows.csv" else word for word in command], capsys)
    assert f"error: rows.xlsx: cannot be read ({LACK})." in said


def test_reading_a_tokenizer(command, monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "from_str", failing(None, PANIC, lambda _: True))
    assert "error: tokenizer.json cannot be used: no char boundary" in refused(command, capsys)


def test_tokenizing(command, reason, monkeypatch, capsys):
    name = "mdl_toolkit.data.tokenization.ChatTokenizer.encode"
    monkeypatch.setattr(name, failing(None, reason, lambda _: True))
    assert f"): {reason}" in refused(command, capsys)
