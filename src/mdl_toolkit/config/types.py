"""Types of options: how a value is spelled, and which values are accepted.

A type reads a word of the command line and a value of a YAML file alike; it knows no option by name.
"""

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdl_toolkit.i18n import Localized

TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})
METRIC_NAMES = ("accuracy", "exact-match", "macro-f1", "wer", "cer", "bleu", "chrf", "map")
# What computes answers; any other is the address of a server.
ENGINES = OURS, VLLM = "torch", "vllm"
# The end of each epoch, as a cadence.
EPOCH = "epoch"
# As transformers calls them.
LR_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
LORA_VARIANTS = ("lora", "rslora", "dora", "pissa")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
# A path with a weight.
WEIGHTED = re.compile(r"(.+)=((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?)")
TRAIN_TARGETS = ("encoder", "projector", "decoder", "embed_tokens", "lm_head")


@dataclass(frozen=True)
class ValueType:
    """Read the value of an option, from a word of the command line or a value of a YAML file.

    Attributes:
        metavar: stands for the value in `--help`.
        parse: returns the value, or raises ValueError with a `Localized` that says what is accepted.
        takes: only where the option may stand alone (bare is true, `--no-` is false): tells whether the word
            after it is its value.
        is_repeated: the option may be given several times.
    """

    metavar: str
    parse: Callable[[Any], Any]
    takes: Callable[[str], bool] | None = None
    is_repeated: bool = False


def refuse(template: str, /, **fields: Any) -> ValueError:
    """Return the error for a value that is not accepted; its message says which ones are."""
    return ValueError(Localized(template, **fields))


def is_boolean_word(word: str) -> bool:
    """Tell whether a word says true or false."""
    return word.strip().lower() in TRUE_WORDS | FALSE_WORDS


def _parse_boolean(value: Any) -> bool:
    word = str(value)
    if is_boolean_word(word):
        return word.strip().lower() in TRUE_WORDS
    raise refuse("expected true or false")


