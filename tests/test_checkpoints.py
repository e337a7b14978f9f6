"""When a checkpoint is due, which one is resumed, what is deleted or set aside (rules 27 to 31)."""

import pytest

from mdl_toolkit import checkpoints
from mdl_toolkit.checkpoints import delete_oldest, due_steps, put_in_place, set_aside, to_resume
from mdl_toolkit.errors import ModelError
from runs import files_below


@pytest.mark.parametrize(
    ("cadence", "per_epoch", "total", "due"),
    [
        (1, 4, 4, {1, 2, 3, 4}),
        (3, 4, 8, {3, 6, 8}),
        (500, 4, 8, {8}),
        (0, 4, 8, {8}),
        (0.5, 4, 12, {2, 4, 6, 8, 10, 12}),  # twice an epoch over three epochs: six times
        (0.5, 5, 15, {2, 5, 8, 10, 12, 15}),
        (0.1, 4, 4, {1, 2, 3, 4}),  # more often than there are steps: every step
        (0.25, 100, 30, {25, 30}),
    ],
)
def test_due_steps(cadence, per_epoch, total, due):
    assert due_steps(cadence, per_epoch, total) == due


def make(output, *steps, complete=True):
    for step in steps:
        folder = output / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in checkpoints._NEEDED if complete else checkpoints._NEEDED[:2]:
            (folder / name).write_text(str(step))


def test_true_takes_the_newest_complete_one(tmp_path):
    make(tmp_path, 5, 20, 100)
    make(tmp_path, 200, complete=False)
    assert to_resume(tmp_path, True) == tmp_path / "checkpoint-100"


def test_true_with_none_starts_afresh(tmp_path):
    make(tmp_path, 200, complete=False)
    assert to_resume(tmp_path, True) is None
    assert to_resume(tmp_path / "nowhere", True) is None


def test_a_path_must_be_complete(tmp_path):
    make(tmp_path, 5)
    make(tmp_path, 6, complete=False)
    assert to_resume(tmp_path, str(tmp_path / "checkpoint-5")) == tmp_path / "checkpoint-5"
    with pytest.raises(ModelError, match="checkpoint-6: not a complete checkpoint"):
        to_resume(tmp_path, str(tmp_path / "checkpoint-6"))


def test_a_fresh_start_moves_what_is_there_and_deletes_nothing(tmp_path):
    make(tmp_path, 5)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mdl-toolkit.yaml").write_text("lr: 1")
    before = files_below(tmp_path)
    assert set_aside(tmp_path) == tmp_path / "previous-1"
    assert files_below(tmp_path) == {
        name if name == "notes.txt" else f"previous-1/{name}" for name in before
    }  # fmt: skip
    assert set_aside(tmp_path) is None
    make(tmp_path, 7)
    assert set_aside(tmp_path) == tmp_path / "previous-2"


def test_only_the_oldest_are_deleted_and_never_the_one_resumed_from(tmp_path):
    make(tmp_path, 1, 2, 3, 10)
    delete_oldest(tmp_path, 2, tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-10",
        "checkpoint-3",
    ]
    delete_oldest(tmp_path, None, None)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_finished_checkpoint_replaces_one_of_the_same_step(tmp_path):
    make(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "stale").write_text("")
    make(tmp_path / ".saving", 4)
    put_in_place(tmp_path / ".saving", tmp_path)
    assert {path.name for path in (tmp_path / "checkpoint-4").iterdir()} == set(checkpoints._NEEDED)
    assert not (tmp_path / ".saving").exists()
