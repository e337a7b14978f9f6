"""Validate what a JSON object holds by a table: for each of its keys the type and range of the value.

A table names the keys that are read, and says which of them must be there; other keys are let through.
"""

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mdl_toolkit.i18n import Localized, Verbatim

# Where nothing else bounds a whole number, it is one of 32 bits.
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """Say what a value must be.

    Attributes:
        wanted: in words.
        accepts: tells whether a value is so, whatever is inside it.
        inside: rules for the keys of an object.
        item: the rule for each item of a list, or each value of an object with any keys.
        name: the rule for these keys.
        is_required: whether the value must be there.
    """

    wanted: Localized
    accepts: Callable[[Any], bool]
    inside: "Schema" = field(default_factory=dict)
    item: "Rule | None" = None
    name: "Rule | None" = None
    is_required: bool = False

    def fault(self, key: str, value: Any) -> Localized | None:
        """Return the first fault in a value, named by the way to it that begins with a key."""
        if not self.accepts(value):
            return not_wanted(key, self.wanted, value)
        if isinstance(value, dict):
            for name, each in value.items() if self.item else ():
                if self.name and not self.name.accepts(name):
                    return not_wanted(key, self.name.wanted, name)
                if fault := self.item and self.item.fault(f"{key}.{name}", each):
                    return fault
            return find_fault(value, self.inside, f"{key}.")
        if self.item and isinstance(value, list):
            faults = (self.item.fault(f"{key}[{index}]", each) for index, each in enumerate(value))
            return next(filter(None, faults), None)
        return None


Schema = Mapping[str, Rule]


def find_fault(values: Mapping[str, Any], schema: Schema, prefix: str = "") -> Localized | None:
    """Return the first key of an object that is missing, or whose value is not what it must be.

    Args:
        values: of the object.
        schema: its rules.
        prefix: of the keys, where the object lies within another one.
    """
    for name, rule in schema.items():
        if name in values:
            if fault := rule.fault(f"{prefix}{name}", values[name]):
                return fault
        elif rule.is_required:
            return Localized("{key} is missing", key=f"{prefix}{name}")
    return None


def not_wanted(key: str, wanted: Localized, value: Any) -> Localized:
    """Say that a key has another value than it must have."""
    # As JSON spells it.
    shown = json.dumps(value) if isinstance(value, bool | None) else reprlib.repr(value)
    return Localized("{key}: expected {wanted}, not {value}", key=key, wanted=wanted, value=shown)


# --- rules -----------------------------------------------------------------------------------------------


def integer(least: int = 0, most: int = LARGEST) -> Rule:
    """Accept a whole number within bounds."""
    wanted = Localized("a whole number from {least} to {most}", least=least, most=most)
    return Rule(wanted, lambda value: type(value) is int and least <= value <= most)


def number(least: float = -math.inf, most: float = math.inf) -> Rule:
    """Accept a finite number within bounds."""
    wanted = Localized("a finite number")
    if math.isfinite(most):
        wanted = Localized("a number from {least:g} to {most:g}", least=least, most=most)
    elif math.isfinite(least):
        wanted = Localized("a finite number from {least:g} on", least=least)
    return Rule(
        wanted,
        lambda value: type(value) in (int, float) and least <= value <= most and abs(value) < math.inf,
    )


def one_of(*values: float | str | bool) -> Rule:
    """Accept one of some values; true is not 1."""
    text = " / ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
    wanted = Verbatim(text, text)
    return Rule(
        wanted,
        lambda value: any(
            each == value and isinstance(each, bool) == isinstance(value, bool) for each in values
        ),
    )


def optional(rule: Rule) -> Rule:
    """Accept null as well."""
    wanted = Localized("{wanted} or null", wanted=rule.wanted)
    return replace(rule, wanted=wanted, accepts=lambda value: value is None or rule.accepts(value))


def either(one: Rule, other: Rule) -> Rule:
    """Accept what one of two rules of different types does."""
    return Rule(
        Localized("{one} or {other}", one=one.wanted, other=other.wanted),
        lambda value: one.accepts(value) or other.accepts(value),
        {**one.inside, **other.inside},
        one.item or other.item,
    )


def list_of(item: Rule) -> Rule:
    """Accept a list of items that have a rule."""
    return Rule(Localized("a list"), lambda value: isinstance(value, list), item=item)


def object_of(inside: Schema) -> Rule:
    """Accept an object whose keys have rules of their own."""
    return Rule(Localized("an object"), lambda value: isinstance(value, dict), inside)


def mapping_of(item: Rule, name: Rule | None = None) -> Rule:
    """Accept an object with any keys, whose values have a rule, and whose keys may have one."""
    return Rule(Localized("an object"), lambda value: isinstance(value, dict), item=item, name=name)


def required(rule: Rule) -> Rule:
    """Accept the same, and insist that it is there."""
    return replace(rule, is_required=True)


def is_regex(value: Any) -> bool:
    """Tell whether a value is the text of a regular expression."""
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


TEXT = Rule(Localized("a text"), lambda value: isinstance(value, str))
BOOLEAN = Rule(Localized("true or false"), lambda value: isinstance(value, bool))
OBJECT = object_of({})
REGEX = Rule(Localized("a regular expression"), is_regex)
FILE_NAME = Rule(
    Localized("the name of a file in this folder"),
    lambda value: isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value,
)
# As a measurement may be: NaN and infinity too.
FIGURE = Rule(Localized("a number"), lambda value: type(value) in (int, float))
