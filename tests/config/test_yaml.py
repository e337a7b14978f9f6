"""Options to and from files and command lines."""

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.config import types
from mdl_toolkit.config.data import CheckOptions, ConvertOptions, DemoOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.options import Options, spec_of
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import as_command, from_mapping, read_settings, to_yaml
from mdl_toolkit.errors import InputError, UsageError
from tests.support.command_line import (
    COMMANDS,
    read,
)

# ---------------------------------------------------------------------------------------------------------
# To and from files and words

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
WORD = TEXT.filter(str)
CADENCE = st.integers(0, 10**6) | st.floats(0, 1, exclude_min=True, exclude_max=True) | st.just("epoch")
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
VALUES: dict[types.ValueType, st.SearchStrategy[Any]] = {
    types.BOOLEAN: st.booleans(),
    types.TEXT: TEXT,
    types.PATH: WORD,
    types.NAME: WORD,
    types.CADENCE: CADENCE,
    types.PATHS: st.lists(WORD, min_size=1),
    types.RESUME: st.booleans() | WORD,
    types.JSON: st.booleans() | WORD,
    types.ENGINE: st.sampled_from([*types.ENGINES, "http://127.0.0.1:8000", "https://host/v1"]),
    types.TARGETS: st.lists(st.sampled_from(types.TRAIN_TARGETS), min_size=1),
    types.WORDS: st.lists(WORD.filter(lambda word: "[" not in word)),
    types.COUNT: st.integers(1, 2**53),
    types.WHOLE: st.integers(0, 2**53),
    types.PORT: st.integers(0, 65_535),
    types.ADAPTERS: st.lists(WORD.map(lambda word: f"{len(word)}={word}"), unique_by=lambda word: word[:2]),
    types.SEED: st.integers(0, 2**32 - 1),
    types.POSITIVE: POSITIVE,
    types.LEARNING_RATES: POSITIVE
    | st.dictionaries(st.sampled_from(types.TRAIN_TARGETS), POSITIVE, min_size=1),
    types.NOT_NEGATIVE: POSITIVE,
    types.PROBABILITY: st.floats(min_value=0, max_value=1, exclude_min=True),
    types.SHARE: st.floats(0, 1, exclude_max=True),
    types.PORTION: st.floats(0, 1, exclude_max=True),
    types.METRIC_LIST: st.lists(st.sampled_from(types.METRIC_NAMES)),
    types.RESULT_FILES: st.lists(WORD.map(lambda word: f"{word}.json")),
}


def values_of(field: "dataclasses.Field[Any]") -> st.SearchStrategy[Any]:
    spec = spec_of(field)
    words = st.sampled_from(spec.type.metavar.split("|"))
    strategy = VALUES.get(spec.type, words)
    return strategy | st.none() if spec.nullable else strategy


@st.composite
def any_options(draw: Callable[..., Any]) -> Options:
    cls = draw(st.sampled_from(sorted(COMMANDS.values(), key=lambda options: options.COMMAND)))
    strategies = {field.name: values_of(field) for field in dataclasses.fields(cls)}
    needed = {
        f.name: strategies.pop(f.name) for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING
    }
    return cls(**draw(st.fixed_dictionaries(needed, optional=strategies)))


@given(options=any_options())
@settings(max_examples=300, deadline=None)
def test_yaml_gives_the_same_options_back(options, tmp_path_factory):
    # Not in the folder above all others, which would be taken for an output.
    folder = tmp_path_factory.getbasetemp() / "options"
    folder.mkdir(exist_ok=True)
    path = folder / "mdl-toolkit.yaml"
    path.write_text(to_yaml(options), encoding="utf-8")
    assert from_mapping(type(options), read_settings(path, type(options))) == options


@given(options=any_options())
@settings(max_examples=300, deadline=None)
def test_as_command_gives_the_same_options_back(options):
    program, command, *words = shlex.split(as_command(options))
    assert program == "mdl-toolkit"
    assert read(command, words) == options


@given(options=any_options())
@settings(max_examples=300, deadline=None)
def test_reading_twice_changes_nothing(options):
    assert dataclasses.replace(options) == options


AWKWARD = [
    "null",
    "",
    "0012",
    "a: b",
    "two\nlines\n",
    "转写这段音频。",
    "--merge-lora",
    "'\"$HOME`",
    "# no",
    "\x85",
    "\r",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_prompts_survive_file_and_shell(text, tmp_path):
    options = TrainOptions(train_dataset="-x.csv", output="--out", system_prompt=text, user_prompt=text)
    path = tmp_path / "mdl-toolkit.yaml"
    path.write_text(to_yaml(options), encoding="utf-8")
    assert from_mapping(TrainOptions, read_settings(path, TrainOptions)) == options
    assert read("train", typed_in_bash(as_command(options))) == options


@pytest.mark.parametrize("name", ["-x.csv", "--output", "--", "-", "null", "true", "a b'c.csv"])
def test_awkward_inputs_survive_the_shell(name):
    options = ConvertOptions(input=name, output=f"./{name}", from_modelscope=True)
    assert read("convert-dataset", typed_in_bash(as_command(options))) == options


def typed_in_bash(command: str) -> list[str]:
    """The words that `train` and so on would be given."""
    script = f"mdl-toolkit() {{ printf '%s\\0' \"$@\"; }}; {command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[1:-1]


def test_several_inputs(tmp_path):
    assert read("check", ["a,b.csv", "--json", "c.csv", "--max-length", "9"]) == CheckOptions(
        input=("a,b.csv", "c.csv"), json=True, max_length=9
    )
    assert read("check", ["a.csv", "--json", "b.json"]).json == "b.json"
    with pytest.raises(UsageError, match="missing INPUT"):
        read("check", ["--json"])


def test_as_command_says_only_what_differs():
    options = TrainOptions(
        train_dataset="a b.csv", output="out", bf16=False, lr=1e-5, report_to="wandb,mlflow"
    )
    assert as_command(options) == (
        "mdl-toolkit train --train-dataset 'a b.csv' --lr 1e-05 --bf16 false"
        " --report-to wandb --report-to mlflow --output out"
    )
    assert as_command(ConvertOptions(input="in.csv", output="out")) == (
        "mdl-toolkit convert-dataset in.csv --output out"
    )


def test_yaml_explains_each_option():
    text = to_yaml(InferenceOptions(input="in.csv", output="out.csv", model_name="m"))
    for field in dataclasses.fields(InferenceOptions):
        assert f"# {spec_of(field).help}\n{field.name}: " in text


def test_a_path_with_undecodable_bytes_survives(tmp_path):
    options = DemoOptions(output="caf\udce9")
    path = tmp_path / "mdl-toolkit.yaml"
    path.write_text(to_yaml(options), encoding="utf-8")
    assert from_mapping(DemoOptions, read_settings(path, DemoOptions)) == options


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n", "expected `name: value` lines"),
        ("lr: [1\n", "line 2"),
        ("lr: 1\n# again\n'lr': 2\n", "lr stands twice, in lines 1 and 3"),
        ("lora-rank: 1\nlora_rank: 1\n", "lora_rank stands twice, in lines 1 and 2"),
        ("lr: 2024-13-45\n", "month"),
        ("xyzzy: 1\nlearning_rate: 2\n", "train has no option learning_rate (lr?), xyzzy"),
        ("lr: fast\nlora-rank: 0\n", "--lora-rank: expected a whole number of at least 1, not 0"),
        ("output: 2024-01-01\n", "--output: expected a text (in YAML, put it in quotes)"),
        ("output:\n", "--output: expected a value, not None"),
        ("a: " + "[" * 5000 + "\n", ""),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(content, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        read_settings(path, TrainOptions)
    assert said in refused.value.message.en
    assert all(line.startswith(f"--config {path}: ") for line in refused.value.message.en.splitlines())
    assert all(line.startswith(f"--config {path}：") for line in refused.value.message.zh.splitlines())


@pytest.mark.parametrize("bytes_", [b"\xff\xfe\x00", None])
def test_an_unreadable_file_is_an_error(bytes_, tmp_path):
    path = tmp_path / "run.yaml"
    if bytes_:
        path.write_bytes(bytes_)
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_settings(path, TrainOptions)


def test_a_file_may_be_empty_or_have_a_bom_and_both_spellings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("", encoding="utf-8")
    assert read_settings(path, TrainOptions) == {}
    Path(path).write_text("lora-rank: 8\nlr: 1e-5\n", encoding="utf-8-sig")
    assert read_settings(path, TrainOptions) == {"lora_rank": 8, "lr": 1e-5}


def test_a_record_serves_the_other_commands(tmp_path):
    """What means the same there is taken: prompts, the folder of recordings; not the output, batch sizes."""
    record, said = tmp_path / "mdl-toolkit.yaml", []
    trained = TrainOptions(
        train_dataset="t.csv", output="run", model_name="base", user_prompt="What?", base_dir="clips",
        batch_size=2, quantization="4bit", num_workers=3,
    )  # fmt: skip
    record.write_text(to_yaml(trained), encoding="utf-8")
    converted = read_settings(record, ConvertOptions, say=said.append)
    assert {name for name, value in converted.items() if value != getattr(trained, name)} == set()
    assert converted["model_name"] == "base"
    assert not {"output", "train_dataset", "batch_size"} & {*converted}
    asked = read_settings(record, InferenceOptions, say=said.append)
    assert (asked["user_prompt"], asked["base_dir"], asked["num_workers"]) == ("What?", "clips", 3)
    assert not {"output", "model_name", "batch_size", "quantization"} & {*asked}
    assert [line.en.partition("; ")[0] for line in said] == [f"--config {record}: the record of train"] * 2
    assert "user_prompt" in said[1].en
    # Its own record, and one that is read for another purpose, as before.
    assert read_settings(record, TrainOptions, say=said.append)["batch_size"] == 2
    assert len(said) == 2
    with pytest.raises(InputError, match="inference has no option"):
        read_settings(record, InferenceOptions)


def test_a_record_of_another_command_may_hold_nothing_unknown(tmp_path):
    record = tmp_path / "mdl-toolkit.yaml"
    record.write_text("# mdl-toolkit train\nlora_rank: 2\nspeed: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match="convert-dataset has no option speed"):
        read_settings(record, ConvertOptions, say=print)
