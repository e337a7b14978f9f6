"""Checkpoints: what is in one, whether it is whole, what is deleted and what is set aside."""

import errno
import hashlib
import json
import os
import pickletools
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.errors import ModelError
from mdl_toolkit.training import checkpoints
from mdl_toolkit.training.checkpoints import damage, delete_oldest, save, to_resume
from mdl_toolkit.training.output import set_aside
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.ownership import RECORD
from mdl_toolkit.utils.run_folder import read_log
from tests.support.fleet import die_before, fleet
from tests.support.paths import MODEL
from tests.support.run_folders import AT_THE_END, cut_off, names
from tests.support.runs import files_below, make_csv, train_options
from tests.support.weight_files import same_weights

WRITTEN = {
    "adapter_config.json", "adapter_model.safetensors", "mdl-toolkit.yaml", "optimizer.safetensors",
    "state.json",
}  # fmt: skip
FILES = {*WRITTEN, "checksums.json"}
OF_A_RUN = {*FILES, "mdl-toolkit.json"}  # which says where all of the run's checkpoints come from


# --- one checkpoint -----------------------------------------------------------------------------------------


def make(output, *steps):
    """Checkpoints of these steps, as `save` writes them."""

    def adapter(folder):
        (folder / "adapter_config.json").write_text('{"r": 4}')
        save_file({"lora_A.weight": torch.arange(6.0)}, folder / "adapter_model.safetensors")

    for step in steps:
        optimizer = {"lora_A.weight/exp_avg": torch.full((3,), float(step))}
        save(output, step, adapter=adapter, optimizer=optimizer, state={"eval_loss": 0.5}, settings="lr: 1\n")
    return output


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def test_the_exact_set_of_files_and_what_they_hold(tmp_path):
    output = make(tmp_path, 7)
    assert names(tmp_path) == ["checkpoint-7"]
    assert set(names(output / "checkpoint-7")) == FILES
    found = to_resume(output, True)
    assert (found.folder, found.step) == (output / "checkpoint-7", 7)
    assert found.state == {"step": 7, "eval_loss": 0.5}
    assert torch.equal(found.adapter()["lora_A.weight"], torch.arange(6.0))
    assert torch.equal(found.optimizer()["lora_A.weight/exp_avg"], torch.full((3,), 7.0))
    listed = json.loads((output / "checkpoint-7/checksums.json").read_text())
    assert set(listed) == WRITTEN
    sizes = {name: entry["bytes"] for name, entry in listed.items()}
    assert sizes == {name: (output / "checkpoint-7" / name).stat().st_size for name in WRITTEN}


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    """Of a real run: no such suffix, and no file that pickle or torch.load would take."""
    train(train_options(make_csv(tmp_path, 4), MODEL, tmp_path / "run"))
    files = [path for path in (tmp_path / "run/checkpoint-1").rglob("*") if path.is_file()]
    assert {path.name for path in files} == OF_A_RUN | {RECORD}
    for path in files:
        assert path.suffix in (".json", ".yaml", ".safetensors")
        assert not zipfile.is_zipfile(path)
        with pytest.raises(ValueError, match=r"opcode|pickle|literal|expected|not enough"):
            list(pickletools.genops(path.read_bytes()))


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.parametrize("spoil", [flip_a_byte, cut_off, empty, Path.unlink])
def test_a_damaged_one_is_skipped_and_the_next_older_taken(tmp_path, capsys, name, spoil):
    output = make(tmp_path, 5, 20, 100)
    spoil(output / "checkpoint-100" / name)
    assert to_resume(output, True).folder == output / "checkpoint-20"
    state = "missing" if spoil is Path.unlink else "damaged"
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: {output / 'checkpoint-100'} is skipped: {name} is {state}"]
    with pytest.raises(ModelError, match=rf"checkpoint-100: not a complete checkpoint \({name} is {state}\)"):
        to_resume(output, str(output / "checkpoint-100"))


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink, flip_a_byte, cut_off, empty, lambda file: file.write_text("[]"),
        lambda file: file.write_text("{}"), lambda file: file.write_text("null"),
        lambda file: file.write_text(json.dumps(dict.fromkeys(FILES, 3))),
        lambda file: file.write_bytes(b"\xff\xfe"),
    ],
)  # fmt: skip
def test_one_without_its_checksums_is_not_whole(tmp_path, capsys, spoil):
    output = make(tmp_path, 5, 6)
    spoil(output / "checkpoint-6/checksums.json")
    assert to_resume(output, True).folder == output / "checkpoint-5"
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {output / 'checkpoint-6'} is skipped: ")
    assert said.count("\n") == 1
    with pytest.raises(ModelError, match="checkpoint-6: not a complete checkpoint"):
        to_resume(output, str(output / "checkpoint-6"))


