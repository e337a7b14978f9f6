"""What `--report-to` leaves behind: for tensorboard, event files with the very figures of log.jsonl."""

import errno
import json
import os
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.errors import InputError, ToolkitError
from mdl_toolkit.training.run import train
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.training.trackers import Trackers, check_trackers
from mdl_toolkit.utils.run_folder import read_log
from tests.support.fleet import fleet, slow_steps, start_ranks
from tests.support.paths import MODEL
from tests.support.runs import files_below, make_csv, train_options

# What a tensorboard series holds, by its name there.
SERIES = {
    "train/loss": "loss", "train/grad_norm": "grad_norm", "train/learning_rate": "learning_rate",
    "eval/loss": "eval_loss", "eval/tokens": "eval_tokens",
}  # fmt: skip


@pytest.fixture
def options(tmp_path):
    csv = make_csv(tmp_path, 14)
    return train_options(
        csv, MODEL, tmp_path / "run", report_to=("tensorboard",), batch_size=2, save_steps=0,
        eval_dataset=str(csv), eval_steps=3,
    )  # fmt: skip


def events_of(output):
    """The only folder of event files in a run's folder."""
    files = [name for name in files_below(output) if "tfevents" in name]
    (folder,) = {Path(name).parent for name in files}
    events = EventAccumulator(str(output / folder))
    events.Reload()
    return events


def check_figures(output):
    events, lines = events_of(output), read_log(output / "log.jsonl")
    for series, name in SERIES.items():
        logged = [(line["step"], line[name]) for line in lines if name in line]
        shown = [(event.step, event.value) for event in events.Scalars(series)]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        assert [value for _, value in shown] == pytest.approx([value for _, value in logged], rel=1e-6)


def test_tensorboard_has_the_figures_of_the_log(options):
    train(options)
    output = Path(options.output)
    assert len(read_log(output / "log.jsonl")) == 7 + 3
    check_figures(output)
    text = events_of(output).Tensors("args/text_summary")[0].tensor_proto.string_val[0]
    settings = json.loads(text)
    assert settings["learning_rate"] == options.lr
    assert settings["per_device_train_batch_size"] == 2
    assert settings["max_steps"] == 7


def test_a_stopped_run_has_told_all_that_it_has_logged(options, tmp_path):
    """Writers keep figures back for a while; whoever stops a run wants to see all of them."""
    with fleet(tmp_path) as start:
        job = start(as_command(options).split()[1:], partial(slow_steps, 0.2))
        log = Path(options.output, "log.jsonl")
        assert job.until(lambda: log.exists() and len(read_log(log)) >= 4)
        job.signal(signal.SIGTERM)
        assert job.end() == 130
    check_figures_so_far(Path(options.output))


def check_figures_so_far(output):
    logged = [line["step"] for line in read_log(output / "log.jsonl") if "loss" in line]
    assert [event.step for event in events_of(output).Scalars("train/loss")] == logged


def test_of_two_processes_only_the_first_reports(options, tmp_path):
    with fleet(tmp_path) as start:
        jobs = start_ranks(start, [*as_command(options).split()[1:], "--batch-size", "1"])
        assert [job.end() for job in jobs] == [0, 0], [job.said() for job in jobs]
    check_figures(Path(options.output))


