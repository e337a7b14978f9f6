"""The house: every module is on its package's map, says what it is for, and imports point down."""

import ast
import re
from pathlib import Path

import pytest
from importlinter import api, cli

import mdl_toolkit
from tests.support.paths import PACKAGE, ROOT

MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
MAP, _, WAY = ARCHITECTURE.partition("## The way of a datum")


@pytest.fixture
def layers(monkeypatch) -> list[set[str]]:
    """The layers of the first contract, from top to bottom."""
    monkeypatch.chdir(ROOT)
    contract = api.read_configuration()["contracts_options"][0]
    assert contract["exhaustive"] in (True, "True", "true")
    return [{name.strip() for name in re.split(r"[|:]", layer)} for layer in contract["layers"]]


def docstring_of(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    assert docstring, module
    return docstring


def test_the_contracts_hold(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert cli.lint_imports(cache_dir=str(tmp_path), no_logo=True) == 0


def test_every_package_is_in_a_layer(layers):
    packages = {module.split("/")[0] for module in MODULES} - {"__init__", "__main__"}
    assert packages == set().union(*layers)


def test_the_map_shows_the_layers_in_their_order(layers):
    rows = re.findall(r"^\| `(\w+)` \|", MAP, re.MULTILINE)
    assert set(rows) == set().union(*layers)
    rank = {name: number for number, layer in enumerate(layers) for name in layer}
    assert [rank[name] for name in rows] == sorted(rank[name] for name in rows)


@pytest.mark.parametrize("package", PACKAGES[1:], ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_package_s_docstring_names_its_modules(package):
    named = re.findall(r"^    ([\w/]+) {2,}\S", docstring_of(package / "__init__.py"), re.MULTILINE)
    there = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    there += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert len(docstring_of(PACKAGE / f"{module}.py").splitlines()) <= 30


def test_every_hop_is_a_function_in_the_file_named():
    hops = re.findall(r"^\| \d+ \| .* \| `(\w+)` \| `([\w/.]+)` \|$", WAY, re.MULTILINE)
    assert len(hops) == 16 + 9
    beside = re.findall(r"`(\w+)` \(`([\w/]+\.py)`\)", WAY)
    assert len(beside) >= 4
    for function, file in hops + beside:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions, file


@pytest.mark.parametrize("name", mdl_toolkit.__all__)
def test_the_package_has_what_it_offers(name):
    assert getattr(mdl_toolkit, name)
