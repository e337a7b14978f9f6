"""A run that is killed at any moment and goes on ends as the unbroken one does, bit for bit."""

import itertools
import os
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import ModelError, ToolkitError
from mdl_toolkit.training import run as training
from mdl_toolkit.training.checkpoints import Checkpoint, checkpoints, damage, save
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import read_log
from mdl_toolkit.weights.config_files import read_json
from tests.support.fleet import die_before, fleet, start_ranks
from tests.support.paths import MODEL
from tests.support.runs import history, make_csv, train_options
from tests.support.weight_files import same_weights

STEPS = 9  # 11 rows in steps of 4, three epochs: each ends with a partial step
RESUME = ("--resume-from-checkpoint", "true")


def options_of(place, output, **changes):
    """Dropout, accumulation, partial steps, epochs, evaluations in between, a warm-up, a full copy."""
    settings = {
        "batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 3, "lora_dropout": 0.1,
        "save_steps": 1, "eval_dataset": str(place / "eval.csv"), "eval_steps": 2, "warmup_steps": 2,
        "merge_lora": False,
        "train_target": ("encoder", "projector", "decoder", "lm_head"),
    }  # fmt: skip
    data = changes.pop("train_dataset", place / "train.csv")
    return train_options(data, MODEL, output, **{**settings, **changes})


def command(place, output, *words, **changes):
    return [*as_command(options_of(place, output, **changes)).split()[1:], *words]


