"""Processes that divide the weights make the steps of one that has them all, and hold their share alone."""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.errors import UsageError
from mdl_toolkit.training import run as training
from mdl_toolkit.training.checkpoints import Checkpoint, checkpoints
from mdl_toolkit.training.memory.sharding import blocks_of
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import read_log
from tests.support.fleet import fleet, start_ranks
from tests.support.paths import MODEL
from tests.support.runs import files_below, history, make_csv, train_options

LOST = "error: another process of this run has ended; its own message says why"
EXACT = dict(rel=1e-5)


def options_of(place, output, **changes):
    settings = {
        "batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2, "lr": 1e-3, "merge_lora": False,
        "eval_dataset": str(place / "eval.csv"), "eval_steps": 3, "save_steps": 2,
        "train_target": ("encoder", "projector", "decoder", "lm_head"), "gradient_checkpointing": True,
    }  # fmt: skip
    return train_options(place / "train.csv", MODEL, output, **{**settings, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """13 rows, in steps of 8: a partial one ends each epoch; in `two` they are made by two that share."""
    folder = tmp_path_factory.mktemp("sharding")
    make_csv(folder, 13)
    make_csv(folder, 5, seed=40, name="eval.csv")
    assert train(options_of(folder, folder / "one", gradient_accumulation_steps=4)).steps == 4
    run_sharded(folder, folder / "two", 2)
    return folder


def run_sharded(place, output, processes, **changes):
    words = as_command(options_of(place, output, shard_weights=True, **changes)).split()[1:]
    folder = output.parent / f"said-{output.name}"
    folder.mkdir(exist_ok=True)
    with fleet(folder) as start:
        jobs = start_ranks(start, words, processes, partial(write_shares, folder))
        assert [job.end() for job in jobs] == [0] * processes, [job.said() for job in jobs]
    assert [job.said() for job in jobs[1:]] == [""] * (processes - 1)
    return jobs[0].said()


def write_shares(folder):
    """Note how many of the blocks' frozen numbers the process holds once they are sharded."""
    shard = training.shard_blocks

    def shard_and_write(model, world, device):
        shard(model, world, device)
        frozen = [p for block in blocks_of(model) for p in block.parameters() if not p.requires_grad]
        own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in frozen)
        shares = {"own": own, "all": sum(p.numel() for p in frozen)}
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(shares))

    training.shard_blocks = shard_and_write


def check_follows(output, one):
    for found, expected in zip(figures(output), figures(one), strict=True):
        assert found == pytest.approx(expected, **EXACT)
    adapters = [Checkpoint(checkpoints(run)[-1], {}).adapter() for run in (output, one)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.allclose(t, adapters[1][n], atol=1e-5, rtol=1e-4) for n, t in adapters[0].items())
    assert files_below(output) == files_below(one)


def figures(output):
    names = ("step", "loss", "grad_norm", "learning_rate", "rows", "eval_loss", "eval_tokens", "epoch")
    return [{name: line[name] for name in names if name in line} for line in read_log(output / "log.jsonl")]


def test_two_processes_that_share_the_weights_follow_one(place):
    check_follows(place / "two", place / "one")


def test_each_process_holds_its_share_of_the_blocks(place):
    shares = [json.loads((place / f"said-two/{rank}.json").read_text()) for rank in range(2)]
    for share in shares:
        assert share["own"] == pytest.approx(share["all"] / 2, rel=0.02)
    assert sum(share["own"] for share in shares) == shares[0]["all"] > 0


def test_four_processes_of_which_some_have_no_rows_follow_one(place, tmp_path):
    """With features from the cache; of the last row three processes have nothing."""
    shutil.copy(place / "eval.csv", tmp_path)
    make_csv(tmp_path, 9)
    changes = {
        "train_target": ("decoder", "lm_head"), "cache_audio_features": True, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
    }  # fmt: skip
    train(options_of(tmp_path, tmp_path / "one", **{**changes, "gradient_accumulation_steps": 4}))
    run_sharded(tmp_path, tmp_path / "four", 4, **changes)
    check_follows(tmp_path / "four", tmp_path / "one")


def test_a_run_that_goes_on_makes_the_same_bits(place, tmp_path):
    shutil.copytree(place / "two", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    said = run_sharded(place, tmp_path / "run", 2, resume_from_checkpoint=True)
    assert "going on after step 2 of 4" in said
    assert history(tmp_path / "run") == history(place / "two")
    adapters = [run / "final/adapter_model.safetensors" for run in (tmp_path / "run", place / "two")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_one_process_has_nothing_to_share(place, tmp_path, capsys):
    options = options_of(place, tmp_path / "run", gradient_accumulation_steps=4, shard_weights=True)
    train(options)
    assert "--shard-weights: this run has one process" in capsys.readouterr().err
    assert history(tmp_path / "run") == history(place / "one")


@pytest.mark.parametrize("changes", [{"quantization": "4bit"}, {"eval_metric": "accuracy"}])
def test_what_cannot_be_shared_is_refused(place, tmp_path, changes):
    with pytest.raises(UsageError, match="--shard-weights: "):
        train(options_of(place, tmp_path / "run", shard_weights=True, **changes))
    assert not (tmp_path / "run").exists()
