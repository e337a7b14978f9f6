"""Inference that loses nothing: kept answers, rows without one, the training's prompts, several processes."""

import csv
import json
import os
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.data.convert import plan
from mdl_toolkit.data.convert import run as conversion
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, ModelError, RowsError, UsageError
from mdl_toolkit.inference import engines
from mdl_toolkit.inference import run as inference
from mdl_toolkit.inference.choices import Chooser
from mdl_toolkit.inference.generate import Answerer, Question
from mdl_toolkit.inference.journal import AnswerJournal, AnswerWriter
from mdl_toolkit.inference.requests import WINDOW
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.run import train
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.fleet import fleet, slowly, start_ranks
from tests.support.runs import copy_checkpoint, files_below, make_csv, make_rows, train_options, write_csv
from tests.support.scoring import scored_slowly


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def options(source, model, output, **changes):
    settings = {"batch_size": 4, "max_length": 90, "num_workers": 1}
    return InferenceOptions(
        input=str(source), output=str(output), model_name=str(model), **{**settings, **changes}
    )


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stop_after(monkeypatch, count, problem=KeyboardInterrupt, kind=Answerer):
    """Let the engine fail when it has given so many answers; what it was asked is kept."""
    asked, answers = [], kind.answers

    def some(self, questions):
        def noted():
            for question in questions:
                asked.append(question.key)
                yield question

        for number, answer in enumerate(answers(self, noted())):
            if number == count:
                raise problem
            yield answer

    monkeypatch.setattr(kind, "answers", some)
    return asked


