"""JSON Lines, or a JSON array, as cells by column: our names, chats, NeMo's manifests, lhotse's cuts.

One object of each:

```
{"audio": "a.wav", "user_prompt": "Which language?", "prediction": "English"}
{"messages": [{"role": "user", "content": "<audio>Which language?"}, ...], "audios": ["a.wav"]}
{"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.0, "text": "hello"}
{"type": "MonoCut", "start": 1.5, "duration": 2.0, "channel": 0, "recording": {"sources": [...], ...},
    "supervisions": [{"text": "hello", "speaker": "ann", ...}]}
```
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mdl_toolkit.data.csv_format import ARRAY, CsvFormat, csv_error
from mdl_toolkit.errors import InputError, shorten
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.schema import (
    OBJECT,
    TEXT,
    Schema,
    either,
    find_fault,
    list_of,
    object_of,
    optional,
    required,
)

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
# lhotse's cuts, those that are a part of one recording first; numbers are texts here.
CUTS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")
SOURCE: Schema = {
    **dict.fromkeys(("type", "source"), required(TEXT)),
    "channels": required(list_of(TEXT)),
}
CUT: Schema = {
    "recording": required(object_of({"sources": required(list_of(object_of(SOURCE)))})),
    **dict.fromkeys(("start", "duration"), required(TEXT)),
    "channel": required(either(TEXT, list_of(TEXT))),
    "supervisions": optional(list_of(object_of({"custom": optional(OBJECT)}))),
    "custom": optional(OBJECT),
}
SUPERVISION = {"speaker": "speaker", "language": "language", "prediction": "text"}
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
        for number, part in [(1, text.read())] if form.records == ARRAY else enumerate(text, 1):
            if not part.isspace():
                value = DECODER.decode(part.rstrip())
                objects = enumerate(value, 1) if form.records == ARRAY else [(number, value)]
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
        InputError: it is none, or a chat or cut that is not one question about one recording.
    """
    if not isinstance(values, dict):
        raise InputError("expected an object, not {shown}", shown=shorten(_cell_text(values)))
    if values.get("type") in CUTS:
        return {name: _cell_text(value) for name, value in cut_cells(values).items()}
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


def cut_cells(cut: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a cut of lhotse's by column, texts and numbers of `custom` among them.

    Raises:
        InputError: it is not a part of one recording as it is in a file, or has several supervisions.
    """
    source, channel = source_of(cut)
    supervisions = cut.get("supervisions") or []
    if len(supervisions) > 1:
        raise InputError(
            "a cut is to have one supervision, not {count}; make such with lhotse's trim_to_supervisions",
            count=len(supervisions),
        )
    said = supervisions[0] if supervisions else {}
    custom = {**(said.get("custom") or {}), **(cut.get("custom") or {})}
    # All of a recording is no segment of it, whose length may be rounded.
    is_whole = cut["start"] in ("0", "0.0") and cut["duration"] == cut["recording"].get("duration")
    return {
        **{name: value for name, value in custom.items() if isinstance(value, str)},
        "id": cut.get("id"),
        "audio": source["source"],
        "start": "" if is_whole else cut["start"],
        "duration": "" if is_whole else cut["duration"],
        "channel": channel,
        **{name: said[key] for name, key in SUPERVISION.items() if key in said},
    }


def source_of(cut: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the file or address that a cut of lhotse's is a part of, and its channel; empty: all of them.

    Raises:
        InputError: there is none, or it is to be changed while it is read.
    """
    recording, kind = cut.get("recording"), cut["type"]
    if recording and kind in CUTS[:2]:
        if fault := find_fault(cut, CUT):
            raise InputError(fault)
        wanted = cut["channel"] if isinstance(cut["channel"], list) else [cut["channel"]]
        sources = [each for each in recording["sources"] if {*wanted} <= {*each["channels"]}]
        kind = sources[0]["type"] if sources else f"channel {', '.join(wanted)}"
        if recording.get("transforms"):
            kind = "transforms"
        elif kind in ("file", "url"):
            channels = sources[0]["channels"]
            if len(wanted) == len(channels):
                return sources[0], ""
            if len(wanted) == 1:
                return sources[0], str(channels.index(*wanted) + 1)
    raise InputError(
        "a cut is to be a part of one recording as it is in a file, not {kind!r}; write its sound to a file "
        "with lhotse's save_audios",
        kind=kind,
    )


def _cell_text(value: Any) -> str:
    """Return a value as a cell: a text as it is, null as nothing, other things as JSON has them."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
