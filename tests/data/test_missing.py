"""A recording that is there under another spelling or in another folder is found for the user."""

import unicodedata

import pytest

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.errors import RowProblem


def reason(folder, cell: str, base_dir: str | None = None) -> str:
    """What is said of the only row of a CSV in the folder `lists`."""
    path = folder / "lists" / "rows.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"audio,prediction\n{cell},x\n", encoding="utf-8")
    options = ConvertOptions(model_name="m", input=str(path), output="out", base_dir=base_dir)
    (problem,) = read_manifest(path, options, needs_prediction=True)
    assert isinstance(problem, RowProblem)
    assert problem.reason.zh != problem.reason.en
    return problem.reason.en


@pytest.mark.parametrize(("there", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_another_form(tmp_path, there, written):
    (tmp_path / unicodedata.normalize(there, "été.wav")).write_bytes(b"x")
    said = reason(tmp_path, unicodedata.normalize(written, "été.wav"), str(tmp_path))
    if "not found" in said:  # some file systems take both for one
        assert f"in another form of Unicode, {there}; " in said
        assert f"unicodedata.normalize('{there}', text)" in said


def test_a_name_that_is_too_long_in_another_form(tmp_path):
    """Sixty syllables of Hangul are 180 bytes, or 540 in NFD: longer than a file's name may be."""
    assert reason(tmp_path, "한" * 60 + ".wav", str(tmp_path)).startswith("not found (looked for ")


def test_backslashes(tmp_path):
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "a.wav").write_bytes(b"x")
    said = reason(tmp_path, "calls\\a.wav", str(tmp_path))
    assert said == f"not found, but {tmp_path}/calls/a.wav is there; write / in place of \\ in paths"


@pytest.mark.parametrize("cell", ["calls/a.wav", "calls\\a.wav"])
def test_beside_the_csv(tmp_path, monkeypatch, cell):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists" / "calls").mkdir(parents=True)
    (tmp_path / "lists" / "calls" / "a.wav").write_bytes(b"x")
    for base_dir in (None, "elsewhere"):
        said = reason(tmp_path, cell, base_dir)
        assert said.endswith(f", but it lies beside the CSV; add: --base-dir {tmp_path}/lists")


def test_nowhere(tmp_path):
    said = reason(tmp_path, "gone.wav", "data")
    assert said == "not found (looked for data/gone.wav); correct the path or --base-dir"
