"""The journal of answers: a run that was stopped goes on, and answers of other work are kept apart."""

import os
import shlex
import signal
from dataclasses import replace

import pytest

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.data.convert import plan
from mdl_toolkit.data.convert import run as conversion
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError
from mdl_toolkit.inference import run as inference
from mdl_toolkit.inference.choices import Chooser
from mdl_toolkit.inference.journal import AnswerJournal
from mdl_toolkit.inference.requests import WINDOW
from mdl_toolkit.inference.run import infer
from tests.support.fleet import fleet, slowly, start_ranks
from tests.support.inferences import infer_options as options
from tests.support.inferences import stop_after, stopped, table
from tests.support.runs import copy_checkpoint, files_below, make_csv, make_rows, write_csv


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


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
    with journal.locked():
        with pytest.raises(InputError, match="another inference is writing it"):
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
    rows = "1 row is" if len(kept) == 1 else f"{len(kept)} rows are"
    assert jobs[0].said().splitlines()[-2:] == [
        f"{rows} answered (in {journal.path}): the same command goes on from there",
        "interrupted",
    ]
    assert infer(options(tmp_path / "train.csv", model, tmp_path / "out.csv")) == whole


def slow_answers():
    """Let each answer wait before it is written down."""
    slowly(AnswerJournal, "add", 0.3)


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
    monkeypatch.setattr(plan, "CHUNK_ROWS", 2)
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
