"""Where a result comes from: the fingerprint of a base, the record beside every adapter and merged model."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from mdl_toolkit.errors import ModelError
from mdl_toolkit.training.run import train
from mdl_toolkit.weights.provenance import Base, Prompts, Provenance, fingerprint, read_provenance
from tests.support.runs import copy_checkpoint, make_rows, train_options, write_csv
from tests.support.weight_files import reshard

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def base(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def test_the_fingerprint_is_of_the_weights_however_they_are_spread(base, tmp_path):
    before = fingerprint(base)
    shutil.copytree(base, tmp_path / "elsewhere")
    reshard(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/config.json").write_text("{}")
    assert fingerprint(tmp_path / "elsewhere") == before


def test_the_fingerprint_sees_every_tensor(base):
    before, tensors = fingerprint(base), load_file(base / "model.safetensors")
    for name in list(tensors)[::9]:
        changed = tensors[name] + 1
        save_file({**tensors, name: changed}, base / "model.safetensors")
        assert fingerprint(base) != before, name


def test_the_revision_is_known_from_the_hubs_cache(base, tmp_path):
    place = tmp_path / f"hub/models--someone--midashenglm/snapshots/{COMMIT}"
    shutil.copytree(base, place)
    assert Base.of(place, "someone/midashenglm").revision == COMMIT
    assert Base.of(base, str(base)).revision is None


def test_what_is_written_is_read_back(tmp_path):
    given = Provenance(
        Base("a/b", COMMIT, "f"), Prompts("系统", None, user_differs=True), {"rows": 2}, {"steps": 3}
    )
    given.write(tmp_path)
    assert read_provenance(tmp_path) == given
    found = json.loads((tmp_path / "mdl-toolkit.json").read_text(encoding="utf-8"))
    assert found["prompts"] == {"system": "系统", "user": None}
    assert found["prompts_differ"] == {"system": False, "user": True}
    assert found["base"] == {"name": "a/b", "revision": COMMIT, "fingerprint": "f"}


def test_a_folder_without_a_record_and_one_with_a_broken_one(tmp_path):
    assert read_provenance(tmp_path) is None
    (tmp_path / "mdl-toolkit.json").write_text('{"base": 5}')
    with pytest.raises(ModelError, match=r"mdl-toolkit\.json: damaged"):
        read_provenance(tmp_path)


# --- what a training writes down -------------------------------------------------------------------------


def test_the_prompts_of_the_rows_are_remembered(base, tmp_path):
    rows = make_rows(tmp_path / "audio", 4)
    for number, row in enumerate(rows):
        row["system_prompt"] = "" if number else "Be brief."
    csv = write_csv(tmp_path / "train.csv", rows)
    done = train(train_options(csv, base, tmp_path / "run", system_prompt="Be brief.", eval_dataset=str(csv)))
    for folder in (done.final, tmp_path / "run/checkpoint-1"):
        found = read_provenance(folder)
        assert found.prompts == Prompts("Be brief.", "What is it?")
        assert found.base == Base(str(base.resolve()), None, fingerprint(base))
        assert (found.data["rows"], found.data["evaluation_rows"]) == (4, 4)
    assert read_provenance(done.final).metrics["eval_loss"] == pytest.approx(done.eval_loss)
    assert read_provenance(done.final).metrics["steps"] == done.steps


@pytest.mark.parametrize("merge_lora", [True, False])
def test_prompts_that_differ_are_not_remembered(base, tmp_path, merge_lora):
    rows = make_rows(tmp_path / "audio", 4)
    rows[3]["user_prompt"] = "And this?"
    csv = write_csv(tmp_path / "train.csv", rows)
    done = train(train_options(csv, base, tmp_path / "run", merge_lora=merge_lora, num_workers=2))
    assert read_provenance(done.final).prompts == Prompts(None, None, user_differs=True)
