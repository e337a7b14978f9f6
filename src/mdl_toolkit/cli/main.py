"""The commands: read options, make one call, and turn what went wrong into one line and an exit status.

A command's work lives in the room it imports when it is called, never here, so that `--help` is quick.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class, shell_complete

from mdl_toolkit import __version__
from mdl_toolkit.cli.click_options import (
    CONTEXT_SETTINGS,
    HELP_NAMES,
    HELP_TEXT,
    OTHERS,
    HelpEntry,
    OptionsCommand,
    Session,
    help_page,
    unknown,
)  # fmt: skip
from mdl_toolkit.config.data import CheckOptions, CompletionOptions, ConvertOptions, DemoOptions
from mdl_toolkit.config.evaluation import EvaluateOptions, ReportOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.options import Options
from mdl_toolkit.config.train import MergeOptions, TrainOptions
from mdl_toolkit.config.types import TRUE_WORDS
from mdl_toolkit.errors import ToolkitError
from mdl_toolkit.i18n import Localized

PROGRAM = "mdl-toolkit"
SUMMARY = Localized("Fine-tune MiDashengLM on your own recordings: convert, train, merge, predict, evaluate.")
COMMANDS = Localized("Commands")
VERSION_TEXT = Localized("Show the version.")

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
COMPLETION_VARIABLE = "_MDL_TOOLKIT_COMPLETE"  # the name that click's completion scripts set


def _convert(options: ConvertOptions) -> None:
    from mdl_toolkit.data.convert.run import convert_dataset

    convert_dataset(options)


def _train(options: TrainOptions) -> None:
    from mdl_toolkit.training.run import train

    train(options)


def _infer(options: InferenceOptions) -> None:
    from mdl_toolkit.inference.run import infer

    infer(options)


def _merge(options: MergeOptions) -> None:
    from mdl_toolkit.training.merge import merge_adapter

    merge_adapter(options)


def _check(options: CheckOptions) -> None:
    from mdl_toolkit.api import check

    check(options)


def _evaluate(options: EvaluateOptions) -> None:
    from mdl_toolkit.api import evaluate
    from mdl_toolkit.evaluation.render import as_text

    click.echo(as_text(evaluate(options)))


def _show(options: ReportOptions) -> None:
    from mdl_toolkit.reporting.report import report

    report(options)


def _demo(options: DemoOptions) -> None:
    from mdl_toolkit.demo import run_demo

    run_demo(options)


def _completion(options: CompletionOptions) -> None:
    script = get_completion_class(options.shell)
    assert script is not None
    click.echo(script(toolkit(), {}, PROGRAM, COMPLETION_VARIABLE).source())


class _Toolkit(click.Group):
    """All commands; what it refuses, it refuses in our words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what is neither a command nor an option of ours.

        Raises:
            UsageError: naming the word and what it resembles.
        """
        if not ctx.resilient_parsing:
            self._refuse(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse(self, ctx: click.Context, args: Sequence[str]) -> None:
        if not args:
            click.echo(self.get_help(ctx), err=True)
            ctx.exit(WRONG_USAGE)
        word, options = args[0], (*HELP_NAMES, "--version")
        if word.startswith("-") and word not in options:
            raise unknown(Localized("{program}: no option {word}", program=PROGRAM, word=word), word, options)
        if word not in options and word not in self.commands:
            raise unknown(
                Localized("{program}: no command {word}", program=PROGRAM, word=word), word, self.commands
            )

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, summary and the commands."""
        usage = Localized("COMMAND [OPTIONS]")
        commands = [HelpEntry(name, "", str(command.help)) for name, command in self.commands.items()]
        others = [
            HelpEntry("--version", "", str(VERSION_TEXT)),
            HelpEntry(", ".join(HELP_NAMES), "", str(HELP_TEXT)),
        ]
        sections = [(str(COMMANDS), commands), (str(OTHERS), others)]
        formatter.write(help_page(f"{ctx.command_path} {usage}", str(SUMMARY), sections, formatter.width))


def toolkit() -> click.Group:
    """The command `mdl-toolkit`, its texts in the user's language."""
    works: list[tuple[type[Options], Callable[[Any], object]]] = [
        (ConvertOptions, _convert),
        (TrainOptions, _train),
        (InferenceOptions, _infer),
        (MergeOptions, _merge),
        (CheckOptions, _check),
        (EvaluateOptions, _evaluate),
        (ReportOptions, _show),
        (DemoOptions, _demo),
        (CompletionOptions, _completion),
    ]
    version = click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
        help=str(VERSION_TEXT),
    )  # fmt: skip
    commands = [OptionsCommand(options, work) for options, work in works]
    return _Toolkit(
        PROGRAM, commands=commands, params=[version], help=str(SUMMARY), context_settings=CONTEXT_SETTINGS
    )


def _show_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"{PROGRAM} {__version__}")
        ctx.exit()


def run(words: Sequence[str]) -> int:
    """Do what the words of a command line say and return the exit status (rule 7).

    Raises:
        Exception: a bug in this toolkit, and `--debug` was given.
    """
    session = Session(debug=os.environ.get("MDL_DEBUG", "").lower() in TRUE_WORDS)
    try:
        return _serve(words, session)
    except ToolkitError as error:
        if session.debug:
            traceback.print_exc()
        _report(Localized("error: {reason}", reason=error.message))
        return error.exit_status
    except KeyboardInterrupt:
        _report(Localized("interrupted"))
        return INTERRUPTED
    except Exception as problem:
        if session.debug:
            raise
        if not _nobody_reads(problem):
            _report_bug(problem)
        return FAILED


def _serve(words: Sequence[str], session: Session) -> int:
    commands = toolkit()
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if instruction:
        return shell_complete(commands, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    try:
        with commands.make_context(PROGRAM, list(words), obj=session) as context:
            commands.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return 0


def _nobody_reads(problem: Exception) -> bool:
    """Tell whether the reader of standard output has gone, as in `| head`; if so, write no more to it."""
    if not isinstance(problem, BrokenPipeError):
        return False
    try:
        sys.stdout.write("\n")  # nothing but a try: flushing alone says nothing when the buffer is empty
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _report(message: Localized) -> None:
    """Write why it ends; unlike `console.say`, in every process, since any one of several may fail alone."""
    sys.stderr.write(f"{message}\n")


def _report_bug(problem: Exception) -> None:
    what = " ".join(f"{type(problem).__name__}: {problem}".split())
    _report(Localized("error: a bug in mdl-toolkit: {what} (--debug shows the traceback)", what=what))


def main() -> NoReturn:
    """The entry point of `mdl-toolkit` and of `python -m mdl_toolkit`."""
    status = run(sys.argv[1:])
    if _is_among_others():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _is_among_others() -> bool:
    """Tell whether this process has failed in a group that it cannot leave alone: tidying up would hang."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
