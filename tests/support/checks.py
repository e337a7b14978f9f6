"""Runs of `check`, and what they found."""

import json
from typing import Any

from mdl_toolkit.cli import main as cli
from tests.support.spoilt import Table

COMMENTED = "{}: columns that are not read: 'comment'\n"
UNUSABLE = ("truncated", "text", "missing", "empty")


class Done:
    """What a command line came to."""

    def __init__(self, capsys: Any, *words: str) -> None:
        self.status = cli.run(["check", *words])
        self.out, self.err = capsys.readouterr()

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


def found_in(file: dict[str, Any]) -> dict[str, list[int]]:
    """Lines by kind of finding; a pair of prompts is named by the line of the rarer one."""
    return {
        each["name"]: each.get("lines") or [pair["lines"][1] for pair in each.get("pairs", [])]
        for each in file["findings"]
    }


def bad_lines(table: Table) -> set[int]:
    return {line for kind in UNUSABLE for line in table.lines.get(kind, [])}
