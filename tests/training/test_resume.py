"""What a resumed run may not take over from the interrupted one, and what it is told about."""

import errno
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.errors import ModelError
from mdl_toolkit.training import run as training
from mdl_toolkit.training import trainer
from mdl_toolkit.training.checkpoints import checkpoints
from mdl_toolkit.training.evaluator import Evaluator
from mdl_toolkit.training.resume import check_shape
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import read_log
from mdl_toolkit.weights.config_files import read_json
from tests.support.fleet import fleet, start_ranks
from tests.support.paths import MODEL
from tests.support.runs import evaluations, make_csv, train_options


@pytest.fixture
def options(tmp_path):
    """Four steps, a checkpoint and an evaluation after each."""
    csv = str(make_csv(tmp_path, 8))
    return train_options(
        csv, MODEL, tmp_path / "run", eval_dataset=csv, eval_steps=1, save_steps=1, num_epochs=2,
        merge_lora=False, keep_best=True,
    )  # fmt: skip


def is_the_adapter_of(final, checkpoint):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (final, checkpoint))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def warnings_in(said):
    return [line for line in said.splitlines() if line.startswith("warning: ")]


def spoil(checkpoint):
    """Another number in the middle of the weights."""
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


# --- the best evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "best"),
    [({"eval_metric": "accuracy"}, 4), ({"eval_dataset": "other.csv"}, 4), ({}, 1)],
    ids=["another metric", "other rows", "the same"],
)
def test_the_best_so_far_counts_among_evaluations_of_its_kind(
    options, tmp_path, losses, capsys, changes, best
):
    """Where they are of another kind, the evaluation of the step that is gone on from is made again."""
    losses += [(0.5, 0.5), (2.0, 2.0), (2.0, 0.25), (1.5, 0.5), (1.0, 0.75)]
    make_csv(tmp_path, 5, seed=40, name="other.csv")
    changes = {name: value.replace("other", f"{tmp_path}/other") for name, value in changes.items()}
    train(options)
    for late in (3, 4):
        shutil.rmtree(tmp_path / f"run/checkpoint-{late}")
    (tmp_path / "run/log.jsonl").write_text(
        "".join((tmp_path / "run/log.jsonl").read_text().splitlines(keepends=True)[:4])
    )
    capsys.readouterr()
    done = train(replace(options, resume_from_checkpoint=True, **changes))
    assert is_the_adapter_of(done.final, tmp_path / f"run/checkpoint-{best}")
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [1, 2, 3, 4]
    told = "the best evaluation so far, after step 1, does not count any more: it was made in another way"
    assert (f"warning: {told}" in warnings_in(capsys.readouterr().err)) == bool(changes)


def test_without_evaluations_the_last_step_is_the_result_and_nothing_stops_early(options, tmp_path, losses):
    losses += [1.0, 2.0, 3.0]
    stopped = replace(options, early_stopping_patience=2)
    assert train(stopped).steps == 3
    done = train(replace(stopped, eval_dataset=None, resume_from_checkpoint=True))
    assert (done.steps, done.eval_loss) == (4, None)
    assert is_the_adapter_of(done.final, tmp_path / "run/checkpoint-4")


@pytest.mark.parametrize("state", ["whole", "gone", "damaged"])
def test_a_best_checkpoint_stays_where_the_run_was(options, tmp_path, losses, capsys, state):
    losses += [2.0, 1.0, 3.0, 4.0]
    train(options)
    is_there = state == "whole"
    if state == "gone":
        shutil.rmtree(tmp_path / "run/checkpoint-2")
    elif state == "damaged":
        spoil(tmp_path / "run/checkpoint-2")
    losses[:] = [3.5]
    again = replace(
        options, output=str(tmp_path / "other"), resume_from_checkpoint=str(tmp_path / "run/checkpoint-3")
    )
    done = train(again)
    assert len(evaluations(tmp_path / "other")) == 1
    result = "run/checkpoint-2" if is_there else "other/checkpoint-4"
    assert is_the_adapter_of(done.final, tmp_path / result)
    metrics = read_json(done.final / "mdl-toolkit.json")["metrics"]
    assert metrics["steps"] == (2 if is_there else 4)
    logged = [line["loss"] for line in read_log(tmp_path / "run/log.jsonl") if "loss" in line]
    assert not is_there or metrics["training_loss"] == pytest.approx(sum(logged[:2]) / 2)
    gone = (
        "the best evaluation so far, after step 2, does not count any more: its checkpoint is gone or damaged"
    )
    assert (f"warning: {gone}" in warnings_in(capsys.readouterr().err)) != is_there


