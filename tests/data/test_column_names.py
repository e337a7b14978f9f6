"""Columns that were meant and are misnamed are read, or named at the start; others are named once."""

from pathlib import Path

import pytest

from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.data.manifest import read_manifest


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Return what is said of a header, and the columns as they are understood."""
    monkeypatch.chdir(tmp_path)

    def said(header: str, *, needs_prediction: bool = True) -> tuple[str, tuple[str, ...]]:
        Path("x.csv").write_text(f"{header}\n", encoding="utf-8")
        manifest = read_manifest("x.csv", ConversionOptions(), needs_prediction=needs_prediction)
        return capsys.readouterr().err, manifest.columns

    return said


@pytest.mark.parametrize(
    "name", ["User_Prompt", " user_prompt", "user_prompt ", "USER PROMPT", "user-prompt", "User Prompt\u3000"]
)
def test_case_and_white_space_are_forgiven(said, name):
    heard, columns = said(f"audio,{name},prediction")
    assert columns == ("audio", "user_prompt", "prediction")
    assert heard == f"x.csv: the column {name!r} is read as user_prompt\n"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("prompt", "user_prompt"), ("Prompt", "user_prompt"), ("question", "user_prompt"),
        ("instruction", "user_prompt"), ("text", "user_prompt"), ("userprompt", "user_prompt"),
        ("user_promt", "user_prompt"), ("system", "system_prompt"), ("sytem_prompt", "system_prompt"),
    ],
)  # fmt: skip
def test_a_column_that_may_be_meant_is_warned_of(said, name, meant):
    heard, columns = said(f"audio,{name},prediction")
    assert columns == ("audio", name, "prediction")
    expected = f"x.csv: columns that are not read: {name!r} (did you mean {meant}?)\n"
    assert heard == f"warning: {expected}"


def test_a_column_of_that_name_is_not_meant_again(said):
    heard, columns = said("audio,User_Prompt,user_prompt,prompt,prediction,label,id")
    assert columns == ("audio", "User_Prompt", "user_prompt", "prompt", "prediction", "label", "id")
    assert heard == "x.csv: columns that are not read: 'User_Prompt', 'prompt', 'label', 'id'\n"


def test_what_was_written_by_an_inference_is_known(said):
    header = "audio,user_prompt,prediction,score,prediction_2,score_2,error"
    assert said(header)[0] == ""


def test_an_inference_keeps_what_looks_like_a_prediction(said):
    heard, columns = said("audio,Prediction,label", needs_prediction=False)
    assert columns == ("audio", "Prediction", "label")
    assert heard == "x.csv: columns that are not read: 'Prediction', 'label'\n"


def test_a_header_of_thousands_is_named_in_part(said):
    heard, _ = said(",".join(["audio", "prediction", *(f"feature {n}" for n in range(10_000))]))
    assert len(heard) < 500
    assert heard.endswith("'feature 19', 9980 more\n")
