"""Processes of one run that were given different things: refused before the first step, by name."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.training import resume
from mdl_toolkit.utils.distributed import World
from tests.support.fleet import fleet, free_port
from tests.support.paths import MODEL
from tests.support.runs import convert, copy_checkpoint, make_csv, train_options

EACH = "all processes of a run need the same"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    make_csv(folder, 8)
    make_csv(folder / "other", 8, seed=70)
    return folder


def run_two(place, folder, *words, before=None):
    """Two processes, the second with more words or an act before; how they ended and what they said."""
    options = train_options(place / "train.csv", MODEL, folder / "run", batch_size=2, merge_lora=False)
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    own = as_command(options).split()[1:]
    with fleet(folder) as start:
        first = start(own, RANK="0", **port)
        second = start([*own, *words], *([before] if before else []), RANK="1", **port)
        return [first.end(), second.end()], [first.said(), second.said()]


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", "0.5"],
        ["--lora-dropout", "0.5"],
        ["--warmup-steps", "3"],
        ["--lora-rank", "2"],
        ["--train-target", "lm_head"],
        ["--seed", "1"],
        ["--num-epochs", "2", "--save-steps", "epoch"],
        ["--batch-size", "4"],
        ["--bf16", "true"],
    ],
    ids=lambda words: words[0],
)
def test_an_option_that_differs_is_named(place, tmp_path, words):
    ends, said = run_two(place, tmp_path, *words)
    assert ends == [1, 1]
    line = said[0].splitlines()[-1]
    assert line.endswith(f"not the same in process 1 as in process 0; {EACH}")
    assert all(word in line for word in words if word.startswith("--"))
    assert not (tmp_path / "run/checkpoint-1").exists()
    assert not any("a bug in" in each for each in said)


def test_folders_may_have_other_names(tmp_path):
    asked = []

    class Alone(World):
        def differences(self, values):
            asked.append({*values})
            return {}

    resume.check_options(Alone(), train_options("d", MODEL, tmp_path))
    assert {"--lr", "--seed"} <= asked[1]
    assert not {"--output", "--train-dataset", "--model-name"} & asked[1]


def another_version():
    resume.__version__ = "0.0.1"


def another_torch():
    resume.torch.__version__ = "1.0"


@pytest.mark.parametrize(
    ("before", "named"), [(another_version, "mdl-toolkit (version)"), (another_torch, "torch (version)")]
)
def test_a_version_that_differs_is_named(place, tmp_path, before, named):
    ends, said = run_two(place, tmp_path, before=before)
    assert ends == [1, 1]
    assert said[0].splitlines()[-1].startswith(f"error: {named}: not the same in process 1")


def test_other_data_under_the_same_name_are_named(place, tmp_path):
    """As on a machine that does not share the folder: as many rows, of other lengths."""
    options = ["--train-dataset", str(place / "data"), "--eval-dataset", str(place / "data")]
    convert(place / "train.csv", MODEL, place / "data")
    convert(place / "other/train.csv", MODEL, place / "other/data")
    common = train_options(place / "data", MODEL, tmp_path / "run", batch_size=2)
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    with fleet(tmp_path) as start:
        words = [*as_command(common).split()[1:], *options[2:]]
        jobs = [start(words, RANK="0", **port)]
        words = [*words, "--train-dataset", str(place / "other/data")]
        jobs.append(start(words, RANK="1", **port))
        assert [job.end() for job in jobs] == [1, 1]
        assert jobs[0].said().splitlines()[-1].startswith("error: --train-dataset: not the same in process 1")


def test_another_base_is_named_and_another_path_to_the_same_is_none(golden, place, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["decoder.model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(MODEL, tmp_path / "same")
    ends, said = run_two(place, tmp_path, "--model-name", str(tmp_path / "same"), "--num-workers", "1")
    assert ends == [0, 0], said
    (tmp_path / "two").mkdir()
    ends, said = run_two(place, tmp_path / "two", "--model-name", str(base))
    assert ends == [1, 1]
    assert said[0].splitlines()[-1].startswith("error: --model-name: not the same in process 1")


def test_alone_there_is_nothing_to_differ():
    assert World().differences({"--lr": "1"}) == {}
