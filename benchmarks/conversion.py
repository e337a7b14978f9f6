"""Conversion: 1,000 recordings against decoding, resampling and packing in a bare loop, and the goals.

What the toolkit adds is the CSV, the look at a file's structure, checks of every sample, tokens, and the
dataset on disk. Reading is compared with waveforms stored as lists of numbers.
"""

import compileall
import contextlib
import io
import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import soxr

import mdl_toolkit
from benchmarks import Figure, timed
from benchmarks.clips import PCM_BYTES, make_clips, write_csv
from benchmarks.processes import Usage, toolkit
from mdl_toolkit.audio.flac import pack_audio
from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.convert.run import convert_rows
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.demo import PROMPT, make_tiny_model
from mdl_toolkit.weights.loading import quiet_libraries
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

RUNS, LONG_RUNS, COMMAND_RUNS = 5, 3, 3
LONG = 3  # times the rows, where starting processes weighs less
CLIPS, SHORTEST, LONGEST = 1000, 1.0, 6.0  # seconds
CLIP_RATE = 22_050
SECONDS_READ = 10
GOAL_SECONDS, GOAL_MEMORY, GOAL_WRITTEN = 5.0, 600e6, 80e6


@dataclass(frozen=True)
class Place:
    """Where everything lies that is converted.

    Attributes:
        folder: empty but for the model.
        model: a tiny one.
        phrases: the recordings that clips are cut from.
    """

    folder: Path
    model: Path
    phrases: Path

    def words(self, rows: Path, output: Path) -> list[str]:
        """The command that converts a CSV with two workers."""
        return [
            "convert-dataset", str(rows), "--output", str(output), "--model-name", str(self.model),
            "--user-prompt", PROMPT, "--num-workers", "2",
        ]  # fmt: skip


@contextmanager
def prepared() -> Iterator[Place]:
    """A temporary folder with a tiny model in it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        resources.as_file(resources.files("mdl_toolkit") / "phrases") as phrases,
    ):
        place = Place(Path(folder), Path(folder) / "model", phrases)
        compileall.compile_dir(Path(mdl_toolkit.__file__).parent, quiet=1)  # as in an installed package
        quiet_libraries()
        make_tiny_model(place.model, phrases, seed=0)
        yield place


def figures() -> list[Figure]:
    """Four lines about time within one process, four about the whole command, one about reading."""
    with prepared() as place:
        lengths = np.random.default_rng(0).permutation(np.linspace(SHORTEST, LONGEST, CLIPS))
        files = make_clips(place.folder / "clips", place.phrases, lengths, rate=CLIP_RATE, extension="ogg")
        rows = write_csv(place.folder / "rows.csv", files, CLIPS)
        return [*_times(place, rows, files), *_command(place, rows), _reading(place)]


# --- within one process ----------------------------------------------------------------------------------


def _times(place: Place, rows: Path, files: Sequence[Path]) -> list[Figure]:
    minutes = CLIPS * (SHORTEST + LONGEST) / 2 / 60
    what = f"converting {CLIPS:,} ogg clips ({minutes:.0f} min)"
    more = write_csv(place.folder / "more.csv", files, LONG * CLIPS)
    one, two = Conversion(place, rows, 1), Conversion(place, rows, 2)
    long_one, long_two = Conversion(place, more, 1), Conversion(place, more, 2)
    bare = partial(bare_loop, files)
    return [
        timed(f"{what}, 1 worker; other: bare loop", one, bare, RUNS),
        timed(f"{what}, 2 workers; other: 1 worker", two, one, RUNS),
        timed(f"the same {LONG} times over, 2 workers; other: 1 worker", long_two, long_one, LONG_RUNS),
        timed("that bare loop in 2 processes; other: in 1", partial(_bare_halves, files), bare, RUNS),
    ]


class Conversion:
    """All of `convert_rows`, into a new folder at every call."""

    _numbers = count()

    def __init__(self, place: Place, rows: Path, workers: int, base_dir: Path | None = None) -> None:
        self.output = self._folder = place.folder
        self._tokenizer = ChatTokenizer(read_tokenizer_files(place.model))
        self._options = ConvertOptions(
            input=str(rows), output="unused", user_prompt=PROMPT, num_workers=workers,
            base_dir=None if base_dir is None else str(base_dir),
        )  # fmt: skip

    def __call__(self) -> None:
        """Convert."""
        self.output = self._folder / f"out-{next(self._numbers)}"
        manifest = read_manifest(self._options.input, self._options, needs_prediction=True)
        with contextlib.redirect_stderr(io.StringIO()):
            convert_rows(manifest, self.output, self._tokenizer, self._options)


def bare_loop(files: Sequence[Path]) -> None:
    """Decode, resample and pack."""
    for file in files:
        samples, rate = soundfile.read(file, dtype="float32")
        pack_audio(soxr.resample(samples, rate, SAMPLE_RATE, "HQ"))


def _bare_halves(files: Sequence[Path]) -> None:
    """The bare loop in two processes that need no start-up: what the machine's CPUs give at best."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=bare_loop, args=(files[half::2],)) for half in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


