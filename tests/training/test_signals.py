"""SIGTERM and SIGINT: a checkpoint after the step under way, then the end; once more, the end at once."""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.training import datasets as training_data
from mdl_toolkit.training import run as training
from mdl_toolkit.training import trainer
from mdl_toolkit.training.checkpoints import checkpoints, damage, to_resume
from mdl_toolkit.training.run import train
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.utils import signals as stopping
from mdl_toolkit.utils.run_folder import read_log
from tests.support.fleet import die_before, fleet, slow_steps, start_ranks
from tests.support.paths import MODEL
from tests.support.processes import wait_for
from tests.support.runs import STOPPING, evaluations, make_csv, train_options
from tests.support.weight_files import same_weights

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])


def options_of(place, output, **changes):
    settings = {"save_steps": 0, "batch_size": 2, "lora_dropout": 0.1, **changes}
    return train_options(place / "train.csv", MODEL, place / output, **settings)


def command(place, output, *words, **changes):
    return [*as_command(options_of(place, output, **changes)).split()[1:], *words]


def steps_in(place, output):
    log = place / output / "log.jsonl"
    return [line["step"] for line in read_log(log)] if log.exists() else []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, and in `whole` what an unbroken run of 8 steps makes of them."""
    folder = tmp_path_factory.mktemp("stopping")
    make_csv(folder, 16)
    train(options_of(folder, "whole"))
    return folder


@pytest.fixture
def start(tmp_path):
    with fleet(tmp_path) as start:
        yield start


# --- when a run stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["convert_rows", "read_manifest"])
def test_a_training_ends_although_a_callback_swallowed_the_signal(place, tmp_path, monkeypatch, moment):
    """As soundfile's does, while a recording is read."""
    monkeypatch.setattr(stopping, "SAME_REQUEST_SECONDS", 0.0)
    real = getattr(training_data, moment)

    def swallowing(*words, **more):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return real(*words, **more)

    monkeypatch.setattr(training_data, moment, swallowing)
    with pytest.raises(KeyboardInterrupt):
        train(options_of(place, tmp_path / "run"))
    assert steps_in(tmp_path, "run") == []


@BOTH
def test_the_step_under_way_is_the_last(place, tmp_path, monkeypatch, capsys, number):
    compute, calls = ForwardPass.loss, []

    def compute_and_signal(self, *words):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return compute(self, *words)

    monkeypatch.setattr(ForwardPass, "loss", compute_and_signal)
    options = train_options(place / "train.csv", MODEL, tmp_path / "run", batch_size=2, save_steps=0)
    with pytest.raises(KeyboardInterrupt):
        train(options)
    assert steps_in(tmp_path, "run") == [1, 2, 3]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    told = "stopped after step 3 of 8; to go on: --resume-from-checkpoint true"
    assert told in capsys.readouterr().err.splitlines()


def test_an_evaluation_is_given_up_and_made_later(place, tmp_path, monkeypatch):
    """Evaluating may take long, and whoever sends signals does not wait: it comes first after resuming."""
    settings = {"batch_size": 2, "eval_dataset": str(place / "train.csv"), "eval_steps": 3, "save_steps": 0}
    options = partial(train_options, place / "train.csv", MODEL, **settings)
    train(options(tmp_path / "whole"))
    compute, seen = ForwardPass.loss, []

    def compute_and_signal(self, batch, tokens):
        if not self.model.training:
            seen.append(steps_in(tmp_path, "run")[-1])
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, batch, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(ForwardPass, "loss", compute_and_signal)
        with pytest.raises(KeyboardInterrupt):
            train(options(tmp_path / "run"))
    assert seen == [3, 3]
    assert steps_in(tmp_path, "run") == [1, 2, 3]
    train(options(tmp_path / "run", resume_from_checkpoint=True))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_request_while_the_last_checkpoint_is_saved_is_one(place, tmp_path, monkeypatch):
    """There is nothing left to train, but whoever asks does not wait for the result either."""
    save, options = trainer.save, options_of(place, tmp_path / "run", merge_lora=False)

    def save_and_signal(*words, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save", save_and_signal)
        with pytest.raises(KeyboardInterrupt):
            train(options)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-8"]
    assert not (tmp_path / "run/final").exists()
    train(replace(options, resume_from_checkpoint=True))
    assert (tmp_path / "run/final/adapter_model.safetensors").exists()
    assert steps_in(tmp_path, "run") == [*range(1, 9)]


@pytest.fixture
def owing(tmp_path, monkeypatch):
    """A run that was stopped in its last evaluation; an unbroken one is in `whole`."""
    csv, compute = make_csv(tmp_path, 8), ForwardPass.loss
    changes = {"eval_dataset": str(csv), "eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    whole = train_options(csv, MODEL, tmp_path / "whole", num_epochs=2, lora_dropout=0.1, **changes)
    options = replace(whole, output=str(tmp_path / "run"), resume_from_checkpoint=True)
    train(whole)

    def compute_and_signal(self, *words):
        if not self.model.training and steps_in(tmp_path, "run")[-1] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(ForwardPass, "loss", compute_and_signal)
        with pytest.raises(KeyboardInterrupt):
            train(options)
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [2]
    return options


def state_of(output):
    (last,) = checkpoints(output)
    assert damage(last) is None
    return (last / "state.json").read_bytes()


def test_an_evaluation_that_was_owed_is_owed_no_more(owing, tmp_path):
    """The checkpoint that the stop has left has it, and stands once in the log, also if that was written."""
    assert state_of(tmp_path / "run") != state_of(tmp_path / "whole")
    with (tmp_path / "run/log.jsonl").open("a") as log:
        log.write('{"step": 4, "eval_loss": 7.0}\n')  # of a life that ended before the checkpoint was written
    for _ in range(2):
        train(owing)
        assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "run/final", tmp_path / "whole/final")


@pytest.mark.parametrize("text", ["run/checkpoint-4", r"run/\.checkpoint-4\.partial-"])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one(owing, tmp_path, start, capsys, text):
    words = as_command(owing).split()[1:]
    assert start(words, partial(die_before, "os.rename", text)).end() == -signal.SIGKILL
    capsys.readouterr()
    train(owing)
    assert "starting afresh" not in capsys.readouterr().err
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "run/final", tmp_path / "whole/final")
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".mdl-toolkit-files.json"]


