"""The table of options against the reference; every spelling of every option; the way to and from files."""

import dataclasses
from typing import Any

import pytest

from mdl_toolkit.config.options import shown_name
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import LORA_VARIANTS
from mdl_toolkit.errors import UsageError
from tests.support.command_line import (
    COMMANDS,
    read,
    words_with,
)

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
CADENCES = {"1": 1, "500": 500, "500.0": 500, "0": 0, "0.5": 0.5, "1e3": 1000, "0.25": 0.25, "epoch": "epoch"}
NO_CADENCES = ["-1", "1.5", "epochs", "-0.5", "nan", "null", "x", ""]
SEEDS = {"0": 0, "42": 42, "4294967295": 2**32 - 1}
NO_SEEDS = ["-1", "4294967296", "1.5", "null", "x"]

Accepted = dict[str, Any]
SHARES: tuple[Accepted, list[str]] = (
    {"0": 0.0, "0.1": 0.1, "0.99": 0.99},
    ["1", "-0.1", "nan", "null", "x"],
)
PORTIONS: tuple[Accepted, list[str]] = (
    {"0": 0.0, "10%": 0.1, " 12.5 %": 0.125, "0.2": 0.2},
    ["100%", "1", "-5%", "x%", "%", "null", "nan"],
)
NORMS: tuple[Accepted, list[str]] = ({"0": 0.0, "0.01": 0.01, "5": 5.0}, ["-1", "inf", "null", "x"])
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
    "--max-audio-hours": (POSITIVES, NO_POSITIVES),
    "--max-download-mb": (POSITIVES, NO_POSITIVES),
    "--download-cache": (PATHS_OR_NULL, [""]),
    "INPUT": (PATHS, [""]),
    "--output": (PATHS, ["", "-"]),
    "--train-dataset": (PATHS, [""]),
    "--lr": (
        {
            **POSITIVES,
            "encoder=2e-5": ("encoder=2e-05",),
            "decoder=1e-4,encoder=2e-5": ("encoder=2e-05", "decoder=0.0001"),
            "1e-4, lm_head=1": ("0.0001", "lm_head=1.0"),
        },
        [
            *NO_POSITIVES,
            "=1",
            "encoder=",
            "encoder=0",
            "encoder=x",
            "tower=1",
            "encoder",
            "encoder=1,",
            "decoder=1,decoder=2",
        ],
    ),
    "--lora-plus-ratio": (POSITIVES, NO_POSITIVES),
    "--repetition-penalty": (POSITIVES, NO_POSITIVES),
    "--no-repeat-ngram-size": ({"0": 0, "3": 3}, ["-1", "0.5", "null", "x"]),
    "--window": ({**POSITIVES, "null": None}, [word for word in NO_POSITIVES if word != "null"]),
    "--overlap": ({"0": 0.0, "2.5": 2.5}, ["-1", "null", "x"]),
    "--join": ({"transcript": "transcript", "list": "list"}, ["List", "null", ""]),
    "--keep-reference": (YES_NO, NO_BOOLEANS),
    "--adapter": (PATHS_OR_NULL, [""]),
    "--lora-rank": (COUNTS, NO_COUNTS),
    "--lora-alpha": (POSITIVES, NO_POSITIVES),
    "--lora-dropout": SHARES,
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
    "--max-steps": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--warmup-ratio": SHARES,
    "--lr-scheduler": (
        {name: name for name in ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")},
        ["Linear", "polynomial", "null", ""],
    ),
    "--lora-variant": ({name: name for name in LORA_VARIANTS}, ["LoRA", "vera", "null", ""]),
    "--shard-weights": (YES_NO, NO_BOOLEANS),
    "--optimizer": (
        {name: name for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")},
        ["sgd", "adamw_torch", "null", ""],
    ),
    "--weight-decay": NORMS,
    "--adam-beta2": SHARES,
    "--max-grad-norm": NORMS,
    "--label-smoothing": SHARES,
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
    "--engine": (
        {word: word for word in ("torch", "vllm", "http://127.0.0.1:8000", "https://host/some/path/v1")},
        ["VLLM", "null", "", "host:8000", "http://", "http://user:secret@host:1", "ftp://host", "http://a b"],
    ),
    "check INPUT": ({word: (word,) for word in PATHS}, [""]),
    "check --max-length": (COUNTS_OR_NULL, NO_COUNTS_NOR_NULL),
    "--for-inference": (YES_NO, NO_BOOLEANS),
    "--train-config": (PATHS_OR_NULL, [""]),
    "--cut": ({**POSITIVES, "null": None}, [word for word in NO_POSITIVES if word != "null"]),
    "--write-fixed": (PATHS_OR_NULL, ["", "-"]),
    "--json": (
        {
            **dict.fromkeys(["true", "1", "YES"], True),
            **dict.fromkeys(["false", "0", "null"]),
            "found.json": "found.json",
            "found": "found",
        },
        ["", "-"],
    ),
    "--reference": (PATHS_OR_NULL, [""]),
    "--reference-column": (TEXTS, []),
    "--compare": (PATHS_OR_NULL, [""]),
    "evaluate --output": (
        {"a.json": ("a.json",), "a, b.CSV": ("a, b.CSV",), "null.csv": ("null.csv",)},
        ["", "-", "a", "a.txt", "null"],
    ),
    "MODEL_NAME": (PATHS, [""]),
    "serve --adapter": (
        {"a=b": ("a=b",), "tuned=run/final=x": ("tuned=run/final=x",)},
        ["", "a", "=b", "a=", "null"],
    ),
    "serve --engine": ({"native": "native", "vllm": "vllm"}, ["torch", "", "null"]),
    "serve --max-new-tokens": (COUNTS, NO_COUNTS),
    "--host": ({"0.0.0.0": "0.0.0.0", "::1": "::1", "null": "null"}, []),
    "--port": ({"0": 0, "8000": 8000, "65535": 65535}, ["-1", "65536", "1.5", "null", "x", ""]),
    "--token": ({"s3cret": "s3cret", "null": None}, ["", " a", "two words", "ключ", "\udce4"]),
    "--max-request-mb": (POSITIVES, NO_POSITIVES),
    "--max-audio-seconds": (POSITIVES, NO_POSITIVES),
    "FOLDER": (PATHS, [""]),
    "REPO": (PATHS, [""]),
    "--to": ({"huggingface": "huggingface", "modelscope": "modelscope"}, ["hf", "", "null"]),
    "--private": (YES_NO, NO_BOOLEANS),
    "report --output": (PATHS_OR_NULL, ["", "-"]),
    "--report": (PATHS_OR_NULL, ["", "-"]),
    "--predictions": (PATHS_OR_NULL, [""]),
    "--png": (PATHS_OR_NULL, ["", "-"]),
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
    "--eval": PORTIONS,
    "--test": PORTIONS,
    "split --group-by": ({"speaker": ("speaker",), "a,b": ("a", "b"), "": ()}, ["[1]"]),
    "--stratify": (TEXTS, []),
    "--bootstrap": ({"0": 0, "1000": 1000, "1e3": 1000}, ["-1", "0.5", "null", "x"]),
    "SHELL": ({word: word for word in ("bash", "zsh", "fish")}, ["tcsh", "", "null"]),
}
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
        ("lr", True), ("lr", [None]), ("lr", [True]), ("lr", 10**400), ("output", 5), ("output", "a\0b"),
        ("system_prompt", 12), ("system_prompt", "a\0"), ("report_to", 5), ("report_to", [1]),
        ("lora_rank", None), ("merge_lora", []), ("quantization", ["4bit"]), ("report_to", "[" * 100_000),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_refused(field, value):
    with pytest.raises(UsageError, match="expected"):
        TrainOptions(**{"train_dataset": "x", "output": "y", field: value})


def test_a_list_of_learning_rates_may_have_a_number():
    options = TrainOptions(train_dataset="x", output="y", lr=[0.0001, "encoder=2e-5"])
    assert options.lr == ("0.0001", "encoder=2e-05")


def test_all_bad_values_in_one_message():
    with pytest.raises(UsageError) as refused:
        TrainOptions(train_dataset="x", output="y", lr=0, lora_rank="x", merge_lora="maybe")
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "--lr",
        "--lora-rank",
        "--merge-lora",
    ]
