"""The table of options against the reference; every spelling of every option; the way to and from files."""

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

from mdl_toolkit.cli.click_options import OptionsCommand
from mdl_toolkit.cli.help import wrap
from mdl_toolkit.cli.main import toolkit
from mdl_toolkit.config import types
from mdl_toolkit.config.data import CheckOptions, CompletionOptions, ConvertOptions, DemoOptions
from mdl_toolkit.config.evaluation import EvaluateOptions, ReportOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.options import Options, shown_name, spec_of
from mdl_toolkit.config.train import MergeOptions, TrainOptions
from mdl_toolkit.config.yaml import as_command, from_mapping, read_settings, to_yaml
from mdl_toolkit.errors import InputError, UsageError

COMMANDS: dict[str, type[Options]] = {
    options.COMMAND: options
    for options in (
        ConvertOptions,
        TrainOptions,
        InferenceOptions,
        MergeOptions,
        CheckOptions,
        EvaluateOptions,
        ReportOptions,
        DemoOptions,
        CompletionOptions,
    )
}

# ---------------------------------------------------------------------------------------------------------
# The reference (docs: cli-reference.zh), copied by hand: option -> default

DYNAMIC = "（动态）"
REQUIRED = "必需"
CONVERSION = {
    "--model-name": "mispeech/midashenglm-7b",
    "--from-modelscope": "false",
    "--tokenizing-batch-size": "8",
    "--num-workers": DYNAMIC,
    "--system-prompt": "null",
    "--user-prompt": "null",
    "--base-dir": "null",
}
REFERENCE = {
    "convert-dataset": {**CONVERSION, "INPUT": REQUIRED, "--output": REQUIRED},
    "train": {
        **CONVERSION,
        "--train-dataset": REQUIRED,
        "--lr": "1e-4",
        "--lora-rank": "32",
        "--lora-alpha": "32",
        "--lora-dropout": "0",
        "--train-target": '["encoder", "projector", "decoder"]',
        "--num-epochs": "1",
        "--warmup-steps": "0",
        "--batch-size": "8",
        "--gradient-accumulation-steps": "1",
        "--gradient-checkpointing": "true",
        "--bf16": DYNAMIC,
        "--quantization": "null",
        "--eval-dataset": "null",
        "--eval-steps": "500",
        "--eval-batch-size": "null",
        "--eval-accumulation-steps": "null",
        "--report-to": "[]",
        "--output": REQUIRED,
        "--resume-from-checkpoint": "null",
        "--save-steps": "500",
        "--save-total-limit": "null",
        "--merge-lora": "true",
    },
    "inference": {
        **CONVERSION,
        "INPUT": REQUIRED,
        "--output": REQUIRED,
        "--model-name": REQUIRED,
        "--batch-size": "32",
        "--max-length": "128",
    },
}
GROUPS = {
    "convert-dataset": ["通用选项", "数据集选项", "输入和输出"],
    "train": ["训练选项", "内存与显存选项", "评估选项", "检查点与输出选项", "通用选项", "数据集选项"],
    "inference": ["推理选项", "通用选项", "数据集选项"],
}
ROWS = [(command, name, default) for command, rows in REFERENCE.items() for name, default in rows.items()]


def page(command: str) -> str:
    commands = toolkit()
    with commands.make_context("mdl-toolkit", [command], resilient_parsing=True) as above:
        found = commands.commands[command]
        with found.make_context(command, [], parent=above, resilient_parsing=True) as context:
            return found.get_help(context)


def shown_defaults(text: str) -> dict[str, str]:
    """What a page of help says of each option, from `--name METAVAR  (default: it)` in either language."""
    return dict(
        re.findall(
            r"^  (--[a-z0-9-]+|[A-Z]+) \S+\s+[(（](?:default: |默认值：)?(.*)[)）]$", text, re.MULTILINE
        )
    )


