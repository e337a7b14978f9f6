"""Rows to answer: those without an answer, folders of recordings, and the prompts of the training."""

import re
from pathlib import Path

import pytest

from mdl_toolkit.data.convert import run as conversion
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, RowsError
from mdl_toolkit.inference.journal import AnswerJournal
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.run import train
from tests.support.inferences import infer_options as options
from tests.support.inferences import stop_after, table
from tests.support.runs import copy_checkpoint, files_below, make_csv, make_rows, train_options, write_csv


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def spoil(tmp_path):
    """Nine rows: one of text, one that is missing, one without a path, one too long, five good ones."""
    rows = [{"id": str(number), **row} for number, row in enumerate(make_rows(tmp_path / "audio", 9))]
    (tmp_path / "text.wav").write_text("this is text")
    rows[1]["audio"] = str(tmp_path / "text.wav")
    rows[3]["audio"] = str(tmp_path / "missing.wav")
    rows[6]["audio"] = ""
    rows[7]["user_prompt"] = "long " * 80
    return rows


def test_kept_rows_say_why_they_have_no_answer(model, tmp_path, capsys):
    rows = spoil(tmp_path)
    good = [row for number, row in enumerate(rows) if number not in (1, 3, 6, 7)]
    expected = infer(options(write_csv(tmp_path / "good.csv", good), model, tmp_path / "good-out.csv"))
    source = write_csv(tmp_path / "in.csv", rows)
    with pytest.raises(InputError, match="4 of its rows have no prediction"):
        infer(options(source, model, tmp_path / "out.csv", on_error="keep"))
    assert f"{tmp_path / 'out.csv'}: 5 predictions, 4 rows without one\n" in capsys.readouterr().err
    found = table(tmp_path / "out.csv")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["prediction"] for row in found if not row["error"]] == expected
    reasons = {number: row["error"] for number, row in enumerate(found) if row["error"]}
    assert {*reasons} == {1, 3, 6, 7}
    assert all(not found[number]["prediction"] for number in reasons)
    for number, words in {1: "not a recording", 3: "not found", 6: "empty", 7: "at least"}.items():
        assert words in reasons[number]
    assert not [*tmp_path.glob(".out*")]


def test_kept_rows_are_not_decoded_again_when_a_run_goes_on(model, tmp_path, monkeypatch):
    source = write_csv(tmp_path / "in.csv", spoil(tmp_path))
    kept = options(source, model, tmp_path / "out.csv", on_error="keep")
    with monkeypatch.context() as context:
        stop_after(context, 2)
        with pytest.raises(KeyboardInterrupt):
            infer(kept)
    journal = AnswerJournal(tmp_path / "out.csv")
    stamp = (journal.dataset / "state.json").stat().st_mtime_ns
    stop_after(monkeypatch, 3, RuntimeError)  # three are left, and this would be the fourth
    with pytest.raises(InputError, match="4 of its rows"):
        infer(kept)
    assert not journal.path.exists()
    assert stamp


def test_a_run_that_was_killed_while_it_removed_its_dataset(model, tmp_path, monkeypatch):
    """All that is left of it looks whole, but the list of rows that it left out is gone."""
    given = options(
        write_csv(tmp_path / "in.csv", spoil(tmp_path)), model, tmp_path / "out.csv", on_error="keep"
    )
    with monkeypatch.context() as context:
        stop_after(context, 2)
        with pytest.raises(KeyboardInterrupt):
            infer(given)
    (AnswerJournal(tmp_path / "out.csv").dataset / conversion.LEFT_OUT_FILE).unlink()
    with pytest.raises(InputError, match="4 of its rows"):
        infer(given)


def test_stopping_is_the_default_and_leaves_nothing(model, tmp_path):
    source = write_csv(tmp_path / "in.csv", spoil(tmp_path))
    before = files_below(tmp_path)
    with pytest.raises(RowsError) as caught:
        infer(options(source, model, tmp_path / "out.csv"))
    assert [problem.line for problem in caught.value.problems] == [3, 5, 8]
    assert files_below(tmp_path) == before


def test_keeping_with_nothing_wrong_has_an_empty_column(model, tmp_path, capsys):
    source = make_csv(tmp_path, 2)
    plain = infer(options(source, model, tmp_path / "plain.csv"))
    assert ": 2 predictions\n" in capsys.readouterr().err
    assert infer(options(source, model, tmp_path / "out.csv", on_error="keep")) == plain
    assert [row["error"] for row in table(tmp_path / "out.csv")] == ["", ""]


def test_keeping_with_nothing_right(model, tmp_path):
    rows = [row for number, row in enumerate(spoil(tmp_path)) if number in (1, 3)]
    with pytest.raises(InputError, match="2 of its rows have no prediction"):
        infer(options(write_csv(tmp_path / "in.csv", rows), model, tmp_path / "out.csv", on_error="keep"))
    assert all(row["error"] for row in table(tmp_path / "out.csv"))


def test_rows_whose_cells_are_wrong_cannot_be_kept(model, tmp_path):
    row = make_rows(tmp_path / "audio", 1)[0]
    source = tmp_path / "in.csv"
    source.write_text(f"audio,id\n{row['audio']},1\n{row['audio']},2,3\n", encoding="utf-8")
    with pytest.raises(RowsError, match="3 cells"):
        infer(options(source, model, tmp_path / "out.csv", on_error="keep"))
    assert not (tmp_path / "out.csv").exists()


