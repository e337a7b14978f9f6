"""What is converted: real recordings in several formats and rates, odd ones, a tiny model's text side."""

import csv
from pathlib import Path

import numpy as np
import soundfile
import soxr

from tests.support.paths import PHRASES

# What a phrase becomes: extension, Hz (None: as it is), libsndfile's subtype.
KINDS = (
    ("flac", None, "PCM_16"), ("ogg", 22_050, "VORBIS"), ("wav", 44_100, "PCM_24"),
    ("mp3", 16_000, "MPEG_LAYER_III"), ("flac", 16_000, "PCM_16"), ("opus", 48_000, "OPUS"),
    ("wav", 8_000, "ULAW"),
)  # fmt: skip


def make_csv(folder: Path, count: int) -> Path:
    """So many phrases, the odd ones among them, and a CSV of them all; the same on every call."""
    (folder / "audio").mkdir(parents=True)
    files = [
        _save(folder / f"audio/{number:03d}", phrase, *KINDS[number % len(KINDS)])
        for number, phrase in enumerate(sorted((PHRASES / "audio").iterdir())[:count])
    ]
    for number, odd in enumerate(_odd_ones(folder / "audio")):
        files.insert(number * count // 5 + 4, odd)
    return write_csv(folder / "rows.csv", files, "What is said?")


def write_csv(path: Path, files: list[Path], prompt: str) -> Path:
    """A CSV of recordings; answers differ in length and script."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "user_prompt", "prediction"])
        for number, recording in enumerate(files):
            writer.writerow([recording, prompt, f"{recording.stem}, 狗在叫<|im_end|>\n" * (number % 4 + 1)])
    return path


def _save(path: Path, phrase: Path, extension: str, rate: int | None, subtype: str) -> Path:
    samples, own_rate = soundfile.read(phrase, dtype="float32")
    target = path.with_suffix(f".{extension}")
    samples = samples if rate is None else soxr.resample(samples, own_rate, rate)
    container = {"opus": "OGG"}.get(extension, extension.upper())
    soundfile.write(target, samples, rate or own_rate, format=container, subtype=subtype)
    return target


def _odd_ones(folder: Path) -> list[Path]:
    random = np.random.default_rng(0)
    stereo = random.standard_normal((3 * 96_000, 2)) * 0.1
    odd = {
        "one-sample": (np.array([0.5]), 16_000),
        "silent": (np.zeros(30_000), 16_000),
        "stereo": (stereo, 96_000),
        "loud": (np.ones(20_000), 44_100),
        "quiet": (random.standard_normal(9_000) * 1e-3, 11_025),
    }
    for name, (samples, rate) in odd.items():
        soundfile.write(folder / f"{name}.wav", samples, rate, subtype="PCM_16")
    return [folder / f"{name}.wav" for name in odd]