def _parse_number(value: Any) -> float:
    if isinstance(value, bool):
        raise refuse("expected a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise refuse("expected a number") from None
    if not math.isfinite(number):
        raise refuse("expected a finite number")
    return number


# Up to 2**53 a float holds every integer.
def _integer(least: int, most: int = 2**53) -> ValueType:
    def parse(value: Any) -> int:
        number = _parse_number(value)
        if number != int(number) or number < least:
            raise refuse("expected a whole number of at least {least}", least=least)
        if number > most:
            raise refuse("expected a whole number of at most {most}", most=most)
        return int(number)

    return ValueType("N", parse)


def _real(accepts: Callable[[float], bool], message: Localized) -> ValueType:
    def parse(value: Any) -> float:
        number = _parse_number(value)
        if not accepts(number):
            raise refuse("expected {message}", message=message)
        return number

    return ValueType("X", parse)


def _parse_cadence(value: Any) -> int | float | str:
    """Read a number of steps, a fraction of an epoch, or the word `epoch`; 0 is never."""
    if value == EPOCH:
        return EPOCH
    with suppress(ValueError):
        number = _parse_number(value)
        if number >= 0 and number == int(number):
            # 1.0 stays what was typed, so that `train` can say that it is a step, and no epoch.
            return number if number == 1 and "." in str(value) else int(number)
        if 0 < number < 1:
            return number
    raise refuse(
        "expected a whole number of steps, a fraction of an epoch between 0 and 1, epoch, or 0 for never"
    )


def _parse_portion(value: Any) -> float:
    """Read a share of the rows: `10%` or 0.1; 0 is none."""
    is_percent = isinstance(value, str) and value.strip().endswith("%")
    with suppress(ValueError):
        share = _parse_number(value.strip()[:-1]) / 100 if is_percent else _parse_number(value)
        if 0 <= share < 1:
            return share
    raise refuse("expected a share such as 10% or 0.1")


def _parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise refuse("expected a text (in YAML, put it in quotes)")
    if "\0" in value:
        raise refuse("expected a text without NUL characters")
    return value


def _parse_prompt(value: Any) -> str:
    text = _parse_text(value)
    # Surrogates stand for bytes that Python could not decode.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise refuse("expected a text in UTF-8")
    return text


def _parse_secret(value: Any) -> str:
    """Read what is sent in a header, which holds no spaces at its ends and no letters of other scripts."""
    text = _parse_text(value)
    if not re.fullmatch("[!-~]+", text):
        raise refuse("expected ASCII letters, digits and signs without spaces, at least one")
    return text


def _parse_path(value: Any) -> str:
    text = _parse_text(str(value) if isinstance(value, Path) else value)
    if not text:
        raise refuse("expected a path")
    return text


def _parse_output(value: Any) -> str:
    """Read a path to write to; `-`, which elsewhere is standard output, would be a file of that name."""
    path = _parse_path(value)
    if path == "-":
        raise refuse("expected the name of a file or folder (- is not standard output here)")
    return path


def _parse_paths(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise refuse("expected a path")
    return tuple(map(_parse_path, items))


def weighted_paths(given: str | tuple[str, ...] | None) -> dict[str, float | None]:
    """Return the paths that an option names, each with its weight if it has one.

    Args:
        given: a path, or several, or none; what is there by its whole name has no weight.

    Raises:
        ValueError: some have weights and others none, a weight is not above 0, or a path stands twice.
    """
    paths: dict[str, float | None] = {}
    words = [given] if isinstance(given, str) else given or ()
    for word in words:
        match = WEIGHTED.fullmatch(word)
        path, weight = (match[1], float(match[2])) if match and not Path(word).exists() else (word, None)
        if path in paths:
            raise refuse("expected each path once, with a weight if it is to count for more")
        if weight is not None and not 0 < weight < math.inf:
            raise refuse("expected finite weights above 0")
        paths[path] = weight
    if None in paths.values() and len({*paths.values()}) > 1:
        raise refuse("expected a weight for each path, or for none")
    return paths


def _parse_weighted_datasets(value: Any) -> str | tuple[str, ...]:
    """Read a path, or several, each with a weight or none; one alone is no list."""
    paths = _parse_paths(value)
    weighted_paths(paths)
    return paths if len(paths) > 1 else paths[0]


def _parse_datasets(value: Any) -> str | tuple[str, ...]:
    """Read a path, or several; one alone is no list."""
    datasets = _parse_weighted_datasets(value)
    if any(weighted_paths(datasets).values()):
        raise refuse("expected paths without weights")
    return datasets


def _parse_result_files(value: Any) -> tuple[str, ...]:
    """Read paths of files to write, whose suffixes say in which format."""
    paths = _parse_paths(value) if value else ()
    if not all(path.lower().endswith((".json", ".csv")) for path in paths):
        raise refuse("expected names that end with .json or .csv")
    return tuple(dict.fromkeys(paths))


def _true_or(parse: Callable[[Any], str]) -> Callable[[Any], bool | str | None]:
    """Return what reads true, a path as `parse` does, or None: null and false both mean neither."""

    def parse_either(value: Any) -> bool | str | None:
        try:
            return _parse_boolean(value) or None
        except ValueError:
            return parse(value)

    return parse_either


def _parse_words(value: Any) -> tuple[str, ...]:
    """Read a list, JSON lists or words separated by commas; drop repetitions."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise refuse("expected words")
    words: list[str] = []
    parts: Any
    for item in items:
        parts = [item]
        if isinstance(item, str) and item.strip().startswith("["):
            parts = None
            with suppress(json.JSONDecodeError, RecursionError):
                parts = json.loads(item)
            if not isinstance(parts, list):
                raise refuse('expected a JSON list of words such as ["a", "b"]')
        for part in parts:
            # Brackets are refused, so that words that are read twice stay the same.
            if not isinstance(part, str) or "[" in part:
                raise refuse("expected words")
            words += [word.strip() for word in _parse_text(part).split(",") if word.strip()]
    return tuple(dict.fromkeys(words))


def _parse_engine(value: Any) -> str:
    """Read torch, vllm, or a server's address; a password in it would be written down with the options."""
    if value in ENGINES or re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", str(value)):
        return str(value)
    listed = ", ".join(ENGINES)
    raise refuse(
        "expected one of {listed}, or a server's address such as http://127.0.0.1:8000", listed=listed
    )


def _parse_adapters(value: Any) -> tuple[str, ...]:
    """Read NAME=FOLDER once or several times; no name may stand twice."""
    items = _parse_paths(value) if value else ()
    names = [item.partition("=")[0] for item in items]
    if not all(name and item.partition("=")[2] for name, item in zip(names, items, strict=True)):
        raise refuse("expected NAME=FOLDER")
    if len({*names}) < len(names):
        raise refuse("expected a name of its own for each folder")
    return items


def _parse_learning_rates(value: Any) -> float | tuple[str, ...]:
    """Read one number, or words `TARGET=NUMBER`; a number among these is for the other targets."""
    items = [f"{name}={rate}" for name, rate in value.items()] if isinstance(value, dict) else value
    items = items if isinstance(items, list | tuple) else [items]
    words = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    rates: dict[str, float] = {}
    for word in words:
        target, equals, number = str(word).partition("=")
        name = target.strip() if equals else ""
        if name not in ("", *TRAIN_TARGETS) or (equals and not name):
            listed = ", ".join(TRAIN_TARGETS)
            raise refuse("expected a number, or TARGET=NUMBER with one of {listed}", listed=listed)
        if name and name in rates:
            raise refuse("expected each target once")
        rates[name] = POSITIVE.parse(number if equals else word)
    if {*rates} == {""}:
        return rates[""]
    if not rates:
        raise refuse("expected a number")
    ordered = [name for name in ("", *TRAIN_TARGETS) if name in rates]
    return tuple(f"{name}={rates[name]!r}" if name else repr(rates[name]) for name in ordered)


def choice(*choices: str) -> ValueType:
    """Return the type of a value that is one of a few words."""

    def parse(value: Any) -> str:
        if value in choices:
            return str(value)
        listed = ", ".join(choices)
        raise refuse("expected one of {listed}", listed=listed)

    return ValueType("|".join(choices), parse)


def some_of(*choices: str, least: int) -> ValueType:
    """Return the type of a value that is at least so many of a few words; the option may be repeated."""

    def parse(value: Any) -> tuple[str, ...]:
        words = _parse_words(value)
        if len(words) < least or not set(words) <= set(choices):
            listed = ", ".join(choices)
            raise refuse("expected some of {listed}", listed=listed)
        return words

    return ValueType("|".join(choices), parse, is_repeated=True)


BOOLEAN = ValueType("true|false", _parse_boolean, takes=is_boolean_word)
TEXT = ValueType("TEXT", _parse_prompt)
SECRET = ValueType("TEXT", _parse_secret)
PATH = ValueType("PATH", _parse_path)
OUTPUT = ValueType("PATH", _parse_output)
NAME = ValueType("NAME|PATH", _parse_path)
CADENCE = ValueType("N|FRACTION|epoch", _parse_cadence)
ADAPTERS = ValueType("NAME=FOLDER", _parse_adapters, is_repeated=True)
PATHS = ValueType("PATH", _parse_paths, is_repeated=True)
DATASETS = ValueType("PATH", _parse_datasets, is_repeated=True)
WEIGHTED_DATASETS = ValueType("PATH", _parse_weighted_datasets, is_repeated=True)
RESUME = ValueType("true|false|PATH", _true_or(_parse_path), takes=lambda word: not word.startswith("-"))
LEARNING_RATES = ValueType("X|TARGET=X", _parse_learning_rates, is_repeated=True)
# A bare `--json` must not take the CSV after it for the file to write.
JSON = ValueType(
    "true|false|PATH",
    _true_or(_parse_output),
    takes=lambda word: is_boolean_word(word) or word == "-" or word.endswith(".json"),
)
ENGINE = ValueType("|".join([*ENGINES, "ADDRESS"]), _parse_engine)
TARGETS = some_of(*TRAIN_TARGETS, least=1)
WORDS = ValueType("NAME", _parse_words, is_repeated=True)
METRIC_LIST = some_of(*METRIC_NAMES, least=0)
RESULT_FILES = ValueType("PATH", _parse_result_files, is_repeated=True)
COUNT = _integer(1)
WHOLE = _integer(0)
PORT = _integer(0, 65_535)
# numpy.random.seed accepts no more.
SEED = _integer(0, 2**32 - 1)
POSITIVE = _real(lambda x: x > 0, Localized("a number above 0"))
PORTION = ValueType("PERCENT", _parse_portion)
SHARE = _real(lambda x: 0 <= x < 1, Localized("a number from 0 to below 1"))
NOT_NEGATIVE = _real(lambda x: x >= 0, Localized("a number of at least 0"))
PROBABILITY = _real(lambda x: 0 < x <= 1, Localized("a number above 0 and up to 1"))
