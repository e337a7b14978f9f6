"""Tests share by `tests.support` alone, and reach the toolkit by its public names."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.paths import PACKAGE, ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PRIVATE = re.compile(r"_(?!_)\w+")
# Private names of the toolkit that tests may use, each with the reason: none.
ALLOWED: dict[str, str] = {}


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yield every module that is imported, and `module.name` for every name that is taken from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def foreign_imports(file: str, tree: ast.Module) -> list[str]:
    """Return the imports of a test file from `tests` that it may not have.

    Tests import only `tests.support`, which imports nothing else of `tests`; the parts of `tests/stress` also
    import one another.
    """
    own = ("tests.support.", "tests.stress.") if file.startswith("tests/stress/") else ("tests.support.",)
    ours = (name for name in imports_of(tree) if re.match(r"tests(\.|$)", name))
    return [name for name in ours if not f"{name}.".startswith(own)]


def defined(tree: ast.Module) -> set[str]:
    """Return every name that a module gives to something of its own."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
            names.add(node.attr)
    return names


def names_used(tree: ast.Module) -> Iterator[str]:
    """Yield every attribute of anything but `self`, every name imported or patched by a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if not is_own(node):
                yield node.attr
        elif isinstance(node, ast.Call):
            is_by_name = ast.unparse(node.func).endswith(("attr", "patch", "patch.object", "slowly", "spy"))
            yield from (word.value for word in node.args if is_by_name and is_text(word))
        elif is_text(node) and node.value.startswith("mdl_toolkit."):
            yield from re.split(r"[.:]", node.value)
    for name in imports_of(tree):
        yield from name.split(".")


def is_own(node: ast.Attribute) -> bool:
    """Tell whether an attribute is that of `self` or of `cls`."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def is_text(node: ast.AST) -> bool:
    """Tell whether a node is a text as it stands."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


TOOLKIT = {
    name
    for path in PACKAGE.rglob("*.py")
    for name in defined(ast.parse(path.read_text(encoding="utf-8")))
    if PRIVATE.fullmatch(name)
}


def private_names(tree: ast.Module, toolkit: set[str]) -> set[str]:
    """Return the private names of the toolkit that a test file uses."""
    return {*names_used(tree)} & toolkit - defined(tree)


@pytest.mark.parametrize("file", TREES)
def test_no_test_imports_another_test(file):
    assert foreign_imports(file, TREES[file]) == []


@pytest.mark.parametrize("file", TREES)
def test_no_private_name_of_the_toolkit_but_those_allowed(file):
    assert private_names(TREES[file], TOOLKIT) <= ALLOWED.keys()


def test_every_allowed_name_is_still_needed():
    used = {name for tree in TREES.values() for name in private_names(tree, TOOLKIT)}
    assert used == ALLOWED.keys()


@pytest.mark.parametrize(
    ("file", "code", "is_wrong"),
    [
        ("tests/data/test_a.py", "from tests.data.test_b import helper", True),
        ("tests/data/test_a.py", "def f():\n    import tests.data.test_b", True),
        ("tests/support/a.py", "from tests.stress import tries", True),
        ("tests/data/test_a.py", "from tests.support.runs import make_csv", False),
        ("tests/data/test_a.py", "from tests.support import recordings", False),
        ("tests/stress/infer.py", "from tests.stress.tries import main", False),
        ("tests/data/test_a.py", "from testspace import x", False),
    ],
)
def test_imports_of_tests_are_seen(file, code, is_wrong):
    assert bool(foreign_imports(file, ast.parse(code))) == is_wrong


@pytest.mark.parametrize(
    ("code", "is_wrong"),
    [
        ("from mdl_toolkit.data.dataset import _read", True),
        ("monkeypatch.setattr(dataset, '_read', None)", True),
        ("dataset._read()", True),
        ("dataset._read = None", True),
        ("HOLD = 'mdl_toolkit.data.dataset:_read:3'", True),
        ("monkeypatch.setattr('mdl_toolkit.data.dataset._read', None)", True),
        ("self._read()", False),
        ("monkeypatch.setattr(dataset, 'read', None)", False),
        ("print('_read')", False),
        ("os._exit(1)", False),
    ],
)
def test_private_names_are_seen(code, is_wrong):
    assert bool(private_names(ast.parse(code), {"_read"})) == is_wrong
