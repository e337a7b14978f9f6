"""What mdl-toolkit 0.1.0 did to a CSV, written again with transformers and `datasets` and nothing of ours."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import soundfile
from datasets import List, Value
from transformers import AutoTokenizer

import mdl_toolkit.model.registration  # noqa: F401 - so that AutoTokenizer knows the model
from runs import make_rows
from waves import wave

MODEL = Path(__file__).parent / "golden/checkpoints/A-small"
HEADER = "<|im_start|>assistant\n"
PROMPTS = (("", "What is it?"), ("Be brief.", ""), ("只说中文。", "这是什么声音？"), ("", "two\nlines <b>"))
Row = dict[str, Any]


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def ids_of(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def places(ids: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(ids)) if ids[i : i + len(part)] == part]


def recordings(folder: Path, count: int = 10) -> list[dict[str, str]]:
    """Rows of a CSV: 16-bit files at 16 kHz, which both versions take as they are; two of under 0.2 s."""
    rows = make_rows(folder / "audio", count)
    for number, samples in ((2, 3_100), (5, 2_000)):  # one audio token, and none
        soundfile.write(rows[number]["audio"], wave(samples, number), 16_000, subtype="PCM_16")
    for number, row in enumerate(rows):
        row["system_prompt"], row["user_prompt"] = PROMPTS[number % len(PROMPTS)]
    return rows


def conversation(row: dict[str, str], audio_tokens: int) -> str:
    content = [{"type": "audio", "audio": ""}]
    if row["user_prompt"]:
        content.append({"type": "text", "text": row["user_prompt"]})
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": row["prediction"]}]
    if row["system_prompt"]:
        turns.insert(0, {"role": "system", "content": row["system_prompt"]})
    text = tokenizer().apply_chat_template(turns, tokenize=False)
    return text.replace("<|AUDIO|>", "<|AUDIO|>" * audio_tokens)


def old_row(row: dict[str, str], *, trained: str) -> Row:
    """One row before it is padded; `trained` says what of the last turn its labels supervise."""
    samples = soundfile.read(row["audio"], dtype="float32")[0]
    ids = ids_of(conversation(row, (1 + len(samples) // 160) // 20))
    header, end = ids_of(HEADER), ids_of("<|im_end|>")
    start = places(ids, header)[0]  # searched for, as it was
    begin = start + {"all": 0, "to the end token": 0, "after the role": 2, "no header": len(header)}[trained]
    stop = len(ids) if trained == "all" else start + ids[start:].index(*end) + 1
    labels = [token if begin <= i < stop else -100 for i, token in enumerate(ids)]
    return {
        "input_ids": ids, "attention_mask": [1] * len(ids), "input_values": samples.tolist(),
        "audio_length": len(samples), "labels": labels,
    }  # fmt: skip


def pad(batch: list[Row]) -> list[Row]:
    """The rows of a tokenizing batch: ids on the left, audio on the right."""
    longest = max(len(row["input_ids"]) for row in batch)
    samples = max(len(row["input_values"]) for row in batch)
    filler = {"input_ids": tokenizer().pad_token_id, "attention_mask": 0, "labels": -100}
    return [
        {name: [value] * (longest - len(row[name])) + row[name] for name, value in filler.items()}
        | {"input_values": row["input_values"] + [0.0] * (samples - len(row["input_values"]))}
        | {"audio_length": row["audio_length"]}
        for row in batch
    ]


def old_rows(rows: list[dict[str, str]], batch_size: int = 4, trained: str = "all") -> list[Row]:
    found = [old_row(row, trained=trained) for row in rows]
    return [row for i in range(0, len(found), batch_size) for row in pad(found[i : i + batch_size])]


def features(
    kind: Callable[..., Any] = List, ints: str = "int64", mask: str = "int64", floats: str = "float32"
):
    return datasets.Features(
        input_ids=kind(Value(ints)), attention_mask=kind(Value(mask)), input_values=kind(Value(floats)),
        audio_length=Value(ints), labels=kind(Value(ints)),
    )  # fmt: skip


def save(folder: Path, rows: list[Row], columns: datasets.Features | None = None, shards: int = 1) -> Path:
    """Write as 0.1.0 did, but three rows to a record batch where `datasets` takes a thousand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 3)
        data = datasets.Dataset.from_list(rows, features=columns or features())
        data.save_to_disk(folder, num_shards=shards)
    return folder
