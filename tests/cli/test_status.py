"""What a command answers without work, and the status and the line it ends with."""

import errno
import os
import resource
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

import mdl_toolkit
from mdl_toolkit import __version__
from mdl_toolkit.cli import main as cli
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import InputError, RowProblem, RowsError, broken_package
from mdl_toolkit.i18n import Verbatim
from tests.support.command_line import (
    LANGUAGES,
    TRAIN,
    Done,
    one_line,
    python,
)

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
        (
            "train --lora",
            [f"plain,--lora-{name}" for name in ("rank", "alpha", "dropout", "variant", "plus-ratio")],
        ),
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
            "zh_CN": "错误：in.csv：2 行有问题：\n" + "  第 2 行 audio 列 'a.wav'：找不到\n" * 2,
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


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/a.csv"),
            "error: /x/a.csv: Permission denied",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
    ],
)
def test_what_the_system_refuses_is_no_bug(door, trouble, line):
    door.trouble = trouble
    done = door(*TRAIN)
    assert done.status == 1
    assert one_line(done) == line


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("raise ImportError('libx.so: cannot open')", "ImportError: libx.so: cannot open"),
        (
            "import collections\ncollections.gone",
            "AttributeError: module 'collections' has no attribute 'gone'",
        ),
        ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package_that_is_not"),
        ("try:\n  1 / 0\nexcept Exception as p:\n  raise RuntimeError('lazy') from p", "RuntimeError: lazy"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_package_that_cannot_be_imported_is_no_bug(door, tmp_path, monkeypatch, content, what, is_wrapped):
    (tmp_path / "broken_thing.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        try:
            import_module("broken_thing")
        except Exception as problem:
            if not is_wrapped:
                raise
            raise RuntimeError("no broken_thing") from problem
    except Exception as problem:  # noqa: BLE001
        door.trouble = problem
    line = one_line(door(*TRAIN))
    shown = "RuntimeError: no broken_thing" if is_wrapped else what
    assert line.startswith(f"error: the package broken_thing cannot be imported: {shown}")
    assert line.endswith(
        "`pip install --force-reinstall --no-deps broken_thing` (--debug shows the traceback)"
    )


def test_a_name_that_we_do_not_have_is_a_bug_and_a_package_has_the_name_that_pip_knows(door):
    with pytest.raises(ImportError) as ours:
        from mdl_toolkit.errors import GoneError  # noqa: F401
    assert broken_package(ours.value) is None
    assert broken_package(ImportError("no", name="yaml._yaml")) == "PyYAML"


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


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["--version"]])
def test_a_full_standard_output_is_said(command):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mdl_toolkit", *command], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.decode() == "error: standard output cannot be written: No space left on device\n"


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    """What a library writes to descriptor 2 would stand in the first file that is opened."""
    code = (
        "import os, sys; from mdl_toolkit.cli.main import open_streams; open_streams();"
        "file = open(sys.argv[1], 'w'); os.write(1, b'x'); os.write(2, b'x'); print('y', file=sys.stderr);"
        "file.write('mine')"
    )
    path = tmp_path / "file"
    line = f"{sys.executable} -c {shlex.quote(code)} {path} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 0
    assert path.read_text() == "mine"


def test_main_exits_with_the_status(door, monkeypatch):
    for words, status in ((["demo"], 0), (["train"], 2)):
        monkeypatch.setattr(sys, "argv", ["mdl-toolkit", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == status


def test_commands_are_click_commands():
    commands = cli.toolkit()
    assert isinstance(commands, click.Group)
    names = ["convert-dataset", "train", "inference", "merge", "check", "split", "evaluate", "report"]
    names += ["serve", "push", "demo", "completion"]
    assert list(commands.commands) == names


def test_every_name_that_python_callers_are_offered_is_there():
    for name in mdl_toolkit.__all__:
        assert getattr(mdl_toolkit, name) is not None


INTERRUPTED = """
import pkgutil, runpy, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name not in ("mdl_toolkit", "mdl_toolkit.__main__") and FIRST in (name, ""):
            sys.meta_path.remove(self)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
runpy.run_module("mdl_toolkit", run_name="__main__")
"""


@pytest.mark.parametrize("first", ["", "mdl_toolkit.cli.main"])
def test_an_interrupt_while_our_modules_are_imported_is_one_line(first):
    """At a module of ours, and at the very first one that we import, whatever that is."""
    done = python("-c", f"FIRST = {first!r}{INTERRUPTED}", LANGUAGE="en")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


class PanicException(BaseException):
    """What a library in Rust raises when it gives up."""


def test_what_fails_as_an_interrupt_passes_is_no_bug(door):
    """The standard library closes a descriptor twice where one comes as it removes a folder."""
    door.trouble = OSError(9, "Bad file descriptor")
    door.trouble.__context__ = KeyboardInterrupt()
    assert door(*TRAIN) == Done(130, "", "interrupted\n")


def test_a_panic_is_one_line(door):
    door.trouble = PanicException("index out of bounds")
    done = door(*TRAIN)
    assert done.status == 1
    assert one_line(done).startswith("error: a bug in mdl-toolkit: PanicException: index out of bounds")


@pytest.mark.parametrize(
    "problem", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_is_no_bug(door, problem):
    import_module("torch")
    door.trouble = problem
    done = door(*TRAIN)
    assert done.status == 1
    assert one_line(done) == "error: the machine ran out of memory; free some and start again"
