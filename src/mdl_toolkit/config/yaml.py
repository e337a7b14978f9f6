"""Options to and from YAML files and command lines; `read_settings` reads the files of `to_yaml`."""

import dataclasses
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.options import (
    AnyOptions,
    Options,
    checked,
    fields_in_order,
    shown_name,
    spec_of,
    spelling,
)
from mdl_toolkit.config.other_names import nearest
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import InputError, UsageError
from mdl_toolkit.i18n import Localized

SETTINGS_FILE = "mdl-toolkit.yaml"
# Options of commands whose records other commands take too: those of the same name and heading.
WRITERS: tuple[type[Options], ...] = (ConvertOptions, TrainOptions, InferenceOptions)


def from_mapping(cls: type[AnyOptions], values: Mapping[str, Any], typed: Collection[str] = ()) -> AnyOptions:
    """Make options of values by field name.

    Args:
        cls: the options.
        values: by field name.
        typed: names of those that stood on the command line.

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
    options = cls(**values)
    object.__setattr__(options, "typed", frozenset(typed))
    return options


def load_mapping(text: str, source: str) -> dict[str, Any]:
    """Load a YAML mapping by its keys with underscores.

    Args:
        text: the content of a file.
        source: names it in errors.

    Raises:
        InputError: it is no YAML mapping, or a key stands twice, of which YAML would take the last one in
            silence.
    """
    try:
        node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())
        raise InputError("{source}: {reason}", source=source, reason=reason) from problem
    if values is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise InputError("{source}: expected `name: value` lines", source=source)
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if lines.setdefault(name, line) != line:
            raise InputError(
                "{source}: {name} stands twice, in lines {first} and {line}; delete one",
                source=source,
                name=key.value,
                first=lines[name],
                line=line,
            )
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def select_shared(
    values: Mapping[str, Any],
    writer: type[Options],
    cls: type[Options],
    source: str,
    say: Callable[[Localized], object],
) -> dict[str, Any]:
    """Leave out of another command's record what means something else here, and say what is taken.

    Args:
        values: by field name.
        writer: the options of the command that wrote them.
        cls: the options that are to be made of them.
        source: names the record.
        say: takes the message.
    """
    theirs, ours = (
        {field.name: spec_of(field).group for field in dataclasses.fields(each)} for each in (writer, cls)
    )
    shared = {name for name, group in theirs.items() if ours.get(name) == group}
    say(
        Localized(
            "{source}: the record of {command}; taken from it: {names}",
            source=source,
            command=writer.COMMAND,
            names=", ".join(name for name in values if name in shared),
        )
    )
    return {name: value for name, value in values.items() if name in shared or name not in theirs}


def read_settings(
    path: str | Path,
    cls: type[Options],
    option: str = "--config",
    say: Callable[[Localized], object] | None = None,
) -> dict[str, Any]:
    """Read the values of a settings file; names may be spelled `max_length` or `max-length`.

    Args:
        path: the file.
        cls: the options that it is to hold.
        option: the option that named the file, for the errors.
        say: accepts the record of another command, says so, and leaves out what means something else there.

    Returns:
        The values by field name.

    Raises:
        InputError: the file cannot be read, is no YAML mapping, or holds unknown keys, a key twice, or values
            that are not accepted (all of them named).
    """
    source = f"{option} {path}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as problem:
        raise InputError("{source}: file not found", source=source) from problem
    except (OSError, ValueError) as problem:
        raise InputError("{source}: {reason}", source=source, reason=problem) from problem
    values = load_mapping(text, source)
    writer = next((each for each in WRITERS if text.startswith(f"# mdl-toolkit {each.COMMAND}\n")), cls)
    if writer is not cls and say is not None:
        values = select_shared(values, writer, cls, source, say)
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted({*values} - {*known}):
        spelled = [name.replace("_", "-") for name in known]
        meant = [nearest(name.replace("_", "-"), spelled) for name in unknown]
        shown = [
            f"{name} ({near.replace('-', '_')}?)" if near else name
            for name, near in zip(unknown, meant, strict=True)
        ]
        raise InputError(
            "{source}: {command} has no option {names}",
            source=source,
            command=cls.COMMAND,
            names=", ".join(shown),
        )
    return checked(cls, values, source)


def to_yaml(options: Options) -> str:
    """Write options as YAML with each option's help as a comment; `read_settings` reads it back."""
    lines = [f"# mdl-toolkit {options.COMMAND}"]
    for field in fields_in_order(type(options)):
        value = getattr(options, field.name)
        named = {field.name: list(value) if isinstance(value, tuple) else value}
        text = yaml.safe_dump(named, allow_unicode=True, width=10**6, default_flow_style=False)
        # PyYAML writes this line break as it is and reads it back as a blank.
        if "\x85" in text:
            text = yaml.safe_dump(named, width=10**6, default_flow_style=False)
        lines += ["", f"# {spec_of(field).help}", text.rstrip("\n")]
    return "\n".join(lines) + "\n"


def as_command(options: Options) -> str:
    """Return the command line that gives these options, as a user would type it in a POSIX shell."""
    positional: list[str] = []
    named: list[str] = []
    for field in fields_in_order(type(options)):
        spec, value = spec_of(field), getattr(options, field.name)
        words = [word_of(item) for item in (value if isinstance(value, tuple) else (value,))]
        if spec.positional:
            positional += words
        elif value != field.default:
            name, takes = spelling(field.name), spec.type.takes
            for word in words:
                is_joined = word.startswith("-") or (takes is not None and not takes(word))
                named += [f"{name}={word}"] if is_joined else [name, word]
    is_dashed = any(word.startswith("-") for word in positional)
    words = [*named, "--", *positional] if is_dashed else [*positional, *named]
    return shlex.join(["mdl-toolkit", options.COMMAND, *words])


def word_of(item: Any) -> str:
    """Return a value as a word of the command line, before quoting."""
    if item is None:
        return "null"
    if isinstance(item, bool):
        return str(item).lower()
    return str(item).removesuffix(".0") if isinstance(item, float) else str(item)
