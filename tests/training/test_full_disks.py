"""A training on a disk that takes no more: what is lost, what is said, and what is there in the end."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

from mdl_toolkit.errors import ToolkitError
from mdl_toolkit.training import checkpoints
from mdl_toolkit.training.checkpoints import damage
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import read_log
from tests.support.paths import MODEL
from tests.support.run_folders import AT_THE_END, cut_off, names
from tests.support.runs import make_csv, train_options
from tests.support.weight_files import same_weights

FULL = [
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
]


def failing_at(monkeypatch, calls, problem):
    """Let these calls of the optimizer's saving fail, after half of it is written."""
    count = 0

    def failing(tensors, path):
        nonlocal count
        count += 1
        save_file(tensors, path)
        if count in calls:
            cut_off(path)
            raise problem

    monkeypatch.setattr(checkpoints, "save_file", failing)


@pytest.mark.parametrize("problem", FULL, ids=["safetensors", "system"])
def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch, capsys, problem):
    csv = make_csv(tmp_path, 16)
    whole = train(train_options(csv, MODEL, tmp_path / "whole", save_steps=0))
    failing_at(monkeypatch, {2, 3}, problem)
    output = tmp_path / "run"
    done = train(train_options(csv, MODEL, output, save_steps=1, save_total_limit=3))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 2
    for step, line in zip((2, 3), said, strict=True):
        assert line.startswith(f"warning: checkpoint-{step} cannot be saved: ")
        assert "No space left on device" in line
        assert line.endswith("; training goes on")
    assert names(output) == ["checkpoint-1", "checkpoint-4", *AT_THE_END]
    assert [damage(output / f"checkpoint-{step}") for step in (1, 4)] == [None, None]
    assert same_weights(done.final, whole.final)


@pytest.mark.parametrize("problem", FULL, ids=["safetensors", "system"])
def test_a_disk_that_is_full_at_the_end_is_an_error(tmp_path, monkeypatch, problem):
    csv, output = make_csv(tmp_path, 16), tmp_path / "run"
    options = train_options(csv, MODEL, output, save_steps=3, save_total_limit=1)
    with monkeypatch.context() as patch:
        failing_at(patch, {2}, problem)
        with pytest.raises(
            ToolkitError, match="checkpoint-4 cannot be saved: .*No space left on device"
        ) as why:
            train(options)
    assert str(why.value).endswith("; make room, and go on with --resume-from-checkpoint true")
    left = ["checkpoint-3", "log.jsonl", "mdl-toolkit.json", "mdl-toolkit.yaml"]
    assert names(output) == [".dataset", *left]
    assert damage(output / "checkpoint-3") is None
    again = train(train_options(csv, MODEL, output, save_steps=3, resume_from_checkpoint=True))
    whole = train(train_options(csv, MODEL, tmp_path / "whole"))
    assert same_weights(again.final, whole.final)


def test_a_disk_that_never_had_room_is_an_error(tmp_path, monkeypatch):
    failing_at(monkeypatch, {1}, FULL[0])
    with pytest.raises(ToolkitError, match="; make room, and start again$"):
        train(train_options(make_csv(tmp_path, 16), MODEL, tmp_path / "run", save_steps=0))


@pytest.mark.parametrize("problem", FULL, ids=["safetensors", "system"])
def test_a_full_disk_gets_the_room_of_a_checkpoint_that_may_go(tmp_path, monkeypatch, capsys, problem):
    """There is room for two; with a limit of two, the oldest goes before the third is there, not after."""
    output, real = tmp_path / "run", checkpoints.save_file

    def on_a_small_disk(tensors, path):
        real(tensors, path)
        if len(checkpoints.checkpoints(output)) >= 2:
            cut_off(path)
            raise problem

    monkeypatch.setattr(checkpoints, "save_file", on_a_small_disk)
    train(train_options(make_csv(tmp_path, 16), MODEL, output, save_steps=1, save_total_limit=2))
    assert names(output) == ["checkpoint-3", "checkpoint-4", *AT_THE_END]
    assert [damage(output / f"checkpoint-{step}") for step in (3, 4)] == [None, None]
    assert "cannot be saved" not in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_a_training(tmp_path, monkeypatch, capsys):
    real, output = Path.rename, tmp_path / "run"

    def busy(self, target):
        if self == output / "checkpoint-1":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    assert (
        train(train_options(make_csv(tmp_path, 12), MODEL, output, save_steps=1, save_total_limit=1)).steps
        == 3
    )
    assert names(output) == ["checkpoint-1", "checkpoint-3", *AT_THE_END]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert {line for line in said if "too few" not in line and "too little" not in line} == {
        f"warning: {output}/checkpoint-1 cannot be deleted: Device or resource busy"
    }


def test_a_log_that_cannot_be_written_does_not_end_a_training(tmp_path, monkeypatch, capsys):
    real = Path.open

    def full(self, mode="r", *args, **more):
        if self.name == "log.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", full)
    done = train(train_options(make_csv(tmp_path, 16), MODEL, tmp_path / "run"))
    assert done.steps == 4
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert said == ["warning: log.jsonl cannot be written: No space left on device; training goes on"]


def test_a_line_that_a_full_disk_cut_off_does_not_spoil_the_next(tmp_path, monkeypatch):
    real, left = Path.open, [3]

    def nearly_full(self, mode="r", *args, **more):
        if self.name == "log.jsonl" and mode == "a":
            left[0] -= 1
            if left[0] == 0:
                with real(self, mode, *args, **more) as file:
                    file.write('{"step": 3, "lo')
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", nearly_full)
    train(train_options(make_csv(tmp_path, 20), MODEL, tmp_path / "run"))
    assert [line["step"] for line in read_log(tmp_path / "run/log.jsonl")] == [1, 2, 4, 5]


def test_a_half_written_log_of_a_killed_run_is_removed(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / ".log.jsonl.partial-1a2b3c4d").write_text('{"step": 1}')
    train(train_options(make_csv(tmp_path, 4), MODEL, output))
    assert names(output) == ["checkpoint-1", *AT_THE_END]