def losses(output):
    return [
        (line["step"], line.get("loss"), line.get("eval_loss")) for line in read_log(output / "log.jsonl")
    ]


def test_a_run_that_was_evaluated_at_its_end_is_not_evaluated_again(place, tmp_path):
    settings = {"eval_dataset": str(place / "train.csv"), "eval_steps": 500}
    done = train(train_options(place / "train.csv", MODEL, tmp_path / "run", **settings))
    before = losses(tmp_path / "run")
    again = train(
        train_options(place / "train.csv", MODEL, tmp_path / "run", resume_from_checkpoint=True, **settings)
    )
    assert (again.steps, again.eval_loss) == (done.steps, done.eval_loss)
    assert losses(tmp_path / "run") == before


# --- the command --------------------------------------------------------------------------------------------


@BOTH
def test_a_stopped_run_goes_on_bit_for_bit(place, tmp_path, start, number):
    job = start(command(place, str(tmp_path / "run")), partial(slow_steps, 0.2))
    assert job.until(lambda: len(steps_in(tmp_path, "run")) >= 2)
    job.signal(number)
    assert job.end() == 130
    step = steps_in(tmp_path, "run")[-1]
    stopped = f"stopped after step {step} of 8; to go on: --resume-from-checkpoint true"
    kept = f"what was converted stays in {tmp_path}/run/.dataset, for the next run with this --output"
    assert job.said().splitlines()[-4:] == [STOPPING, stopped, kept, "interrupted"]
    usual = ("device", "recipe", "memory", "training", "steps", "loading")
    assert [line for line in job.said().splitlines()[:-4] if not line.startswith(usual)] == []
    assert 2 <= step < 8
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".dataset", ".mdl-toolkit-files.json", f"checkpoint-{step}", "log.jsonl", "mdl-toolkit.json",
        "mdl-toolkit.yaml"
    ]  # fmt: skip
    assert damage(tmp_path / f"run/checkpoint-{step}") is None
    again = start(command(place, str(tmp_path / "run"), "--resume-from-checkpoint", "true"))
    assert again.end() == 0, again.said()
    assert steps_in(tmp_path, "run") == [*range(1, 9)]
    assert same_weights(tmp_path / "run/final", place / "whole/final")
    assert not (tmp_path / "run/.dataset").exists()


