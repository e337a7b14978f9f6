"""The commands: read options, make one call, and turn what went wrong into one line and an exit status.

The module that does a command's work is imported when the command is called, so that `--help` is quick.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class, shell_complete

import mdl_toolkit
from mdl_toolkit.cli.click_options import CONTEXT_SETTINGS, OptionsCommand, Session, unknown
from mdl_toolkit.cli.help import HELP_NAMES, OTHERS, HelpEntry, help_entry, help_page
from mdl_toolkit.config.data import (
    CheckOptions,
    CompletionOptions,
    ConvertOptions,
    DemoOptions,
    SplitOptions,
)
from mdl_toolkit.config.evaluation import EvaluateOptions, ReportOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.options import Options
from mdl_toolkit.config.serving import PushOptions, ServeOptions
from mdl_toolkit.config.train import MergeOptions, TrainOptions
from mdl_toolkit.config.types import TRUE_WORDS
from mdl_toolkit.errors import ToolkitError, breakdown, broken_package, is_error
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import ForgivingStream

PROGRAM = "mdl-toolkit"
SUMMARY = Localized("Fine-tune MiDashengLM on your own recordings: convert, train, merge, predict, evaluate.")
COMMANDS = Localized("Commands")
VERSION_TEXT = Localized("Show the version.")

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
# The descriptors of standard input, output and error end here.
STANDARD_ERROR = 2
# Refusals of the system, which a user can put right.
MACHINE_ERRORS = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE,
    errno.ENOSPC, errno.EPERM, errno.EROFS, errno.ESTALE,
}  # fmt: skip
# The name that click's completion scripts set.
COMPLETION_VARIABLE = "_MDL_TOOLKIT_COMPLETE"


def _calls(name: str, module: str = "mdl_toolkit") -> Callable[[Any], object]:
    """Return a call of a function, of the Python API by default, which is imported only when it is called."""
    return lambda options: getattr(import_module(module), name)(options)


def _evaluate(options: EvaluateOptions) -> None:
    from mdl_toolkit.api import evaluate
    from mdl_toolkit.evaluation.render import as_text

    click.echo(as_text(evaluate(options)))


class _Toolkit(click.Group):
    """Group all commands, and refuse other words with messages of ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse a first word that is neither a command nor an option of the program.

        Raises:
            UsageError: naming the word and the one it resembles.
        """
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        if not args:
            click.echo(self.get_help(ctx), err=True)
            ctx.exit(WRONG_USAGE)
        word, options = args[0], (*HELP_NAMES, "--version")
        if word.startswith("-") and word not in options:
            raise unknown(Localized("{program}: no option {word}", program=PROGRAM, word=word), word, options)
        if word not in options and word not in self.commands:
            message = Localized("{program}: no command {word}", program=PROGRAM, word=word)
            raise unknown(message, word, self.commands)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, summary and the commands."""
        usage = Localized("COMMAND [OPTIONS]")
        commands = [HelpEntry(name, "", str(command.help)) for name, command in self.commands.items()]
        others = [HelpEntry("--version", "", str(VERSION_TEXT)), help_entry()]
        sections = [(str(COMMANDS), commands), (str(OTHERS), others)]
        formatter.write(help_page(f"{ctx.command_path} {usage}", str(SUMMARY), sections, formatter.width))


def toolkit() -> click.Group:
    """Return the command `mdl-toolkit`, its texts in the user's language."""

    def print_completion(options: CompletionOptions) -> None:
        script = get_completion_class(options.shell)
        assert script is not None
        click.echo(script(group, {}, PROGRAM, COMPLETION_VARIABLE).source())

    works: list[tuple[type[Options], Callable[[Any], object]]] = [
        (ConvertOptions, _calls("convert_dataset")),
        (TrainOptions, _calls("train")),
        (InferenceOptions, _calls("infer")),
        (MergeOptions, _calls("merge_adapter")),
        (CheckOptions, _calls("check")),
        (SplitOptions, _calls("split_dataset")),
        (EvaluateOptions, _evaluate),
        (ReportOptions, _calls("report")),
        (ServeOptions, _calls("serve", "mdl_toolkit.serving.serve")),
        (PushOptions, _calls("push", "mdl_toolkit.weights.push")),
        (DemoOptions, _calls("run_demo", "mdl_toolkit.demo")),
        (CompletionOptions, print_completion),
    ]

    commands = [OptionsCommand(options, work) for options, work in works]
    group = _Toolkit(PROGRAM, commands=commands, help=str(SUMMARY), context_settings=CONTEXT_SETTINGS)
    return click.version_option(mdl_toolkit.__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")(
        group
    )


