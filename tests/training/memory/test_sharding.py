"""Processes that divide the weights make the steps of one that has them all, and hold their share alone."""

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.errors import UsageError
from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training import run as training
from mdl_toolkit.training.checkpoints import checkpoints, damage
from mdl_toolkit.training.gradient_checkpointing import checkpoint_gradients
from mdl_toolkit.training.log import RunLog
from mdl_toolkit.training.memory.plan import GATHERED, plan_memory
from mdl_toolkit.training.memory.sharding import blocks_of, shard_blocks
from mdl_toolkit.training.run import train, trainable_model
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.step import ForwardPass, TrainableState
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.utils.launcher import check_launch
from mdl_toolkit.utils.run_folder import read_log
from tests.support.compared import check_follows
from tests.support.fleet import fleet, start_ranks
from tests.support.memory import peak_bytes
from tests.support.paths import MODEL
from tests.support.runs import history, make_csv, train_options

CPU = torch.device("cpu")
LOST = "error: another process of this run has ended; its own message says why"
EXACT = 1e-5


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
    run_processes(folder, folder / "two", 2)
    return folder


def run_processes(place, output, processes, **changes):
    words = as_command(options_of(place, output, **{"shard_weights": True, **changes})).split()[1:]
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

    def shard_and_write(model, *words):
        shard(model, *words)
        frozen = [p for block in blocks_of(model) for p in block.parameters() if not p.requires_grad]
        own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in frozen)
        shares = {"own": own, "all": sum(p.numel() for p in frozen)}
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(shares))

    training.shard_blocks = shard_and_write


def test_two_processes_that_share_the_weights_follow_one(place):
    check_follows(place / "two", place / "one", EXACT)


def test_they_make_the_bits_of_two_that_do_not_share(place, tmp_path):
    run_processes(place, tmp_path / "run", 2, shard_weights=False)
    assert history(tmp_path / "run") == history(place / "two")
    adapters = [run / "final/adapter_model.safetensors" for run in (tmp_path / "run", place / "two")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_launcher_that_asks_for_it_too_is_not_told_that_it_is_not_used(monkeypatch, capsys):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    for is_sharding, told in ((True, ["DeepSpeed"]), (False, ["FSDP", "DeepSpeed"])):
        check_launch(is_sharding=is_sharding)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split("asks for ")[1].split(",")[0] for line in lines] == told
        assert all(("--shard-weights true" in line) != is_sharding for line in lines)


def test_each_process_holds_its_share_of_the_blocks(place):
    shares = [json.loads((place / f"said-two/{rank}.json").read_text()) for rank in range(2)]
    for share in shares:
        assert share["own"] == pytest.approx(share["all"] / 2, rel=0.02)
    assert sum(share["own"] for share in shares) == shares[0]["all"] > 0


