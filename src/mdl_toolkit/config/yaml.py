"""Options to and from YAML files and words of the command line.

`read_settings` reads back what `to_yaml` writes; `as_command` is what a user would have typed.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mdl_toolkit.config.options import (
    Options,
    ValuesError,
    checked,
    fields_in_order,
    shown_name,
    spec_of,
    spelling,
)
from mdl_toolkit.errors import InputError, UsageError
from mdl_toolkit.i18n import Localized, join_messages

SETTINGS_FILE = "mdl-toolkit.yaml"

AnyOptions = TypeVar("AnyOptions", bound=Options)


def from_mapping(cls: type[AnyOptions], values: Mapping[str, Any]) -> AnyOptions:
    """Options from values by field name.

    Raises:
        UsageError: naming the required options that are missing, or the values that are not accepted.
    """
    missing = [
        shown_name(field)
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        names = ", ".join(missing)
        raise UsageError("{command}: missing {names}", command=cls.COMMAND, names=names)
    return cls(**values)


def read_settings(path: str | Path, cls: type[Options], option: str = "--config") -> dict[str, Any]:
    """The values of a settings file, by field name; both spellings of a name are accepted.

    Args:
        path: the file.
        cls: the options that it is to hold.
        option: by which it was given, for the errors.

    Raises:
        InputError: the file cannot be read, is no YAML mapping, or holds unknown keys or values that are not
            accepted (all of them named).
    """
    place = f"{option} {path}"
    named = {str(key).replace("-", "_"): value for key, value in _mapping(path, place).items()}
    unknown = sorted(set(named) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        names = ", ".join(unknown)
        raise InputError(
            "{place}: {command} has no option {names}", place=place, command=cls.COMMAND, names=names
        )
    try:
        return checked(cls, named)
    except ValuesError as refused:
        lines = [Localized("{place}: {reason}", place=place, reason=line) for line in refused.lines]
        raise InputError(join_messages(lines, "{left}\n{right}")) from refused


def _mapping(path: str | Path, place: str) -> dict[Any, Any]:
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            values = yaml.safe_load(file)
    except FileNotFoundError as problem:
        raise InputError("{place}: file not found", place=place) from problem
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())
        raise InputError("{place}: {reason}", place=place, reason=reason) from problem
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError("{place}: expected `name: value` lines", place=place)
    return values


def to_yaml(options: Options) -> str:
    """The settings as YAML with each option's help as a comment; `read_settings` reads it back."""
    lines = [f"# mdl-toolkit {options.COMMAND}"]
    for field in fields_in_order(type(options)):
        value = getattr(options, field.name)
        value = list(value) if isinstance(value, tuple) else value
        lines += ["", f"# {spec_of(field).help}", _yaml_line(field.name, value)]
    return "\n".join(lines) + "\n"


def _yaml_line(name: str, value: Any) -> str:
    shown = yaml.safe_dump({name: value}, allow_unicode=True, width=10**6, default_flow_style=False)
    if "\x85" in shown:  # PyYAML writes this line break as it is and reads it back as a blank
        shown = yaml.safe_dump({name: value}, width=10**6, default_flow_style=False)
    return str(shown).rstrip("\n")


def as_command(options: Options) -> str:
    """The command line that gives these options, as a user would type it in a POSIX shell."""
    fields = fields_in_order(type(options))
    inputs = [
        word for field in fields if spec_of(field).positional for word in _items(getattr(options, field.name))
    ]
    named = [
        word
        for field in fields
        if not spec_of(field).positional and getattr(options, field.name) != field.default
        for word in _words_of(field, getattr(options, field.name))
    ]
    dashed = any(word.startswith("-") for word in inputs)
    return shlex.join(
        ["mdl-toolkit", options.COMMAND, *([*named, "--", *inputs] if dashed else [*inputs, *named])]
    )


def _words_of(field: "dataclasses.Field[Any]", value: Any) -> list[str]:
    name, takes = spelling(field.name), spec_of(field).type.takes
    words: list[str] = []
    for shown in map(word_of, _items(value)):
        is_joined = shown.startswith("-") or (takes is not None and not takes(shown))
        words += [f"{name}={shown}"] if is_joined else [name, shown]
    return words


def _items(value: Any) -> tuple[Any, ...]:
    """What was given for an option, one by one."""
    return value if isinstance(value, tuple) else (value,)


def word_of(item: Any) -> str:
    """A value as a word of the command line, before quoting."""
    if item is None:
        return "null"
    if isinstance(item, bool):
        return str(item).lower()
    return str(item).removesuffix(".0") if isinstance(item, float) else str(item)