def bytes_below(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, and in `whole` what an unbroken run makes of them."""
    folder = tmp_path_factory.mktemp("resuming")
    make_csv(folder, 11)
    make_csv(folder, 3, seed=40, name="eval.csv")
    assert train(options_of(folder, folder / "whole")).steps == STEPS
    lines = [(line["step"], "loss" in line) for line in read_log(folder / "whole/log.jsonl")]
    expected = [(step, True) for step in range(1, 10)] + [(step, False) for step in (2, 4, 6, 8, 9)]
    assert sorted(lines) == sorted(expected)
    return folder


@pytest.fixture
def start(tmp_path):
    with fleet(tmp_path) as start:
        yield start


def check_same_end(output, place):
    """Same weights to the bit, same log: each step and evaluation once, with the very same figures."""
    assert same_weights(output / "final", place / "whole/final")
    assert same_weights(output / f"checkpoint-{STEPS}", place / f"whole/checkpoint-{STEPS}")
    assert history(output) == history(place / "whole")
    record, expected = (folder / "final/mdl-toolkit.json" for folder in (output, place / "whole"))
    assert record.read_bytes() == expected.read_bytes()


# --- killed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_again_and_again(place, tmp_path, start, seed):
    random, output = Random(seed), tmp_path / "run"
    words = command(place, output, save_steps=random.choice((1, 2)))
    done = 0
    for kills in itertools.count():
        job = start(words if kills == 0 else [*words, *RESUME])
        target = done + random.choice((1, 2, 3))
        if not job.until(partial(has_logged, output, target)):
            break
        time.sleep(random.uniform(0, 0.15))  # within a step, an evaluation, or a saving
        job.kill()
        whole = [path for path in checkpoints(output) if damage(path) is None]
        assert len(checkpoints(output)) == len(whole)
        done = max(int(path.name[11:]) for path in whole) if whole else 0
    assert job.end() == 0, job.said()
    assert kills >= 2
    check_same_end(output, place)


def has_logged(output, step):
    with suppress(FileNotFoundError):  # not there yet, or set aside by a run that starts afresh
        return any(line["step"] >= step for line in read_log(output / "log.jsonl"))
    return False


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ("os.mkdir", r"run/\.checkpoint-5\.partial-"),
        ("open", r"run/\.checkpoint-5\.partial-\w+/state\.json"),
        ("open", r"run/\.checkpoint-5\.partial-\w+/checksums\.json"),
        ("os.rename", r"run/\.checkpoint-5\.partial-"),
        ("os.mkdir", r"run/\.final\.partial-"),
        ("os.rename", r"run/\.final\.partial-"),
    ],
)
def test_killed_at_an_exact_moment(place, tmp_path, start, event, text):
    output = tmp_path / "run"
    words = command(place, output)
    job = start(words, partial(die_before, event, text))
    status = job.end()
    if status == 0:  # nothing of that kind happens
        pytest.fail(f"no {event} of {text}")
    assert status == -9
    assert all(damage(path) is None for path in checkpoints(output))
    again = start([*words, *RESUME])
    assert again.end() == 0, again.said()
    check_same_end(output, place)


def test_killed_while_the_log_is_rewritten(place, tmp_path, start):
    """At the beginning of a resumed run; then the next one still finds the log of all steps."""
    output = tmp_path / "run"
    words = command(place, output, save_steps=2)
    job = start(words)
    assert job.until(partial(has_logged, output, 3))
    job.kill()
    for _ in range(2):
        job = start([*words, *RESUME], partial(die_before, "os.rename", r"run/\.log\.jsonl\.partial-"))
        assert job.end() == -9
    assert start([*words, *RESUME]).end() == 0
    check_same_end(output, place)
    assert [path.name for path in output.glob(".*")] == [".mdl-toolkit-files.json"]


# --- otherwise than before ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(place):
    """An unbroken run without dropout, which differs between batches of other sizes."""
    train(options_of(place, place / "plain", lora_dropout=0.0))
    return place / "plain"


def test_with_two_processes_instead_of_one(place, plain, tmp_path, start):
    output = tmp_path / "run"
    output.mkdir()
    for name in ("checkpoint-4", "log.jsonl"):
        copy(plain / name, output / name)
    words = command(place, output, *RESUME, lora_dropout=0.0, batch_size=1)
    jobs = start_ranks(start, words)
    assert [job.end() for job in jobs] == [0, 0], [job.said() for job in jobs]
    assert jobs[1].said() == ""
    check_close(output, plain, 1e-4)


def test_with_two_processes_dropout_is_that_of_one_if_batches_are_the_same(place, tmp_path, start):
    """2 x 2 rows: as two batches of one process, or one batch in each of two."""
    output = tmp_path / "run"
    output.mkdir()
    for name in ("checkpoint-4", "log.jsonl"):
        copy(place / "whole" / name, output / name)
    jobs = start_ranks(start, command(place, output, *RESUME, gradient_accumulation_steps=1))
    assert [job.end() for job in jobs] == [0, 0], [job.said() for job in jobs]
    check_close(output, place / "whole", 1e-4)


def copy(source, target):
    target.parent.mkdir(exist_ok=True, parents=True)
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            copy(path, target / path.name)
    else:
        target.write_bytes(source.read_bytes())


def check_close(output, expected, tolerance):
    for found, wanted in zip(history(output), history(expected), strict=True):
        assert found == pytest.approx(wanted, rel=tolerance)
    tensors = [Checkpoint(run / f"checkpoint-{STEPS}", {}).adapter() for run in (output, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.allclose(tensor, tensors[1][name], atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize(
    ("changes", "rows"), [({"batch_size": 3}, 6), ({"gradient_accumulation_steps": 1}, 2)]
)
def test_another_effective_batch_is_refused_and_nothing_changes(
    place, tmp_path, monkeypatch, capsys, changes, rows
):
    output = tmp_path / "run"
    for name in ("checkpoint-4", "checkpoint-5", "log.jsonl", "mdl-toolkit.yaml"):
        copy(place / "whole" / name, output / name)
    before = bytes_below(output)
    monkeypatch.setattr(training, "load_model", None)  # nor are weights loaded
    with pytest.raises(ToolkitError, match=f"checkpoint-4: its steps had 4 rows, now it would be {rows}; "):
        train(options_of(place, output, resume_from_checkpoint=str(output / "checkpoint-4"), **changes))
    assert "the new ones hold" not in capsys.readouterr().err
    assert bytes_below(output) == before


def test_changed_options_are_named_and_win(place, tmp_path, capsys):
    output = tmp_path / "run"
    copy(place / "whole/checkpoint-7", output / "checkpoint-7")
    options = options_of(
        place, output, lr=2e-3, num_epochs=4, eval_dataset=None, save_steps=0, num_workers=1,
        resume_from_checkpoint=True, merge_lora=False, download_cache="elsewhere",
    )  # fmt: skip
    train(options)
    lines = capsys.readouterr().err.splitlines()
    assert f"going on after step 7 of 12, from {output / 'checkpoint-7'}" in lines
    assert [line for line in lines if "differ" in line] == [
        "warning: options differ from the interrupted run's, and the new ones hold: --lr 0.002 (was 0.01), "
        "--num-epochs 4 (was 3), --eval-dataset null (was " + str(place / "eval.csv") + "), "
        "--save-steps 0 (was 1)"
    ]
    last = history(output)[-1]
    assert last["step"] == 12
    assert history(output)[0]["learning_rate"] == pytest.approx(2e-3 * (12 - 7) / (12 - 2))


def test_paths_that_are_spelt_otherwise_are_not_named(place, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    copy(place / "whole/checkpoint-8", output / "checkpoint-8")
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(tmp_path)
    options = options_of(place, output, resume_from_checkpoint=True)
    names = ("train_dataset", "eval_dataset", "model_name")
    spelt = {name: os.path.relpath(getattr(options, name), place) for name in names}
    train(replace(options, **{name: f"./link/{path}" for name, path in spelt.items()}))
    assert "warning" not in capsys.readouterr().err


def test_the_same_options_are_not_named(place, tmp_path, capsys):
    """Those that decide only where things are, or how fast they come, are not compared."""
    output = tmp_path / "run"
    copy(place / "whole/checkpoint-8", output / "checkpoint-8")
    train(options_of(place, output, resume_from_checkpoint=True, num_workers=2, report_to=("none",)))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"seed": 1}, {"train_dataset": "eval.csv"}])
def test_another_order_of_rows_is_said(place, tmp_path, capsys, changes):
    output = tmp_path / "run"
    copy(place / "whole/checkpoint-8", output / "checkpoint-8")
    changes = {name: str(place / value) if name != "seed" else value for name, value in changes.items()}
    settings = {"num_epochs": 9, "save_steps": 0, "eval_dataset": None, "resume_from_checkpoint": True}
    train(options_of(place, output, **{**settings, **changes}))
    assert "warning: the training data or the seed are not the interrupted run's" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["another shape", "fewer layers", "other layers"])
def test_a_checkpoint_of_another_model_is_refused(place, tmp_path, change):
    output = tmp_path / "run"
    copy(place / "whole/checkpoint-8", tmp_path / "old")
    rewrite(tmp_path / "old", output, change)
    before = bytes_below(output)
    with pytest.raises(
        ModelError, match=r"checkpoint-8: it does not fit .*A-small; resume with the same model"
    ):
        train(options_of(place, output, resume_from_checkpoint=True))
    assert bytes_below(output) == before


def rewrite(old, output, change):
    """The checkpoint as another model would have left it, whole by its checksums."""
    saved = Checkpoint(old, {})
    tensors = [saved.adapter(), saved.optimizer()]
    if change == "another shape":
        tensors = [{n: t[..., :-1].clone() if t.ndim > 1 else t for n, t in of.items()} for of in tensors]
    elif change == "fewer layers":
        tensors = [{n: t for n, t in of.items() if "layers.1." not in n} for of in tensors]
    else:
        tensors = [{n.replace("layers.1.", "layers.2."): t for n, t in of.items()} for of in tensors]

    def adapter(folder):
        copy(old / "adapter_config.json", folder / "adapter_config.json")
        save_file(tensors[0], folder / "adapter_model.safetensors")

    state = read_json(old / "state.json")
    save(
        output, 8, adapter=adapter, optimizer=tensors[1], state=state,
        settings=(old / "mdl-toolkit.yaml").read_text(),
    )  # fmt: skip


@pytest.mark.parametrize("old", [("decoder", "embed_tokens"), ("decoder", "lm_head")])
def test_other_full_copies_are_refused(place, tmp_path, old):
    """Both are whole matrices, but not the same one."""
    new = ("decoder", "lm_head") if "embed_tokens" in old else ("decoder", "embed_tokens")
    output = tmp_path / "run"
    train(options_of(place, output, train_target=old, num_epochs=0.4))
    options = options_of(place, output, train_target=new, num_epochs=1, resume_from_checkpoint=True)
    with pytest.raises(ModelError, match="--train-target"):
        train(options)


# --- what is not done again ---------------------------------------------------------------------------------


def test_rows_of_earlier_steps_are_not_read(place, tmp_path, monkeypatch):
    """Each row of the steps that are left is read once; counted, as time says little of tiny clips."""
    data = tmp_path / "data"
    convert_dataset(
        ConvertOptions(input=str(place / "train.csv"), output=str(data), model_name=str(MODEL), num_workers=1)
    )
    settings = {"train_dataset": str(data), "eval_dataset": None, "save_steps": 4, "num_epochs": 20}
    options = options_of(place, tmp_path / "run", **settings)
    read, get = [], ConvertedDataset.__getitem__

    def counting(self, index):
        read.append(index)
        return get(self, index)

    monkeypatch.setattr(ConvertedDataset, "__getitem__", counting)
    train(options)
    # No row is read twice in an epoch, either.
    assert sorted(read) == sorted([*range(11)] * 20)
    read.clear()
    train(replace(options, resume_from_checkpoint=str(tmp_path / "run/checkpoint-56")))
    assert sorted(read) == sorted(sampled_after(options, 56))
    # Of 20 epochs of 4 + 4 + 3 rows, after 18 epochs and two steps.
    assert len(read) == 3 + 11


def sampled_after(options, step):
    from mdl_toolkit.training.sampler import BatchSampler

    data = ConvertedDataset(Path(options.train_dataset))
    sampler = BatchSampler(data.token_counts, data.supervised_counts, 2, 2, 1, options.seed)
    return [int(row) for later in range(step, 60) for row in sampler.examples(later)]


def test_a_thing_of_the_past_is_gone(place, tmp_path, start):
    """What a killed run left half-written is removed, and nothing else."""
    output = tmp_path / "run"
    copy(place / "whole/checkpoint-8", output / "checkpoint-8")
    copy(place / "whole/log.jsonl", output / "log.jsonl")
    (output / ".checkpoint-9.partial-1a2b3c4d").mkdir()
    (output / ".checkpoint-9.partial-1a2b3c4d/state.json").write_text("{")
    for name in (".final.partial-1a2b3c4d", ".final.old-1a2b3c4d", "final"):
        copy(place / "whole/final", output / name)
    (output / "notes.txt").write_text("mine")
    job = start(command(place, output, *RESUME))
    assert job.end() == 0, job.said()
    assert sorted(path.name for path in output.iterdir()) == [
        ".mdl-toolkit-files.json", "checkpoint-8", "checkpoint-9", "final", "log.jsonl", "loss.png",
        "mdl-toolkit.json",
        "mdl-toolkit.yaml", "notes.txt", "report.html",
    ]  # fmt: skip
    check_same_end(output, place)


def test_a_result_that_was_away_when_a_run_was_killed_is_not_lost(place, tmp_path):
    """It is put back, and then set aside as any result is when a run starts afresh."""
    copy(place / "whole/final", tmp_path / "run/.final.old-1a2b3c4d")
    train(options_of(place, tmp_path / "run", num_epochs=0.3))
    assert bytes_below(tmp_path / "run/previous-1/final") == bytes_below(place / "whole/final")
    assert not list((tmp_path / "run").glob(".final*"))
