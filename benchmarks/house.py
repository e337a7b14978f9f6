"""`python -m benchmarks.house [--list WHAT]`: measure how the source reads, and list what stands out.

Everything is read with `ast`, nothing is imported. The figures are those of `src/mdl_toolkit` and say:

- a **module** is a `.py` file other than `__init__.py`;
- a **function's length** is its lines with signature and docstring, without decorators;
- a **private function used once** begins with one underscore and is named once in its module, beside its
  definition;
- a **public docstring** is that of a function or method that is reached without an underscore. It begins as a
  **fragment** unless its first word is a verb of `verbs.txt` ("Return", "Returns"), not followed by "of"
  ("Count of rows"); a property may be named by a noun phrase instead. Classes are counted apart;
- an **API function** is a function or class that the package offers by its name, or one of `ALSO_API`.
"""

import argparse
import ast
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "mdl_toolkit"
LONGEST_FUNCTION, SHORTEST_FILE, LONGEST_FILE = 50, 100, 400
EXAMPLE = re.compile(r"^Examples?:$", re.MULTILINE)
FULLEST = "modules in the fullest folder"
USED_ONCE = "private functions used once, of all functions"
FRAGMENTS = "public docstrings that begin as fragments"
CLASS_FRAGMENTS = "public classes whose docstrings begin as fragments"
LONG_FILES = f"files over {LONGEST_FILE} lines"
LONG_FUNCTIONS = f"functions over {LONGEST_FUNCTION} lines"
NO_EXAMPLE = "API functions without an example"
SKIPS = "`# fmt: skip`"
RULES = '"rule N"'
SHARED_NAMES = "top-level names defined in two or more modules"

# What the house promises: the most that each figure may be.
LIMITS = {
    FULLEST: 20,
    USED_ONCE: 0.15,
    FRAGMENTS: 0.10,
    LONG_FILES: 0,
    LONG_FUNCTIONS: 0,
    NO_EXAMPLE: 0,
}
# The promises that do not hold yet. A test fails where one of them does: then it comes off this list.
NOT_YET: set[str] = set()

# The functions of the Python API that are not in the `__all__` of the package, by module.
ALSO_API = {"load": "audio/loading", "register": "model/registration"}

VERBS = frozenset((Path(__file__).parent / "verbs.txt").read_text(encoding="utf-8").split())

VERBS_WITH_OF = ("dispose", "tell", "think", "warn")


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        value: a share of 1 where it is a float, otherwise a count.
        offenders: what makes the figure what it is, one a line: `--list` prints them.
    """

    value: float
    offenders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Definition:
    """A function or class.

    Attributes:
        where: path and line.
        node: its syntax.
        is_public: no underscore stands on the way to it.
        parent: the class or function around it, or the module.
    """

    where: str
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    is_public: bool
    parent: ast.AST

    @property
    def docstring(self) -> str:
        """The docstring; empty if there is none."""
        return ast.get_docstring(self.node) or ""

    @property
    def lines(self) -> int:
        """The number of lines with signature and docstring."""
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def is_property(self) -> bool:
        """Whether it is read like an attribute."""
        return any("property" in ast.unparse(decorator) for decorator in self.node.decorator_list)

    def __str__(self) -> str:
        return f"{self.where}: {self.node.name}"


def modules(source: Path) -> dict[str, str]:
    """Read every Python file below a folder: texts by path within it."""
    return {
        path.relative_to(source).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(source.rglob("*.py"))
    }


def definitions(name: str, tree: ast.AST, *, is_public: bool = True) -> Iterator[Definition]:
    """Find every function and class of a module, those inside others after them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            is_open = is_public and not node.name.startswith("_")
            yield Definition(f"{name}:{node.lineno}", node, is_open, tree)
            inside = is_open and isinstance(node, ast.ClassDef)
            yield from definitions(name, node, is_public=inside)
        else:
            yield from definitions(name, node, is_public=is_public)


