"""Recordings to convert, cut from the phrases: speech of telephone quality, in files of other kinds."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

PCM_BYTES = 2  # a 16-bit sample


def make_clips(
    folder: Path, phrases: Path, lengths: Sequence[float], *, rate: int, extension: str
) -> list[Path]:
    """Cut clips of so many seconds each from the phrases, one after the other and round and round."""
    folder.mkdir()
    speech, start = _speech(phrases, rate), 0
    files = [folder / f"{number:05d}.{extension}" for number in range(len(lengths))]
    for file, seconds in zip(files, lengths, strict=True):
        count = round(seconds * rate)
        soundfile.write(file, speech[np.arange(start, start + count) % len(speech)], rate)
        start += count
    return files


def write_csv(path: Path, files: Sequence[Path], rows: int) -> Path:
    """A CSV of so many rows, which point at the files round and round."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "prediction"])
        writer.writerows([files[row % len(files)], f"Answer {row % 7}"] for row in range(rows))
    return path


def _speech(phrases: Path, rate: int) -> NDArray[np.float32]:
    """All phrases, joined, `[samples]` at so many Hz."""
    parts = []
    for file in sorted((phrases / "audio").iterdir()):
        samples, own_rate = soundfile.read(file, dtype="float32")
        parts.append(soxr.resample(samples, own_rate, rate))
    return np.concatenate(parts)
