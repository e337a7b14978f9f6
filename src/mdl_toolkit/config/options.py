"""One option: kind, default, help, group; and what all commands' options share.

Values are checked here, one by one; what depends on files, models or the machine is not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mdl_toolkit.config.types import Kind
from mdl_toolkit.errors import UsageError
from mdl_toolkit.i18n import Localized, join_messages


@dataclass(frozen=True)
class Setting:
    """What the table says of one option beside its default; kept in the field's metadata.

    Attributes:
        kind: how its value is read.
        group: the heading under which `--help` shows it.
        help: one text for `--help`, settings files and the reference.
        nullable: the word `null` is accepted and means None.
        dynamic: words shown for a default that depends on the machine.
        positional: the value stands on the command line without the option's name.
    """

    kind: Kind
    group: Localized
    help: Localized
    nullable: bool = False
    dynamic: Localized | None = None
    positional: bool = False


REQUIRED: Any = dataclasses.MISSING


def option(kind: Kind, default: Any, group: Localized, help: str | Localized, /, **more: Any) -> Any:
    """Declare one option; `more` goes to `Setting`."""
    setting = Setting(kind, group, Localized.of(help, {}), **more)
    return dataclasses.field(default=default, metadata={"setting": setting})


def setting_of(field: "dataclasses.Field[Any]") -> Setting:
    """What the table says of a field."""
    setting = field.metadata["setting"]
    assert isinstance(setting, Setting)
    return setting


def spelling(name: str) -> str:
    """The option's spelling on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command's options share: checking, and the way to and from YAML and words."""

    COMMAND: ClassVar[str] = ""
    SUMMARY: ClassVar[Localized]
    GROUPS: ClassVar[tuple[Localized, ...]] = ()

    def __post_init__(self) -> None:
        """Bring every value to its type.

        Raises:
            UsageError: naming every value that is not accepted, in one message.
        """
        for name, value in checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)


def shown_name(field: "dataclasses.Field[Any]") -> str:
    """The option as messages name it: its spelling, or INPUT."""
    return field.name.upper() if setting_of(field).positional else spelling(field.name)


class ValuesError(UsageError):
    """Values of options that are not accepted.

    Attributes:
        lines: a line for each.
    """

    def __init__(self, lines: Sequence[Localized]) -> None:
        self.lines = lines
        super().__init__(join_messages(lines, "{left}\n{right}"))


def checked(options: type[Options], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field name, each brought to its option's type; options without a value are left out.

    Raises:
        ValuesError: naming every value that is not accepted, in one message.
    """
    fields = [field for field in dataclasses.fields(options) if field.name in values]
    read = {field.name: _read(field, values[field.name]) for field in fields}
    refused = [field for field in fields if isinstance(read[field.name], Localized)]
    if refused:
        lines = [
            Localized(
                "{option}: {accepted}, not {value}",
                option=shown_name(field),
                accepted=read[field.name],
                value=_quoted(values[field.name]),
            )
            for field in refused
        ]
        raise ValuesError(lines)
    return read


def _quoted(value: Any) -> str:
    """A value as messages show it; that of a repeated option as the words that were typed."""
    return ", ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)


def _read(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value, or the `Localized` that says what is accepted."""
    setting = setting_of(field)
    if setting.nullable and (value is None or value == "null"):
        return None
    if value is None:
        return Localized("expected a value")
    try:
        return setting.kind.parse(value)
    except ValueError as refused:
        accepted: Localized = refused.args[0]
    return Localized("{accepted} (or null)", accepted=accepted) if setting.nullable else accepted


def fields_in_order(options: type[Options]) -> list["dataclasses.Field[Any]"]:
    """The fields of a command, group by group in the order of the reference: its own before the shared."""
    fields = sorted(dataclasses.fields(options), key=lambda field: field.name not in options.__annotations__)
    return [f for group in options.GROUPS for f in fields if setting_of(f).group == group]
