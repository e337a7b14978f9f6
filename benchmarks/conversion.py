"""Conversion: `convert_rows` in one process against decoding, resampling and packing in a bare loop.

What the toolkit adds is the look at a file's structure, checks of every sample, tokens and the dataset on
disk. Reading is compared with waveforms stored as lists of numbers.
"""

import contextlib
import io
import tempfile
from importlib import resources
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import soxr

from benchmarks import Figure, timed
from mdl_toolkit.audio import SAMPLE_RATE
from mdl_toolkit.conversion import convert_rows, read_rows
from mdl_toolkit.dataset import ConvertedDataset
from mdl_toolkit.demo import PROMPT, make_tiny_model
from mdl_toolkit.loading import quiet_libraries, read_text_files
from mdl_toolkit.manifest import Manifest
from mdl_toolkit.options import ConvertOptions
from mdl_toolkit.tokens import Encoder

RUNS = 5
SECONDS_READ = 10


def figures() -> list[Figure]:
    """One line for writing, one for reading."""
    with (
        tempfile.TemporaryDirectory() as place,
        resources.as_file(resources.files("mdl_toolkit") / "phrases") as phrases,
    ):
        return _figures(Path(place), phrases)


def _figures(place: Path, phrases: Path) -> list[Figure]:
    quiet_libraries()
    make_tiny_model(place / "model", phrases, seed=0)
    encoder = Encoder(read_text_files(place / "model"))
    options = ConvertOptions(
        input=str(phrases / "train.csv"), output="unused", base_dir=str(phrases), user_prompt=PROMPT,
        num_workers=1,
    )  # fmt: skip
    manifest = read_rows(options.input, options, needs_prediction=True)
    numbers = count()

    def convert() -> None:
        folder = place / f"dataset-{next(numbers)}"
        folder.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            convert_rows(manifest, folder, encoder, options)

    what = f"converting {len(manifest.rows)} phrases, 1 worker; other: bare loop"
    written = timed(what, convert, lambda: _bare_loop(manifest), RUNS)
    return [written, _reading(ConvertedDataset(place / "dataset-0"))]


def _bare_loop(manifest: Manifest) -> None:
    for row in manifest.rows:
        samples, rate = soundfile.read(row.audio, dtype="float32")
        samples = soxr.resample(samples, rate, SAMPLE_RATE, "HQ")
        soundfile.write(io.BytesIO(), samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")


def _reading(dataset: ConvertedDataset) -> Figure:
    """Samples that hold 10 s of audio together, against as many numbers in an Arrow list."""
    rows = int(np.searchsorted(np.cumsum(dataset.samples), SECONDS_READ * SAMPLE_RATE)) + 1
    numbers = np.concatenate([dataset[row].waveform for row in range(rows)])
    stored = pa.array([numbers[: SECONDS_READ * SAMPLE_RATE]])

    def read() -> None:
        for row in range(rows):
            _ = dataset[row].waveform

    seconds = len(numbers) / SAMPLE_RATE
    what = f"reading {seconds:.0f} s of audio in {rows} samples; other: {SECONDS_READ} s as a list of floats"
    return timed(what, read, lambda: np.asarray(stored[0].as_py(), dtype=np.float32), 9)
