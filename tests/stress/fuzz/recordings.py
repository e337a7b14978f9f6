"""Recordings in every format, spoilt; a command may refuse one, but not hear less of it without a word."""

import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

import mdl_toolkit.audio
from mdl_toolkit.errors import ToolkitError
from tests.stress.fuzz.cases import Case, spoil_bytes
from tests.support.paths import MODEL
from tests.support.recordings import EVERY, recording

# Containers without a length that decoding could be held against: a cut one is a shorter whole one.
WITHOUT_LENGTH = {"adts", "mpegts", "ac3", "eac3", "mp2", "MP3", "amr", "flv", "AU"}
SECONDS = 0.6


@lru_cache
def _whole(kind: tuple[str, str, str, int]) -> tuple[bytes, int]:
    """Return a whole recording and how many samples are heard of it."""
    content = recording(*kind, seconds=SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole"
        path.write_bytes(content)
        return content, len(mdl_toolkit.audio.load(path).samples)


def make(folder: Path, shared: Path, random: np.random.Generator) -> Case:
    """Return a case of a CSV with one spoilt recording."""
    kind = EVERY[random.integers(len(EVERY))]
    content, heard = _whole(kind)
    spoilt, how = spoil_bytes(content, random)
    (folder / "x.bin").write_bytes(spoilt)
    (folder / "rows.csv").write_text("audio,prediction\nx.bin,yes\n")
    command = (
        ["check", "rows.csv"] if random.integers(4) else ["convert-dataset", "rows.csv", "--output", "out"]
    )

    def hears_all(status: int, said: str) -> str:
        """Only a cut is held against the whole: other damage may well have moved what the header says."""
        if status or not how.startswith("cut") or kind[1] in WITHOUT_LENGTH:
            return ""
        try:
            found = len(mdl_toolkit.audio.load(folder / "x.bin").samples)
        except ToolkitError:
            return ""
        lost = heard - found
        return f"{lost} of {heard} samples lost without a word" if lost > 2 * 16_000 // 10 else ""

    words = [*command, "--model-name", str(MODEL), "--num-workers", "1"]
    return Case(folder, words, f"{' '.join(map(str, kind))}: {how}", check=hears_all)