def in_the_first_step(sign, usual):
    """Leave a sign there and stay; `usual` is what SIGINT does, which a shell's `&` has ignored."""

    def stay(*_):
        sign.touch()
        time.sleep(600)

    trainer.BatchSampler.tokens = stay
    signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize(
    ("number", "usual"),
    [
        (signal.SIGTERM, signal.default_int_handler),
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGINT, signal.SIG_IGN),
    ],
    ids=["SIGTERM", "SIGINT", "SIGINT in the background"],
)
def test_a_second_signal_stops_at_once(place, tmp_path, start, number, usual):
    job = start(command(place, str(tmp_path / "run"), save_steps=1), partial(slow_steps, 0.05))
    assert job.until(lambda: (tmp_path / "run/checkpoint-1").exists())
    job.kill()
    before = checkpoints(tmp_path / "run")
    assert before
    resume = ("--resume-from-checkpoint", "true")
    staying = partial(in_the_first_step, tmp_path / "sign", usual)
    job = start(command(place, str(tmp_path / "run"), *resume, save_steps=1), staying)
    assert job.until((tmp_path / "sign").exists)
    job.signal(number)
    assert job.until(lambda: STOPPING in job.said())
    time.sleep(stopping.SAME_REQUEST_SECONDS + 0.2)
    job.signal(number)
    assert job.end() == 130
    assert checkpoints(tmp_path / "run") == before
    assert all(damage(path) is None for path in before)


def in_the_beginning(sign, name):
    """Leave a sign before or after the steps, and stay."""

    def stay(*_, **__):
        sign.touch()
        time.sleep(600)

    setattr(training_data if name == "convert_rows" else training, name, stay)


@BOTH
@pytest.mark.parametrize("moment", ["convert_rows", "trainable_model", "write_result"])
def test_a_signal_outside_the_steps_ends_the_run_tidily(place, tmp_path, start, number, moment):
    """While data are converted, a model is loaded, a result is written."""
    words = command(place, str(tmp_path / "run"), num_epochs=0.1)
    job = start(words, partial(in_the_beginning, tmp_path / "sign", moment))
    assert job.until((tmp_path / "sign").exists)
    job.signal(number)
    assert job.end() == 130
    assert job.said().splitlines()[-1] == "interrupted"
    told = "\nevery step is made and saved; to write the result: the same with --resume-from-checkpoint true"
    assert (told in job.said()) == (moment == "write_result")
    left = {path.name for path in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    written = {".mdl-toolkit-files.json", "checkpoint-1", "log.jsonl", "mdl-toolkit.json", "mdl-toolkit.yaml"}
    expected = {
        "convert_rows": set(),
        "trainable_model": {".dataset"},
        "write_result": {".dataset", *written},
    }
    assert left == expected[moment]


# --- two processes ------------------------------------------------------------------------------------------


def test_a_terminal_that_is_closed_leaves_a_checkpoint(place, tmp_path, start):
    """With a bar on it, which cannot be drawn any more."""
    words = command(place, tmp_path / "run")
    job = start(words, partial(slow_steps, 0.3), in_terminal=True, TERM="xterm")
    assert job.until(lambda: len(steps_in(place, tmp_path / "run")) >= 2 and "\x1b[" in job.said())
    job.end_by(None)
    assert job.end() == 130
    (saved,) = checkpoints(tmp_path / "run")
    assert damage(saved) is None
    assert saved.name == f"checkpoint-{steps_in(place, tmp_path / 'run')[-1]}"
    assert steps_in(place, tmp_path / "run")[-1] < 8


@pytest.mark.parametrize("gone", ["2>&-", "2>/dev/full", "2>&1 | head -1"])
def test_a_standard_error_that_takes_nothing_ends_no_training(place, tmp_path, gone):
    words = shlex.join([sys.executable, "-m", "mdl_toolkit", *command(place, tmp_path / "run")])
    line = f"set -o pipefail; {words} {gone}"
    done = subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, check=False, timeout=120)
    assert same_weights(tmp_path / "run/final", place / "whole/final")
    assert done.returncode == (0 if gone == "2>&-" else 1)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_of_two_processes_stops_both_with_one_checkpoint(place, tmp_path, start, asked):
    """The second one does not end before all is saved: a launcher would end the first one, too."""
    words = command(place, str(tmp_path / "run"), batch_size=1)
    jobs = start_ranks(start, words, before=partial(slow_steps, 0.05, saving=1.0))
    assert jobs[0].until(lambda: len(steps_in(tmp_path, "run")) >= 2)
    jobs[asked].signal(signal.SIGTERM)
    wait_for(lambda: not jobs[1].is_running)
    saved = checkpoints(tmp_path / "run")
    assert [damage(path) for path in saved] == [None]
    assert [job.end() for job in jobs] == [130, 130]
    assert jobs[0].said().splitlines()[-1] == "interrupted"
    assert jobs[1].said().splitlines() == ["interrupted"]
    step = steps_in(tmp_path, "run")[-1]
    assert 2 <= step < 8
    assert to_resume(tmp_path / "run", True).step == step
    resume = ("--resume-from-checkpoint", "true")
    again = start(command(place, str(tmp_path / "run"), *resume))  # one process: 1 x 2 instead of 2 x 1
    assert again.end() == 0
    assert steps_in(tmp_path, "run") == [*range(1, 9)]