@pytest.mark.parametrize("language", ["en", "zh_CN"])
@pytest.mark.parametrize(("command", "name", "default"), ROWS)
def test_help_shows_the_default_of_the_reference(command, name, default, language, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    shown = shown_defaults(page(command))[name]
    if default == REQUIRED:
        assert shown == {"en": "required", "zh_CN": "必需"}[language]
    elif default == DYNAMIC:
        assert any(character.isalpha() for character in shown.replace("null", ""))
    elif name == "--lr":
        assert float(shown) == float(default)
    else:
        assert shown == default


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_of_the_table(command):
    names = {shown_name(field) for field in dataclasses.fields(COMMANDS[command])}
    assert set(shown_defaults(page(command))) == names | {"--config", "--debug"}


@pytest.mark.parametrize("command", GROUPS)
def test_help_groups_in_the_order_of_the_reference(command, monkeypatch):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    text = page(command)
    assert re.findall(r"^(\S+)：$", text, re.MULTILINE) == [*GROUPS[command], "其他选项"]
    shown = list(shown_defaults(text))
    shared = [name for name in CONVERSION if REFERENCE[command][name] == CONVERSION[name]]
    own = [name for name in REFERENCE[command] if name not in CONVERSION]
    for names in (shared, own):
        assert [name for name in shown if name in names] == names


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("language", ["en", "zh_CN"])
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_help_fits_the_terminal(command, language, columns, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    monkeypatch.setenv("COLUMNS", str(columns))
    for line in page(command).splitlines():
        wide = sum(2 if character > "\u2e80" else 1 for character in line)
        label_alone = len(line.split()) == 2 and line.startswith("  --")
        assert wide <= columns or label_alone


def test_help_reads_in_one_language(monkeypatch):
    assert not re.search(r"[\u4e00-\u9fff]", page("train"))
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert "default" not in page("train")
    assert page("train").startswith("用法：mdl-toolkit train --train-dataset PATH --output PATH [选项]\n")


@given(st.text(), st.integers(4, 30))
def test_wrapping_loses_nothing_but_blanks(text, width):
    assert "".join("".join(wrap(text, width)).split()) == "".join(text.split())


def test_wrapping_keeps_punctuation_off_the_start_of_a_line():
    assert wrap("学习率，控制参数。", 6) == ["学习", "率，控", "制参", "数。"]
    assert wrap("one two three", 7) == ["one two", "three"]


# ---------------------------------------------------------------------------------------------------------
# Spellings

YES_NO = {
    **dict.fromkeys(["true", "True", "TRUE", "1", "yes", "on", " on "], True),
    **dict.fromkeys(["false", "False", "0", "no", "OFF"], False),
}
NO_BOOLEANS = ["null", "2", "maybe", "", "t"]
COUNTS = {"1": 1, "8.0": 8, "1e3": 1000, " 16 ": 16}
NO_COUNTS = ["0", "-1", "1.5", "null", "x", "", "nan", "inf", "1e300"]
COUNTS_OR_NULL = {**COUNTS, "null": None}
NO_COUNTS_NOR_NULL = [word for word in NO_COUNTS if word != "null"]
POSITIVES = {"1e-4": 1e-4, "0.5": 0.5, "2": 2.0}
NO_POSITIVES = ["0", "-1", "nan", "inf", "null", "x", ""]
TEXTS = {"null": None, "": "", "0012": "0012", "a: b": "a: b", "--x": "--x", "转写": "转写", "true": "true"}
PATHS = {"a/b.csv": "a/b.csv", "-x": "-x", "0012": "0012", "null": "null", "true": "true", "数据": "数据"}
PATHS_OR_NULL = {**PATHS, "null": None}
CADENCES = {"1": 1, "500": 500, "500.0": 500, "0": 0, "0.5": 0.5, "1e3": 1000, "0.25": 0.25}
NO_CADENCES = ["-1", "1.5", "-0.5", "nan", "null", "x", ""]
SEEDS = {"0": 0, "42": 42, "4294967295": 2**32 - 1}
NO_SEEDS = ["-1", "4294967296", "1.5", "null", "x"]

Accepted = dict[str, Any]
SPELLINGS: dict[str, tuple[Accepted, list[str]]] = {
    "--model-name": (PATHS, [""]),
    "--from-modelscope": (YES_NO, NO_BOOLEANS),
    "--tokenizing-batch-size": (COUNTS, NO_COUNTS),
    "--num-workers": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--system-prompt": (TEXTS, ["\udce4"]),
    "--user-prompt": (TEXTS, []),
    "--base-dir": (PATHS_OR_NULL, [""]),
    "--allow-empty-prediction": (YES_NO, NO_BOOLEANS),
    "--allow-truncated": (YES_NO, NO_BOOLEANS),
    "--max-download-mb": (POSITIVES, NO_POSITIVES),
    "--download-cache": (PATHS_OR_NULL, [""]),
    "INPUT": (PATHS, [""]),
    "--output": (PATHS, [""]),
    "--train-dataset": (PATHS, [""]),
    "--lr": (POSITIVES, NO_POSITIVES),
    "--lora-rank": (COUNTS, NO_COUNTS),
    "--lora-alpha": (POSITIVES, NO_POSITIVES),
    "--lora-dropout": ({"0": 0.0, "0.1": 0.1, "0.99": 0.99}, ["1", "-0.1", "nan", "null", "x"]),
    "--train-target": (
        {
            "encoder": ("encoder",),
            "lm_head,embed_tokens": ("lm_head", "embed_tokens"),
            " decoder , encoder,": ("decoder", "encoder"),
            '["projector", "decoder"]': ("projector", "decoder"),
            "decoder,decoder": ("decoder",),
        },
        ["", "[]", "encoders", "null", "encoder projector", '["encoder"', "[1]", '[["encoder"]]'],
    ),
    "--num-epochs": (POSITIVES, NO_POSITIVES),
    "--warmup-steps": ({"0": 0, "10": 10, "1e2": 100}, ["-1", "0.1", "null", "x"]),
    "--seed": (SEEDS, NO_SEEDS),
    "--batch-size": (COUNTS, NO_COUNTS),
    "--gradient-accumulation-steps": (COUNTS, NO_COUNTS),
    "--gradient-checkpointing": (YES_NO, NO_BOOLEANS),
    "--cache-audio-features": (YES_NO, NO_BOOLEANS),
    "--bf16": ({**YES_NO, "null": None}, ["2", "maybe", ""]),
    "--quantization": ({"8bit": "8bit", "4bit": "4bit", "null": None}, ["8", "3bit", "4BIT", "", "false"]),
    "--eval-dataset": (PATHS_OR_NULL, [""]),
    "--eval-steps": (CADENCES, NO_CADENCES),
    "--eval-batch-size": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--eval-accumulation-steps": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--eval-metric": ({"wer": "wer", "accuracy": "accuracy", "null": None}, ["", "WER", "bleu"]),
    "--eval-samples": (COUNTS, NO_COUNTS),
    "--keep-best": (YES_NO, NO_BOOLEANS),
    "--early-stopping-patience": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--report-to": (
        {
            "wandb": ("wandb",),
            "wandb,tensorboard": ("wandb", "tensorboard"),
            '["tensorboard", "wandb"]': ("tensorboard", "wandb"),
            "wandb, wandb": ("wandb",),
            "": (),
            "[]": (),
        },
        ['["wandb"', "[1]", "wandb,[x"],
    ),
    "--resume-from-checkpoint": (
        {
            **dict.fromkeys(["true", "1", "YES"], True),
            **dict.fromkeys(["false", "0", "null"]),
            "out/checkpoint-500": "out/checkpoint-500",
            "-odd": "-odd",
        },
        [""],
    ),
    "--save-steps": (CADENCES, NO_CADENCES),
    "--save-total-limit": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--merge-lora": (YES_NO, NO_BOOLEANS),
    "merge --model-name": (PATHS_OR_NULL, [""]),  # of one command alone
    "ADAPTER": (PATHS, [""]),
    "--dtype": (
        {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "null": None},
        ["bf16", "", "BFLOAT16", "true"],
    ),
    "--verify": (YES_NO, NO_BOOLEANS),
    "--max-length": (COUNTS, NO_COUNTS),
    "--max-new-tokens": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--temperature": ({"0": 0.0, "0.7": 0.7, "1e1": 10.0}, ["-0.1", "nan", "inf", "null", "x", ""]),
    "--top-p": ({"1": 1.0, "0.9": 0.9}, ["0", "1.1", "-1", "null", "x"]),
    "--num-beams": (COUNTS, NO_COUNTS),
    "--choices": (PATHS_OR_NULL, [""]),
    "--top-k": (COUNTS, NO_COUNTS),
    "--normalize-scores": (YES_NO, NO_BOOLEANS),
    "--on-error": ({"stop": "stop", "keep": "keep"}, ["Keep", "null", "", "skip"]),
    "--engine": ({"torch": "torch", "vllm": "vllm"}, ["VLLM", "null", ""]),
    "check INPUT": ({word: (word,) for word in PATHS}, [""]),
    "check --max-length": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--for-inference": (YES_NO, NO_BOOLEANS),
    "--train-config": (PATHS_OR_NULL, [""]),
    "--write-fixed": (PATHS_OR_NULL, [""]),
    "--json": (
        {
            **dict.fromkeys(["true", "1", "YES"], True),
            **dict.fromkeys(["false", "0", "null"]),
            "found.json": "found.json",
            "found": "found",
        },
        [""],
    ),
    "--reference": (PATHS_OR_NULL, [""]),
    "--reference-column": (TEXTS, []),
    "--compare": (PATHS_OR_NULL, [""]),
    "evaluate --output": (
        {"a.json": ("a.json",), "a, b.CSV": ("a, b.CSV",), "null.csv": ("null.csv",)},
        ["", "a", "a.txt", "null"],
    ),
    "report --output": (PATHS_OR_NULL, [""]),
    "--report": (PATHS_OR_NULL, [""]),
    "--predictions": (PATHS_OR_NULL, [""]),
    "--png": (PATHS_OR_NULL, [""]),
    "--embed-audio": ({"0": 0, "20": 20, "1e2": 100}, ["-1", "0.5", "null", "x"]),
    "--metric": (
        {
            "wer": ("wer",),
            "wer,cer,wer": ("wer", "cer"),
            '["exact-match", "macro-f1"]': ("exact-match", "macro-f1"),
            "bleu , chrf": ("bleu", "chrf"),
            "map": ("map",),
            "accuracy": ("accuracy",),
            "": (),
        },
        ["WER", "f1", "null", "wer cer"],
    ),
    "--normalize": (YES_NO, NO_BOOLEANS),
    "--label-separator": (TEXTS, []),
    "--score-column": (TEXTS, []),
    "--group-by": ({"language": ("language",), "a,b": ("a", "b"), "length": ("length",), "": ()}, ["[1]"]),
    "--bootstrap": ({"0": 0, "1000": 1000, "1e3": 1000}, ["-1", "0.5", "null", "x"]),
    "SHELL": ({word: word for word in ("bash", "zsh", "fish")}, ["tcsh", "", "null"]),
}
NEEDED: dict[str, dict[str, str]] = {
    "convert-dataset": {"INPUT": "in.csv", "--output": "out"},
    "train": {"--train-dataset": "in.csv", "--output": "out"},
    "inference": {"INPUT": "in.csv", "--output": "out.csv", "--model-name": "model"},
    "merge": {"ADAPTER": "run/final", "--output": "out"},
    "check": {"INPUT": "in.csv"},
    "evaluate": {"INPUT": "in.csv"},
    "report": {"INPUT": "run"},
    "demo": {},
    "completion": {"SHELL": "bash"},
}


def read(command: str, words: list[str]) -> Options:
    """The options that a command line gives."""
    seen: list[Options] = []
    found = OptionsCommand(COMMANDS[command], seen.append)
    with found.make_context(command, list(words)) as context:
        found.invoke(context)
    return seen[0]


def words_with(command: str, name: str, value: str) -> list[str]:
    """The shortest command line that gives one option a value."""
    given = {**NEEDED[command], name: value}
    named = [f"{key}={word}" for key, word in given.items() if key.startswith("--")]
    return [*named, "--", *(word for key, word in given.items() if not key.startswith("--"))]


FIELDS = [
    (command, field.name, shown_name(field))
    for command, options in COMMANDS.items()
    for field in dataclasses.fields(options)
]


def spellings(command: str, name: str) -> tuple[Accepted, list[str]]:
    """What one command, or every one that has it, accepts and refuses for an option."""
    return SPELLINGS.get(f"{command} {name}") or SPELLINGS[name]


@pytest.mark.parametrize(("command", "field", "name"), FIELDS)
def test_accepted_spellings(command, field, name):
    for word, value in spellings(command, name)[0].items():
        got = getattr(read(command, words_with(command, name, word)), field)
        assert (got, type(got)) == (value, type(value)), word


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, _, name in FIELDS])
def test_refused_spellings(command, name):
    for word in spellings(command, name)[1]:
        with pytest.raises(UsageError) as refused:
            read(command, words_with(command, name, word))
        assert refused.value.message.en.startswith(f"{name}: expected ")
        assert refused.value.message.zh.startswith(f"{name}：应")
        assert refused.value.message.en.endswith(f", not {word!r}")
        assert len(refused.value.message.en.splitlines()) == 1


