"""Messages in the reader's language: English templates in the code, Chinese from a gettext catalogue.

A message is a template with named fields, and rendered only when it is shown. The catalogue is opened when
the first Chinese text is asked for; `locale/README.md` says how to translate.
"""

import os
import re
from collections.abc import Iterable, Mapping
from functools import cache, reduce
from gettext import NullTranslations, translation
from numbers import Number
from pathlib import Path
from string import Formatter
from typing import Any

DOMAIN = "mdl_toolkit"
LOCALE = Path(__file__).parent / "locale"
# Letters of a value that are shown, such as a path or what a server said.
LONGEST_FIELD = 4000
# Control characters but for tabs and line feeds, and surrogates, which stand for bytes that are no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def is_chinese() -> bool:
    """Tell whether messages should be in Chinese.

    The order is gettext's: LANGUAGE, LC_ALL, LC_MESSAGES, LANG; the first one that is set decides.
    """
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(name, "")
        if value:
            return value.lower().startswith("zh")
    return False


@cache
def chinese() -> NullTranslations:
    """Return the Chinese catalogue, read once."""
    return translation(DOMAIN, LOCALE, ["zh"])


def _kept(value: Any) -> Any:
    """Return a value as a message keeps it; of an exception what it says, in one line."""
    if isinstance(value, BaseException):
        return " ".join(str(getattr(value, "strerror", None) or value).split()) or type(value).__name__
    return value if isinstance(value, str | Number | Localized | None) else str(value)


def cut(value: Any) -> Any:
    """Cut a very long text, and say how long it is."""
    if not isinstance(value, str) or len(value) <= LONGEST_FIELD:
        return value
    return f"{value[:LONGEST_FIELD]}... ({len(value):,})"


def _escape(message: str) -> str:
    """Return a message as a terminal may show it, with what it would obey escaped."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), message)


class PluralFormatter(Formatter):
    """Format fields as `str.format` does; of `{count:row|rows}`, the first for 1, else the second."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Return a field's text."""
        one, has_two, several = format_spec.partition("|")
        if has_two:
            return one if value in (1, "1") else several
        return super().format_field(value, format_spec)


class Localized:
    """Hold a message: a template and the values of its fields; `str()` renders it in the reader's language.

    Two messages are equal if their English is. A value other than a text, number, message or None is kept as
    its text, so that any message can be hashed and pickled; of an exception it is what went wrong, without
    number and file name, or its type if it says nothing. What a text holds that a terminal would obey is
    escaped, and a very long one is cut.

    Args:
        template: English, with fields as `str.format` has them, or `{count:row|rows}` for a word by number;
            braces that are meant literally are doubled.
        fields: their values; a message among them is rendered in the language of the whole.

    Example:
        >>> Localized("{path}: {count:,} rows", path="train.csv", count=1234).en
        'train.csv: 1,234 rows'
    """

    __slots__ = ("fields", "template")

    def __init__(self, template: str, /, **fields: Any) -> None:
        self.template = template
        self.fields = {name: _kept(value) for name, value in fields.items()}

    @classmethod
    def of(cls, template: "str | Localized", fields: Mapping[str, Any]) -> "Localized":
        """Return a message as it is, or make one of a template and its fields."""
        return template if isinstance(template, Localized) else Localized(template, **fields)

    @property
    def en(self) -> str:
        """The English text."""
        fields = {name: getattr(value, "en", cut(value)) for name, value in self.fields.items()}
        return _escape(PluralFormatter().vformat(self.template, (), fields))

    @property
    def zh(self) -> str:
        """The Chinese text."""
        fields = {name: getattr(value, "zh", cut(value)) for name, value in self.fields.items()}
        return _escape(PluralFormatter().vformat(chinese().gettext(self.template), (), fields))

    def __str__(self) -> str:
        return self.zh if is_chinese() else self.en

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.en!r}>"

    def __eq__(self, other: object) -> bool:
        return self.en == other.en if isinstance(other, Localized) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.en)

    def to_json(self) -> dict[str, str]:
        """Return both texts, which are understood without this version's templates."""
        return {"en": self.en, "zh": self.zh}


class Verbatim(Localized):
    """Hold a message of which both texts were written down, as `Localized.to_json` does."""

    __slots__ = ()

    def __init__(self, en: str, zh: str) -> None:
        super().__init__("", en=en, zh=zh)

    @property
    def en(self) -> str:
        """The English text."""
        return str(self.fields["en"])

    @property
    def zh(self) -> str:
        """The Chinese text."""
        return str(self.fields["zh"])


def join_messages(messages: Iterable[Localized], template: str) -> Localized:
    """Join several messages into one.

    Args:
        messages: at least one.
        template: how two are put together, such as `"{left}; {right}"`.
    """
    return reduce(lambda left, right: Localized(template, left=left, right=right), messages)
