"""Outputs of one run at a time: a folder is claimed, and given up when its process ends."""

import errno
import fcntl
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.errors import InputError
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.files import claim_folder, parse_json
from mdl_toolkit.utils.run_folder import read_log
from tests.support.fleet import fleet, slow_steps
from tests.support.paths import MODEL
from tests.support.runs import make_csv, train_options


def test_a_second_training_in_the_same_folder_is_refused_and_changes_nothing(tmp_path):
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    words = as_command(train_options(csv, MODEL, output, num_epochs=4, merge_lora=False)).split()[1:]
    with fleet(tmp_path) as start:
        first = start(words, partial(slow_steps, 0.3))
        assert first.until(lambda: (output / "log.jsonl").exists())
        second = start(words)
        assert second.end() == 1
        line = (
            f"error: --output {output}: another run writes into it; wait for its end, or give another folder"
        )
        assert second.said().splitlines() == [line]
        assert first.end() == 0, first.said()
    assert [line["step"] for line in read_log(output / "log.jsonl")] == [*range(1, 9)]
    assert not (output / "previous-1").exists()


@pytest.mark.parametrize("name", ["checkpoint-2", "final"])
@pytest.mark.parametrize("merge", [True, False])
def test_a_checkpoint_or_a_result_is_no_folder_for_a_run(tmp_path, name, merge):
    """It would be whole no longer."""
    options = train_options(make_csv(tmp_path, 8), MODEL, tmp_path / "run", merge_lora=merge)
    train(options)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"run/{name}: a checkpoint or a model is there; give the folder"):
        train(replace(options, output=str(tmp_path / "run" / name)))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_killed_run_holds_nothing(tmp_path):
    code = f"""
import os
from pathlib import Path
from mdl_toolkit.utils.files import claim_folder, parse_json
with claim_folder(Path({str(tmp_path / "run")!r})):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with claim_folder(tmp_path / "run"):
        pass


def test_a_folder_that_nothing_was_written_into_goes(tmp_path):
    with claim_folder(tmp_path / "a/b"):
        assert (tmp_path / "a/b").is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_files_cannot_be_locked_nothing_is_refused(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with claim_folder(tmp_path / "run"), claim_folder(tmp_path / "run"):
        (tmp_path / "run/file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_folder_that_cannot_be_made_is_known_before_anything_is_loaded(tmp_path):
    with pytest.raises(InputError, match="--output /proc/nowhere/run: cannot be written"):
        train(train_options(make_csv(tmp_path, 4), MODEL, Path("/proc/nowhere/run")))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", b"\xff", '{"a": 1}x'])
def test_json_that_is_none_is_a_value_error_however_deep(text):
    assert parse_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path):
    with (
        pytest.raises(InputError, match="its path is not UTF-8; choose another place"),
        claim_folder(tmp_path / os.fsdecode(b"\xff")),
    ):
        pass
    assert not [*tmp_path.iterdir()]
