"""Several processes follow the curve of one, and none of them is left waiting for another that is gone."""

import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

from mdl_toolkit.cli import main as cli
from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.data.convert import run as conversion
from mdl_toolkit.training import datasets as training_data
from mdl_toolkit.training import run as training
from mdl_toolkit.training.checkpoints import checkpoints, damage
from mdl_toolkit.training.run import train
from mdl_toolkit.utils import distributed
from mdl_toolkit.utils.distributed import PeerLostError, World
from mdl_toolkit.utils.run_folder import read_log
from tests.support.compared import check_follows, figures
from tests.support.fleet import fleet, free_port, nothing, start_ranks
from tests.support.paths import MODEL
from tests.support.processes import children, wait_for
from tests.support.runs import STOPPING, make_csv, make_rows, train_options, write_csv

LOST = "error: another process of this run has ended; its own message says why"
BIN = Path(sys.executable).parent


def options_of(place, output, **changes):
    settings = {
        "batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2, "lr": 1e-3, "merge_lora": False,
        "eval_dataset": str(place / "eval.csv"), "eval_steps": 3,
        "train_target": ("encoder", "projector", "lm_head"),
    }  # fmt: skip
    data = changes.pop("train_dataset", place / "train.csv")
    return train_options(data, MODEL, output, **{**settings, **changes})


def command(place, output, *words, **changes):
    return [*as_command(options_of(place, output, **changes)).split()[1:], *words]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """13 rows, and in `one` what one process makes of them in steps of 8: a partial one ends each epoch."""
    folder = tmp_path_factory.mktemp("distributed")
    make_csv(folder, 13)
    make_csv(folder, 5, seed=40, name="eval.csv")
    assert train(options_of(folder, folder / "one", gradient_accumulation_steps=4)).steps == 4
    return folder


@pytest.fixture
def start(tmp_path):
    with fleet(tmp_path) as start:
        yield start


def decompose_nothing():
    """Fail where a weight is decomposed."""
    torch.linalg.svd = None


def test_the_first_of_two_decomposes_weights_for_both(place, tmp_path, start):
    settings = {"lora_variant": "pissa", "train_target": ("encoder", "decoder")}
    train(options_of(place, tmp_path / "one", gradient_accumulation_steps=4, **settings))
    words = command(place, tmp_path / "two", **settings)
    jobs = start_ranks(start, words, before=[nothing, decompose_nothing])
    assert [job.end() for job in jobs] == [0, 0], [job.said() for job in jobs]
    check_follows(tmp_path / "two", tmp_path / "one")


# --- converting ---------------------------------------------------------------------------------------------


def test_the_first_rank_converts_alone_and_the_others_end_as_it_does(place, tmp_path, start):
    """What follows in a script of another node must not begin before there is a dataset, or without one."""
    rows = make_rows(tmp_path / "audio", 4)
    for name, some in (("good", rows), ("bad", [*rows, {"audio": "gone.wav", "prediction": "x"}])):
        write_csv(tmp_path / f"{name}.csv", some)
        words = ["convert-dataset", tmp_path / f"{name}.csv", "--output", tmp_path / name]
        jobs = start_ranks(start, [*map(str, words), "--model-name", str(MODEL)])
        status = 0 if name == "good" else 1
        assert [job.end() for job in jobs] == [status, status]
        assert (tmp_path / name).exists() == (name == "good")
        assert ("gone.wav" in jobs[0].said()) == (LOST in jobs[1].said()) == (name == "bad")


# --- the same curve -----------------------------------------------------------------------------------------


def only_the_first_converts():
    if os.environ["RANK"] != "0":
        conversion.convert_rows = training_data.convert_rows = None


@pytest.mark.parametrize(
    ("rows", "processes", "split"),
    [
        (13, 2, (2, 2)),  # of the last 5 rows the second process has 2
        (9, 2, (2, 2)),  # of the last row it has nothing
        (13, 3, (1, 2)),
    ],
)
def test_processes_that_rows_do_not_divide_evenly_follow_one(place, tmp_path, start, rows, processes, split):
    csv = make_csv(tmp_path, rows)
    effective = split[0] * split[1] * processes
    steps = train(
        options_of(
            place, tmp_path / "one", train_dataset=csv, batch_size=effective, gradient_accumulation_steps=1
        )
    ).steps
    words = command(
        place, tmp_path / "run", train_dataset=csv, batch_size=split[0], gradient_accumulation_steps=split[1]
    )
    jobs = start_ranks(start, words, processes, only_the_first_converts)
    assert [job.end() for job in jobs] == [0] * processes, [job.said() for job in jobs]
    assert [job.said() for job in jobs[1:]] == [""] * (processes - 1)
    assert jobs[0].said().splitlines()[-1].startswith(f"done: {steps} step")
    check_follows(tmp_path / "run", tmp_path / "one")


