"""The pages of help: what they show, and how they fit."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdl_toolkit.cli.help import wrap
from mdl_toolkit.cli.main import toolkit
from mdl_toolkit.config.options import shown_name
from tests.support.command_line import (
    COMMANDS,
)

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
            r"^  (--[a-z0-9-]+|[A-Z_]+) \S+\s+[(（](?:default: |默认值：)?(.*)[)）]$", text, re.MULTILINE
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


def test_several_inputs_are_shown_as_such():
    assert page("check").splitlines()[0].endswith("check INPUT... [OPTIONS]")
