"""Copies of the shipped phrases, some of them deliberately spoilt in one way each."""

import csv
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr

from tests.support.paths import PHRASES

PROMPT = "Which language is spoken?"
COLUMNS = ("audio", "user_prompt", "prediction", "comment")


def phrases(name: str) -> list[dict[str, str]]:
    """Rows of one of the shipped files, with absolute paths and a prompt."""
    with (PHRASES / name).open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    return [
        {"audio": str(PHRASES / row["audio"]), "user_prompt": PROMPT, "prediction": row["prediction"],
         "comment": row["transcript"]}
        for row in rows
    ]  # fmt: skip


@dataclass
class Table:
    """A CSV that grows row by row, and where each spoilt row stands.

    Attributes:
        path: the file, written by `write`.
        rows: its rows.
        lines: of the spoilt rows, by kind.
    """

    path: Path
    rows: list[dict[str, str]] = field(default_factory=list)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: dict[str, str], kind: str = "", **changes: str) -> int:
        """Append a row and return the line where it stands."""
        self.rows.append({**row, **changes})
        line = len(self.rows) + 1
        if kind:
            self.lines.setdefault(kind, []).append(line)
        return line

    def write(self) -> "Table":
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(self.rows)
        return self


def make_spoilt(folder: Path, rows: int = 12) -> tuple[Table, Table]:
    """A training and an evaluation file in a folder, with every kind of spoilt copy in it."""
    train, held = Table(folder / "train.csv"), Table(folder / "eval.csv")
    clean, other = phrases("train.csv"), phrases("test.csv")
    for row in clean[:rows]:
        train.add(row)
    for number, kind in enumerate(RECORDINGS):
        row = clean[rows + number]
        path = folder / f"{kind}.wav"
        RECORDINGS[kind](Path(row["audio"]), path)
        train.add(row, kind, audio=str(path))
    duplicate = folder / "duplicate.wav"  # another file and format, the same sound
    samples, rate = soundfile.read(clean[3]["audio"], dtype="int16")
    soundfile.write(duplicate, samples, rate, subtype="PCM_16")
    train.add(clean[3], "duplicate", audio=str(duplicate))
    shutil.copy(clean[4]["audio"], folder / "mislabelled.flac")
    train.add(clean[4], "contradiction", audio=str(folder / "mislabelled.flac"), prediction="Klingon")
    train.add(clean[5], "other_prompt", user_prompt="Who is speaking?")
    words = clean[rows + len(RECORDINGS) :]
    train.add(words[0], "missing", audio=str(folder / "nowhere.wav"))
    train.add(words[1], "empty", prediction="")
    train.add(words[2], "number_answer", prediction="0012")
    train.add(words[3], "number_answer", prediction="1.0")
    train.add(words[4], "space_answer", prediction=" English")
    train.add(words[5], "space_prompt", user_prompt=f"{PROMPT} ")
    train.add(words[6], "near_prompts", user_prompt=PROMPT.replace("spoken", "spokn"))
    for row in other[:rows]:
        held.add(row)
    held.add(clean[6], "leak", audio=clean[6]["audio"])
    held.add(clean[7], "leak_other_text", prediction="Klingon")
    return train.write(), held.write()


# --- recordings ------------------------------------------------------------------------------------------


def _truncated(source: Path, target: Path) -> None:
    samples, rate = soundfile.read(source, dtype="int16")
    soundfile.write(target, samples, rate, subtype="PCM_16")
    content = target.read_bytes()
    target.write_bytes(content[: len(content) // 2])


def _silent(source: Path, target: Path) -> None:
    samples, rate = soundfile.read(source, dtype="int16")
    soundfile.write(target, np.zeros_like(samples), rate, subtype="PCM_16")


def _nearly_empty(source: Path, target: Path) -> None:
    """Ten seconds of faint noise around a click."""
    _, rate = soundfile.read(source)
    noise = np.random.default_rng(0).standard_normal(10 * rate) * 1e-3
    noise[5 * rate : 5 * rate + 400] = 0.5
    soundfile.write(target, noise, rate, subtype="PCM_16")


def _clipped(source: Path, target: Path) -> None:
    samples, rate = soundfile.read(source, dtype="float32")
    soundfile.write(target, np.clip(samples * 20, -1, 1), rate, subtype="PCM_16")


def _padded(source: Path, target: Path) -> None:
    samples, rate = soundfile.read(source, dtype="int16")
    soundfile.write(target, samples[rate : rate + rate // 10], rate, subtype="PCM_16")


def _wide(source: Path, target: Path) -> None:
    samples, rate = soundfile.read(source, dtype="float32")
    loud = soxr.resample(samples, rate, 96_000)
    soundfile.write(target, np.stack([loud, loud * 0.5], axis=1), 96_000, subtype="PCM_24")


def _text(source: Path, target: Path) -> None:
    target.write_text("not found\n", encoding="utf-8")


RECORDINGS = {
    "truncated": _truncated,
    "silent": _silent,
    "nearly_empty": _nearly_empty,
    "clipped": _clipped,
    "padded": _padded,
    "wide": _wide,
    "text": _text,
}