def test_what_is_damaged_is_said_in_chinese_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    output = make(tmp_path, 5, 6, 7)
    flip_a_byte(output / "checkpoint-6/optimizer.safetensors")
    (output / "checkpoint-7/state.json").unlink()
    assert to_resume(output, True).folder == output / "checkpoint-5"
    assert capsys.readouterr().err.splitlines() == [
        f"警告：跳过 {output}/checkpoint-7：缺少 state.json",
        f"警告：跳过 {output}/checkpoint-6：optimizer.safetensors 已损坏",
    ]
    with pytest.raises(ModelError) as refused:
        to_resume(output, str(output / "checkpoint-7"))
    assert "不是完整的检查点（缺少 state.json）；是否想写" in str(refused.value)


def test_all_damaged_is_a_fresh_start(tmp_path, capsys):
    output = make(tmp_path, 5, 6)
    for step in (5, 6):
        flip_a_byte(output / f"checkpoint-{step}/adapter_model.safetensors")
    assert to_resume(output, True) is None
    assert capsys.readouterr().err.count("is skipped: adapter_model.safetensors is damaged") == 2


def test_the_newest_is_that_of_the_highest_number(tmp_path):
    output = make(tmp_path, 100, 9, 20)
    (output / "checkpoint-1000x").mkdir()
    assert to_resume(output, True).step == 100


@pytest.mark.parametrize("resume", [None, False])
def test_nothing_is_resumed_unless_asked_for(tmp_path, resume):
    assert to_resume(make(tmp_path, 5), resume) is None


def test_true_with_none_starts_afresh(tmp_path, capsys):
    assert to_resume(tmp_path, True) is None
    assert to_resume(tmp_path / "nowhere", True) is None
    assert capsys.readouterr().err == ""


def test_a_path_is_taken_even_if_it_is_not_the_newest(tmp_path):
    output = make(tmp_path, 5, 6)
    assert to_resume(tmp_path / "elsewhere", str(output / "checkpoint-5")).step == 5
    for path, message in (tmp_path, "not a complete checkpoint"), (tmp_path / "nowhere", "no such folder"):
        with pytest.raises(ModelError, match=message):
            to_resume(output, str(path))


