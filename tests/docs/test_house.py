"""How the source reads: the promises hold that are switched on, and the script measures what it says."""

import subprocess
import sys

import pytest
from benchmarks import house

from tests.support.paths import ROOT

ONE = '''\
"""A module."""


def public(value):
    """Returns a value.

    Args:
        value: any.

    Example:
        >>> public(1)
        1
    """
    return _used_once(_used_twice(_used_twice(value)))


def _used_once(value):
    return value


def _used_twice(value):
    return value


class Thing:
    """A thing."""

    @property
    def size(self):
        """The size."""
        return 1

    def count(self):
        """Count of things, by rule 12."""
        return 1  # fmt: skip

    def warn(self):
        """Warn of things."""

    def _hidden(self):
        """The hidden one."""
'''
TWO = '''\
"""Another module."""


def public():
    """What it does."""
''' + "\n".join(f"x{number} = {number}" for number in range(400))


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(house, "ALSO_API", {})
    (tmp_path / "deep").mkdir()
    (tmp_path / "__init__.py").write_text('PLACES = {"Thing": "one", "public": "deep.two"}\n')
    (tmp_path / "one.py").write_text(ONE)
    (tmp_path / "deep" / "two.py").write_text(TWO)
    return tmp_path


@pytest.mark.parametrize("name", house.LIMITS)
def test_a_promise_holds_or_is_on_the_list_of_those_that_do_not_yet(name):
    figure = house.measure()[name]
    if name in house.NOT_YET:
        assert not house.kept(name, figure), "it holds: take it off the list"
    else:
        assert house.kept(name, figure), "\n".join(figure.offenders)


def test_what_is_measured_is_what_is_there(small):
    figures = house.measure(small)
    values = {name: figure.value for name, figure in figures.items()}
    assert values["modules"] == 2
    assert values[house.FULLEST] == 1
    assert values[house.LONG_FILES] == 1
    assert values["functions"] == 8
    assert values[house.USED_ONCE] == 1 / 8
    assert figures[house.USED_ONCE].offenders == ("one.py:17: _used_once",)
    assert values["public docstrings of functions"] == 5
    assert values[house.FRAGMENTS] == 2 / 5
    assert [line.split(": ")[-1] for line in figures[house.FRAGMENTS].offenders] == [
        "What it does.", "Count of things, by rule 12.",
    ]  # fmt: skip
    assert values[house.CLASS_FRAGMENTS] == 1
    assert values["public docstrings with Args"] == pytest.approx(1 / 5)
    assert values[house.SKIPS] == values[house.RULES] == 1
    assert figures[house.SHARED_NAMES].offenders == ("public: deep/two.py, one.py",)
    assert [line.split(": ")[1] for line in figures[house.NO_EXAMPLE].offenders] == ["Thing", "public"]


def test_the_longest_function_is_found(small):
    long = "def long():\n" + "    pass\n" * 50
    (small / "three.py").write_text(long)
    figure = house.measure(small)[house.LONG_FUNCTIONS]
    assert figure.offenders == ("three.py:1: long: 51",)


@pytest.mark.parametrize(
    "line",
    ["Return it.", "Returns it.", "Carries it.", "Pushes it.", "Fine-tune it.", "Warn of it.", "Tell if."],
)
def test_a_first_line_with_a_verb_is_no_fragment(line):
    assert not house.is_fragment(line)


@pytest.mark.parametrize(
    "line", ["The rows.", "Count of rows.", "Rows of a CSV.", "`[rows]` figures.", "What is."]
)
def test_a_first_line_without_a_verb_is_a_fragment(line):
    assert house.is_fragment(line)


def test_the_table_and_the_lists_are_printed():
    def printed(*words):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.house", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    table = printed().stdout
    assert all(f"| {name} |" in table for name in house.LIMITS)
    listed = printed("--list", "rule N").stdout.splitlines()
    assert listed[0] == f'"rule N": {len(listed) - 1}'
    assert printed("--list", "nothing like it").returncode == 2
