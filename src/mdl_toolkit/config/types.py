"""Kinds of options: how a value is spelled, and which values are accepted.

A kind reads a word of the command line and a value of a YAML file alike; it knows no option by name.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdl_toolkit.i18n import Localized

TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})
METRIC_NAMES = ("accuracy", "exact-match", "macro-f1", "wer", "cer", "bleu", "chrf", "map")
TRAIN_TARGETS = ("encoder", "projector", "decoder", "embed_tokens", "lm_head")


@dataclass(frozen=True)
class ValueType:
    """How the value of an option is read, from a word of the command line or a value of a YAML file.

    Attributes:
        metavar: what `--help` shows in the value's place.
        parse: the value, or ValueError with `Localized` as its argument saying what is accepted.
        takes: only where the option may stand alone (bare is true, `--no-` is false): whether the word after
            it is its value.
        is_repeated: the option may be given several times.
    """

    metavar: str
    parse: Callable[[Any], Any]
    takes: Callable[[str], bool] | None = None
    is_repeated: bool = False


def refuse(template: str, /, **fields: Any) -> ValueError:
    """What `ValueType.parse` raises: the values that are accepted."""
    return ValueError(Localized(template, **fields))


def is_boolean_word(word: str) -> bool:
    """Whether a word says true or false (rule 1)."""
    return word.strip().lower() in TRUE_WORDS | FALSE_WORDS


def _boolean(value: Any) -> bool:
    word = str(value)
    if is_boolean_word(word):
        return word.strip().lower() in TRUE_WORDS
    raise refuse("expected true or false")


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise refuse("expected a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise refuse("expected a number") from None
    if not math.isfinite(number):
        raise refuse("expected a finite number")
    return number


def _integer(least: int, most: int = 2**53) -> ValueType:  # 2**53: up to there a float holds every integer
    def parse(value: Any) -> int:
        number = _number(value)
        if number != int(number) or number < least:
            raise refuse("expected a whole number of at least {least}", least=least)
        if number > most:
            raise refuse("expected a whole number of at most {most}", most=most)
        return int(number)

    return ValueType("N", parse)


def _real(accepts: Callable[[float], bool], message: Localized) -> ValueType:
    def parse(value: Any) -> float:
        number = _number(value)
        if not accepts(number):
            raise refuse("expected {message}", message=message)
        return number

    return ValueType("X", parse)


def _cadence(value: Any) -> int | float:
    """Every how many steps, or which fraction of an epoch (rule 27); 0 is never."""
    number = _number(value)
    if number >= 0 and number == int(number):
        return int(number)
    if 0 < number < 1:
        return number
    raise refuse("expected a whole number of steps, a fraction of an epoch between 0 and 1, or 0 for never")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise refuse("expected a text (in YAML, put it in quotes)")
    if "\0" in value:
        raise refuse("expected a text without NUL characters")
    return value


def _prompt(value: Any) -> str:
    text = _text(value)
    if any("\ud800" <= character <= "\udfff" for character in text):  # bytes that Python could not decode
        raise refuse("expected a text in UTF-8")
    return text


def _path(value: Any) -> str:
    text = _text(str(value) if isinstance(value, Path) else value)
    if not text:
        raise refuse("expected a path")
    return text


def _paths(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise refuse("expected a path")
    return tuple(map(_path, items))


def _true_or_path(value: Any) -> bool | str | None:
    """True, a path, or None: null and false both mean neither (rule 30)."""
    try:
        return _boolean(value) or None
    except ValueError:
        return _path(value)


def choice(*choices: str) -> ValueType:
    """One of some words, spelled exactly so."""

    def parse(value: Any) -> str:
        if value in choices:
            return str(value)
        listed = ", ".join(choices)
        raise refuse("expected one of {listed}", listed=listed)

    return ValueType("|".join(choices), parse)


def _words(value: Any) -> tuple[str, ...]:
    """A list, a JSON list or words separated by commas, without repetitions (rule 3)."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise refuse("expected words")
    words = [word for item in items for word in _split_list(item)]
    return tuple(dict.fromkeys(words))


def _split_list(item: Any) -> list[str]:
    if isinstance(item, str) and item.strip().startswith("["):
        return [word for part in _json_list(item) for word in _split_commas(part)]
    return _split_commas(item)


def _json_list(item: str) -> list[Any]:
    try:
        words = json.loads(item)
    except (json.JSONDecodeError, RecursionError):
        words = None
    if not isinstance(words, list):
        raise refuse('expected a JSON list of words such as ["a", "b"]')
    return words


def _split_commas(item: Any) -> list[str]:
    if not isinstance(item, str) or "[" in item:  # so that words read twice stay what they are
        raise refuse("expected words")
    return [word.strip() for word in _text(item).split(",") if word.strip()]


def some_of(*choices: str, least: int) -> ValueType:
    """Some of a few words, at least so many; the option may be given several times."""

    def parse(value: Any) -> tuple[str, ...]:
        words = _words(value)
        if len(words) < least or not set(words) <= set(choices):
            listed = ", ".join(choices)
            raise refuse("expected some of {listed}", listed=listed)
        return words

    return ValueType("|".join(choices), parse, is_repeated=True)


def _results(value: Any) -> tuple[str, ...]:
    """Paths of files to write, whose names end with what is to be in them."""
    paths = tuple(map(_path, [value] if isinstance(value, str | Path) else value))
    if not all(path.lower().endswith((".json", ".csv")) for path in paths):
        raise refuse("expected names that end with .json or .csv")
    return tuple(dict.fromkeys(paths))


BOOLEAN = ValueType("true|false", _boolean, takes=is_boolean_word)
TEXT = ValueType("TEXT", _prompt)
PATH = ValueType("PATH", _path)
NAME = ValueType("NAME|PATH", _path)
CADENCE = ValueType("N|FRACTION", _cadence)
PATHS = ValueType("PATH", _paths, is_repeated=True)
RESUME = ValueType("true|false|PATH", _true_or_path, takes=lambda word: not word.startswith("-"))
# A bare `--json` must not take the CSV after it for the file to write.
JSON = ValueType(
    "true|false|PATH", _true_or_path, takes=lambda word: is_boolean_word(word) or word.endswith(".json")
)
TARGETS = some_of(*TRAIN_TARGETS, least=1)
WORDS = ValueType("NAME", _words, is_repeated=True)
METRIC_LIST = some_of(*METRIC_NAMES, least=0)
RESULT_FILES = ValueType("PATH", _results, is_repeated=True)
COUNT = _integer(1)
WHOLE = _integer(0)
SEED = _integer(0, 2**32 - 1)  # what numpy.random.seed accepts
POSITIVE = _real(lambda x: x > 0, Localized("a number above 0"))
DROPOUT = _real(lambda x: 0 <= x < 1, Localized("a number from 0 to below 1"))
NOT_NEGATIVE = _real(lambda x: x >= 0, Localized("a number of at least 0"))
PROBABILITY = _real(lambda x: 0 < x <= 1, Localized("a number above 0 and up to 1"))