@pytest.mark.parametrize("memory", ["8", -1, 1.5])
def test_a_state_that_is_none_is_told(tmp_path, memory):
    folder = make(tmp_path, 3) / "checkpoint-3"
    state = json.dumps({"step": 3, "memory": memory})
    (folder / "state.json").write_text(state)
    sums = json.loads((folder / "checksums.json").read_text())
    sums["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}
    (folder / "checksums.json").write_text(json.dumps(sums))
    assert "memory: expected a whole number" in damage(folder).en


# --- writing it ---------------------------------------------------------------------------------------------


def test_a_new_one_takes_the_place_of_one_of_the_same_step(tmp_path):
    output = make(tmp_path, 4)
    flip_a_byte(output / "checkpoint-4/state.json")
    (output / "checkpoint-4/stale").write_text("")
    make(tmp_path, 4)
    # As a whole: one of its files is not as it was written, and another is somebody else's.
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-4.previous-1"]
    assert set(names(output / "checkpoint-4")) == FILES
    assert set(names(output / "checkpoint-4.previous-1")) == {*FILES, "stale"}
    assert damage(output / "checkpoint-4") is None


@pytest.mark.parametrize(("given", "hint"), [(4, r"; did you mean .*/checkpoint-2\?$"), (2, r"missing\)$")])
def test_a_damaged_checkpoint_is_not_suggested(tmp_path, given, hint):
    make(tmp_path, 2, 4)
    (tmp_path / "checkpoint-4/state.json").unlink()
    if given == 2:
        (tmp_path / "checkpoint-2/state.json").unlink()
    with pytest.raises(ModelError, match=hint):
        to_resume(tmp_path, str(tmp_path / f"checkpoint-{given}"))


def test_a_checkpoint_stays_where_a_newer_one_cannot_take_its_place(tmp_path, monkeypatch):
    make(tmp_path, 4)
    before, rename = (tmp_path / "checkpoint-4/optimizer.safetensors").stat().st_ino, Path.rename

    def fail(self, target):
        if self.name.startswith(".checkpoint-4.partial-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4/optimizer.safetensors").stat().st_ino == before


@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_right_before_the_renaming(tmp_path, moment):
    """There is no checkpoint of that name, the one before it is whole, and the run ends as if unbroken."""
    csv = make_csv(tmp_path, 8)
    options = train_options(csv, MODEL, tmp_path / "whole", save_steps=1)
    whole = train(options)
    command = [*as_command(options).split()[1:], "--output", str(tmp_path / "run")]
    with fleet(tmp_path) as start:
        assert (
            start(command, partial(die_before, "os.rename", rf"/\.checkpoint-{moment}\.partial-")).end() == -9
        )
        left = {name for name in names(tmp_path / "run") if "checkpoint" in name}
        (saved,) = (tmp_path / "run").glob(f".checkpoint-{moment}.partial-*")
        (lock,) = (tmp_path / "run").glob(f".checkpoint-{moment}.lock-*")
        assert left == {saved.name, lock.name} | ({"checkpoint-1"} if moment == 2 else set())
        assert set(names(saved)) == OF_A_RUN
        assert moment == 1 or damage(tmp_path / "run/checkpoint-1") is None
        job = start([*command, "--resume-from-checkpoint", "true"])
        assert job.end() == 0
    assert ("starting afresh" in job.said()) == (moment == 1)
    assert not [name for name in names(tmp_path / "run") if name.startswith(".")]
    assert same_weights(tmp_path / "run/final", whole.final)


# --- where there is none ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        (".", r"not a complete checkpoint \(checksums.json is missing\); did you mean .*run/checkpoint-3\?"),
        (
            "final",
            r"not a complete checkpoint \(checksums.json is missing\); did you mean .*run/checkpoint-3\?",
        ),
    ],
)
def test_what_is_no_checkpoint_is_told_with_what_may_be_meant(tmp_path, given, message):
    output = make(tmp_path / "run", 2, 3)
    (output / "final").mkdir()
    with pytest.raises(ModelError, match=message):
        to_resume(output, str(output / given))


# --- what goes and what stays -------------------------------------------------------------------------------


def test_only_the_oldest_are_deleted_and_never_what_must_stay(tmp_path):
    output = make(tmp_path, 1, 2, 3, 10)
    (output / "final").mkdir()
    delete_oldest(output, 2, {1})
    assert names(output) == ["checkpoint-1", "checkpoint-10", "checkpoint-3", "final"]
    delete_oldest(output, 1, set())
    assert names(output) == ["checkpoint-10", "final"]


