"""Column names: which are understood, which are forgiven, and what one that is neither was meant to be."""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from mdl_toolkit.data.csv_format import BAD_BYTE, csv_error, fold_name
from mdl_toolkit.data.csv_reader import NOT_UTF8, NUL_BYTE
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.utils.console import say, warn

AUDIO, SYSTEM, USER, PREDICTION = "audio", "system_prompt", "user_prompt", "prediction"
# What others call our columns, the most likely meaning first; one that is there already is not meant.
SYNONYMS = {
    AUDIO: "audio_path audio_file audio_filepath file file_name file_path filename filepath path wav "
    "wav_path recording sound clip url",
    SYSTEM: "system sys_prompt system_message system_instruction",
    PREDICTION: "answer answers label labels target targets class category caption transcript transcription "
    "sentence output response completion reference text",
    USER: "prompt user question query instruction input text",
}
MEANINGS = {
    word: [name for name, words in SYNONYMS.items() if word in words.split()]
    for words in SYNONYMS.values()
    for word in words.split()
}
# Columns that this toolkit writes itself.
WRITTEN = re.compile(r"error|(score|prediction)(_\d+)?")
# Likeness from which a name is taken for a slip of the pen.
LIKENESS = 0.8
# Names that a message lists.
MOST_NAMED = 20


def understand(
    path: Path,
    columns: Sequence[str],
    known: Sequence[str],
    needed: Sequence[str],
    also: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return the names of the columns as they are understood, and say which are forgiven or not read.

    Args:
        path: the CSV.
        columns: names as written.
        known: names that are read; in another case, or with white space, they are forgiven.
        needed: those of them that must be there.
        also: names of others that are read, as they may be written.

    Raises:
        InputError: see `check_columns`.
    """
    names, notes = forgive(path, columns, known)
    check_columns(path, names, needed)
    for note in notes:
        say(note)
    read = {*known, *(find_column(name, names) for name in also)}
    others = [name for name in names if name not in read and not WRITTEN.fullmatch(name)]
    meanings = {name: suggest(name, [each for each in known if each not in names]) for name in others}
    # Those that may be meant come first.
    shown = [
        Localized("{column!r} (did you mean {name}?)", column=column, name=meanings[column])
        if meanings[column]
        else Localized("{column!r}", column=column)
        for column in sorted(others, key=lambda column: meanings[column] is None)
    ]
    if len(shown) > MOST_NAMED:
        shown[MOST_NAMED:] = [Localized("{count} more", count=len(shown) - MOST_NAMED)]
    if shown:
        listed = join_messages(shown, "{left}, {right}")
        message = Localized("{path}: columns that are not read: {columns}", path=path, columns=listed)
        (warn if any(meanings.values()) else say)(message)
    return names


def forgive(
    path: Path, columns: Sequence[str], known: Collection[str]
) -> tuple[tuple[str, ...], list[Localized]]:
    """Return the names of the columns, those known in another case or spacing as known, and which these are.

    Args:
        path: the CSV.
        columns: names as written.
        known: names that are read.
    """
    folded = [*map(fold_name, columns)]
    names = tuple(
        name if name in known and name not in columns else column
        for column, name in zip(columns, folded, strict=True)
    )
    notes = [
        Localized("{path}: the column {column!r} is read as {name}", path=path, column=column, name=name)
        for column, name in zip(columns, names, strict=True)
        if column != name
    ]
    return names, notes


def find_column(name: str, columns: Sequence[str]) -> str:
    """Return the column of that name, in another case or spacing if only one is; else the name itself."""
    alike = [column for column in columns if fold_name(column) == fold_name(name)]
    return alike[0] if name not in columns and len(alike) == 1 else name


def suggest(column: str, missing: Sequence[str]) -> str | None:
    """Return which of the missing columns another one was meant to be."""
    name = fold_name(column)
    alike = difflib.get_close_matches(name, missing, 1, LIKENESS)
    return next((each for each in MEANINGS.get(name, alike) if each in missing), None)


def check_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse column names that cannot be used.

    Raises:
        InputError: a needed column is missing, or any column is there twice.
    """
    complaints = [_missing_column(name, columns) for name in needed if name not in columns]
    complaints += [
        Localized("there are {count} columns {name!r}; rename or remove one", count=count, name=name)
        for name, count in Counter(columns).items()
        if count > 1
    ]
    if any("\0" in name for name in columns):
        complaints.append(Localized("line 1: {reason}", reason=NUL_BYTE))
    if any(map(BAD_BYTE.search, columns)):
        complaints.append(Localized("line 1: {reason}", reason=NOT_UTF8))
    if complaints:
        raise csv_error(path, join_messages(complaints, "{left}; {right}"))


def _missing_column(name: str, columns: Sequence[str]) -> Localized:
    listed = ", ".join(map(repr, columns[:MOST_NAMED])) + ", ..." * (len(columns) > MOST_NAMED)
    meant = next((column for column in columns if suggest(column, [name])), None)
    if meant is not None:
        hint = Localized("rename {column!r}", column=meant)
    elif len(columns) == 1 and re.search("[;\t|]", columns[0]):
        hint = Localized("separate cells by commas")
    else:
        hint = Localized("add it")
    return Localized(
        "the column {name!r} is missing, the columns are {listed}; {hint}",
        name=name,
        listed=listed,
        hint=hint,
    )