def test_every_spelling_in_the_table_belongs_to_an_option():
    names = {name for _, _, name in FIELDS} | {f"{command} {name}" for command, _, name in FIELDS}
    assert set(SPELLINGS) <= names
    assert {name for _, _, name in FIELDS} <= {name.split()[-1] for name in SPELLINGS}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", True), ("lr", [1]), ("lr", 10**400), ("output", 5), ("output", "a\0b"), ("system_prompt", 12),
        ("system_prompt", "a\0"), ("report_to", 5), ("report_to", [1]), ("report_to", None),
        ("lora_rank", None), ("merge_lora", []), ("quantization", ["4bit"]), ("report_to", "[" * 100_000),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_refused(field, value):
    with pytest.raises(UsageError, match="expected"):
        TrainOptions(**{"train_dataset": "x", "output": "y", field: value})


def test_all_bad_values_in_one_message():
    with pytest.raises(UsageError) as refused:
        TrainOptions(train_dataset="x", output="y", lr=0, lora_rank="x", merge_lora="maybe")
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "--lr",
        "--lora-rank",
        "--merge-lora",
    ]


# ---------------------------------------------------------------------------------------------------------
# To and from files and words

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
WORD = TEXT.filter(str)
CADENCE = st.integers(0, 10**6) | st.floats(0, 1, exclude_min=True, exclude_max=True)
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
    types.TARGETS: st.lists(st.sampled_from(types.TRAIN_TARGETS), min_size=1),
    types.WORDS: st.lists(WORD.filter(lambda word: "[" not in word)),
    types.COUNT: st.integers(1, 2**53),
    types.WHOLE: st.integers(0, 2**53),
    types.SEED: st.integers(0, 2**32 - 1),
    types.POSITIVE: POSITIVE,
    types.NOT_NEGATIVE: POSITIVE,
    types.PROBABILITY: st.floats(min_value=0, max_value=1, exclude_min=True),
    types.DROPOUT: st.floats(0, 1, exclude_max=True),
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
    path = tmp_path_factory.getbasetemp() / "mdl-toolkit.yaml"
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
    options = ConvertOptions(input=name, output=name, from_modelscope=True)
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
    assert page("check").splitlines()[0].endswith("check INPUT... [OPTIONS]")
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
        ("lr: 2024-13-45\n", "month"),
        ("speed: 1\nlora: 2\n", "train has no option lora, speed"),
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