# --- the whole command -----------------------------------------------------------------------------------


def _command(place: Place, rows: Path) -> list[Figure]:
    """Time, memory and bytes written of `convert-dataset`, and what it leaves."""
    runs = [_run(place, rows, looks=False) for _ in range(COMMAND_RUNS)]
    looked = [_run(place, rows, looks=True) for _ in range(COMMAND_RUNS)]
    seconds = statistics.median(run.seconds for run in runs)
    memory = statistics.median(run.together for run in looked)
    written = statistics.median(run.written for run in runs)
    dataset = ConvertedDataset(place.folder / "dataset")
    stored = sum(file.stat().st_size for file in dataset.folder.iterdir())
    pcm = dataset.record.seconds * SAMPLE_RATE * PCM_BYTES
    what = f"`convert-dataset`, 2 workers (median of {COMMAND_RUNS})"
    return [
        Figure(f"{what}; other: goal", f"{seconds:.2f} s", f"{GOAL_SECONDS:.0f} s", GOAL_SECONDS / seconds),
        _bytes(f"{what}, memory of all processes (Pss); other: goal", memory, GOAL_MEMORY),
        _bytes(f"{what}, bytes written; other: goal", written, GOAL_WRITTEN),
        _bytes("the dataset on disk; other: 16-bit PCM", stored, pcm),
    ]


def _run(place: Place, rows: Path, *, looks: bool) -> Usage:
    """Convert anew, and see that nothing is left beside the dataset."""
    output = place.folder / "dataset"
    shutil.rmtree(output, ignore_errors=True)
    before = set(place.folder.iterdir())
    usage = toolkit(*place.words(rows, output), looks=looks)
    if set(place.folder.iterdir()) - before != {output}:
        raise RuntimeError(f"left beside the output: {set(place.folder.iterdir()) - before}")
    return usage


def _bytes(what: str, ours: float, other: float) -> Figure:
    return Figure(what, f"{ours / 1e6:.0f} MB", f"{other / 1e6:.0f} MB", other / ours)


# --- reading ---------------------------------------------------------------------------------------------


def _reading(place: Place) -> Figure:
    """Samples that hold 10 s of audio together, against as many numbers in an Arrow list."""
    convert = Conversion(place, place.phrases / "train.csv", 1, base_dir=place.phrases)
    convert()
    dataset = ConvertedDataset(convert.output)
    rows = int(np.searchsorted(np.cumsum(dataset.audio_lengths), SECONDS_READ * SAMPLE_RATE)) + 1
    numbers = np.concatenate([dataset[row].waveform for row in range(rows)])
    stored = pa.array([numbers[: SECONDS_READ * SAMPLE_RATE]])

    def read() -> None:
        for row in range(rows):
            _ = dataset[row].waveform

    seconds = len(numbers) / SAMPLE_RATE
    what = f"reading {seconds:.0f} s of audio in {rows} samples; other: {SECONDS_READ} s as a list of floats"
    return timed(what, read, lambda: np.asarray(stored[0].as_py(), dtype=np.float32), 9)