def launch(*words, **environment):
    """A launcher, as a user starts it."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    return subprocess.Popen(
        [str(BIN / words[0]), *map(str, words[1:])], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
    )  # fmt: skip


def torchrun(*words):
    return launch("torchrun", "--standalone", "--nproc-per-node", 2, "--no-python", "mdl-toolkit", *words)


def accelerate(*words, mode=("--multi_gpu",)):
    return launch(
        "accelerate", "launch", *mode, "--num_processes", 2, "--num_machines", 1,
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port(),
        "--no_python", "mdl-toolkit", *words,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, accelerate])
def test_a_launcher_starts_two_that_follow_one(place, tmp_path, launcher):
    process = launcher(*command(place, tmp_path / "run"))
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.count("done: 4 steps") == 1
    check_follows(tmp_path / "run", place / "one")


@pytest.mark.slow
def test_an_fsdp_configuration_is_said_not_to_be_used(place, tmp_path):
    process = accelerate(*command(place, tmp_path / "run"), mode=("--use_fsdp", "--fsdp_version", 2))
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.count("the launcher asks for FSDP, which is not used") == 1
    check_follows(tmp_path / "run", place / "one")


@pytest.mark.slow
def test_two_nodes_follow_one(place, tmp_path):
    nodes = [
        launch(
            "torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "both",
            "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "127.0.0.1", "--no-python", "mdl-toolkit",
            *command(place, tmp_path / "run"),
        )
        for port in [free_port()]
        for _ in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("done: 4 steps" in text for text in said) == 1
    check_follows(tmp_path / "run", place / "one")


# --- when one ends ------------------------------------------------------------------------------------------


def test_a_bad_row_ends_all(place, tmp_path, start):
    """The first process says which row; the other one, which waits for the data, says that it is alone."""
    jobs = start_ranks(start, command(place, tmp_path / "run", train_dataset=bad_csv(tmp_path)))
    assert [job.end() for job in jobs] == [1, 1]
    assert jobs[0].said().splitlines()[0].endswith("bad.csv: 1 bad row(s):")
    assert "missing.wav" in jobs[0].said()
    assert jobs[1].said().splitlines() == [LOST]
    assert not (tmp_path / "run").exists()


def bad_csv(folder):
    rows = make_rows(folder / "audio", 4)
    rows[2]["audio"] = "missing.wav"
    return write_csv(folder / "bad.csv", rows)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_one_with_one_line(place, tmp_path, start, killed):
    words = command(place, tmp_path / "run", save_steps=1, num_epochs=500)
    jobs = start_ranks(start, words)
    assert jobs[0].until(lambda: len(checkpoints(tmp_path / "run")) >= 2)
    jobs[killed].kill()
    assert jobs[1 - killed].end() == 1
    lines = jobs[1 - killed].said().splitlines()
    usual = (
        "device", "evaluation", "loading", "memory", "recipe", "steps", "time", "training", "what"
    )  # fmt: skip
    assert [line for line in lines if not line.startswith(usual)] == [LOST]
    assert all(damage(path) is None for path in checkpoints(tmp_path / "run"))


def little_patience_for_a_meeting():
    distributed.RENDEZVOUS_TIMEOUT = timedelta(seconds=2)


def gone_after_the_meeting():
    little_patience_for_a_meeting()
    meet = distributed.rendezvous

    def meet_and_end(*words, **more):
        next(meet(*words, **more))
        os._exit(7)

    distributed.rendezvous = meet_and_end


def test_a_process_that_ends_between_meeting_and_connecting_does_not_keep_others_waiting(
    place, tmp_path, start
):
    words = command(place, tmp_path / "run")
    jobs = start_ranks(start, words, 2, [little_patience_for_a_meeting, gone_after_the_meeting])
    assert [job.end() for job in jobs] == [1, 7]
    assert jobs[0].said().splitlines()[-1] == LOST


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_nobody_joins_says_so(place, tmp_path, start, rank):
    """Such as one whose peers were killed before they came."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = command(place, tmp_path / "run")
    job = start(words, little_patience_for_a_meeting, RANK=rank, WORLD_SIZE="2", **address)
    assert job.end() == 1
    assert f"met at 127.0.0.1:{address['MASTER_PORT']} within" in job.said()
    assert job.said().count("error: ") == 1
    assert job.said().splitlines()[-1].endswith("start them together")


@pytest.mark.parametrize("moment", ["open_data", "load_model"])
def test_a_process_that_fails_before_the_first_step_ends_the_other_one(place, tmp_path, start, moment):
    """Whatever it is that fails: here a bug."""
    jobs = start_ranks(start, command(place, tmp_path / "run"), before=partial(fail_in_second, moment))
    assert [job.end() for job in jobs] == [1, 1]
    assert LOST in jobs[0].said().splitlines()
    assert jobs[1].said().splitlines() == [
        "error: a bug in mdl-toolkit: ValueError: broken (--debug shows the traceback)"
    ]


def a_group_that_ends_together():
    """As with NCCL: whoever leaves waits for all others, here for ever."""
    fail_in_second("load_model")
    distributed.must_leave_together = lambda: True
    distributed.distributed.destroy_process_group = lambda: time.sleep(600)


def test_a_process_that_fails_says_so_before_it_waits_for_anybody(place, tmp_path, start):
    jobs = start_ranks(start, command(place, tmp_path / "run"), before=a_group_that_ends_together)
    assert [job.end() for job in jobs] == [1, 1]
    assert jobs[1].said().startswith("error: a bug in mdl-toolkit: ValueError: broken")


