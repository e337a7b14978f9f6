"""The command line, with the work behind it replaced by functions that only listen."""

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mdl_toolkit
from mdl_toolkit import __version__
from mdl_toolkit.cli import main as cli
from mdl_toolkit.cli.click_options import OptionsCommand
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.options import Options, fields_in_order, spec_of, spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import BOOLEAN, is_boolean_word
from mdl_toolkit.errors import InputError, RowProblem, RowsError
from mdl_toolkit.i18n import Verbatim

WORK = {
    "data.convert.run": "convert_dataset",
    "training.run": "train",
    "inference.run": "infer",
    "training.merge": "merge_adapter",
    "api": "check",
    "demo": "run_demo",
}
TRAIN = ("train", "--train-dataset", "in.csv", "--output", "out")
CONVERT = ("convert-dataset", "in.csv", "--output", "out")
LANGUAGES = ["en", "zh_CN"]


@dataclass
class Done:
    """What became of a command line."""

    status: int
    out: str
    err: str


class Door:
    """Runs command lines and keeps the options that reached its work."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.reached: list[tuple[str, Any]] = []
        self.trouble: BaseException | None = None

    def work(self, name: str) -> Any:
        def work(options: Options) -> None:
            self.reached.append((name, options))
            if self.trouble:
                raise self.trouble

        return work

    def __call__(self, *words: str) -> Done:
        status = cli.run(words)
        captured = self.capsys.readouterr()
        return Done(status, captured.out, captured.err)

    def options(self, *words: str) -> Any:
        done = self(*words)
        assert (done.status, done.out, done.err) == (0, "", "")
        return self.reached[-1][1]


@pytest.fixture
def door(capsys, monkeypatch):
    door = Door(capsys)
    for name, function in WORK.items():
        module = ModuleType(f"mdl_toolkit.{name}")
        setattr(module, function, door.work(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return door


def one_line(done: Done) -> str:
    """The only line of a refusal."""
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    return done.err[:-1]


def python(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


# Which command does which work


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (CONVERT, "data.convert.run"),
        (TRAIN, "training.run"),
        (("inference", "in.csv", "--output", "out.csv", "--model-name", "m"), "inference.run"),
        (("merge", "run/final", "--output", "out"), "training.merge"),
        (("check", "in.csv", "more.csv"), "api"),
        (("demo",), "demo"),
    ],
)
def test_a_command_does_its_work_once(door, words, module):
    assert door(*words) == Done(0, "", "")
    [(reached, options)] = door.reached
    assert reached == module
    assert words[0] == options.COMMAND


# Rule 1


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--merge-lora"], True), (["--merge-lora", "false"], False), (["--merge-lora=FALSE"], False),
        (["--merge-lora", "0"], False), (["--merge-lora", "Off"], False), (["--merge-lora=yes"], True),
        (["--no-merge-lora"], False), (["--no_merge_lora"], False), (["--merge_lora=no"], False),
        (["--no-merge-lora", "--merge-lora"], True), (["--merge-lora", "--no-merge-lora"], False),
        (["--merge-lora", "--lr", "1"], True), ([], True),
    ],
)  # fmt: skip
def test_booleans(door, words, value):
    assert door.options(*TRAIN, *words).merge_lora is value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None), (["--bf16"], True), (["--no-bf16"], False), (["--bf16", "null"], None),
        (["--bf16=null"], None), (["--bf16", "on"], True), (["--bf16", "false", "--bf16", "null"], None),
    ],
)  # fmt: skip
def test_a_boolean_that_may_be_absent(door, words, value):
    assert door.options(*TRAIN, *words).bf16 is value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--resume-from-checkpoint"], True), (["--resume-from-checkpoint", "--lr", "1"], True),
        (["--resume-from-checkpoint", "true"], True), (["--resume-from-checkpoint", "false"], None),
        (["--resume-from-checkpoint", "null"], None), (["--no-resume-from-checkpoint"], None),
        (["--resume-from-checkpoint", "out/checkpoint-5"], "out/checkpoint-5"),
        (["--resume_from_checkpoint=-odd"], "-odd"), (["--resume-from-checkpoint", "--"], True),
    ],
)  # fmt: skip
def test_resume_stands_alone_or_takes_a_path(door, words, value):
    assert door.options(*TRAIN, *words).resume_from_checkpoint == value


def test_a_bare_flag_leaves_the_word_after_it(door):
    options = door.options("convert-dataset", "--from-modelscope", "train.csv", "--output", "x")
    assert (options.from_modelscope, options.input) == (True, "train.csv")
    options = door.options("convert-dataset", "--from-modelscope", "false", "true", "--output", "x")
    assert (options.from_modelscope, options.input) == (False, "true")
    options = door.options("convert-dataset", "--output", "x", "--from-modelscope", "--", "false")
    assert (options.from_modelscope, options.input) == (True, "false")


BARE = [spelling(f.name) for f in fields_in_order(ConvertOptions) if spec_of(f).type is BOOLEAN]


@given(
    flags=st.lists(st.sampled_from(BARE), min_size=1, unique=True),
    word=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
    output=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
)
@settings(max_examples=300, deadline=None)
def test_bare_flags_never_swallow_a_word(flags, word, output):
    if is_boolean_word(word) or (word.startswith("-") and word != "-"):
        word = f"./{word}"
    seen: list[ConvertOptions] = []
    command = OptionsCommand(ConvertOptions, seen.append)
    with command.make_context("convert-dataset", ["--output", output, *flags, word]) as context:
        command.invoke(context)
    [options] = seen
    assert (options.input, options.output) == (word, output)
    assert all(getattr(options, flag[2:].replace("-", "_")) is True for flag in flags)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_flags_take_no_value(door, language, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    done = door(*TRAIN, "--no-merge-lora=true")
    assert done.status == 2
    assert (
        one_line(done)
        == {
            "en": "error: train: --no-merge-lora takes no value",
            "zh_CN": "错误：train：--no-merge-lora 不带值",
        }[language]
    )


# Rule 2


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        ([], "from file"), (["--system-prompt", "null"], None), (["--system-prompt", ""], ""),
        (["--system-prompt="], ""), (["--system-prompt", "--no-merge-lora"], "--no-merge-lora"),
        (["--system-prompt", "--"], "--"), (["--system-prompt=a=b"], "a=b"),
        (["--system-prompt", "one", "--system-prompt", "two"], "two"),
    ],
)  # fmt: skip
def test_null_and_empty_override_the_file(door, words, prompt, tmp_path):
    config = written(tmp_path, "system_prompt: from file\n")
    options = door.options(*TRAIN, "--config", config, *words)
    assert options.system_prompt == prompt
    assert options.merge_lora is True


def test_empty_and_null_differ_only_over_a_file(door):
    assert door.options(*TRAIN, "--system-prompt", "null").system_prompt is None
    assert door.options(*TRAIN, "--system-prompt", "").system_prompt == ""


def written(folder: Path, content: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


# Rule 3


@pytest.mark.parametrize(
    "words",
    [
        ["--report-to", "wandb", "--report-to", "tensorboard"],
        ["--report-to", "wandb,tensorboard"],
        ["--report_to=wandb, tensorboard", "--report-to", "wandb"],
        ["--report-to", '["wandb", "tensorboard"]'],
        ["--report-to", '["wandb"]', "--report-to", "tensorboard,wandb"],
    ],
)
def test_repeated_options_replace_file_and_default(door, words, tmp_path):
    config = written(tmp_path, "report_to: [swanlab]\ntrain_target: [lm_head]\n")
    options = door.options(*TRAIN, "--config", config, *words, "--train-target", "decoder")
    assert options.report_to == ("wandb", "tensorboard")
    assert options.train_target == ("decoder",)


def test_an_empty_list_replaces_too(door, tmp_path):
    config = written(tmp_path, "report_to: [swanlab]\n")
    assert door.options(*TRAIN, "--config", config, "--report-to", "[]").report_to == ()
    assert door.options(*TRAIN, "--config", config, "--report-to", "").report_to == ()


def test_the_last_of_two_values_wins(door):
    assert door.options(*TRAIN, "--lr", "x", "--lr=1e-5").lr == 1e-5


# Rule 4


@pytest.mark.parametrize(
    "words",
    [
        ["in.csv", "--output", "out", "--num-workers", "3"],
        ["--output", "out", "in.csv", "--num-workers", "3"],
        ["--output", "out", "--num-workers", "3", "in.csv"],
        ["--output", "out", "--num-workers", "3", "--", "in.csv"],
        ["--num_workers=3", "in.csv", "--output=out"],
    ],
)
def test_options_stand_before_or_after_the_input(door, words):
    options = door.options("convert-dataset", *words)
    assert options == ConvertOptions(input="in.csv", output="out", num_workers=3)


def test_after_two_dashes_everything_is_input(door):
    assert door.options("convert-dataset", "--output", "out", "--", "--no_x.csv").input == "--no_x.csv"


SUGGESTED = [
    (("train", "--lora-r", "8"), "train", "--lora-r", "--lora-rank"),
    (("train", "--lora_rnk=8"), "train", "--lora_rnk", "--lora-rank"),
    (("train", "--no-mergelora"), "train", "--no-mergelora", "--no-merge-lora"),
    (("train", "-output", "x"), "train", "-output", "--output"),
    (("convert-dataset", "--configs", "x"), "convert-dataset", "--configs", "--config"),
    (("--versoin",), "mdl-toolkit", "--versoin", "--version"),
]


@pytest.mark.parametrize(("words", "command", "typed", "meant"), SUGGESTED)
def test_an_unknown_option_is_one_line_with_a_suggestion(door, words, command, typed, meant, monkeypatch):
    done = door(*words)
    assert done.status == 2
    assert one_line(done) == f"error: {command}: no option {typed}; did you mean {meant}?"
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert one_line(door(*words)) == f"错误：{command}：没有选项 {typed}；您是不是想用 {meant}？"
    assert door.reached == []


@pytest.mark.parametrize("words", [(*TRAIN, "--xyzzy"), (*TRAIN, "-x"), (*TRAIN, "--no-lr"), ("-9",)])
def test_an_unknown_option_like_no_other(door, words):
    done = door(*words)
    assert done.status == 2
    assert one_line(done).endswith(f"no option {words[-1]}; --help shows what there is")


@pytest.mark.parametrize(
    ("language", "line"),
    [
        ("en", "error: mdl-toolkit: no command trian; did you mean train?"),
        ("zh_CN", "错误：mdl-toolkit：没有命令 trian；您是不是想用 train？"),
    ],
)
def test_an_unknown_command(door, language, line, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    done = door("trian", "--train-dataset", "x")
    assert done.status == 2
    assert one_line(done) == line


def test_help_does_not_show_snake_case(door):
    done = door("train", "--help")
    assert "--lora-rank" in done.out
    assert "--lora_rank" not in done.out


@pytest.mark.parametrize(
    ("words", "en", "zh"),
    [
        (("train",), "train: missing --train-dataset, --output", "train：缺少 --train-dataset, --output"),
        (
            ("convert-dataset", "--output", "x"),
            "convert-dataset: missing INPUT",
            "convert-dataset：缺少 INPUT",
        ),
        (
            ("inference", "x", "--output", "y"),
            "inference: missing --model-name",
            "inference：缺少 --model-name",
        ),
        ((*TRAIN, "--lr"), "train: --lr needs a value", "train：--lr 需要一个值"),
        ((*TRAIN, "more.csv"), "train: unexpected argument 'more.csv'", "train：多余的参数 'more.csv'"),
        (
            (*CONVERT, "b.csv"),
            "convert-dataset: unexpected argument 'b.csv'",
            "convert-dataset：多余的参数 'b.csv'",
        ),
        ((*TRAIN, "--lr", "fast"), "--lr: expected a number, not 'fast'", "--lr：应为数字，而不是 'fast'"),
        (
            (*TRAIN, "--lr", "--lora-rank", "8"),
            "--lr: expected a number, not '--lora-rank'",
            "--lr：应为数字，而不是 '--lora-rank'",
        ),
        (
            (*TRAIN, "--report-to", "wandb", "--report-to", "[1]"),
            "--report-to: expected words, not 'wandb', '[1]'",
            "--report-to：应为单词列表，而不是 'wandb', '[1]'",
        ),
        (
            (*TRAIN, "--config="),
            "--config: expected a path (or null), not ''",
            "--config：应为路径（或 null），而不是 ''",
        ),
        (
            (*TRAIN, "--debug=x"),
            "--debug: expected true or false, not 'x'",
            "--debug：应为 true 或 false，而不是 'x'",
        ),
        (("train", "--help=x"), "train: --help takes no value", "train：--help 不带值"),
        (
            ("completion", "tcsh"),
            "SHELL: expected one of bash, zsh, fish, not 'tcsh'",
            "SHELL：应为以下之一：bash, zsh, fish，而不是 'tcsh'",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(door, words, en, zh, monkeypatch):
    done = door(*words)
    assert done.status == 2
    assert one_line(done) == f"error: {en}"
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert one_line(door(*words)) == f"错误：{zh}"
    assert door.reached == []


# Rule 5


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(door, tmp_path):
    config = written(tmp_path, "train_dataset: f.csv\noutput: f\nlr: 1e-5\nlora-rank: 4\nmerge_lora: no\n")
    options = door.options("train", "--lora_rank", "16", "--config", config)
    assert options == TrainOptions(train_dataset="f.csv", output="f", lr=1e-5, lora_rank=16, merge_lora=False)


def test_the_file_may_hold_the_input(door, tmp_path):
    config = written(tmp_path, "input: f.csv\noutput: f\n")
    assert door.options("convert-dataset", "--config", config).input == "f.csv"
    assert door.options("convert-dataset", "g.csv", f"--config={config}").input == "g.csv"


def test_no_file_may_be_said(door):
    assert door.options(*TRAIN, "--config", "null") == TrainOptions(train_dataset="in.csv", output="out")


@pytest.mark.parametrize(
    ("content", "en", "zh"),
    [
        ("speed: 1\nlora_rnk: 2\n", "train has no option lora_rnk, speed", "train 没有选项 lora_rnk, speed"),
        ("lr: fast\n", "--lr: expected a number, not 'fast'", "--lr：应为数字，而不是 'fast'"),
        ("- 1\n", "expected `name: value` lines", "应为“名称: 值”"),
        ("config: x.yaml\n", "train has no option config", "train 没有选项 config"),
    ],
)
def test_what_is_wrong_in_the_file_is_status_1_and_names_it(door, content, en, zh, tmp_path, monkeypatch):
    config = written(tmp_path, content)
    done = door(*TRAIN, "--config", config)
    assert done.status == 1
    assert one_line(done) == f"error: --config {config}: {en}"
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert one_line(door(*TRAIN, "--config", config)) == f"错误：--config {config}：{zh}"


def test_a_missing_file_is_status_1(door, tmp_path):
    done = door(*TRAIN, "--config", str(tmp_path / "no.yaml"))
    assert done.status == 1
    assert one_line(done) == f"error: --config {tmp_path / 'no.yaml'}: file not found"


def test_the_command_line_is_blamed_before_the_file(door, tmp_path):
    config = written(tmp_path, "lr: fast\n")
    done = door(*TRAIN, "--config", config, "--lora-rank", "0")
    assert done.status == 2
    assert one_line(done).startswith("error: --lora-rank: ")


def test_what_neither_gives_is_a_usage_error(door, tmp_path):
    done = door("train", "--config", written(tmp_path, "output: x\n"))
    assert done.status == 2
    assert one_line(done) == "error: train: missing --train-dataset"


# Rule 6


def test_version(door):
    assert door("--version") == Done(0, f"mdl-toolkit {__version__}\n", "")


def test_the_module_is_the_command():
    done = python("-m", "mdl_toolkit", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mdl-toolkit {__version__}\n", "")


def test_the_door_imports_nothing_heavy():
    code = (
        "import sys; from mdl_toolkit.cli import main as cli; cli.run(['train', '--help']);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    heavy = {"torch", "transformers", "datasets", "numpy", "rich", "peft", "pyarrow"}
    heavy |= {"huggingface_hub", "httpx"}
    assert heavy.isdisjoint(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "command", ["convert-dataset", "train", "inference", "merge", "check", "demo", "completion"]
)
def test_help_is_quick(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(3):
        assert python("-m", "mdl_toolkit", command, "--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time on the processor, so that neighbours on the same machine do not count (under 0.3 s).
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 3 < 0.3


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_of_the_program_names_the_commands(door, word, monkeypatch):
    done = door(word)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("Usage: mdl-toolkit COMMAND [OPTIONS]\n")
    for options in (ConvertOptions, TrainOptions):
        assert f"  {options.COMMAND}\n      {options.SUMMARY.en}" in done.out
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert door(word).out.startswith("用法：mdl-toolkit 命令 [选项]\n")


def test_help_of_a_command_begins_with_usage_and_summary(door, monkeypatch):
    usage = "mdl-toolkit convert-dataset INPUT --output PATH"
    assert door("convert-dataset", "-h").out.startswith(f"Usage: {usage} [OPTIONS]\n\n  Convert a CSV ")
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert door("convert-dataset", "--help").out.startswith(f"用法：{usage} [选项]\n\n  将 CSV ")


def test_no_words_show_help_as_an_error(door):
    done = door()
    assert (done.status, done.out) == (2, "")
    assert done.err == door("--help").out


@pytest.mark.parametrize(
    ("shell", "sign"),
    [("bash", "complete -o"), ("zsh", "#compdef mdl-toolkit"), ("fish", "complete --no-files")],
)
def test_completion_prints_a_script(door, shell, sign):
    done = door("completion", shell)
    assert (done.status, done.err) == (0, "")
    assert sign in done.out
    assert f"_MDL_TOOLKIT_COMPLETE={shell}_complete" in done.out


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("tr", ["plain,train"]),
        ("train --lora", ["plain,--lora-rank", "plain,--lora-alpha", "plain,--lora-dropout"]),
        ("train --lr x --nosuch 3 --num-e", ["plain,--num-epochs"]),
        ("train --quantization ", ["plain,8bit", "plain,4bit"]),
        ("train --bf16 t", ["plain,true"]),
        ("train --resume-from-checkpoint ", ["plain,true", "plain,false", "file,"]),
        ("train --lr ", []),
        ("convert-dataset --num_workers 3 da", ["file,da"]),
        ("completion ", ["plain,bash", "plain,zsh", "plain,fish"]),
        ("--ver", ["plain,--version"]),
    ],
)
def test_completion_offers_commands_options_and_values(door, words, offered, monkeypatch):
    monkeypatch.setenv("_MDL_TOOLKIT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"mdl-toolkit {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(f"x{words}x".split())))
    done = door()
    assert (done.status, done.err, done.out.splitlines()) == (0, "", offered or [""])


# Rule 7


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_the_user_can_put_right_is_said_in_one_piece(door, language, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    problems = [RowProblem(2, "audio", "a.wav", Verbatim("not found", "找不到"))] * 2
    door.trouble = RowsError("in.csv", problems)
    done = door(*TRAIN)
    assert (done.status, done.out) == (1, "")
    assert (
        done.err
        == {
            "en": "error: in.csv: 2 bad row(s):\n" + "  line 2, column audio 'a.wav': not found\n" * 2,
            "zh_CN": "错误：in.csv：2 行有问题：\n" + "  第 2 行 audio 列 'a.wav': 找不到\n" * 2,
        }[language]
    )


def test_an_error_in_one_of_several_processes_is_said(door, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    door.trouble = InputError("no such thing")
    assert one_line(door(*TRAIN)) == "error: no such thing"


@pytest.mark.parametrize("words", [["--debug"], ["--debug", "true"], ["--debug=1"]])
def test_debug_shows_the_traceback(door, words):
    door.trouble = InputError("no such thing")
    done = door(*TRAIN, *words)
    assert done.status == 1
    assert done.err.startswith("Traceback (most recent call last):\n")
    assert done.err.endswith("\nerror: no such thing\n")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_environment_asks_for_the_traceback(door, value, shown, monkeypatch):
    monkeypatch.setenv("MDL_DEBUG", value)
    door.trouble = InputError("no such thing")
    assert ("Traceback" in door(*TRAIN).err) is shown


@pytest.mark.parametrize(("language", "line"), [("en", "interrupted"), ("zh_CN", "已中断")])
def test_an_interrupt_is_status_130(door, language, line, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    door.trouble = KeyboardInterrupt()
    done = door(*TRAIN)
    assert done.status == 130
    assert one_line(done) == line


@pytest.mark.parametrize(
    ("language", "line"),
    [
        ("en", "error: a bug in mdl-toolkit: KeyError: 'a b' (--debug shows the traceback)"),
        ("zh_CN", "错误：mdl-toolkit 的程序缺陷：KeyError: 'a b'（使用 --debug 查看调用栈）"),
    ],
)
def test_anything_else_is_a_bug_and_said_to_be(door, language, line, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    door.trouble = KeyError("a b")
    done = door(*TRAIN)
    assert done.status == 1
    assert one_line(done) == line


def test_a_bug_under_debug_is_raised(door):
    door.trouble = KeyError("x")
    with pytest.raises(KeyError):
        door(*TRAIN, "--debug")


def test_a_pipe_broken_inside_the_work_is_not_kept_quiet(door):
    door.trouble = BrokenPipeError("a worker died")
    done = door(*TRAIN)
    assert done.status == 1
    assert "BrokenPipeError: a worker died" in done.err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "mdl_toolkit", "train", "--help"],
        stdout=writer, stderr=subprocess.PIPE, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_main_exits_with_the_status(door, monkeypatch):
    for words, status in ((["demo"], 0), (["train"], 2)):
        monkeypatch.setattr(sys, "argv", ["mdl-toolkit", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == status


def test_commands_are_click_commands():
    commands = cli.toolkit()
    assert isinstance(commands, click.Group)
    names = ["convert-dataset", "train", "inference", "merge", "check", "evaluate", "report", "demo"]
    names += ["completion"]
    assert list(commands.commands) == names


def test_every_name_that_python_callers_are_offered_is_there():
    for name in mdl_toolkit.__all__:
        assert getattr(mdl_toolkit, name) is not None
