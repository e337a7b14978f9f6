"""The house: every module is on the map and in a layer, says what it is for, and depends downwards only."""

import ast
import re
from pathlib import Path

import pytest
from importlinter import api, cli

import mdl_toolkit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "mdl_toolkit"
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
MAP = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
ROOMS, _, WAY = MAP.partition("## The way of a datum")


@pytest.fixture
def contract(monkeypatch):
    """import-linter's contract, as `pyproject.toml` has it."""
    monkeypatch.chdir(ROOT)
    (contract,) = api.read_configuration()["contracts_options"]
    return contract


def layers_of(contract) -> list[set[str]]:
    return [{name.strip() for name in re.split(r"[|:]", layer)} for layer in contract["layers"]]


def layers_on_the_map() -> list[set[str]]:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", ROOMS, re.MULTILINE)
    numbers = [int(number) for number, _ in rows]
    assert numbers == sorted(numbers)
    return [{room for n, room in rows if int(n) == number} for number in sorted(set(numbers))]


def test_the_contract_holds(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert cli.lint_imports(cache_dir=str(tmp_path), no_logo=True) == 0


def test_every_module_is_in_a_layer(contract):
    rooms = {module.split("/")[0] for module in MODULES} - {"__init__", *contract["exhaustive_ignores"]}
    assert rooms == set().union(*layers_of(contract))
    assert contract["exhaustive"] in (True, "True", "true")


def test_the_map_shows_the_layers_in_their_order(contract):
    assert layers_on_the_map() == layers_of(contract)


@pytest.mark.parametrize("module", MODULES)
def test_the_map_shows_every_module(module):
    assert f"`{module}`" in ROOMS


def test_the_map_shows_no_module_that_is_gone():
    shown = re.findall(r"^\| (?:\d+ \| )?`([\w/]+)` \|", ROOMS, re.MULTILINE)
    assert {name for name in shown if name != "model"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert docstring
    assert len(docstring.splitlines()) <= 20


# Numbers that several modules must agree on, and where each is defined.
SHARED = {
    "SAMPLE_RATE": "model/constants",
    "IGNORE_INDEX": "model/constants",
    "MOST_LOGITS": "model/constants",
    "MIN_SAMPLES": "model/lengths",
}


def constants_of(module: str) -> set[str]:
    """The capital names that a module gives a value to, as it is imported."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    targets = [
        target
        for node in tree.body
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
    ]
    return {
        name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)
    }


@pytest.mark.parametrize(("name", "home"), SHARED.items())
def test_a_number_that_modules_must_agree_on_is_defined_once(name, home):
    assert [module for module in MODULES if name in constants_of(module)] == [home]


def test_every_hop_is_a_function_in_the_file_named():
    hops = re.findall(r"^\| \d \| .* \| `(\w+)` \| `([\w/.]+)` \|$", WAY, re.MULTILINE)
    assert len(hops) == 6
    beside = re.findall(r"`(\w+)` \(`([\w/]+\.py)`\)", WAY)
    assert len(beside) >= 4
    for function, file in hops + beside:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions, file


@pytest.mark.parametrize("name", mdl_toolkit.__all__)
def test_the_package_has_what_it_offers(name):
    assert getattr(mdl_toolkit, name)
