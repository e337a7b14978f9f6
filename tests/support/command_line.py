"""What tests of the command line share: all options, and commands whose work only listens."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mdl_toolkit.cli import main as cli
from mdl_toolkit.cli.click_options import OptionsCommand
from mdl_toolkit.config.data import (
    CheckOptions,
    CompletionOptions,
    ConvertOptions,
    DemoOptions,
    SplitOptions,
)
from mdl_toolkit.config.evaluation import EvaluateOptions, ReportOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.options import Options
from mdl_toolkit.config.serving import PushOptions, ServeOptions
from mdl_toolkit.config.train import MergeOptions, TrainOptions

COMMANDS: dict[str, type[Options]] = {
    options.COMMAND: options
    for options in (
        ConvertOptions,
        TrainOptions,
        InferenceOptions,
        MergeOptions,
        CheckOptions,
        SplitOptions,
        EvaluateOptions,
        ReportOptions,
        ServeOptions,
        PushOptions,
        DemoOptions,
        CompletionOptions,
    )
}

TRAIN = ("train", "--train-dataset", "in.csv", "--output", "out")
CONVERT = ("convert-dataset", "in.csv", "--output", "out")
LANGUAGES = ["en", "zh_CN"]


@dataclass
class Done:
    """What became of a command line."""

    status: int
    out: str
    err: str


class Door:
    """Runs command lines and keeps the options that reached its work."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.reached: list[tuple[str, Any]] = []
        self.trouble: BaseException | None = None

    def work(self, name: str) -> Any:
        def work(options: Options) -> None:
            self.reached.append((name, options))
            if self.trouble:
                raise self.trouble

        return work

    def __call__(self, *words: str) -> Done:
        status = cli.run(words)
        captured = self.capsys.readouterr()
        return Done(status, captured.out, captured.err)

    def options(self, *words: str) -> Any:
        done = self(*words)
        assert (done.status, done.out, done.err) == (0, "", "")
        return self.reached[-1][1]


def one_line(done: Done) -> str:
    """The only line of a refusal."""
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    return done.err[:-1]


def python(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


NEEDED: dict[str, dict[str, str]] = {
    "convert-dataset": {"INPUT": "in.csv", "--output": "out"},
    "train": {"--train-dataset": "in.csv", "--output": "out"},
    "inference": {"INPUT": "in.csv", "--output": "out.csv", "--model-name": "model"},
    "merge": {"ADAPTER": "run/final", "--output": "out"},
    "check": {"INPUT": "in.csv"},
    "split": {"INPUT": "in.csv", "--output": "out"},
    "evaluate": {"INPUT": "in.csv"},
    "report": {"INPUT": "run"},
    "serve": {"MODEL_NAME": "model"},
    "push": {"FOLDER": "run/final", "REPO": "me/model"},
    "demo": {},
    "completion": {"SHELL": "bash"},
}


def read(command: str, words: list[str]) -> Options:
    """The options that a command line gives."""
    seen: list[Options] = []
    found = OptionsCommand(COMMANDS[command], seen.append)
    with found.make_context(command, list(words)) as context:
        found.invoke(context)
    return seen[0]


def words_with(command: str, name: str, value: str) -> list[str]:
    """The shortest command line that gives one option a value."""
    given = {**NEEDED[command], name: value}
    named = [f"{key}={word}" for key, word in given.items() if key.startswith("--")]
    return [*named, "--", *(word for key, word in given.items() if not key.startswith("--"))]


def written(folder: Path, content: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)