def is_fragment(docstring: str) -> bool:
    """Tell whether a docstring's first line does not begin with a verb."""
    first, second, *_ = [*docstring.split(maxsplit=2), "", ""]
    word = first.lower().split("-")[0] if first.lower() not in VERBS else first.lower()
    forms = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
    return not forms & VERBS or (second == "of" and word not in VERBS_WITH_OF)


def measure(source: Path = SOURCE) -> dict[str, Figure]:
    """Measure all Python files below a folder."""
    texts = modules(source)
    trees = {name: ast.parse(text) for name, text in texts.items()}
    found = {name: list(definitions(name, tree)) for name, tree in trees.items()}
    everything = [one for several in found.values() for one in several]
    functions = [one for one in everything if not isinstance(one.node, ast.ClassDef)]
    return {
        **_folders(texts),
        **_files(texts),
        **_functions(functions),
        USED_ONCE: _used_once(trees, found, len(functions)),
        **_docstrings([one for one in everything if one.is_public and one.docstring]),
        NO_EXAMPLE: _without_example(trees, found),
        SKIPS: _occurrences(texts, r"# fmt: skip"),
        RULES: _occurrences(texts, r"\brules? \d+"),
        SHARED_NAMES: _shared_names(trees),
    }


def _folders(texts: dict[str, str]) -> dict[str, Figure]:
    folders = Counter(str(Path(name).parent) for name in texts if not name.endswith("__init__.py"))
    listed = tuple(f"{folder}: {count}" for folder, count in folders.most_common())
    return {"modules": Figure(folders.total()), FULLEST: Figure(max(folders.values()), listed)}


def _files(texts: dict[str, str]) -> dict[str, Figure]:
    lengths = sorted(((len(text.splitlines()), name) for name, text in texts.items()), reverse=True)
    own = [(lines, name) for lines, name in lengths if not name.endswith("__init__.py")]
    shorter = [f"{name}: {lines}" for lines, name in own if lines < SHORTEST_FILE]
    longer = [f"{name}: {lines}" for lines, name in own if lines > LONGEST_FILE]
    between = 1 - (len(shorter) + len(longer)) / len(own)
    return {
        "lines of all files": Figure(sum(lines for lines, _ in lengths)),
        f"files of {SHORTEST_FILE} to {LONGEST_FILE} lines": Figure(between, (*shorter, *longer)),
        "lines of the longest file": Figure(lengths[0][0], (f"{lengths[0][1]}: {lengths[0][0]}",)),
        LONG_FILES: Figure(len(longer), tuple(longer)),
    }


def _functions(functions: list[Definition]) -> dict[str, Figure]:
    ordered = sorted(functions, key=lambda one: one.lines)
    longest = tuple(f"{one}: {one.lines}" for one in reversed(ordered[-20:]))
    long = tuple(f"{one}: {one.lines}" for one in ordered if one.lines > LONGEST_FUNCTION)
    return {
        "functions": Figure(len(functions)),
        "lines of a function, median": Figure(int(statistics.median(one.lines for one in functions))),
        "lines of a function, 90th percentile": Figure(ordered[int(0.9 * len(ordered))].lines),
        "lines of the longest function": Figure(ordered[-1].lines, longest),
        LONG_FUNCTIONS: Figure(len(long), long),
    }


def _used_once(trees: dict[str, ast.Module], found: dict[str, list[Definition]], functions: int) -> Figure:
    once = []
    for name, tree in trees.items():
        uses = Counter(
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Name | ast.Attribute)
        )
        once += [
            str(one)
            for one in found[name]
            if not isinstance(one.node, ast.ClassDef)
            if re.match("_(?!_)", one.node.name) and uses[one.node.name] == 1
        ]
    return Figure(len(once) / functions, tuple(once))


