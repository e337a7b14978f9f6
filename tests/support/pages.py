"""Make a report, and look at it in a browser."""

from pathlib import Path
from typing import Any

import pytest

from mdl_toolkit.cli.main import run
from tests.support.runs import write_csv

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "looked",
    "at",
    "rain",
    "while",
    "nobody",
    "was",
    "there",
]


def made(path: Path, *words: str) -> Path:
    """The report of some file or folder."""
    assert run(["report", str(path), "--output", str(path.parent / "report.html"), *words]) == 0
    return path.parent / "report.html"


def answered(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A CSV of answers."""
    return write_csv(folder / "answers.csv", rows)


def texts(page: Any, selector: str) -> list[str]:
    """The text of each element."""
    return page.locator(selector).all_text_contents()


def shown(page: Any) -> list[int]:
    """Lines of the rows in the page, in their order."""
    return [int(text.split()[-1]) for text in texts(page, ".row .first small:nth-of-type(1)")]


def until(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript; playwright's own wait needs `eval`, which the page forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"never: {condition}")
