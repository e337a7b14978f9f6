"""JSON Lines, or a JSON array, as cells by column: our names, chats as others train on, NeMo's manifests.

One object of each:

```
{"audio": "a.wav", "user_prompt": "Which language?", "prediction": "English"}
{"messages": [{"role": "user", "content": "<audio>Which language?"}, ...], "audios": ["a.wav"]}
{"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.0, "text": "hello"}
```
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mdl_toolkit.data.csv_format import ARRAY, CsvFormat, csv_error
from mdl_toolkit.errors import InputError, shorten
from mdl_toolkit.i18n import Localized

# Who speaks, in chats of OpenAI's form and of ShareGPT's, and our column for what is said.
ROLES = {
    "system": "system_prompt",
    "user": "user_prompt",
    "human": "user_prompt",
    "assistant": "prediction",
    "gpt": "prediction",
}
CHATS, RECORDINGS = ("messages", "conversations"), ("audios", "audio")
# NeMo's names, which lhotse writes too.
MANIFEST = {"audio_filepath": "audio", "text": "prediction"}
# What stands for the recording in a question.
AUDIO_MARK = re.compile(r"\s*<audio>\s*")
# Numbers stay as they are written.
DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)


def read_json_rows(path: Path, file: BinaryIO, form: CsvFormat) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the cells of each object by column, with its line, or its number in an array, counted from 1.

    Args:
        path: the file, for messages.
        file: the open file.
        form: how it is written; lines are a stream, an array is read as a whole.

    Raises:
        InputError: naming the first line that is no object, or a chat that is no question and answer.
    """
    text, number = form.text(file), 1
    try:
        for number, part in [(1, text.read())] if form.json == ARRAY else enumerate(text, 1):
            if not part.isspace():
                value = DECODER.decode(part.rstrip())
                objects = enumerate(value, 1) if form.json == ARRAY else [(number, value)]
                for number, values in objects:
                    yield number, cells_of(values)
    except (json.JSONDecodeError, RecursionError) as problem:
        number += getattr(problem, "lineno", 1) - 1
        reason = Localized(
            "line {number} is no valid JSON ({reason}); write one object on each line",
            number=number,
            reason=getattr(problem, "msg", problem),
        )
        raise csv_error(path, reason) from problem
    except InputError as problem:
        reason = Localized("line {number}: {reason}", number=number, reason=problem.message)
        raise csv_error(path, reason) from problem
    finally:
        text.detach()


def cells_of(values: Any) -> dict[str, str]:
    """Return the cells of an object by column.

    Raises:
        InputError: it is none, or a chat that is not one question about one recording.
    """
    if not isinstance(values, dict):
        raise InputError("expected an object, not {shown}", shown=shorten(_cell_text(values)))
    chat = next((values[name] for name in CHATS if isinstance(values.get(name), list)), None)
    names, cells = MANIFEST if "audio_filepath" in values else {}, {}
    if chat is not None:
        recordings: Any = next((values[name] for name in RECORDINGS if values.get(name)), [])
        names, cells = {"system": ROLES["system"]}, chat_cells(chat, recordings)
        values = {name: value for name, value in values.items() if name not in (*CHATS, *RECORDINGS)}
    # A name that is ours already stays what it is.
    return {
        name if names.get(name, name) in values else names[name]: _cell_text(value)
        for name, value in values.items()
    } | cells


def chat_cells(chat: Sequence[Any], recordings: Any) -> dict[str, str]:
    """Return the cells of a chat.

    Args:
        chat: its turns, each with `role` and `content`, or `from` and `value`.
        recordings: paths or addresses, or one of them.

    Raises:
        InputError: it is not one question about one recording, with at most one answer.
    """
    named = [*recordings] if isinstance(recordings, list) else [recordings]
    cells: dict[str, str] = {}
    for turn in chat:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        column = ROLES.get(str(role))
        if column is None or column in cells:
            raise InputError(
                "a chat is to be system (or none), user and assistant, once each, not {role!r}", role=role
            )
        content = turn.get("content", turn.get("value"))
        parts = content if isinstance(content, list) else [{"text": content}]
        for part in parts:
            if not isinstance(part, dict) or part.get("type", "text") not in ("text", "audio"):
                raise InputError(
                    "a turn is to hold text and audio, not {shown}", shown=shorten(_cell_text(part))
                )
        named += [part["audio"] for part in parts if part.get("audio")]
        text = "".join(_cell_text(part.get("text")) for part in parts)
        # Only what stands beside the mark is trimmed.
        cells[column] = " ".join(filter(None, AUDIO_MARK.split(text))) if column == ROLES["user"] else text
    if len(named) != 1 or not isinstance(named[0], str):
        raise InputError("a chat is to be about one recording, not {shown}", shown=shorten(_cell_text(named)))
    return {"audio": named[0], **cells}


def _cell_text(value: Any) -> str:
    """Return a value as a cell: a text as it is, null as nothing, other things as JSON has them."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