def test_trackio_has_the_figures_of_the_log(options, tmp_path):
    """It keeps a database of its own, and asks nobody for anything."""
    with fleet(tmp_path) as start:
        words = as_command(replace(options, report_to=("trackio",))).split()[1:]
        job = start(words, TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
        assert job.end() == 0, job.said()
    (database,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        told = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    lines = read_log(Path(options.output, "log.jsonl"))
    assert [row["train/global_step"] for row in told] == [line["step"] for line in lines]
    for row, line in zip(told, lines, strict=True):
        figures = {series: line[name] for series, name in SERIES.items() if name in line}
        assert {series: row[series] for series in figures} == pytest.approx(figures)


@pytest.mark.parametrize("event", ["on_log", "on_train_end"])
def test_a_tracker_that_fails_does_not_end_a_training(options, tmp_path, monkeypatch, capsys, event):
    """A full disk, a network that is gone: said once."""
    from transformers.integrations import TensorBoardCallback

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    assert train(options).final.is_dir()
    said = [line for line in capsys.readouterr().err.splitlines() if "--report-to" in line]
    assert said == [
        "warning: --report-to: No space left on device; nothing more is reported, training goes on"
    ]


@pytest.mark.parametrize("event", ["__init__", "on_train_begin"])
def test_a_tracker_that_cannot_begin_is_named_before_the_first_step(options, tmp_path, monkeypatch, event):
    """One that wants to be logged in to, for example."""
    from transformers.integrations import TensorBoardCallback

    def fail(*_, **__):
        raise ValueError("api_key not configured")

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    with pytest.raises(ToolkitError) as refused:
        train(options)
    told = "--report-to tensorboard: api_key not configured; log in, choose its offline mode, or leave it out"
    assert refused.value.message.en == told
    assert refused.value.message.zh.startswith("--report-to tensorboard：api_key not configured；请登录")
    assert not (tmp_path / "run/log.jsonl").exists()


def test_what_a_tracker_wrote_moves_with_its_run(options):
    output = Path(options.output)
    train(options)
    before = {name for name in files_below(output) if name.startswith("runs/")}
    train(options)
    after = files_below(output)
    assert before
    assert {
        name.removeprefix("previous-1/") for name in after if name.startswith("previous-1/runs/")
    } == before
    new = {name for name in after if name.startswith("runs/")}
    assert len(new) == 1
    assert not new & before
    check_figures_of(output / "runs")


def check_figures_of(runs):
    """Of the new run alone."""
    assert len([*runs.glob("*/events.out.tfevents.*")]) == 1


def test_a_folder_of_that_name_that_is_another_stays(options):
    output = Path(options.output)
    (output / "runs").mkdir(parents=True)
    (output / "runs/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="runs is there, which train did not write"):
        train(replace(options, report_to=()))
    assert files_below(output) == {"runs/mine.txt"}


@pytest.mark.parametrize("names", ["null", "none", ("null",), None, ()])
def test_null_reports_to_nobody(tmp_path, names):
    options = TrainOptions(train_dataset="d", output=str(tmp_path), report_to=names)
    assert options.report_to in ((), ("none",))
    check_trackers(options.report_to)


def test_a_tracker_is_told_also_of_a_run_that_fails(options, monkeypatch):
    """Otherwise it would show it as running, or as crashed."""
    from transformers.integrations import TensorBoardCallback

    told = []
    monkeypatch.setattr(TensorBoardCallback, "on_train_end", lambda *_, **__: told.append("end"))
    monkeypatch.setattr(ForwardPass, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(options)
    assert told == ["end"]


@pytest.mark.parametrize("names", [(), ("none",)])
def test_by_default_nothing_is_reported(tmp_path, names):
    options = train_options(make_csv(tmp_path, 4), MODEL, tmp_path / "run", report_to=names)
    train(options)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".mdl-toolkit-files.json", "checkpoint-1", "final", "log.jsonl", "loss.png", "mdl-toolkit.json",
        "mdl-toolkit.yaml",
        "report.html",
    ]  # fmt: skip


def test_all_are_those_that_are_installed(tmp_path, monkeypatch):
    """The names are those of transformers, so that a new one there is one here."""
    from transformers.integrations import integration_utils

    made = []

    class Spy:
        def __getattr__(self, name):
            return lambda *_, **__: made.append(name)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "spy", Spy)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["spy"])
    trackers = Trackers(TrainOptions(train_dataset="d", output=str(tmp_path), report_to=("all",)), 5)
    trackers.log(1, {"loss": 2.0})
    trackers.close()
    assert [name for name in made if name in ("on_train_begin", "on_log", "on_train_end")] == [
        "on_train_begin", "on_log", "on_train_end"
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []
