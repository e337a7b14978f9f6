"""Chinese texts: between a Chinese character and a Latin letter, digit or code there is a space."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.chinese import wrong_in
from tests.support.paths import ROOT

SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = sorted([*(ROOT / "docs").glob("*.zh.md"), ROOT / "README.zh.md"])
# What is put in for a placeholder is taken for Latin, unless its name says that it is Chinese.
IS_CHINESE = re.compile(r"\bzh\b|_zh\b")
MARKS = {"begin", "end"}  # colours of a terminal, or brackets
CODE, LINK = re.compile(r"`[^`]*`"), re.compile(r"\[([^\]]*)\]\([^)]*\)")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def literals(source: str) -> list[str]:
    """The texts of a Python file, with something in place of each placeholder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(map(_part, node.values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    name = ast.unparse(node.value) if isinstance(node, ast.FormattedValue) else ""
    return "" if name in MARKS else "，" if IS_CHINESE.search(name) else "X"


def test_what_is_wrong_is_found():
    source = "zh = '不支持FLAC'; f'共 {n}行'; f'第 {n} 行{zh}'; f'95% 为 {x} 秒（{y}）'"
    assert [text for text in literals(source) if wrong_in(text)] == ["不支持FLAC", "共 X行"]


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_the_program_s_texts(path):
    texts = literals(path.read_text(encoding="utf-8"))
    assert [found for text in texts for found in wrong_in(text)] == []


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_the_pages(path):
    text = path.read_text(encoding="utf-8")
    assert wrong_in(text) == []
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert wrong_in(CODE.sub("X", LINK.sub(r"\1", prose))) == []


def test_the_report_s_page():
    files = [path for path in (ROOT / "src/mdl_toolkit/reporting/page").iterdir() if path.is_file()]
    assert files
    assert [found for path in files for found in wrong_in(path.read_text(encoding="utf-8"))] == []