def test_bad_recordings_of_a_folder_are_told_as_those_of_the_folder(model, tmp_path):
    make_rows(tmp_path / "clips", 1)
    (tmp_path / "clips/a.wav").write_text("no sound", encoding="utf-8")
    for given in (tmp_path / "clips", tmp_path / "clips/*.wav"):
        with pytest.raises(RowsError) as caught:
            infer(options(given, model, tmp_path / "out.csv"))
        head, bad = caught.value.message.en.splitlines()
        assert head == f"{given}: 1 bad file(s):"
        assert bad.startswith(f"  '{tmp_path}/clips/a.wav': this is a text file")
        head, bad = caught.value.message.zh.splitlines()
        assert head == f"{given}：1 个文件有问题："
        assert bad.startswith(f"  '{tmp_path}/clips/a.wav'：")
    with pytest.raises(RowsError) as caught:  # too long, which is known later
        infer(options(tmp_path / "clips/clip*", model, tmp_path / "out.csv", max_length=3))
    assert caught.value.message.en.splitlines()[1].startswith(
        f"  '{tmp_path}/clips/clip-0-0.wav': the prompt"
    )


def test_warnings_about_a_folder_name_no_line_of_a_list_that_nobody_has_seen(model, tmp_path, capsys):
    rows = make_rows(tmp_path / "clips", 2)
    cut = Path(rows[0]["audio"])
    final = train(train_options(write_csv(tmp_path / "t.csv", rows), model, tmp_path / "run")).final
    cut.write_bytes(cut.read_bytes()[:-2000])
    capsys.readouterr()
    given = {"user_prompt": "And now?", "allow_truncated": True}
    infer(options(tmp_path / "clips", final, tmp_path / "out.csv", **given))
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    prompts, truncated = warned
    assert truncated.startswith(f"warning: {cut}: ")
    assert "2 rows have another one than the training (here: 'And now?'; the training: " in prompts
    assert not any(re.search(r"\bline \d", line) for line in warned)


def test_a_folder_or_a_pattern_of_recordings(model, tmp_path):
    rows = make_rows(tmp_path / "clips", 3)
    (tmp_path / "clips/deep").mkdir()
    Path(rows[2]["audio"]).rename(tmp_path / "clips/deep/third.WAV")
    (tmp_path / "clips/notes.txt").write_text("not a recording")
    names = ("clip-0-0.wav", "clip-0-1.wav", "deep/third.WAV")
    listed = [{"audio": str(tmp_path / "clips" / name)} for name in names]
    by_hand = write_csv(tmp_path / "in.csv", listed)
    expected = infer(options(by_hand, model, tmp_path / "hand.csv", user_prompt="What is it?"))
    found = infer(options(tmp_path / "clips", model, tmp_path / "a.csv", user_prompt="What is it?"))
    assert found == expected
    assert table(tmp_path / "a.csv") == table(tmp_path / "hand.csv")
    pattern = infer(options(tmp_path / "clips/*.wav", model, tmp_path / "b.csv", user_prompt="What is it?"))
    assert pattern == expected[:2]
    with pytest.raises(InputError, match="holds no recordings"):
        infer(options(tmp_path / "clips/*.flac", model, tmp_path / "c.csv"))
    assert not (tmp_path / "c.csv").exists()


def test_as_many_new_tokens_whatever_the_prompt(model, tmp_path, monkeypatch):
    kept, decode = [], ChatTokenizer.decode
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: kept.append(len(ids)) or decode(self, ids))
    monkeypatch.setattr("mdl_toolkit.inference.generate.end_ids", lambda *_: set())
    rows = make_rows(tmp_path / "audio", 3)
    rows[1]["user_prompt"] = "What is it? " * 40
    source = write_csv(tmp_path / "in.csv", rows)
    infer(options(source, model, tmp_path / "out.csv", max_length=5, max_new_tokens=7))
    assert kept == [7, 7, 7]


def test_the_prompts_of_the_training(model, tmp_path, capsys):
    rows = make_rows(tmp_path / "audio", 4)
    final = train(train_options(write_csv(tmp_path / "t.csv", rows), model, tmp_path / "run")).final
    bare = write_csv(tmp_path / "bare.csv", [{"audio": row["audio"]} for row in rows])
    told = write_csv(tmp_path / "told.csv", rows)
    capsys.readouterr()
    expected = infer(options(told, final, tmp_path / "1.csv"))
    assert "training" not in capsys.readouterr().err
    assert infer(options(bare, final, tmp_path / "2.csv")) == expected
    said = capsys.readouterr().err
    assert "user prompt: that of the training is used: 'What is it?'" in said
    infer(options(bare, final, tmp_path / "3.csv", user_prompt="And now?"))
    assert "warning: user prompt: 4 rows have another one than the training" in capsys.readouterr().err
    rows[2]["user_prompt"] = "Something else"
    infer(options(write_csv(tmp_path / "told.csv", rows), final, tmp_path / "4.csv"))
    assert "1 row has another one than the training (line 4: 'Something else'" in capsys.readouterr().err
