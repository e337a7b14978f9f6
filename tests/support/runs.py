"""Small data and quick settings for tests that train or answer."""

import csv
import shutil
from pathlib import Path
from typing import Any

import soundfile

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.utils.ownership import RECORD
from mdl_toolkit.utils.run_folder import read_log
from tests.support.waves import wave

ANSWERS = ("rain", "A dog barking.", "music and engine noise", "狗在叫", "click", "the quick brown fox jumps")
TIMES = {"elapsed", "waited"}  # in the log: never the same
# The warning of a training that was asked to stop.
STOPPING = "warning: stopping after this step, with a checkpoint; once more stops at once"
LENGTHS = (16_000, 9_000, 32_333, 3_300, 20_111, 5_000)


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_rows(folder: Path, count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Recordings of different lengths with answers of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        file = folder / f"clip-{seed}-{number}.wav"
        soundfile.write(file, wave(LENGTHS[number % 6], seed + number), 16_000, subtype="PCM_16")
        rows.append({"audio": str(file), "user_prompt": "What is it?", "prediction": ANSWERS[number % 6]})
    return rows


def make_csv(folder: Path, count: int, *, seed: int = 0, name: str = "train.csv") -> Path:
    return write_csv(folder / name, make_rows(folder / "audio", count, seed=seed))


def copy_checkpoint(golden: Path, name: str, folder: Path) -> Path:
    """A checkpoint that a test may change."""
    target = folder / name
    shutil.copytree(golden / "checkpoints" / name, target)
    return target


def train_options(data: Path, model: Path, output: Path, **changes: Any) -> TrainOptions:
    settings = {
        "train_dataset": str(data), "model_name": str(model), "output": str(output), "lr": 1e-2,
        "lora_rank": 4, "lora_alpha": 8, "batch_size": 4, "gradient_checkpointing": False,
    }  # fmt: skip
    return TrainOptions(**{**settings, **changes})


def convert(csv_file: Path, model: Path, output: Path) -> Path:
    """Convert a CSV with a model's tokenizer; return the dataset's folder."""
    convert_dataset(ConvertOptions(input=str(csv_file), output=str(output), model_name=str(model)))
    return output


def files_below(folder: Path) -> set[str]:
    """All files but the records of what was written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD]
    return {str(path.relative_to(folder)) for path in files}


def history(output):
    """What was logged, without times."""
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_log(output / "log.jsonl")
    ]


def evaluations(output: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's log."""
    log = output / "log.jsonl"
    return [line for line in read_log(log) if "eval_loss" in line] if log.exists() else []