def test_a_limit_spares_the_one_resumed_from_and_counts_nothing_newer(tmp_path):
    """Checkpoints after it are another course of events: set aside, not counted, not lost."""
    csv, output = make_csv(tmp_path, 20), tmp_path / "run"
    train(train_options(csv, MODEL, output, save_steps=1))
    changes = {"save_steps": 1, "save_total_limit": 1, "lr": 1e-3}
    train(train_options(csv, MODEL, output, resume_from_checkpoint=str(output / "checkpoint-2"), **changes))
    assert names(output) == sorted(["checkpoint-2", "checkpoint-5", *AT_THE_END, "previous-1"])
    assert names(output / "previous-1") == ["checkpoint-3", "checkpoint-4", "checkpoint-5", "log.jsonl"]
    lines = [line["step"] for line in read_log(output / "log.jsonl")]
    assert lines == [1, 2, 3, 4, 5]


def test_a_limit_holds_for_a_finished_run_that_is_given_back(tmp_path):
    csv, output = make_csv(tmp_path, 16), tmp_path / "run"
    train(train_options(csv, MODEL, output, save_steps=1))
    train(train_options(csv, MODEL, output, save_total_limit=2, resume_from_checkpoint=True))
    assert [path.name for path in checkpoints.checkpoints(output)] == ["checkpoint-3", "checkpoint-4"]


def test_a_kill_while_deleting_leaves_no_half_checkpoint(tmp_path):
    csv, output = make_csv(tmp_path, 12), tmp_path / "run"
    options = train_options(csv, MODEL, output, save_steps=1, save_total_limit=1)
    command = as_command(options).split()[1:]
    with fleet(tmp_path) as start:
        assert start(command, partial(die_before, "os.remove", "optimizer.safetensors")).end() == -9
        assert [path.name for path in checkpoints.checkpoints(output)] == ["checkpoint-2"]
        assert damage(output / "checkpoint-2") is None
        assert start([*command, "--resume-from-checkpoint", "true"]).end() == 0
    assert names(output) == ["checkpoint-2", "checkpoint-3", *AT_THE_END]


def test_a_damaged_newest_one_is_not_counted_for_good_ones(tmp_path):
    csv, output = make_csv(tmp_path, 20), tmp_path / "run"
    whole = train(train_options(csv, MODEL, output, save_steps=1))
    flip_a_byte(output / "checkpoint-5/state.json")
    options = train_options(csv, MODEL, output, save_steps=0, save_total_limit=1, resume_from_checkpoint=True)
    again = train(options)
    assert damage(output / "checkpoint-5") is None
    assert names(output / "previous-1") == ["checkpoint-5", "log.jsonl"]
    assert same_weights(again.final, whole.final)


def test_resuming_from_elsewhere_sets_what_is_there_aside(tmp_path):
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    train(train_options(csv, MODEL, tmp_path / "other", save_steps=1))
    train(train_options(csv, MODEL, output, save_steps=1, lr=1e-3))
    train(
        train_options(
            csv, MODEL, output, save_steps=0, resume_from_checkpoint=str(tmp_path / "other/checkpoint-1")
        )
    )
    assert names(output) == sorted(["checkpoint-1", "checkpoint-2", *AT_THE_END, "previous-1"])
    for name in ("checkpoint-1/adapter_model.safetensors", "checkpoint-1/optimizer.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert same_weights(output / "checkpoint-2", tmp_path / "other/checkpoint-2")
    assert names(output / "previous-1") == [
        "checkpoint-1", "checkpoint-2", *AT_THE_END,
    ]  # fmt: skip


def test_a_fresh_start_moves_what_is_there_and_deletes_nothing(tmp_path):
    make(tmp_path, 5)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mdl-toolkit.yaml").write_text("lr: 1")
    before = files_below(tmp_path)
    assert set_aside(tmp_path) == tmp_path / "previous-1"
    assert files_below(tmp_path) == {name if name == "notes.txt" else f"previous-1/{name}" for name in before}
    assert set_aside(tmp_path) is None
    make(tmp_path, 7)
    assert set_aside(tmp_path) == tmp_path / "previous-2"