def test_the_command_ends_at_once_where_tidying_up_would_hang(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(cli, "run", lambda _: 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", lambda status: ended.append(status))
    with pytest.raises(SystemExit):
        cli.main()
    assert ended == [1]


@pytest.mark.parametrize(
    ("reason", "more"),
    [
        ("[/pytorch/third_party/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:2", ""),
        (
            "Duplicate GPU detected : rank 1 and rank 0\nmore",
            " (here: Duplicate GPU detected : rank 1 and rank 0)",
        ),
    ],
)
def test_what_else_breaks_a_connection_is_told(reason, more, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", raising(RuntimeError(reason)))
    with pytest.raises(PeerLostError) as caught:
        distributed.World(0, 2).wait()
    assert f"error: {caught.value.message.en}" == LOST + more


def test_a_lack_of_memory_is_no_lost_connection(monkeypatch):
    problem = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.distributed, "all_reduce", raising(problem))
    with pytest.raises(torch.OutOfMemoryError):
        distributed.World(0, 2).wait()


def raising(problem):
    def fail(*_, **__):
        raise problem

    return fail


def fail_in_second(name):
    def fail(*_, **__):
        raise ValueError("broken")

    if os.environ["RANK"] == "1":
        setattr(training, name, fail)


@pytest.mark.slow
def test_torchrun_shows_the_error_and_fails(place, tmp_path):
    process = torchrun(*command(place, tmp_path / "run", train_dataset=bad_csv(tmp_path)))
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "missing.wav" in said
    assert LOST in said.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train-dataset", "nowhere.csv"], "error: --train-dataset nowhere.csv: no such file or folder"),
        (["--lora-rank", "x"], "error: --lora-rank: expected a number, not 'x'"),
        (["--lora-rnk", "2"], "error: train: no option --lora-rnk; did you mean --lora-rank?"),
    ],
)
def test_what_all_processes_have_to_say_is_said_once(place, tmp_path, words, told):
    process = torchrun(*command(place, tmp_path / "run"), *words)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1
    assert said.splitlines().count(told) == 1
    assert said.count(told) == 1


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["a rank", "torchrun"])
def test_sigterm_under_torchrun_leaves_one_checkpoint(place, tmp_path, asked):
    """torchrun ends all others as soon as one has ended, and passes on what it is sent itself."""
    script = tmp_path / "slow.py"
    script.write_text(
        "from tests.support import fleet; fleet.slow_steps(0.3)\n"
        "from mdl_toolkit.cli.main import main; main()"
    )
    process = launch(
        "torchrun", "--standalone", "--nproc-per-node", 2, script,
        *command(place, tmp_path / "run", num_epochs=500),
    )  # fmt: skip
    log = tmp_path / "run/log.jsonl"
    wait_for(lambda: process.poll() is not None or (log.exists() and len(read_log(log)) >= 2))
    ranks = [pid for pid in children(process.pid) if b"slow.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(process.pid if asked == "torchrun" else max(ranks), signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode != 0
    assert STOPPING in said.splitlines() or asked == "a rank"
    assert "interrupted" in said.splitlines()
    saved = checkpoints(tmp_path / "run")
    assert [damage(path) for path in saved] == [None]
    assert saved[0].name == f"checkpoint-{figures(tmp_path / 'run')[-1]['step']}"


# --- one process, and what a launcher says ------------------------------------------------------------------


def test_alone_nothing_is_exchanged():
    world, values = World(), torch.tensor([1.0, 2.0])
    assert world.sum(values) is values
    parameter = torch.nn.Parameter(torch.ones(2))
    world.sum_gradients([parameter])
    world.wait()
    assert parameter.grad is None
    assert world.is_first


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=x"),
    ],
)
def test_an_environment_that_makes_no_sense_is_said(place, tmp_path, start, environment, named):
    job = start(command(place, tmp_path / "run"), **environment)
    assert job.end() == 2
    assert job.said().count("\n") == 1
    assert job.said().startswith("error: ")
    assert named in job.said()


def test_gradients_are_summed_in_buckets_of_several_or_one(monkeypatch):
    """The other process has the same ones; parameters without a gradient count as zero."""
    sizes, work = [], namedtuple("Work", "wait")(lambda: None)
    monkeypatch.setattr(distributed, "BUCKET", 40)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda flat, **_: (sizes.append(flat.numel()), flat.mul_(2), work)[2]
    )
    parameters = [
        torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4,), (20,), (1,), (3, 3), (2,))
    ]
    expected = []
    for number, parameter in enumerate(parameters):
        values = torch.arange(parameter.numel()).view_as(parameter) + 100.0 * number
        parameter.grad = None if number == 3 else values.clone()
        expected.append(torch.zeros(1) if number == 3 else 2 * values)
    World(0, 2).sum_gradients(parameters)
    assert sizes == [10, 20, 10, 2]
    assert all(torch.equal(p.grad, wanted) for p, wanted in zip(parameters, expected, strict=True))
