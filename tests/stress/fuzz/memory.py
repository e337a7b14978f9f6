"""Commands that get less memory than they want, wherever the line is drawn."""

from pathlib import Path

import numpy as np

from tests.stress.fuzz.cases import Case
from tests.stress.fuzz.datasets import TRAIN
from tests.support.paths import MODEL
from tests.support.recordings import pcm_wav

# Seconds of the one recording, rows of the one table.
LONG, ROWS = 1200, 50_000


def make_shared(folder: Path) -> None:
    """Make what takes memory: a long recording and a long table."""
    wave = (np.random.default_rng(0).standard_normal(LONG * 8_000) * 3000).astype(np.int16)
    (folder / "long.wav").write_bytes(pcm_wav(wave, 8_000))
    (folder / "long.csv").write_text(f"audio,user_prompt,prediction\n{folder}/long.wav,What?,yes\n")
    rows = (f"{number}.wav,answer {number % 7},answer {number % 5}\n" for number in range(ROWS))
    (folder / "table.csv").write_text(f"audio,reference,prediction\n{''.join(rows)}")


def make(folder: Path, shared: Path, random: np.random.Generator) -> Case:
    """Return a case of any command with a limit of its memory, in bytes beyond what it begins with."""
    rows, model = str(shared / "long.csv"), ["--model-name", str(MODEL), "--num-workers", "1"]
    commands = [
        ["check", rows, *model],
        ["convert-dataset", rows, "--output", "data", *model],
        ["inference", rows, "--output", "out.csv", "--max-length", "99999", *model],
        ["train", "--train-dataset", rows, *TRAIN, "--num-workers", "1"],
        ["train", "--train-dataset", str(shared / "data"), *TRAIN],
        ["merge", str(shared / "adapter"), "--output", "merged"],
        ["evaluate", str(shared / "table.csv")],
        ["report", str(shared / "run"), "--output", "page.html"],
    ]
    megabytes = float(2 ** random.uniform(1, 8))
    limit = _held() + int(megabytes * 2**20)
    return Case(
        folder, commands[random.integers(len(commands))], f"{megabytes:.0f} MB of memory", limit=limit
    )


def _held() -> int:
    """Return the bytes of this process that a limit counts."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024