def _docstrings(public: list[Definition]) -> dict[str, Figure]:
    classes = [one for one in public if isinstance(one.node, ast.ClassDef)]
    functions = [one for one in public if not isinstance(one.node, ast.ClassDef)]
    without = [one for one in functions if "Args:" not in one.docstring]
    examples = [one for one in functions if EXAMPLE.search(one.docstring)]
    return {
        "public docstrings of functions": Figure(len(functions)),
        FRAGMENTS: _fragments([one for one in functions if not one.is_property], len(functions)),
        CLASS_FRAGMENTS: _fragments(classes, len(classes)),
        "public docstrings with Args": Figure(1 - len(without) / len(functions)),
        "public docstrings with an example": Figure(
            len(examples) / len(functions), tuple(map(str, examples))
        ),
    }


def _fragments(public: list[Definition], of: int) -> Figure:
    offenders = [f"{one}: {one.docstring.splitlines()[0]}" for one in public if is_fragment(one.docstring)]
    return Figure(len(offenders) / of, tuple(offenders))


def _without_example(trees: dict[str, ast.Module], found: dict[str, list[Definition]]) -> Figure:
    lacking = []
    for name, place in {**_lazy_names(trees["__init__.py"]), **ALSO_API}.items():
        there = [
            one
            for module, several in found.items()
            if module == f"{place}.py" or module.startswith(f"{place}/")
            for one in several
            if one.node.name == name and one.is_public
        ]
        if not there:
            raise ValueError(f"{place} has no {name}: the table of the Python API is wrong")
        lacking += [str(one) for one in there if not EXAMPLE.search(one.docstring)]
    return Figure(len(lacking), tuple(lacking))


def _lazy_names(package: ast.Module) -> dict[str, str]:
    """Read the table of a package's lazy names: names to modules, as paths without `.py`."""
    for node in package.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            table: dict[str, str] = ast.literal_eval(node.value)
            return {name: module.replace(".", "/") for name, module in table.items()}
    raise ValueError("the package's __init__.py has no table of names")


def _occurrences(texts: dict[str, str], pattern: str) -> Figure:
    lines = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        for _ in re.finditer(pattern, line)
    ]
    return Figure(len(lines), tuple(lines))


def _shared_names(trees: dict[str, ast.Module]) -> Figure:
    where = defaultdict(list)
    for module, tree in trees.items():
        for name in {name for node in tree.body for name in _bound(node)}:
            where[name].append(module)
    shared = {name: places for name, places in sorted(where.items()) if len(places) > 1}
    return Figure(len(shared), tuple(f"{name}: {', '.join(places)}" for name, places in shared.items()))


def _bound(node: ast.stmt) -> list[str]:
    """Name what a statement defines or assigns; imports are no definitions."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def kept(name: str, figure: Figure) -> bool:
    """Tell whether a figure keeps its promise: shares stay below their limit, counts may reach it."""
    limit = LIMITS[name]
    return figure.value < limit if isinstance(limit, float) else figure.value <= limit


def main() -> int:
    """Print the table, or with `--list` what is behind the figures whose names hold a word."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description="Measure the source.")
    parser.add_argument(
        "--list", metavar="WHAT", help="list what is behind each figure with this word in its name"
    )
    wanted = parser.parse_args().list
    figures = measure()
    if wanted is None:
        print("| what | figure | promise |\n| --- | --- | --- |")
        for name, figure in figures.items():
            print(f"| {name} | {_shown(figure.value)} | {_promise(name, figure)} |")
        return 0
    listed = {name: figure for name, figure in figures.items() if wanted.lower() in name.lower()}
    for name, figure in listed.items():
        print(f"{name}: {_shown(figure.value)}", *figure.offenders, sep="\n  ")
    if not listed:
        sys.stderr.write("no such figure; there are:\n" + "".join(f"  {name}\n" for name in figures))
    return 0 if listed else 2


def _shown(value: float) -> str:
    return f"{value:.0%}" if isinstance(value, float) else str(value)


def _promise(name: str, figure: Figure) -> str:
    if name not in LIMITS:
        return ""
    limit = LIMITS[name]
    words = f"under {_shown(limit)}" if isinstance(limit, float) else f"at most {limit}"
    return words if kept(name, figure) else f"{words}: not yet"


if __name__ == "__main__":
    sys.exit(main())
