"""Measure what few steps teach: `python -m benchmarks little_data` prints the table of docs/training.

The demonstration's model learns five languages with random weights and, when it knows them, to answer with
five other words to another prompt.
"""

import csv
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.demo import PROMPT, lay_out_phrases, make_tiny_model
from mdl_toolkit.training.optimization.expectation import rate_sum
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import read_log

STEPS, RATES = (25, 50, 100, 200), (1e-4, 5e-4, 2e-3)
# Steps and learning rate of what is called pretraining.
PRETRAINING: dict[str, Any] = {"max_steps": 300, "lr": 2e-3}
OTHER_WORDS = ("zero", "one", "two", "three", "four")
QUICK: dict[str, Any] = {"gradient_checkpointing": False, "verify": False, "save_steps": 0, "eval_steps": 0}


def rename_answers(source: Path, target: Path) -> None:
    """Write a CSV with another word for each of its answers, in alphabetic order."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    words = dict(zip(sorted({row["prediction"] for row in rows}), OTHER_WORDS, strict=True))
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "prediction": words[row["prediction"]]} for row in rows)


def accuracies(
    folder: Path, model: Path, names: tuple[str, str], prompt: str
) -> dict[tuple[int, float], float]:
    """Train for each number of steps at each learning rate; return the accuracy on recordings left out.

    Args:
        folder: of the CSVs.
        model: the base.
        names: of the CSVs to learn from and to be tested on.
        prompt: for all rows.
    """
    sets = {}
    for option, name in zip(("train_dataset", "eval_dataset"), names, strict=True):
        sets[option] = str(folder / f"{name}-{model.name}")
        conversion = {"model_name": str(model), "base_dir": str(folder / "phrases"), "user_prompt": prompt}
        convert_dataset(ConvertOptions(input=str(folder / f"{name}.csv"), output=sets[option], **conversion))
    found = {}
    for steps, rate in itertools.product(STEPS, RATES):
        output = folder / f"{names[0]}-{steps}-{rate}"
        settings = {"max_steps": steps, "lr": rate, "merge_lora": False, "eval_metric": "accuracy", **QUICK}
        train(TrainOptions(model_name=str(model), output=str(output), **sets, **settings))
        found[steps, rate] = read_log(output / "log.jsonl")[-1]["eval_accuracy"]
    return found


def main() -> int:
    """Measure both models, and print a line for each number of steps and learning rate."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_out_phrases(folder / "phrases", folder)
        make_tiny_model(folder / "model", folder / "phrases", seed=42)
        columns = [accuracies(folder, folder / "model", ("train", "test"), PROMPT)]
        settings = {"train_dataset": str(folder / "train-model"), "model_name": str(folder / "model")}
        base = train(TrainOptions(output=str(folder / "base"), **settings, **PRETRAINING, **QUICK)).final
        for name in ("train", "test"):
            rename_answers(folder / f"{name}.csv", folder / f"new-{name}.csv")
        columns.append(accuracies(folder, base, ("new-train", "new-test"), "What number has it?"))
    print("| steps | `--lr` | sum | random model | pretrained model |\n| --- | --- | --- | --- | --- |")
    for steps, rate in itertools.product(STEPS, RATES):
        options = TrainOptions(train_dataset="d", output="o", max_steps=steps, lr=rate)
        shares = " | ".join(f"{column[steps, rate]:.0%}" for column in columns)
        print(f"| {steps} | {rate:g} | {rate_sum(options, Schedule.of(steps, options)):.2g} | {shares} |")
    return 0
