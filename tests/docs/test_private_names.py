"""No module leans on a private name of a library, which may move with any new version, but for a few."""

import ast
import importlib
import sys
from collections.abc import Iterator

import pytest

from tests.support.paths import PACKAGE

TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
DOCUMENTED = {"_exit", "_fields"}  # of `os` and of named tuples
INNER = ("transformers.trainer_callback", "transformers.integrations.integration_utils")

# Private names that stay, each with the reason; `trackers` names its inner parts of transformers itself.
ALLOWED = {
    "_linear_pointwise": "oneDNN's product has no public name",
    "_reorder_linear_weight": "nor has laying out its weights beforehand",
    "_foreach_copy_": "hundreds of tensors in one call, as torch's optimizers make theirs",
    "_version": "whether a parameter has changed since its cast",
    "_CONFIG_REGISTRY": "vLLM's own configuration of this model comes before what is registered in public",
    **dict.fromkeys(
        ["_mark_tower_model", "_mark_language_model", "_get_dummy_audios", "_get_expected_hidden_size"],
        "vLLM's own models use these, and there is no other way to say the same",
    ),
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def imports_of(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Every module that is imported, with the name that is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def own_names(tree: ast.Module) -> Iterator[str]:
    """Every name that a module gives to something of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_names(tree: ast.Module, own: set[str]) -> set[str]:
    """Names with an underscore that are not the tree's own: attributes, imports, words for `getattr`."""
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith("attr"):
            used |= {str(word.value) for word in call.args if isinstance(word, ast.Constant) and word.value}
    for module, name in imports_of(tree):
        used |= {*module.split("."), name or ""}
    return {name for name in used - own - DOCUMENTED if is_private(name)}


OWN = {name for tree in TREES.values() for name in own_names(tree)}


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_of_a_library(path):
    assert private_names(TREES[path], OWN) <= ALLOWED.keys()


def test_every_name_that_is_allowed_is_needed():
    assert set().union(*(private_names(tree, OWN) for tree in TREES.values())) == ALLOWED.keys()


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_of_the_standard_library_that_is_not_documented(path):
    assert [*filter(is_undocumented, imports_of(TREES[path]))] == []


def is_undocumented(imported: tuple[str, str | None]) -> bool:
    """Tell whether a module of the standard library does not list a name among those that it offers."""
    module, name = imported
    if module.split(".")[0] not in sys.stdlib_module_names:
        return False
    if "multiprocessing.resource_tracker" in (module, f"{module}.{name}"):
        return True
    offered = getattr(importlib.import_module(module), "__all__", None)
    is_module = name is None or f"{module}.{name}" in sys.modules
    return not (is_module or offered is None or name in offered)


@pytest.mark.parametrize(
    "imported", [("multiprocessing.pool", "ExceptionWithTraceback"), ("multiprocessing", "resource_tracker")]
)
def test_what_is_not_documented_is_seen(imported):
    assert is_undocumented(imported)


def test_inner_parts_of_transformers_are_the_trackers_business_alone():
    users = {
        path.stem
        for path, tree in TREES.items()
        for module, name in imports_of(tree)
        if module.startswith(INNER) or f"{module}.{name}".startswith(INNER)
    }
    assert users == {"trackers"}
    (words,) = [ast.get_docstring(tree) for path, tree in TREES.items() if path.stem == "trackers"]
    assert all(name.rpartition(".")[2] in words for name in INNER)


@pytest.mark.parametrize(
    "code",
    [
        "from torch.distributed.distributed_c10d import _set_pg_timeout", "import torch._dynamo",
        "import torch\ntorch._softmax(1)", "import numpy\ngetattr(numpy, '_core')",
        "from transformers._internal import x", "class A(B):\n def f(self):\n  return self._of_base",
    ],
)  # fmt: skip
def test_the_test_sees(code):
    assert private_names(ast.parse(code), OWN)


@pytest.mark.parametrize(
    "code",
    ["import os\nos._exit(1)", "class A:\n def f(self):\n  self._a = 1\n  return self._a", "_, b = 1, 2"],
)
def test_what_is_no_private_name_of_a_library(code):
    tree = ast.parse(code)
    assert not private_names(tree, {*own_names(tree)})