# --- the journal ---------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped_and_computes_no_row_twice(model, tmp_path, monkeypatch, capsys):
    source = make_csv(tmp_path, 14)
    whole = infer(options(source, model, tmp_path / "whole.csv"))
    with monkeypatch.context() as context:
        stop_after(context, 5)
        with pytest.raises(KeyboardInterrupt):
            infer(options(source, model, tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()
    kept = set(AnswerJournal(tmp_path / "out.csv").answers())
    assert len(kept) == 5
    assert "5 rows are answered" in capsys.readouterr().err
    asked = stop_after(monkeypatch, 99)
    assert infer(options(source, model, tmp_path / "out.csv", batch_size=3)) == whole
    assert sorted(asked) == sorted({*range(14)} - kept)
    assert "5 of 14 rows are answered already" in capsys.readouterr().err
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not [*tmp_path.glob(".out*")]


@pytest.mark.parametrize("change", ["prompt", "row", "audio", "length", "weights", "beams"])
def test_answers_of_another_run_are_not_taken_over(model, tmp_path, monkeypatch, change):
    rows = make_rows(tmp_path / "audio", 6)
    source = write_csv(tmp_path / "in.csv", rows)
    first = options(source, model, tmp_path / "out.csv")
    with monkeypatch.context() as context:
        stop_after(context, 3)
        with pytest.raises(KeyboardInterrupt):
            infer(first)
    later = first
    if change == "prompt":
        later = replace(first, system_prompt="Listen.")
    elif change == "row":
        rows[0]["user_prompt"] = "And this?"
        write_csv(source, rows)
    elif change == "audio":
        make_rows(tmp_path / "other", 1, seed=5)
        (tmp_path / "other/clip-5-0.wav").replace(rows[5]["audio"])
    elif change == "length":
        later = replace(first, max_length=80)
    elif change == "weights":
        os.utime(model / "model.safetensors", (0, 0))
    else:
        later = replace(first, temperature=1.5)
    asked = stop_after(monkeypatch, 99)
    infer(later)
    assert sorted(asked) == [*range(6)]


def stopped(monkeypatch, count, options, kind=Answerer):
    with monkeypatch.context() as context:
        stop_after(context, count, kind=kind)
        with pytest.raises(KeyboardInterrupt):
            infer(options)


PATHS = {"input": "in.csv", "model_name": "A-small", "output": "out.csv", "choices": "choices.txt"}
SPELLINGS = {  # the current directory, what stands before each path, and where recordings are looked for
    "a dot": (".", "./", None),
    "there and back": (".", "audio/../", None),
    "a link": (".", "link/", "link"),
    "another directory": ("audio", "../", ".."),
    "absolute paths": (".", "{}/", "{}"),
    "absolute paths by a link": ("audio", "{}/link/", "{}/link"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_work_spelt_otherwise_goes_on(model, tmp_path, monkeypatch, spelling):
    make_rows(tmp_path / "audio", 6)
    write_csv(tmp_path / "in.csv", [{"audio": f"audio/clip-0-{n}.wav", "user_prompt": "?"} for n in range(6)])
    (tmp_path / "choices.txt").write_text("rain\nclick\n", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    first = replace(options("in.csv", model, "out.csv"), **PATHS)
    stopped(monkeypatch, 3, first, Chooser)
    folder, before, base_dir = (each and each.format(tmp_path) for each in SPELLINGS[spelling])
    monkeypatch.chdir(folder)
    asked = stop_after(monkeypatch, 99, kind=Chooser)
    infer(replace(first, base_dir=base_dir, **{name: before + path for name, path in PATHS.items()}))
    assert len(asked) == 3
    assert len(table(tmp_path / "out.csv")) == 6
    assert not [*tmp_path.glob("*previous*")]


def test_prompts_that_say_the_same_go_on_and_an_input_that_is_spelt_otherwise(model, tmp_path, monkeypatch):
    """A prompt by its option or in the cells: the same question."""
    rows = make_rows(tmp_path / "audio", 6)
    write_csv(tmp_path / "in.csv", rows)
    stopped(monkeypatch, 3, options(tmp_path / "in.csv", model, tmp_path / "out.csv"))
    write_csv(tmp_path / "other.csv", [{**row, "user_prompt": "null"} for row in rows])
    asked = stop_after(monkeypatch, 99)
    infer(options(tmp_path / "other.csv", model, tmp_path / "out.csv", user_prompt="What is it?"))
    assert len(asked) == 3


def test_answers_of_other_work_are_set_aside_and_taken_up_again(model, tmp_path, monkeypatch, capsys):
    source, output = make_csv(tmp_path, 6), tmp_path / "out.csv"
    whole = infer(options(source, model, tmp_path / "whole.csv"))
    stopped(monkeypatch, 4, options(source, model, output))
    (kept,) = [file.read_bytes() for file in (tmp_path / ".out.csv.partial").glob("answers-*.jsonl")]
    capsys.readouterr()
    infer(options(source, model, output, system_prompt="Listen."))
    place = tmp_path / "out.csv.previous-1"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if str(place) in line]
    assert "4 answers" in line
    assert [file.read_bytes() for file in place.glob("answers-*.jsonl")] == [kept]
    assert len(table(output)) == 6
    asked = stop_after(monkeypatch, 99)
    assert infer(options(source, model, output)) == whole
    assert len(asked) == 2
    assert "4 of 6 rows are answered already" in capsys.readouterr().err
    assert not place.exists()


def test_answers_are_set_aside_beside_earlier_ones(model, tmp_path, monkeypatch):
    source, output = make_csv(tmp_path, 4), tmp_path / "out.csv"
    for seed in range(3):
        stopped(monkeypatch, 2, options(source, model, output, seed=seed))
    infer(options(source, model, output, seed=3))
    places = sorted(path.name for path in tmp_path.glob("out.csv.previous-*"))
    assert places == [f"out.csv.previous-{number}" for number in (1, 2, 3)]
    assert all(len([*(tmp_path / name).glob("answers-*.jsonl")]) == 1 for name in places)


def test_answers_outlive_an_input_without_rows(model, tmp_path, monkeypatch):
    source, output = make_csv(tmp_path, 4), tmp_path / "out.csv"
    stopped(monkeypatch, 2, options(source, model, output))
    (tmp_path / "empty.csv").write_text("audio\n", encoding="utf-8")
    assert infer(options(tmp_path / "empty.csv", model, output)) == []
    asked = stop_after(monkeypatch, 99)
    infer(options(source, model, output))
    assert len(asked) == 2


def test_answers_of_another_model_with_names_sizes_and_times_alike_are_not_taken_over(
    model, tmp_path, monkeypatch
):
    """As of two results of one training that were unpacked from an archive."""
    source, output = make_csv(tmp_path, 4), tmp_path / "out.csv"
    stopped(monkeypatch, 2, options(source, model, output))
    file = model / "model.safetensors"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-4:] = b"\0\0\0\0"
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    asked = stop_after(monkeypatch, 99)
    infer(options(source, model, output))
    assert sorted(asked) == [*range(4)]


def test_a_line_that_was_not_finished_is_answered_again(model, tmp_path, monkeypatch):
    source = make_csv(tmp_path, 6)
    whole = infer(options(source, model, tmp_path / "whole.csv"))
    with monkeypatch.context() as context:
        stop_after(context, 4)
        with pytest.raises(KeyboardInterrupt):
            infer(options(source, model, tmp_path / "out.csv"))
    (file,) = AnswerJournal(tmp_path / "out.csv").path.glob("answers-*.jsonl")
    text = file.read_text(encoding="utf-8").rstrip("\n")
    file.write_text(text[:-5], encoding="utf-8")
    asked = stop_after(monkeypatch, 99)
    assert infer(options(source, model, tmp_path / "out.csv")) == whole
    assert len(asked) == 3


def test_two_runs_into_one_output(model, tmp_path):
    journal = AnswerJournal(tmp_path / "out.csv")
    with journal.locked(), pytest.raises(InputError, match="another inference is writing it"):
        infer(options(make_csv(tmp_path, 2), model, tmp_path / "out.csv"))
    assert journal.path.exists()


def test_a_failure_before_the_first_answer_leaves_nothing(model, tmp_path, monkeypatch):
    stop_after(monkeypatch, 0, RuntimeError("broken"))
    source = make_csv(tmp_path, 3)
    before = files_below(tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        infer(options(source, model, tmp_path / "new/out.csv"))
    assert files_below(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_the_first_answer_comes_within_two_batches(model, tmp_path, monkeypatch):
    """However many rows there are; each window is a part of the file."""
    rows = make_rows(tmp_path / "audio", 12) * 20
    source = write_csv(tmp_path / "in.csv", rows)
    asked = stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        infer(options(source, model, tmp_path / "out.csv", max_new_tokens=9))
    assert len(asked) <= 2 * 4
    assert max(asked) < WINDOW * 4


def test_what_a_csv_cannot_hold_is_not_written(model, tmp_path, monkeypatch):
    """A byte-level tokenizer has a token for NUL, and our own reader refuses a file with one."""
    monkeypatch.setattr(ChatTokenizer, "decode", lambda *_: "a\0b")
    source = make_csv(tmp_path, 2)
    assert infer(options(source, model, source)) == ["a\N{REPLACEMENT CHARACTER}b"] * 2
    assert infer(options(source, model, source)) == ["a\N{REPLACEMENT CHARACTER}b"] * 2


def test_an_output_that_a_killed_run_has_half_written_is_removed(model, tmp_path):
    source = make_csv(tmp_path, 2)
    (tmp_path / ".out.csv.partial-0123abcd").write_text("half")
    infer(options(source, model, tmp_path / "out.csv"))
    assert not [*tmp_path.glob(".out*")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_stops_it_and_it_says_how_to_go_on(model, tmp_path, number, ranks):
    whole = infer(options(make_csv(tmp_path, 9), model, tmp_path / "whole.csv"))
    words = shlex.split(as_command(options(tmp_path / "train.csv", model, tmp_path / "out.csv")))[1:]
    journal = AnswerJournal(tmp_path / "out.csv")
    with fleet(tmp_path) as start:
        jobs = start_ranks(start, words, ranks, slow_answers) if ranks > 1 else [start(words, slow_answers)]
        assert jobs[0].until(journal.answers)
        for job in jobs:
            job.signal(number)
            job.signal(signal.SIGTERM)  # what a launcher passes on
        assert [job.end() for job in jobs] == [130] * ranks, [job.said() for job in jobs]
    kept = journal.answers()
    assert 0 < len(kept) < 9
    assert jobs[0].said().splitlines()[-2:] == [
        f"{len(kept)} rows are answered (in {journal.path}): the same command goes on from there",
        "interrupted",
    ]
    assert infer(options(tmp_path / "train.csv", model, tmp_path / "out.csv")) == whole


def slow_answers():
    """Let each answer wait before it is written down."""
    slowly(AnswerWriter, "add", 0.3)


def test_converted_rows_are_kept_when_it_is_stopped_before_the_first_answer(
    model, tmp_path, monkeypatch, capsys
):
    given = options(make_csv(tmp_path, 3), model, tmp_path / "out.csv")
    with monkeypatch.context() as context:
        stop_after(context, 0)
        with pytest.raises(KeyboardInterrupt):
            infer(given)
    journal = AnswerJournal(tmp_path / "out.csv")
    assert f"all rows are converted (in {journal.path})" in capsys.readouterr().err
    monkeypatch.setattr(conversion, "write_metadata", None)  # nothing is converted any more
    infer(given)
    assert not journal.path.exists()


def test_what_a_conversion_says_it_keeps_is_kept(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "PIECE_ROWS", 2)
    monkeypatch.setattr(plan, "FEWEST_BYTES", 1)
    given = options(make_csv(tmp_path, 6), model, tmp_path / "out.csv")
    with monkeypatch.context() as context:
        context.setattr(conversion, "write_metadata", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            infer(given)
    assert "6 of 6 rows are finished" in capsys.readouterr().err
    infer(given)
    assert "going on from an earlier run: 6 of 6 rows are converted" in capsys.readouterr().err


def test_answers_are_kept_until_the_report_is_written(model, tmp_path, monkeypatch):
    given = options(make_csv(tmp_path, 3), model, tmp_path / "out.csv", report=str(tmp_path / "page.html"))
    with monkeypatch.context() as context:
        context.setattr(inference, "report_answers", raising(InputError("full")))
        with pytest.raises(InputError, match="full"):
            infer(given)
    asked = stop_after(monkeypatch, 99)
    infer(given)
    assert not asked
    assert (tmp_path / "page.html").exists()
    assert not [*tmp_path.glob(".out*")]


def raising(problem):
    def fail(*_):
        raise problem

    return fail


# --- rows without an answer ----------------------------------------------------------------------------


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


# --- what is asked -------------------------------------------------------------------------------------


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
        assert bad.startswith(f"  '{tmp_path}/clips/a.wav': ")
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
    assert "1 rows have another one than the training (line 4: 'Something else'" in capsys.readouterr().err


# --- engines -------------------------------------------------------------------------------------------


def test_drawn_answers_depend_on_the_seed_and_not_on_the_batch(model, tmp_path):
    source = make_csv(tmp_path, 6)
    drawn = {
        (seed, size): infer(
            options(source, model, tmp_path / "out.csv", temperature=1.0, seed=seed, batch_size=size)
        )
        for seed, size in [(1, 1), (1, 5), (2, 5)]
    }
    assert drawn[1, 1] == drawn[1, 5] != drawn[2, 5]


def test_beams_find_what_transformers_finds_for_each_row_alone(model, tmp_path):
    source = make_csv(tmp_path, 7)
    found = infer(options(source, model, tmp_path / "out.csv", num_beams=3))
    for number, row in enumerate(table(source)):
        single = write_csv(tmp_path / "single.csv", [row])
        assert infer(options(single, model, tmp_path / "s.csv", num_beams=3)) == [found[number]]
    assert found != infer(options(source, model, tmp_path / "greedy.csv"))


@pytest.mark.parametrize("by_length", [False, True])
def test_choices_are_those_a_plain_loop_finds_best(model, tmp_path, by_length):
    texts = ["rain", "a dog that barks and barks", "click", "狗在叫"]
    (tmp_path / "choices.txt").write_text("\n".join([*texts, "", " "]), encoding="utf-8-sig")
    source = make_csv(tmp_path, 5)
    changes = {"choices": str(tmp_path / "choices.txt"), "top_k": 3, "normalize_scores": by_length}
    found = infer(options(source, model, tmp_path / "out.csv", **changes))
    rows = table(tmp_path / "out.csv")
    assert [row["prediction"] for row in rows] == found
    assert list(rows[0])[-6:] == ["prediction", "score", "prediction_2", "score_2", "prediction_3", "score_3"]
    convert_dataset(ConvertOptions(input=str(source), output=str(tmp_path / "d"), model_name=str(model)))
    dataset, tokenizer = ConvertedDataset(tmp_path / "d"), ChatTokenizer(read_tokenizer_files(model))
    loaded = load_model(model, dtype=torch.float32, device=torch.device("cpu")).eval()
    for number, row in enumerate(rows):
        sample = dataset[number]
        prompt = int((sample.labels == -100).sum()) - 1  # the newline after the answer is no prompt
        bare = replace(sample, input_ids=sample.input_ids[:prompt], labels=sample.labels[:prompt])
        scores = {}
        for text in texts:
            ids = tokenizer.answer_ids(text)
            total = scored_slowly(loaded, Question(0, bare, 1), ids)
            scores[text] = total / len(ids) if by_length else total
        best = sorted(scores, key=lambda text: -scores[text])[:3]
        assert [row["prediction"], row["prediction_2"], row["prediction_3"]] == best
        assert float(row["score"]) == pytest.approx(scores[best[0]], abs=2e-3)
    again = infer(options(source, model, tmp_path / "one.csv", **{**changes, "batch_size": 1}))
    assert again == found


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no such file"), ("one\n", "at least two"), ("a\nb\n a \n", "twice"), (b"\xff\xfe\xff", "UTF-8")],
)
def test_choices_that_cannot_be_used(model, tmp_path, text, words):
    file = tmp_path / "choices.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        infer(options(make_csv(tmp_path, 1), model, tmp_path / "out.csv", choices=str(file)))


def test_choices_too_long_for_a_row_s_room(model, tmp_path):
    """Not the prompt is too long, but it with the longest choice; what is asked for is the least."""
    choices = tmp_path / "choices.txt"
    choices.write_text("rain\na dog that barks\nclick\n")
    given = {"choices": str(choices)}
    source = make_csv(tmp_path, 1)
    with pytest.raises(RowsError, match="prompt alone") as caught:
        infer(options(source, model, tmp_path / "out.csv", max_length=5))
    alone = int(str(caught.value).rsplit(" ", 1)[1]) - 1
    with pytest.raises(RowsError, match="and the longest choice 'a dog that barks' [0-9]+ more; ") as caught:
        infer(options(source, model, tmp_path / "out.csv", max_length=alone + 1, **given))
    assert f"the prompt takes {alone} tokens and" in str(caught.value)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert least > alone + 3
    assert len(infer(options(source, model, tmp_path / "out.csv", max_length=least, **given))) == 1
    with pytest.raises(RowsError, match=f"--max-length {least - 1} must"):
        infer(options(source, model, tmp_path / "out.csv", max_length=least - 1, **given))
    with pytest.raises(InputError, match=f"--max-new-tokens 2: .* takes {least - alone} tokens"):
        infer(options(source, model, tmp_path / "out.csv", max_new_tokens=2, **given))
    assert len(infer(options(source, model, tmp_path / "o.csv", max_new_tokens=least - alone, **given))) == 1


@pytest.mark.parametrize("place", ["output", "report"])
def test_the_choices_are_not_written_over(model, tmp_path, place):
    file = tmp_path / "choices.txt"
    file.write_text("rain\nwind\n", encoding="utf-8")
    settings = options(make_csv(tmp_path, 1), model, tmp_path / "out.csv", choices=str(file))
    with pytest.raises(InputError, match=f"--{place} "):
        infer(replace(settings, **{place: str(file)}))
    assert file.read_text(encoding="utf-8") == "rain\nwind\n"


def test_choices_need_room_for_the_longest(model, tmp_path):
    (tmp_path / "choices.txt").write_text("rain\n" + "a very long answer " * 5 + "\n", encoding="utf-8")
    with pytest.raises(RowsError, match="must be at least") as caught:
        infer(
            options(make_csv(tmp_path, 1), model, tmp_path / "o.csv", choices=str(tmp_path / "choices.txt"))
        )
    least = int(str(caught.value).rsplit(" ", 1)[1])
    settings = options(
        tmp_path / "train.csv", model, tmp_path / "o.csv", choices=str(tmp_path / "choices.txt")
    )
    assert len(infer(replace(settings, max_length=least))) == 1
    with pytest.raises(RowsError):
        infer(replace(settings, max_length=least - 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "--num-beams and --temperature"),
        ({"choices": "c.txt", "temperature": 0.5}, "--choices and --temperature"),
        ({"choices": "c.txt", "num_beams": 2}, "--choices and --num-beams"),
        ({"engine": "vllm", "choices": "c.txt"}, "--engine vllm and --choices"),
        ({"engine": "vllm", "num_beams": 2}, "--engine vllm and --num-beams"),
        ({"top_k": 2}, "--top-k has no effect without --choices"),
        ({"normalize_scores": True}, "--normalize-scores has no effect without --choices"),
        ({"top_p": 0.5}, "--top-p has no effect without --temperature"),
    ],
)
def test_options_that_do_not_go_together(model, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        infer(options(tmp_path / "in.csv", model, tmp_path / "out.csv", **changes))


def test_vllm_has_to_be_installed(model, tmp_path):
    with pytest.raises(ModelError, match=r"mdl-toolkit\[vllm\]"):
        infer(options(tmp_path / "in.csv", model, tmp_path / "out.csv", engine="vllm"))


def test_vllm_is_given_prompts_with_one_mark_for_each_recording(model, tmp_path, monkeypatch):
    """A stand-in for vLLM, which cannot be run here: what it is called with, and where its answers go."""
    calls = []

    class Llm:
        def __init__(self, **settings):
            calls.append(settings)

        def generate(self, prompts, settings):
            calls.append((prompts, settings))
            answers = [f"answer of {setting['max_tokens']}" for setting in settings]
            return [type("Output", (), {"outputs": [type("One", (), {"text": text})]}) for text in answers]

    stand_in = type(sys)("vllm")
    stand_in.LLM, stand_in.SamplingParams = Llm, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(engines, "require_package", lambda *_: None)
    source = make_csv(tmp_path, 2)
    answers = infer(options(source, model, tmp_path / "out.csv", engine="vllm", max_new_tokens=5))
    assert answers == ["answer of 5"] * 2
    made, (prompts, settings) = calls
    assert made["model"] == str(model)
    assert made["trust_remote_code"] is False
    mark = json.loads((model / "config.json").read_text())["audio_token_id"]
    for prompt in prompts:
        assert prompt["prompt_token_ids"].count(mark) == 1
        assert prompt["multi_modal_data"]["audio"][1] == 16_000
    assert settings[0]["temperature"] == 0.0


# --- several processes ---------------------------------------------------------------------------------


def test_two_processes_divide_the_rows_and_write_one_output(model, tmp_path):
    source = make_csv(tmp_path, 11)
    expected = infer(options(source, model, tmp_path / "one.csv"))
    words = shlex.split(as_command(options(source, model, tmp_path / "two.csv")))[1:]
    with fleet(tmp_path) as start:
        ranks = start_ranks(start, words, 2)
        assert [rank.end() for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    assert [row["prediction"] for row in table(tmp_path / "two.csv")] == expected
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert not [*tmp_path.glob(".two*")]