def test_four_processes_of_which_some_have_no_rows_follow_one(place, tmp_path):
    """With DoRA, and features from the cache; of the last row three processes have nothing."""
    shutil.copy(place / "eval.csv", tmp_path)
    make_csv(tmp_path, 9)
    changes = {
        "train_target": ("decoder", "lm_head"), "cache_audio_features": True, "lora_variant": "dora",
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    train(options_of(tmp_path, tmp_path / "one", **{**changes, "gradient_accumulation_steps": 4}))
    run_processes(tmp_path, tmp_path / "four", 4, **changes)
    check_follows(tmp_path / "four", tmp_path / "one", EXACT)


def test_a_run_that_goes_on_makes_the_same_bits(place, tmp_path):
    shutil.copytree(place / "two", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    said = run_processes(place, tmp_path / "run", 2, resume_from_checkpoint=True)
    assert "going on after step 2 of 4" in said
    assert history(tmp_path / "run") == history(place / "two")
    adapters = [run / "final/adapter_model.safetensors" for run in (tmp_path / "run", place / "two")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def start_long(start, place, output):
    """Two processes with many steps, evaluations and checkpoints before them."""
    changes = {"shard_weights": True, "save_steps": 1, "eval_steps": 1, "num_epochs": 500}
    jobs = start_ranks(start, as_command(options_of(place, output, **changes)).split()[1:])
    assert jobs[0].until(lambda: len(checkpoints(output)) >= 2), jobs[0].said()
    return jobs


def test_a_killed_process_ends_the_other_one(place, tmp_path):
    with fleet(tmp_path) as start:
        jobs = start_long(start, place, tmp_path / "run")
        jobs[1].kill()
        assert jobs[0].end() == 1
    assert jobs[0].said().splitlines()[-1] == LOST
    assert all(damage(path) is None for path in checkpoints(tmp_path / "run"))


def note_losses_and_die_after(step, folder):
    """Let the second process end right after a step, and the first one note each loss that it computes."""
    compute, log = ForwardPass.loss, RunLog.step

    def compute_and_note(self, *words, **more):
        if os.environ["RANK"] == "0":
            with (folder / "losses").open("a") as file:
                file.write("a loss\n")
        return compute(self, *words, **more)

    def log_and_die(self, number, **more):
        log(self, number, **more)
        if os.environ["RANK"] == "1" and number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    ForwardPass.loss, RunLog.step = compute_and_note, log_and_die


def test_a_process_that_has_gone_is_noticed_before_anything_is_gathered(place, tmp_path):
    """On GPUs a sum over NCCL would wait for it for half an hour."""
    changes = {"shard_weights": True, "save_steps": 0, "eval_steps": 0}
    words = as_command(options_of(place, tmp_path / "run", **changes)).split()[1:]
    with fleet(tmp_path) as start:
        jobs = start_ranks(start, words, before=partial(note_losses_and_die_after, 2, tmp_path))
        assert [job.end() for job in jobs] == [1, -signal.SIGKILL], jobs[0].said()
    assert jobs[0].said().splitlines()[-1] == LOST
    # The steps have 8 and 5 rows, in batches of 2 for each process.
    assert (tmp_path / "losses").read_text().splitlines() == ["a loss"] * 4


def test_all_stop_when_one_is_asked_to(place, tmp_path):
    """In the middle of an evaluation, too: where one does not go on, no other one can."""
    with fleet(tmp_path) as start:
        jobs = start_long(start, place, tmp_path / "run")
        jobs[1].signal(signal.SIGTERM)
        assert [job.end() for job in jobs] == [130, 130], jobs[0].said()
    steps = [line["step"] for line in read_log(tmp_path / "run/log.jsonl")]
    assert checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{steps[-1]}"


def test_one_process_goes_on_from_what_two_saved(place, tmp_path):
    """A checkpoint holds whole states, also of the full copy that each process updated half of."""
    shutil.copytree(place / "two", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    train(options_of(place, tmp_path / "run", gradient_accumulation_steps=4, resume_from_checkpoint=True))
    check_follows(tmp_path / "run", place / "one", EXACT)


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


# --- one of four processes, the others pretended ------------------------------------------------------------


@pytest.fixture
def first_of_four():
    """What is gathered is never sent, so that only its size is right."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield World(0, 4, distributed.group.WORLD, is_sharding=True)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model whose blocks are larger than what they compute."""
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    config["audio_encoder_config"] |= {"embed_dim": 128, "depth": 6}
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 768}
    folder = tmp_path_factory.mktemp("model")
    MiDashengLMModel(MiDashengLMConfig(**config)).save_pretrained(folder)
    return folder


def sharded(options, base, world, dtype=torch.float32):
    model, _ = trainable_model(options, base, CPU, dtype, is_on_host=True)
    shard_blocks(model, world, CPU, dtype)
    return model


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_a_share_is_the_first_rows_of_the_weights_in_their_dtype(base, first_of_four, variant):
    """And adapters begin as they do without sharding, to the bit."""
    settings = {"train_target": ("encoder", "decoder", "lm_head"), "lora_variant": variant}
    options, dtype = train_options(base, base, "run", **settings), torch.bfloat16
    whole, _ = trainable_model(options, base, CPU, dtype)
    expected = dict(whole.named_parameters())
    count = 0
    for name, found in sharded(options, base, first_of_four, dtype).named_parameters():
        wanted = expected[name].detach()
        if isinstance(found, DTensor):
            count += 1
            found, wanted = found.to_local(), wanted.chunk(4)[0]
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), name
    assert count == sum(not p.requires_grad for block in blocks_of(whole) for p in block.parameters())


def test_each_process_keeps_the_states_of_its_rows(base, first_of_four):
    options = train_options(base, base, "run", train_target=("decoder", "lm_head"))
    model = sharded(options, base, first_of_four)
    trained = TrainableState(model, CPU, world=first_of_four)
    step(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trained.update(1.0)
    rows = len(model.get_base_model().decoder.lm_head.weight)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            changed = (parameter.detach() != before[name]).any(1).nonzero()
            assert changed.numel() > 0
            assert "lora" in name or changed.max() < rows / 4 + 1
    states = trained.optimizer_state()
    assert trained.is_divided
    [head] = [name for name in states if "lm_head" in name and name.endswith("/exp_avg")]
    assert states[head].shape == before[head.removesuffix("/exp_avg")].shape
    assert states[head].any(1).nonzero().max() < rows / 4 + 1


def test_the_plan_counts_shares_and_what_is_gathered(base, first_of_four):
    options = train_options(base, base, "run", gradient_checkpointing=True)
    lengths = np.full(8, 40)
    plans = [
        plan_memory(
            base, options_, BatchSampler(lengths, lengths // 2, 2, 1, processes, 0), 16_000 * lengths, 0,
            CPU, torch.float32,
        )
        for options_, processes in ((options, 4), (replace(options, shard_weights=True), 4))
    ]  # fmt: skip
    measured = []
    for is_sharded in (False, True):
        if is_sharded:
            model = sharded(options, base, first_of_four)
        else:
            model, _ = trainable_model(options, base, CPU, torch.float32)
        checkpoint_gradients(model.train())
        step(model)
        model.zero_grad()
        held = sum(
            (p.to_local() if isinstance(p, DTensor) else p).nbytes
            for p in model.parameters()
            if not p.requires_grad
        )
        measured.append((held, peak_bytes(partial(step, model))))
    gathered = measured[1][1] - measured[0][1]
    largest = max(sum(p.nbytes for p in b.parameters() if not p.requires_grad) for b in blocks_of(model))
    # From torch 2.15 on less than two blocks.
    assert largest < gathered <= GATHERED * largest
    saved = measured[0][0] - measured[1][0] - GATHERED * largest
    assert plans[0].weights - plans[1].weights == pytest.approx(saved, rel=1e-3)


def step(model):
    ids = np.array([1] * 10 + [model.config.audio_token_id] * audio_token_count(16_000) + [3] * 10)
    labels = np.where(np.arange(len(ids)) < len(ids) - 10, -100, ids)
    model(**Collator(0)([Sample(ids, labels, np.zeros(16_000, np.float32))])).loss.backward()
