"""One option of a command, and the base class of all options.

Values are checked here one by one; nothing here depends on files, models or the machine.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from mdl_toolkit.config.types import ValueType, refuse
from mdl_toolkit.errors import InputError, UsageError
from mdl_toolkit.i18n import Localized, join_messages


@dataclass(frozen=True)
class OptionSpec:
    """Describe an option; kept in the metadata of its field.

    Attributes:
        type: reads and checks its value.
        group: the heading under which `--help` shows it.
        help: one text for `--help`, settings files and the reference.
        nullable: the word `null` is accepted.
        dynamic: words shown for a default that depends on the machine.
        positional: the value stands on the command line without the option's name.
        null: what the word `null` means.
    """

    type: ValueType
    group: Localized
    help: Localized
    nullable: bool = False
    dynamic: Localized | None = None
    positional: bool = False
    null: tuple[()] | None = None

    def parse(self, value: Any) -> Any:
        """Bring a value to the option's type.

        Raises:
            ValueError: it is not accepted; the argument is a `Localized` that says which ones are.
        """
        if self.nullable and (value is None or value in ("null", ("null",), ["null"])):
            return self.null
        if value is None:
            raise refuse("expected a value")
        try:
            return self.type.parse(value)
        except ValueError as problem:
            if self.nullable:
                raise refuse("{accepted} (or null)", accepted=problem.args[0]) from None
            raise


REQUIRED: Any = dataclasses.MISSING


def option(
    value_type: ValueType, default: Any, group: Localized, help_text: str | Localized, /, **more: Any
) -> Any:
    """Declare a field of an options class.

    Args:
        value_type: reads and checks its value.
        default: `REQUIRED` if there is none; where it is None, `null` is accepted.
        group: the heading under which `--help` shows it.
        help_text: what it does.
        more: `dynamic`, `positional` and `nullable` of `OptionSpec`.
    """
    more.setdefault("nullable", default is None)
    more.setdefault("null", () if default == () else None)
    spec = OptionSpec(value_type, group, Localized.of(help_text, {}), **more)
    return dataclasses.field(default=default, metadata={"spec": spec})


def spec_of(field: "dataclasses.Field[Any]") -> OptionSpec:
    """Return the description of a field's option."""
    spec = field.metadata["spec"]
    assert isinstance(spec, OptionSpec)
    return spec


def spelling(name: str) -> str:
    """Spell a field's name as on the command line: `max_length` is `--max-length`."""
    return "--" + name.replace("_", "-")


def shown_name(field: "dataclasses.Field[Any]") -> str:
    """Name an option as help and messages do: `--max-length`, or `INPUT` if it is positional."""
    return field.name.upper() if spec_of(field).positional else spelling(field.name)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check the values of a command's options; the base class of all of them.

    Attributes:
        COMMAND: the command's name.
        SUMMARY: one sentence for `--help`.
        GROUPS: the headings of `--help`, in order.
        typed: names of the fields whose values stood on the command line, also where they are the defaults.
    """

    COMMAND: ClassVar[str] = ""
    SUMMARY: ClassVar[Localized]
    GROUPS: ClassVar[tuple[Localized, ...]] = ()
    typed: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Bring every value to its type.

        Raises:
            UsageError: naming every value that is not accepted, in one message.
        """
        for name, value in checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)

    def given(self, names: Collection[str]) -> list[str]:
        """Return those of some fields that were typed or are not at their defaults, as they are typed."""
        return [
            spelling(field.name)
            for field in dataclasses.fields(self)
            if field.name in names
            and (field.name in self.typed or getattr(self, field.name) != field.default)
        ]


AnyOptions = TypeVar("AnyOptions", bound=Options)


def checked(options: type[Options], values: Mapping[str, Any], file: str = "") -> dict[str, Any]:
    """Return values by field name, each brought to its option's type; options without a value are left out.

    Args:
        options: says which values are accepted.
        values: as they were given.
        file: that they come from, and the option that named it; empty for a command line.

    Raises:
        UsageError: naming every value that is not accepted, in one message.
        InputError: the same, of a file.
    """
    read: dict[str, Any] = {}
    refused: list[Localized] = []
    for field in dataclasses.fields(options):
        if field.name not in values:
            continue
        value = values[field.name]
        try:
            read[field.name] = spec_of(field).parse(value)
        except ValueError as problem:
            # The value of a repeated option is shown as the words that were typed.
            shown = ", ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
            line = Localized(
                "{option}: {accepted}, not {value}",
                option=shown_name(field),
                accepted=problem.args[0],
                value=shown,
            )
            refused.append(Localized("{source}: {reason}", source=file, reason=line) if file else line)
    if refused:
        raise (InputError if file else UsageError)(join_messages(refused, "{left}\n{right}"))
    return read


def fields_in_order(options: type[Options]) -> list["dataclasses.Field[Any]"]:
    """List the fields of a command group by group, its own before those it shares with others."""
    fields = sorted(dataclasses.fields(options), key=lambda field: field.name not in options.__annotations__)
    return [field for group in options.GROUPS for field in fields if spec_of(field).group == group]
