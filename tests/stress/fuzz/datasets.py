"""Converted datasets, runs and checkpoints, spoilt: a byte, a number, a file that is missing."""

import os
import shutil
from pathlib import Path

import numpy as np

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.training.run import train
from tests.stress.fuzz.cases import Case
from tests.stress.fuzz.models import spoil_file
from tests.support.paths import MODEL
from tests.support.runs import make_csv, train_options

TRAIN = [
    "--model-name",
    str(MODEL),
    "--output",
    "run",
    "--batch-size",
    "2",
    "--lora-rank",
    "2",
    "--num-epochs",
    "0.5",
]


def make_shared(folder: Path) -> None:
    """Convert a small dataset and train on it, once for all cases."""
    rows = make_csv(folder, 6)
    convert_dataset(
        ConvertOptions(input=str(rows), output=str(folder / "data"), model_name=str(MODEL), num_workers=1)
    )
    options = {"batch_size": 2, "lora_rank": 2, "num_epochs": 1, "save_steps": 1}
    train(train_options(folder / "data", MODEL, folder / "run", **options))
    for path in (folder / "run/final", folder / "run/checkpoint-3"):
        shutil.rmtree(path)


def make(folder: Path, shared: Path, random: np.random.Generator) -> Case:
    """Return a case of a training or a command that reads a spoilt dataset, run or checkpoint."""
    if random.integers(2):
        shutil.copytree(shared / "data", folder / "data", copy_function=os.link)
        spoilt = spoil_file(folder / "data", random)

        def notices(status: int, said: str) -> str:
            """A shard holds recordings and labels: whatever was changed in it must be noticed."""
            return "" if status or ".arrow" not in spoilt else "not noticed"

        return Case(folder, ["train", "--train-dataset", "data", *TRAIN], f"dataset: {spoilt}", check=notices)
    shutil.copytree(shared / "run", folder / "run", copy_function=shutil.copy2)
    newest = folder / "run/checkpoint-2"
    spoilt = spoil_file(newest if random.integers(4) else folder / "run", random)
    words = ["train", "--train-dataset", str(shared / "data"), *TRAIN, "--resume-from-checkpoint", "true"]
    return Case(folder, words if random.integers(4) else ["report", "run"], f"run: {spoilt}")
