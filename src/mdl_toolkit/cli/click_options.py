"""Turn an options dataclass into a click command: its options, `--config`, `--debug` and help.

Click parses and completes. The spellings that users may choose are brought to one before it sees them,
and the dataclass says which values are accepted. No command is known here by name.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, fields
from typing import Any

import click
from click.shell_completion import CompletionItem

from mdl_toolkit.cli.help import HELP_NAMES, OTHERS, options_page
from mdl_toolkit.config.options import (
    AnyOptions,
    Options,
    OptionSpec,
    checked,
    fields_in_order,
    option,
    spec_of,
    spelling,
)
from mdl_toolkit.config.other_names import nearest
from mdl_toolkit.config.types import BOOLEAN, PATH
from mdl_toolkit.config.yaml import from_mapping, read_settings
from mdl_toolkit.errors import UsageError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import say

CONTEXT_SETTINGS = {"help_option_names": list(HELP_NAMES), "max_content_width": 100}


@dataclass(frozen=True, kw_only=True)
class _SharedOptions(Options):
    """Hold the options that every command takes."""

    GROUPS = (OTHERS,)

    config: str | None = option(
        PATH,
        None,
        OTHERS,
        "A YAML file of options, such as the mdl-toolkit.yaml beside every output; the command line wins.",
    )
    debug: bool = option(
        BOOLEAN,
        False,
        OTHERS,
        "Show the traceback of an error; so does the environment variable MDL_DEBUG=1.",
    )


@dataclass
class Session:
    """Say how errors of a command are reported; click's `Context.obj`."""

    debug: bool = False


class OptionsCommand(click.Command):
    """Read an options dataclass from the command line and hand it to a function."""

    def __init__(self, options: type[AnyOptions], work: Callable[[AnyOptions], object]) -> None:
        self.options = options
        self.fields = [*fields_in_order(options), *fields_in_order(_SharedOptions)]
        self.work = work
        super().__init__(
            name=options.COMMAND,
            params=[click_parameter(field) for field in self.fields],
            help=str(options.SUMMARY),
            context_settings={**CONTEXT_SETTINGS, "allow_extra_args": True},
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Normalize the words before click parses them; words being completed may be wrong."""
        try:
            args = normalize(self.options.COMMAND, args, self.fields)
        except UsageError:
            if not ctx.resilient_parsing:
                raise
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Check the values and do the work.

        Raises:
            UsageError: the command line is wrong.
            InputError: the configuration file is.
        """
        given = {name: value for name, value in ctx.params.items() if value not in (None, ())}
        shared = _SharedOptions(
            **{field.name: given.pop(field.name) for field in fields(_SharedOptions) if field.name in given}
        )
        if shared.debug and ctx.obj:
            ctx.obj.debug = True
        from_words = checked(self.options, given)
        if ctx.args:
            name, word = self.options.COMMAND, ctx.args[0]
            raise UsageError("{command}: unexpected argument {word!r}", command=name, word=word)
        from_file = read_settings(shared.config, self.options, say=say) if shared.config else {}
        return self.work(from_mapping(self.options, {**from_file, **from_words}, from_words))

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, summary and the groups of options in the order of the reference."""
        formatter.write(options_page(ctx.command_path, self.options, self.fields, formatter.width))


def click_parameter(field: "Field[Any]") -> click.Parameter:
    """Return click's parameter of an option.

    Every value reaches us as the text it was typed as, so that None and () can only mean "not given".
    """
    spec = spec_of(field)
    shared: dict[str, Any] = {
        "type": click.UNPROCESSED,
        "metavar": spec.type.metavar,
        "shell_complete": _complete,
    }
    if spec.positional:
        count = -1 if spec.type.is_repeated else 1
        return click.Argument([field.name], required=False, nargs=count, **shared)
    names, is_repeated = [spelling(field.name), field.name], spec.type.is_repeated
    return click.Option(names, multiple=is_repeated, help=str(spec.help), **shared)


def _complete(_ctx: click.Context, parameter: click.Parameter, start: str) -> "list[CompletionItem[str]]":
    """Offer the words of a metavar such as `true|false|PATH`; capitals are not meant literally."""
    words = str(parameter.metavar).split("|")
    items = [CompletionItem(word) for word in words if word.islower() and word.startswith(start)]
    return [*items, CompletionItem(start, type="file")] if "PATH" in words else items


def normalize(command: str, words: Iterable[str], table: Iterable["Field[Any]"]) -> list[str]:
    """Rewrite every option as `--its-name=value`, so that click has nothing to guess.

    Args:
        command: the command's name, for the errors.
        words: the words of the command line after it.
        table: the fields of its options.

    Raises:
        UsageError: an unknown option, one without the value it needs, or one with a value it does not take.
    """
    options = {spelling(field.name): spec_of(field) for field in table if not spec_of(field).positional}
    # The words that never have a value, and their normal form.
    flags = {f"--no-{name[2:]}": f"{name}=false" for name, spec in options.items() if spec.type.takes}
    flags |= {name: name for name in HELP_NAMES}
    remaining = deque(words)
    normal: list[str] = []
    while remaining:
        word = remaining.popleft()
        if word == "--":
            return [*normal, word, *remaining]
        typed, equals, value = word.partition("=")
        name = typed.replace("_", "-")
        if not word.startswith("-") or word == "-":
            normal.append(word)
        elif name in options:
            value = value if equals else _value_after(command, name, options[name], remaining)
            normal.append(f"{name}={value}")
        elif name not in flags:
            message = Localized("{command}: no option {typed}", command=command, typed=typed)
            raise unknown(message, name, [*options, *flags])
        elif equals:
            raise UsageError("{command}: {name} takes no value", command=command, name=name)
        else:
            normal.append(flags[name])
    return normal


def _value_after(command: str, name: str, spec: OptionSpec, remaining: deque[str]) -> str:
    """Take the value of an option without `=`: the next word, or true where the option stands alone."""
    takes = spec.type.takes
    if takes is None and not remaining:
        raise UsageError("{command}: {name} needs a value", command=command, name=name)
    if takes is None or (remaining and (takes(remaining[0]) or (spec.nullable and remaining[0] == "null"))):
        return remaining.popleft()
    return "true"


def unknown(message: Localized, word: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown word; it names the known one that resembles it."""
    # Without dashes, which would make any two options alike.
    bare = {name.lstrip("-"): name for name in known}
    near = nearest(word.lstrip("-"), bare)
    if near:
        return UsageError("{message}; did you mean {near}?", message=message, near=bare[near])
    if near is not None:
        return UsageError("{message}, nor one that does the same", message=message)
    return UsageError("{message}; --help shows what there is", message=message)
