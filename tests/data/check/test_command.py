"""The command of a training that `check` prints: it fits rows and memory, and it runs as it is."""

import json
import shlex
from itertools import pairwise

import pytest
import yaml

from mdl_toolkit.cli import main as cli
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.training.memory import plan as planning
from mdl_toolkit.training.memory.forecast import fit_memory
from mdl_toolkit.utils.run_folder import read_log
from tests.support.paths import MODEL
from tests.support.runs import make_csv, train_options


def advised(run, tmp_path, *words):
    """What is said of the training, and its command."""
    found = tmp_path / "found.json"
    said = run(*words, "--json", found).out
    training = json.loads(found.read_text(encoding="utf-8"))["training"]
    assert f"\n  {training['command']}\n" in said
    assert ("too little" in said) == (training["expectation"] is not None)
    return training, training["command"]


def test_the_command_runs_and_evaluates_and_saves_several_times(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, held = make_csv(tmp_path, 18), make_csv(tmp_path, 6, seed=50, name="it's held out.csv")
    training, command = advised(run, tmp_path, train, held, "--system-prompt", "Listen.")
    assert training["steps"] == 3
    assert "too little" in training["expectation"]["en"]
    words = shlex.split(command)
    assert words[:2] == ["mdl-toolkit", "train"]
    assert words[words.index("--eval-dataset") + 1] == str(held)
    assert words[words.index("--system-prompt") + 1] == "Listen."
    assert words[words.index("--eval-metric") + 1] == "accuracy"
    assert "--keep-best" in words
    capsys.readouterr()
    assert cli.run(words[1:]) == 0
    said = capsys.readouterr().err
    assert "done: 30 steps; the result is in run/final" in said
    assert "too little" not in said
    evaluations = [line for line in read_log(tmp_path / "run/log.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [*range(3, 31, 3)]
    assert {"checkpoint-27", "checkpoint-30"} >= {
        each.name for each in (tmp_path / "run").glob("checkpoint-*")
    }


def test_what_was_chosen_stays(run, tmp_path):
    settings = tmp_path / "train.yaml"
    chosen = {
        "num_epochs": 3, "batch_size": 2, "save_steps": 7, "lora_rank": 8, "output": "there",
        "lr_scheduler": "cosine",
    }  # fmt: skip
    settings.write_text(yaml.safe_dump(chosen))
    _, command = advised(run, tmp_path, make_csv(tmp_path, 6), "--train-config", settings)
    for name, value in chosen.items():
        assert f"--{name.replace('_', '-')} {value}" in command
    assert "--lr " not in command
    assert "--eval" not in command
    assert "--save-total-limit 2" in command


def test_what_was_chosen_stays_where_it_is_the_default(run, tmp_path):
    settings, chosen = tmp_path / "train.yaml", {"num_epochs": 1, "save_steps": 500, "eval_steps": 500}
    settings.write_text(yaml.safe_dump(chosen))
    train, held = make_csv(tmp_path, 18), make_csv(tmp_path, 6, seed=50, name="held.csv")
    options = TrainOptions(train_dataset="t", output="o")
    assert {name: getattr(options, name) for name in chosen} == chosen
    _, command = advised(run, tmp_path, train, held, "--train-config", settings)
    assert not any(f"--{name.replace('_', '-')}" in command for name in chosen)
    assert "--keep-best" in command


def test_all_evaluation_files_are_in_it_and_other_training_sets_are_told(run, tmp_path, capsys):
    settings = tmp_path / "train.yaml"
    settings.write_text("train_dataset: [a.csv=0.8, b.csv=0.2]\neval_dataset: c.csv\n")
    train, *held = (make_csv(tmp_path, 6, seed=seed, name=f"{seed}.csv") for seed in (1, 2, 3))
    found = tmp_path / "found.json"
    done = run(train, *held, "--train-config", settings, "--json", found)
    words = shlex.split(json.loads(found.read_text(encoding="utf-8"))["training"]["command"])
    named = [after for word, after in pairwise(words) if word == "--eval-dataset"]
    assert named == [*map(str, held)]
    assert words[words.index("--train-dataset") + 1] == str(train)
    assert (
        f"the training is predicted on {train} alone, not on the 2 datasets of its train_dataset" in done.err
    )


def test_the_batch_fits_what_is_free(run, tmp_path, monkeypatch):
    """The largest that fits, accumulated to the same effective one."""
    csv, settings, needs = make_csv(tmp_path, 16), tmp_path / "train.yaml", {}
    for size in (8, 4, 2):
        settings.write_text(f"batch_size: {size}\n")
        needs[size] = run(csv, "--json", "--train-config", settings).figures["training"]["bytes"]["total"]
    assert needs[8] > needs[4] > needs[2]
    monkeypatch.setattr(planning, "free_memory", lambda _: needs[2])
    training, command = advised(run, tmp_path, csv)
    assert training["warning"] is not None
    assert "--batch-size 2 --gradient-accumulation-steps 4" in command
    assert "--quantization" not in command
    # Where nothing fits the warning says so, and the batch is that which was asked for.
    monkeypatch.setattr(planning, "free_memory", lambda _: 1)
    assert "--batch-size" not in advised(run, tmp_path, csv)[1]


def test_four_bits_are_the_last_resort():
    options = train_options("d", MODEL, "o", batch_size=2)
    fitting = fit_memory(options, None, lambda each: each.quantization == "4bit")
    assert (fitting.batch_size, fitting.gradient_accumulation_steps, fitting.quantization) == (1, 2, "4bit")
    assert fitting.gradient_checkpointing


@pytest.mark.parametrize(
    ("changes", "stored"),
    [({"lora_variant": "pissa"}, None), ({"shard_weights": True}, None), ({}, "8bit")],
)
def test_no_four_bits_where_training_refuses_them(changes, stored):
    options = train_options("d", MODEL, "o", **changes)
    assert fit_memory(options, stored, lambda each: each.quantization == "4bit") == options


def test_no_answers_are_generated_where_weights_are_shared(run, tmp_path):
    settings = tmp_path / "train.yaml"
    settings.write_text("shard_weights: true\n")
    words = make_csv(tmp_path, 18), make_csv(tmp_path, 6, seed=50, name="held.csv")
    _, command = advised(run, tmp_path, *words, "--train-config", settings)
    assert "--keep-best" in command
    assert "--eval-metric" not in command
