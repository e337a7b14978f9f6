"""An options dataclass becomes a click command: its options, `--config`, and grouped help in two languages.

Click parses and completes. The many spellings of rules 1 to 4 are brought to one before it sees them, and
which values are accepted is for the dataclass to say. No command is known here by name.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mdl_toolkit.config.options import (
    Options,
    OptionSpec,
    checked,
    fields_in_order,
    option,
    shown_name,
    spec_of,
    spelling,
)
from mdl_toolkit.config.types import BOOLEAN, PATH
from mdl_toolkit.config.yaml import from_mapping, read_settings
from mdl_toolkit.errors import UsageError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import width_of

HELP_NAMES = ("-h", "--help")
CONTEXT_SETTINGS = {"help_option_names": list(HELP_NAMES), "max_content_width": 100}
INDENT = 6  # columns before an option's explanation
OTHERS = Localized("Other options")
HELP_TEXT = Localized("Show this page.")

AnyOptions = TypeVar("AnyOptions", bound=Options)


@dataclass(frozen=True, kw_only=True)
class _Shared(Options):
    """What every command takes beside its own options."""

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
    """What the door must know of a command that failed; click's `Context.obj`."""

    debug: bool = False


class OptionsCommand(click.Command):
    """The command that reads an options dataclass and hands it to `work`."""

    def __init__(self, options: type[AnyOptions], work: Callable[[AnyOptions], object]) -> None:
        self.options = options
        self.fields = [*fields_in_order(options), *fields_in_order(_Shared)]
        self.work = work
        super().__init__(
            options.COMMAND,
            params=[_parameter(field) for field in self.fields],
            help=str(options.SUMMARY),
            context_settings={**CONTEXT_SETTINGS, "allow_extra_args": True},
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Bring `args` to the one spelling that click is shown; while completing, whatever can be brought."""
        try:
            args = in_one_spelling(self.options.COMMAND, args, self.fields)
        except UsageError:
            if not ctx.resilient_parsing:
                raise
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Check what was given and do the work.

        Raises:
            UsageError: the command line is wrong.
            InputError: the configuration file is.
        """
        given = {name: value for name, value in ctx.params.items() if value not in (None, ())}
        shared = _Shared(
            **{field.name: given.pop(field.name) for field in fields(_Shared) if field.name in given}
        )
        if shared.debug and ctx.obj:
            ctx.obj.debug = True
        from_words = checked(self.options, given)
        if ctx.args:
            name, word = self.options.COMMAND, ctx.args[0]
            raise UsageError("{command}: unexpected argument {word!r}", command=name, word=word)
        from_file = read_settings(shared.config, self.options) if shared.config else {}
        return self.work(from_mapping(self.options, {**from_file, **from_words}))

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, summary and the groups of options in the order of the reference."""
        needed = [_usage_word(field) for field in self.fields if field.default is MISSING]
        words = [ctx.command_path, *needed, str(Localized("[OPTIONS]"))]
        sections = [
            (str(group), [_entry(field) for field in self.fields if spec_of(field).group == group])
            for group in (*self.options.GROUPS, OTHERS)
        ]
        sections[-1][1].append(HelpEntry(", ".join(HELP_NAMES), "", str(HELP_TEXT)))
        formatter.write(help_page(" ".join(words), str(self.options.SUMMARY), sections, formatter.width))


def _parameter(field: "Field[Any]") -> click.Parameter:
    """What click needs to parse and complete a field.

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
    return click.Option(
        [spelling(field.name), field.name],
        multiple=spec.type.is_repeated,
        help=str(spec.help),
        **shared,
    )


def _complete(_ctx: click.Context, parameter: click.Parameter, start: str) -> "list[CompletionItem[str]]":
    """The words of a metavar such as `true|false|PATH`; capitals stand for something else than themselves."""
    words = str(parameter.metavar).split("|")
    items = [CompletionItem(word) for word in words if word.islower() and word.startswith(start)]
    return [*items, CompletionItem(start, type="file")] if "PATH" in words else items


# ---------------------------------------------------------------------------------------------------------
# Spellings


@dataclass(frozen=True)
class _Names:
    """The names a command knows.

    Attributes:
        options: the options that have a value.
        flags: the words that never have one, and what click is told instead.
    """

    options: Mapping[str, OptionSpec]
    flags: Mapping[str, str]


def _names_of(table: Iterable["Field[Any]"]) -> _Names:
    options = {spelling(field.name): spec_of(field) for field in table if not spec_of(field).positional}
    alone = [name for name, spec in options.items() if spec.type.takes]
    flags = {f"--no-{name[2:]}": f"{name}=false" for name in alone} | {name: name for name in HELP_NAMES}
    return _Names(options, flags)


def in_one_spelling(command: str, words: Iterable[str], table: Iterable["Field[Any]"]) -> list[str]:
    """The words with every option as `--its-name=value`, so that click has nothing to guess.

    Raises:
        UsageError: an unknown option, one without the value it needs, or one with a value it does not take.
    """
    names = _names_of(table)
    rest = deque(words)
    spelled: list[str] = []
    while rest:
        word = rest.popleft()
        if word == "--":
            return [*spelled, word, *rest]
        spelled.append(_spelled(command, word, rest, names) if word.startswith("-") and word != "-" else word)
    return spelled


def _spelled(command: str, word: str, rest: deque[str], names: _Names) -> str:
    typed, equals, value = word.partition("=")
    name = typed.replace("_", "-")
    if name in names.flags:
        if equals:
            raise UsageError("{command}: {name} takes no value", command=command, name=name)
        return names.flags[name]
    if name not in names.options:
        known = [*names.options, *names.flags]
        raise unknown(Localized("{command}: no option {typed}", command=command, typed=typed), name, known)
    if not equals:
        value = _value_after(command, name, names.options[name], rest)
    return f"{name}={value}"


def _value_after(command: str, name: str, spec: OptionSpec, rest: deque[str]) -> str:
    """The value of an option written without `=`: the next word, or true where the option stands alone."""
    takes = spec.type.takes
    if takes is None:
        if not rest:
            raise UsageError("{command}: {name} needs a value", command=command, name=name)
        return rest.popleft()
    if rest and (takes(rest[0]) or (spec.nullable and rest[0] == "null")):
        return rest.popleft()
    return "true"


def unknown(message: Localized, word: str, known: Iterable[str]) -> UsageError:
    """The error for a word nobody knows, with the known one it resembles."""
    bare = {name.lstrip("-"): name for name in known}  # dashes would make any two options alike
    for near in get_close_matches(word.lstrip("-"), bare, n=1):
        return UsageError("{message}; did you mean {near}?", message=message, near=bare[near])
    return UsageError("{message}; --help shows what there is", message=message)


# ---------------------------------------------------------------------------------------------------------
# Help


@dataclass(frozen=True)
class HelpEntry:
    """One thing that help explains: its label, a note behind it, and the explanation."""

    label: str
    note: str
    text: str


def _usage_word(field: "Field[Any]") -> str:
    name, spec = shown_name(field), spec_of(field)
    if spec.positional:
        return f"{name}..." if spec.type.is_repeated else name
    return f"{name} {spec.type.metavar}"


def _entry(field: "Field[Any]") -> HelpEntry:
    spec = spec_of(field)
    label = f"{shown_name(field)} {spec.type.metavar}"
    if field.default is MISSING:
        note = Localized("(required)")
    else:
        note = Localized("(default: {value})", value=spec.dynamic or _shown(field.default))
    return HelpEntry(label, str(note), str(spec.help))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def help_page(
    usage: str, summary: str, sections: Iterable[tuple[str, Sequence[HelpEntry]]], width: int
) -> str:
    """A page of help in lines of at most `width` columns, where the words allow it."""
    first = Localized("Usage: {command}", command=usage)
    lines = [*wrap(str(first), width), "", *_indented(wrap(summary, width - 2), 2)]
    for heading, entries in sections:
        lines += ["", str(Localized("{heading}:", heading=heading))]
        for entry in entries:
            lines += _entry_lines(entry, width)
    return "\n".join(lines) + "\n"


def _entry_lines(entry: HelpEntry, width: int) -> list[str]:
    head = [f"  {entry.label}  {entry.note}".rstrip()]
    if width_of(head[0]) > width:
        head = [f"  {entry.label}", *_indented(wrap(entry.note, width - INDENT), INDENT)]
    return [*head, *_indented(wrap(entry.text, width - INDENT), INDENT)]


def _indented(lines: Iterable[str], columns: int) -> list[str]:
    return [" " * columns + line for line in lines]


# A piece is one Chinese character or a run of other letters, with the punctuation that stays beside it.
_PIECE = re.compile(r"(\s*)([（]*(?:[\u3400-\u9fff]|[^\s\u3000-\u9fff\uff00-\uffef]+)[、。），：；！？]*|\S)")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at blanks and between Chinese characters."""
    lines = [""]
    for blank, piece in _PIECE.findall(text):
        longer = lines[-1] + (" " if blank and lines[-1] else "") + piece
        if lines[-1] and width_of(longer) > width:
            lines.append(piece)
        else:
            lines[-1] = longer
    return lines
