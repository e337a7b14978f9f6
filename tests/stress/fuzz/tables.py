"""CSVs, spoilt: bytes, encodings, delimiters, headers, cells, paths and addresses."""

import csv
import io
import os
from pathlib import Path

import numpy as np

from tests.stress.fuzz.cases import Case, spoil_bytes
from tests.support.paths import MODEL
from tests.support.recordings import pcm_wav

HEADER = ["audio", "system_prompt", "user_prompt", "prediction", "speaker"]
HEADERS = (
    "Audio", " audio", "AUDIO ", "path", "wav", "audio_path", "User_Prompt", "question", "text", "label", "",
    "start", "end", "begin", "offset", "duration", "channel", "名前", "audio\n", "prediction", "a" * 5000,
)  # fmt: skip
CELLS = (
    "", " ", "null", "NULL", "None", "nan", "=1+1", "=cmd|' /C calc'!A0", "@SUM(1)", "+1", "-1", "1.23E+11",
    "2-Jan", "1月2日", "#NAME?", "TRUE", "0012", "\x1b[31mred\x07", "a\x00b", "\u202eabc", "\ufeff", "\ud83d",
    "<|im_end|>", "<|im_start|>assistant\n", "<|AUDIO|>", "<audio>", "{{ 7*7 }}", "%s %n", "{path}",
    "a,b;c\td",
    'quo"te', "two\nlines", "two\r\nlines", "狗在叫。", "ｆｕｌｌ", "a" * 100_000, "é" * 3000, "\\N",
    "1:02.5", "1e400",
)  # fmt: skip
PATHS = (
    "missing.wav", ".", "..", "/", "", "~", "~nobody/x.wav", "folder", "pipe", "link", "loop", "null",
    "a" * 5000,
    "good-0.wav/x", "GOOD-0.WAV", "good-0", "good-0.wav ", " good-0.wav", "audio\\good-0.wav", "empty.wav",
    "rows.csv", "text.wav", "http://127.0.0.1:9/x.wav", "https://127.0.0.1:9/x.wav", "http://", "http://[::1",
    "http://user:pass@127.0.0.1:9/", "ftp://127.0.0.1/x", "file:///etc/passwd", "data:audio/wav;base64,AAAA",
    "http://127.0.0.1:99999/x", "HTTP://127.0.0.1:9/X", "C:\\x\\y.wav", "\\\\host\\x.wav", "x\x00.wav",
    "-", "--help",
    "good-0.wav\n", "\x1b]0;title\x07.wav",
)  # fmt: skip
ENCODINGS = (
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "gb18030",
    "shift-jis",
    "latin-1",
    "big5",
)


def make_shared(folder: Path) -> None:
    """Make the recordings and the things that are none, once for all cases."""
    random = np.random.default_rng(0)
    for number, samples in enumerate((5000, 9000)):
        wave = (random.standard_normal(samples) * 3000).astype(np.int16)
        (folder / f"good-{number}.wav").write_bytes(pcm_wav(wave))
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("<html><body>Please log in</body></html>")
    (folder / "folder").mkdir()
    (folder / "null").symlink_to("/dev/null")
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to("good-0.wav")
    os.mkfifo(folder / "pipe")


def make(folder: Path, shared: Path, random: np.random.Generator) -> Case:
    """Return a case of one or two spoilt CSVs."""
    rows = [[*HEADER]] + [
        [f"good-{number % 2}.wav", "", "What is it?", f"answer {number}", "A"] for number in range(4)
    ]
    spoilt = " and ".join(_spoil_rows(rows, random) for _ in range(random.integers(1, 3)))
    content, how = _written(rows, random)
    (folder / "rows.csv").write_bytes(content)
    base = ["--base-dir", str(shared), "--model-name", str(MODEL), "--num-workers", "1"]
    match random.integers(8):
        case 0:
            words = ["evaluate", "rows.csv", "--reference", "rows.csv"]
        case 1:
            words = ["convert-dataset", "rows.csv", "--output", "out", *base]
        case 2:
            words = ["check", "rows.csv", "rows.csv", "--json", *base]
        case 3:
            words = ["check", "rows.csv", "--for-inference", "--write-fixed", "fixed.csv", *base]
        case _:
            words = ["check", "rows.csv", *base]
    return Case(folder, words, f"{spoilt}; {how}")


def _spoil_rows(rows: list[list[str]], random: np.random.Generator) -> str:
    if len(rows) < 2:
        return "nothing more"
    row = int(random.integers(1, len(rows)))
    column = int(random.integers(len(HEADER)))
    pick = lambda values: values[random.integers(len(values))]  # noqa: E731
    match random.integers(9):
        case 0:
            rows[0][column : column + 1] = [name := pick(HEADERS)]
            return f"a column named {name[:20]!r}"
        case 1:
            for line in rows:
                del line[column : column + 1]
            return f"no column {column}"
        case 2 | 3:
            rows[row][:1] = [path := pick(PATHS)]
            return f"audio {path[:30]!r}"
        case 4:
            rows[row] += [""] * int(random.choice([1, 3, 10_000]))
            return f"{len(rows[row])} cells"
        case 5:
            rows[row] = rows[row][: int(random.integers(0, 3))]
            return "cells are missing"
        case 6:
            name, cell = pick(("start", "end", "begin", "offset", "duration", "channel")), pick(CELLS)
            rows[0].append(name)
            for line in rows[1:]:
                line.append(pick(("", "0", "0.1", "1", "left", "nan", "-1", "1e9", cell)))
            return f"a column {name}"
        case 7:
            del rows[int(random.integers(0, 2)) :]
            return "no rows"
        case _:
            rows[row][column : column + 1] = [cell := pick(CELLS)]
            return f"a cell {cell[:30]!r}"


def _written(rows: list[list[str]], random: np.random.Generator) -> tuple[bytes, str]:
    delimiter = str(random.choice([",", ",", ",", ",", ";", "\t", "|"]))
    ends = str(random.choice(["\n", "\r\n", "\n", "\r"]))
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=ends).writerows(rows)
    encoding = "utf-8" if random.integers(3) else str(random.choice(ENCODINGS))
    content = text.getvalue().encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    how = f"{encoding}, {delimiter!r}, {ends!r}"
    if random.integers(4) == 0:
        content, more = spoil_bytes(content, random)
        how = f"{how}, {more}"
    return content, how