def run(words: Sequence[str]) -> int:
    """Run a command line.

    Returns:
        The exit status: 0; 1 if the work failed; 2 if the command line is wrong; 130 if interrupted.

    Raises:
        Exception: a bug in this toolkit, and `--debug` was given.
    """
    session = Session(debug=os.environ.get("MDL_DEBUG", "").lower() in TRUE_WORDS)
    try:
        commands = toolkit()
        if instruction := os.environ.get(COMPLETION_VARIABLE):
            return shell_complete(commands, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
        with commands.make_context(PROGRAM, list(words), obj=session) as context:
            commands.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except ToolkitError as error:
        if session.debug:
            traceback.print_exc()
        _write_error(Localized("error: {reason}", reason=error.message))
        return error.exit_status
    except KeyboardInterrupt:
        _write_error(Localized("interrupted"))
        return INTERRUPTED
    except BaseException as problem:
        if session.debug or not is_error(problem):
            raise
        # A folder that was being removed closes its descriptor twice.
        is_interrupted = isinstance(problem.__context__, KeyboardInterrupt)
        _write_error(Localized("interrupted") if is_interrupted else _unforeseen(problem))
        return INTERRUPTED if is_interrupted else FAILED
    return 0


def _unforeseen(problem: BaseException) -> Localized:
    """Tell what the machine refuses, or a package that does not work, from a bug of ours."""
    lack = breakdown(problem) if isinstance(problem, MemoryError) else None
    if lack is None and "torch" in sys.modules:
        from mdl_toolkit.utils.machine import describe_oom

        lack = describe_oom(problem)
    if lack is not None:
        return Localized("error: {lack}; free some and start again", lack=lack)
    if isinstance(problem, OSError) and problem.errno in MACHINE_ERRORS:
        where = "" if problem.filename is None else f"{problem.filename}: "
        return Localized("error: {where}{reason}", where=where, reason=problem.strerror)
    what = " ".join(f"{type(problem).__name__}: {problem}".split())
    if package := broken_package(problem):
        return Localized(
            "error: the package {package} cannot be imported: {what}; repair it, for example by `pip install "
            "--force-reinstall --no-deps {package}` (--debug shows the traceback)",
            package=package,
            what=what,
        )
    return Localized("error: a bug in mdl-toolkit: {what} (--debug shows the traceback)", what=what)


def _write_error(message: Localized) -> None:
    """Write why it ends, in any of several processes, as one may fail alone; what one has said is said."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from mdl_toolkit.utils.distributed import is_first_to_say

        if not is_first_to_say(str(message)):
            return
    sys.stderr.write(f"{message}\n")


def open_streams() -> tuple[ForgivingStream, ForgivingStream]:
    """Make standard output and error take everything: a closed one is the null device.

    Otherwise the next file that is opened would be taken for it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Open until the end of the process, as the other ones.
    opened = [
        ForgivingStream(stream or Path(os.devnull).open("w"))  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    ]
    sys.stdout, sys.stderr = opened
    return opened[0], opened[1]


def main() -> NoReturn:
    """Run the command line of this process and exit; the entry point of `mdl-toolkit`."""
    output, errors = open_streams()
    status = run(sys.argv[1:])
    output.finish()
    if output.problem is not None and output.problem.errno != errno.EPIPE:
        reason = output.problem.strerror
        _write_error(Localized("error: standard output cannot be written: {reason}", reason=reason))
    errors.finish()
    # Something could not be told.
    if output.problem or errors.problem:
        status = status or FAILED
    distributed = sys.modules.get("torch.distributed")
    # Among other processes of a distributed group, tidying up would wait for them forever.
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        os._exit(status)
    sys.exit(status)
