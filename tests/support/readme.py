"""The README's way to a result without our commands: transformers alone."""

import csv
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

SNIPPET = re.compile(
    r"^```python\n(import mdl_toolkit\.model\.registration  #.*?)^```$", re.DOTALL | re.MULTILINE
)


def snippet_answers(model: Path, folder: Path, asked: Callable[[str], str] = str) -> list[str]:
    """What the README's code prints for each recording of a demonstration's test.csv.

    Args:
        model: the merged folder.
        folder: of the demonstration.
        asked: may change the code that asks.
    """
    (code,) = SNIPPET.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert code.count('"run/final"') == 2
    assert code.count('"recording.mp3"') == 1
    load, inputs, ask = code.replace("run/final", str(model)).partition("inputs = ")
    names: dict[str, Any] = {}
    exec(load, names)
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        recordings = [str(folder / "phrases" / row["audio"]) for row in csv.DictReader(file)]
    answers = []
    for recording in recordings:
        with redirect_stdout(StringIO()) as printed:
            exec(asked(inputs + ask.replace("recording.mp3", recording)), names)
        answers.append(printed.getvalue().removesuffix("\n"))
    return answers