def test_the_best_of_a_run_that_goes_on_elsewhere_outlives_an_interruption_there(
    options, tmp_path, losses, capsys
):
    """And the result says how good it was, although another folder's log has that line."""
    losses += [1.0, 2.0, 3.0, 4.0]
    train(options)
    other = tmp_path / "other"
    start = str(tmp_path / "run/checkpoint-2")
    losses[:] = [3.0, 4.0]
    train(replace(options, output=str(other), resume_from_checkpoint=start))
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(other / "checkpoint-4")
    best = other / "checkpoint-1"
    capsys.readouterr()
    done = train(replace(options, output=str(other), resume_from_checkpoint=True))
    assert "does not count" not in capsys.readouterr().err
    assert is_the_adapter_of(done.final, best)
    metrics = read_json(done.final / "mdl-toolkit.json")["metrics"]
    assert (metrics["steps"], metrics["eval_loss"]) == (1, 1.0)
    assert [path.name for path in checkpoints(other)] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_what_is_dropped_from_the_log_is_set_aside_with_its_checkpoints(options, tmp_path):
    train(options)
    whole = (tmp_path / "run/log.jsonl").read_bytes()
    train(replace(options, resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"), lr=0.5))
    left = {path.name for path in (tmp_path / "run/previous-1").iterdir()}
    assert left == {"checkpoint-3", "checkpoint-4", "log.jsonl"}
    assert (tmp_path / "run/previous-1/log.jsonl").read_bytes() == whole


def test_no_result_is_made_of_a_checkpoint_that_was_damaged_meanwhile(options, tmp_path, losses, monkeypatch):
    losses += [2.0, 1.0, 3.0, 4.0]
    real = training.write_result

    def late(*words):
        spoil(tmp_path / "run/checkpoint-2")
        return real(*words)

    monkeypatch.setattr(training, "write_result", late)
    with pytest.raises(ModelError, match="checkpoint-2: adapter_model.safetensors is damaged, so no result"):
        train(options)
    assert not (tmp_path / "run/final").exists()


# --- nothing left to do ----------------------------------------------------------------------------------


def test_a_run_that_stopped_early_says_so_and_says_so_again(options, tmp_path, losses, capsys):
    losses += [1.0, 2.0, 3.0, 0.5]
    stopped = replace(options, early_stopping_patience=2)
    assert train(stopped).steps == 3
    assert "stopped early after step 3: 2 evaluations in a row no better" in capsys.readouterr().err
    assert train(replace(stopped, resume_from_checkpoint=True)).steps == 3
    (told,) = [line for line in warnings_in(capsys.readouterr().err) if "checkpoint-3" in line]
    assert told.startswith(f"warning: {tmp_path}/run/checkpoint-3: its run was stopped early, 2 evaluations")
    assert told.endswith("to go on, raise --early-stopping-patience")
    assert train(replace(stopped, early_stopping_patience=3, resume_from_checkpoint=True)).steps == 4


def test_a_finished_run_s_checkpoint_under_another_name(options, tmp_path):
    first = train(options)
    weights = load_file(first.final / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "run/checkpoint-4", tmp_path / "good")
    done = train(
        replace(
            options, output=str(tmp_path / "other"), resume_from_checkpoint=str(tmp_path / "good"),
            keep_best=False,
        )
    )  # fmt: skip
    assert all(
        torch.equal(t, weights[n]) for n, t in load_file(done.final / "adapter_model.safetensors").items()
    )
    assert read_json(done.final / "mdl-toolkit.json")["metrics"]["steps"] == 4


@pytest.mark.parametrize("changes", [{}, {"eval_metric": "accuracy"}], ids=["evaluated", "evaluated anew"])
def test_a_result_is_described_by_the_options_that_it_was_trained_with(options, tmp_path, changes):
    """Of a finished run nothing is trained with new ones, nor does its checkpoint become another."""
    train(options)
    checkpoint = tmp_path / "run/checkpoint-4"
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    done = train(replace(options, lora_alpha=64, lr=0.5, resume_from_checkpoint=True, **changes))
    after = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    new = {"state.json", "checksums.json", ".mdl-toolkit-files.json"} if changes else set()
    assert {name for name in before if after[name] != before[name]} == new
    assert read_json(done.final / "adapter_config.json")["lora_alpha"] == options.lora_alpha == 8
    card = (done.final / "README.md").read_text()
    assert "\nlora_alpha: 8.0\n" in card
    assert "\nlr: 0.01\n" in card


def test_an_evaluation_stays_in_the_log_until_another_takes_its_place(options, tmp_path, monkeypatch):
    """It was not lost if the other one is given up."""
    train(options)
    before = evaluations(tmp_path / "run")
    other = replace(options, eval_metric="accuracy", resume_from_checkpoint=True)

    with monkeypatch.context() as patch:
        evaluate = Evaluator.evaluate
        patch.setattr(
            Evaluator, "evaluate", lambda *words: os.kill(os.getpid(), signal.SIGTERM) or evaluate(*words)
        )
        with pytest.raises(KeyboardInterrupt):
            train(other)
    assert evaluations(tmp_path / "run") == before
    train(other)
    lines = evaluations(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["eval_accuracy" in line for line in lines] == [False, False, False, True]


def test_a_full_disk_costs_no_checkpoint_for_an_evaluation(options, tmp_path, monkeypatch, capsys):
    train(replace(options, save_total_limit=2, keep_best=False))

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "save_state", fail)
    capsys.readouterr()
    again = replace(
        options, save_total_limit=2, keep_best=False, eval_metric="cer", resume_from_checkpoint=True
    )
    assert train(again).final.is_dir()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]
    told = "checkpoint-4 cannot be saved: No space left on device; training goes on"
    assert f"warning: {told}" in warnings_in(capsys.readouterr().err)


# --- several processes -----------------------------------------------------------------------------------


def finds_nothing_in_its_own_folder():
    if os.environ["RANK"] == "1":
        training.to_resume = lambda *_: None


def test_another_shape_is_refused_by_the_options_to_give(options, tmp_path):
    """Also of a checkpoint that is older than an option."""
    before = {"train_target": ("decoder",), "lora_rank": 4}
    now = replace(options, train_target=("decoder",), lora_rank=4)
    check_shape(tmp_path, before, now)
    check_shape(tmp_path, {**before, "adapter": "start"}, replace(now, adapter="elsewhere"))
    with pytest.raises(ModelError, match=r"trained with --optimizer adamw; give the same"):
        check_shape(tmp_path, before, replace(now, optimizer="adamw_8bit"))
    # Its scales may not be those of a new one.
    with pytest.raises(ModelError, match=r"trained with --adapter start; give the same"):
        check_shape(tmp_path, {**before, "adapter": "start"}, now)


def test_processes_that_find_different_checkpoints_do_not_train(options, tmp_path):
    one = replace(options, batch_size=2, gradient_accumulation_steps=2, keep_best=False)
    train(one)
    for late in (3, 4):
        shutil.rmtree(tmp_path / f"run/checkpoint-{late}")
    words = as_command(replace(one, gradient_accumulation_steps=1, resume_from_checkpoint=True)).split()[1:]
    with fleet(tmp_path) as start:
        jobs = start_ranks(start, words, 2, finds_nothing_in_its_own_folder)
        assert [job.end() for job in jobs] == [1, 1]
        for rank, step in enumerate((2, 0)):
            line = f"error: process {rank} would go on from step {step} of 4 with 8 rows, another one diff"
            assert jobs[rank].said().splitlines()[-1].startswith(line)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("processes", [1, 2])
def test_answers_that_processes_share_unevenly_are_judged_as_before(options, tmp_path, processes):
    """Three rows are two for one process and one for the other; to the run it is the same evaluation."""
    questions = str(make_csv(tmp_path, 3, seed=40, name="questions.csv"))
    one = replace(options, eval_dataset=questions, eval_metric="cer", early_stopping_patience=9)
    two = as_command(replace(one, batch_size=2)).split()[1:]
    with fleet(tmp_path) as start:
        assert [job.end() for job in start_ranks(start, two)] == [0, 0]
    whole = evaluations(tmp_path / "run")
    for late in (3, 4):
        shutil.rmtree(tmp_path / f"run/checkpoint-{late}")
    again = replace(one, batch_size=4 // processes, resume_from_checkpoint=True)
    with fleet(tmp_path) as start:
        jobs = start_ranks(start, as_command(again).split()[1:], processes)
        assert [job.end() for job in jobs] == [0] * processes, jobs[0].said()
    assert "does not count" not in jobs[0].said()
    for before, after in zip(whole, evaluations(tmp_path / "run"), strict=True):
        assert (before["step"], before["eval_cer"]) == (after["step"], after["eval_cer"])
        assert before["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-4)
