"""Weights that are not all there: `train` and `inference` say the same, before a recording is converted."""

import os
import shutil

import pytest

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.errors import ModelError
from mdl_toolkit.inference import run as inference
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.training import datasets
from mdl_toolkit.training.run import train
from tests.support.paths import MODEL
from tests.support.runs import files_below, make_csv, train_options

SHARD = "model-00002-of-00003.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 400000\n"
DAMAGE = {
    "missing": os.unlink,
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "a pointer of git-lfs": lambda file: file.write_bytes(POINTER),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(MODEL, folder)
    (folder / "model.safetensors").unlink()
    MiDashengLMModel.from_pretrained(MODEL).save_pretrained(folder, max_shard_size="500KB")
    assert SHARD in files_below(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_both_commands_refuse_them_before_they_convert(sharded, tmp_path, monkeypatch, damage):
    model, rows = tmp_path / "model", make_csv(tmp_path, 2)
    shutil.copytree(sharded, model)
    damage(model / SHARD)
    before = files_below(tmp_path)
    for module in (inference, datasets):
        monkeypatch.setattr(module, "convert_rows", lambda *_, **__: pytest.fail("it converts"))
    said = []
    with pytest.raises(ModelError) as caught:
        train(train_options(rows, model, tmp_path / "run"))
    said.append(caught.value.message.en)
    with pytest.raises(ModelError) as caught:
        inference.infer(
            InferenceOptions(input=str(rows), output=str(tmp_path / "out.csv"), model_name=str(model))
        )
    said.append(caught.value.message.en)
    assert said[0] == said[1]
    assert SHARD in said[0]
    assert files_below(tmp_path) == before
