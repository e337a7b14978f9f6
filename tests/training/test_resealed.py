"""Checkpoints that somebody changed, checksums and all: refused by name, never a bug."""

import hashlib
import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from mdl_toolkit.errors import ModelError
from mdl_toolkit.training.checkpoints import CHECKSUMS, damage
from mdl_toolkit.training.run import train
from tests.support.paths import MODEL
from tests.support.runs import make_csv, train_options


def reseal(folder):
    """Write the checksums of what is there now, as somebody who changed a file might."""
    sums = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.iterdir()
        if file.name != CHECKSUMS
    }
    (folder / CHECKSUMS).write_text(json.dumps(sums))


def change_state(folder, **values):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **values}))


def change_tensors(name, change):
    def spoil(folder):
        tensors = load_file(folder / name)
        save_file(change(tensors), folder / name)

    return spoil


ADAM = "optimizer.safetensors"
SPOILT = {
    "a step that is a text": lambda folder: change_state(folder, step="2"),
    "no step": lambda folder: change_state(folder, step=None),
    "losses that are a list": lambda folder: change_state(folder, losses=[1]),
    "a state that is a list": lambda folder: (folder / "state.json").write_text("[]"),
    "a best of another kind": lambda folder: change_state(folder, best={"colour": "red"}),
    "weights that are none": lambda folder: (folder / "adapter_model.safetensors").write_text("no weights"),
    "no weights": change_tensors("adapter_model.safetensors", lambda _: {}),
    "weights of another shape": change_tensors(
        "adapter_model.safetensors", lambda all_: {name: t[:1].clone() for name, t in all_.items()}
    ),
    "an optimizer that is none": lambda folder: (folder / ADAM).write_bytes(b"\xff" * 100),
    "integers for moments": change_tensors(ADAM, lambda all_: {n: t.int() for n, t in all_.items()}),
    "half of the optimizer": change_tensors(
        ADAM, lambda all_: {name: t for name, t in all_.items() if not name.endswith("exp_avg")}
    ),
    "states of nothing": change_tensors(ADAM, lambda all_: {f"x{name}": t for name, t in all_.items()}),
}


@pytest.mark.parametrize("how", [*SPOILT])
def test_a_resealed_checkpoint_that_does_not_load_is_refused_by_name(resealed, tmp_path, how):
    csv, made = resealed
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(made / "checkpoint-2", folder)
    SPOILT[how](folder)
    reseal(folder)
    options = train_options(csv, MODEL, tmp_path / "run", save_steps=1, resume_from_checkpoint=str(folder))
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        train(options)
    assert not (tmp_path / "run/final").exists()


NAN = float("nan")
COUNT = (None, True, "2", 1.5, [2], {}, -1)
LOSS = (True, "2", [2], {})
SOME = {"rows": 1, "lengths": "a", "effective": 1, "seed": 1}
BEST = {"value": 1.0, "step": 2, "worse": 0, "loss": 1.0}
WRONG = {
    "step": COUNT,
    "sampling": (None, 5, "x", [], *({**SOME, key: None} for key in SOME), {**SOME, "rows": "1"}),
    "judged": (5, "x", [], {"rows": "1"}, {"lengths": 5}, {"metric": 5}, {"answers": [5]}),
    "eval_loss": LOSS,
    "evaluated": COUNT[1:],
    "best": (None, 5, "x", [], {**BEST, "worse": None}, {**BEST, "step": "2"}, {**BEST, "value": "1"}),
    "recent": (None, 5, "x", {}, [None], ["1"], [[1]]),
    "losses": (None, *LOSS),
    "since": COUNT,
    "most_rows": (*COUNT, 0),
    "memory": COUNT[1:],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_state_that_holds_what_it_must_not_is_told_by_key(resealed, tmp_path, key):
    _, made = resealed
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(made / "checkpoint-2", folder)
    state = (folder / "state.json").read_bytes()
    assert {*json.loads(state)} <= {*WRONG}
    for wrong in WRONG[key]:
        change_state(folder, **{key: wrong})
        reseal(folder)
        assert (fault := damage(folder)) is not None, wrong
        assert fault.en.startswith(
            (f"state.json.{key}: expected ", f"state.json.{key}.", f"state.json.{key}[")
        )
        (folder / "state.json").write_bytes(state)
    reseal(folder)
    assert damage(folder) is None


SUM = {"bytes": 1, "sha256": "0"}


@pytest.mark.parametrize(
    "sums",
    [None, 5, "x", [], {"a": None}, {"a": {**SUM, "bytes": "1"}}, {"a": {**SUM, "sha256": 5}}, {"../a": SUM}],
)
def test_checksums_that_are_none_are_told(resealed, tmp_path, sums):
    _, made = resealed
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(made / "checkpoint-2", folder)
    (folder / CHECKSUMS).write_text(json.dumps(sums))
    assert "checksums.json" in damage(folder).en


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "{"])
@pytest.mark.parametrize("name", ["state.json", CHECKSUMS])
def test_what_is_no_json_object_is_told_by_file(resealed, tmp_path, name, content):
    _, made = resealed
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(made / "checkpoint-2", folder)
    (folder / name).write_text(content)
    if name != CHECKSUMS:
        reseal(folder)
    assert damage(folder).en.startswith(f"{name}: ")


@pytest.fixture(scope="module")
def resealed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resealed")
    csv = make_csv(folder, 12)
    train(train_options(csv, MODEL, folder / "run", save_steps=1, merge_lora=False))
    return csv, folder / "run"
