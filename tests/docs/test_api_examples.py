"""Every example in a docstring runs as it stands, beside recordings, CSVs, a model and a finished run."""

import ast
import csv
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from benchmarks import house

import mdl_toolkit
from mdl_toolkit import TrainOptions, train
from mdl_toolkit.demo import make_tiny_model
from tests.support.paths import PHRASES
from tests.support.runs import write_csv

CODE = re.compile(r"^Example:\n(    ```python\n.*?^    ```)$", re.DOTALL | re.MULTILINE)


def examples() -> dict[str, str]:
    """The code of all examples, by module and name."""
    found = {}
    for module, text in house.modules(house.SOURCE).items():
        for one in house.definitions(module, ast.parse(text)):
            for block in CODE.findall(one.docstring):
                found[f"{module}:{one.node.name}"] = "\n".join(textwrap.dedent(block).splitlines()[1:-1])
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the examples find: 12 recordings to train on, 6 to test, the model, a run that left an adapter."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "recordings").mkdir()
    number = 0
    for name, count in (("train.csv", 12), ("test.csv", 6)):
        with (PHRASES / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        kept = []
        for row in rows[:: len(rows) // count][:count]:
            number += 1
            shutil.copyfile(PHRASES / row["audio"], folder / "recordings" / f"{number:04}.flac")
            prompt, answer = "Which language is spoken?", row["prediction"]
            kept.append({"audio": f"{number:04}.flac", "user_prompt": prompt, "prediction": answer})
        write_csv(folder / name, kept)
    answers = [{**row, "prediction": "English"} for row in kept]
    write_csv(folder / "predictions.csv", answers)
    make_tiny_model(folder / "midashenglm-7b", PHRASES, seed=1)
    train(
        TrainOptions(
            train_dataset=str(folder / "train.csv"),
            output=str(folder / "run"),
            model_name=str(folder / "midashenglm-7b"),
            base_dir=str(folder / "recordings"),
            num_epochs=1,
            merge_lora=False,
        )
    )
    return folder


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch):
    """A copy of all that, as the current directory."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    # Without this, another test's import of the module would hide the function, as the test below shows.
    monkeypatch.delitem(vars(mdl_toolkit), "report", raising=False)
    return folder


def test_every_name_of_the_python_api_has_one():
    named = {name.split(":")[1] for name in EXAMPLES}
    assert {*mdl_toolkit.__all__, *house.ALSO_API} - {"__version__"} <= named


@pytest.mark.parametrize("name", ["report"])
def test_a_function_is_not_hidden_by_the_module_of_its_name(name):
    twice = f"from mdl_toolkit import {name}; " * 2
    code = f"{twice}assert callable({name})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_and_writes_what_it_names(workplace, name, capsys):
    code = EXAMPLES[name]
    before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*")}
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert bool(capsys.readouterr().out) == ("print(" in code or name.endswith(":check"))
    if not name.split(":")[1][0].isupper():
        for written in re.findall(r'output=\(?"(.+?)"', code):
            path = workplace / written
            assert path.exists()
            assert before.get(path) != path.stat().st_mtime_ns
