"""The command in a process of its own, which a test can stop at any function, kill, and let go on.

Run as a script this is `mdl-toolkit` with shards of four rows. The environment says more:

    SIGNS     a folder for the files by which test and process talk to each other
    HOLD      `module:name:count`: at the count-th call of a function in a process, say so by a file and wait
              for another one; several such, between spaces, are stages that follow each other
    STARTING  workers do so already when they are started
    LIMIT     bytes that no file may exceed, as on a full disk

Each shard that is written down adds its number to `log`.
"""

import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

from mdl_toolkit.cli.main import main
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE
from mdl_toolkit.data.convert import plan
from mdl_toolkit.data.convert import run as conversion
from mdl_toolkit.data.convert.work_folder import WorkFolder
from mdl_toolkit.utils.ownership import RECORD
from tests.support.paths import MODEL
from tests.support.processes import children, wait_for
from tests.support.runs import make_rows, write_csv

ROWS, ROWS_PER_SHARD, SHARDS = 24, 4, 6
PATIENCE = 60  # seconds; everything here takes one or two


# --- rows and data ---------------------------------------------------------------------------------------

Marks = dict[str, tuple[int, int]]  # of files by name: which file it is, and when it was written


def make_place(folder: Path) -> Path:
    """A folder with `rows.csv` and the recordings, always the same."""
    folder.mkdir(exist_ok=True)
    write_csv(folder / "rows.csv", make_rows(folder / "audio", ROWS))
    return folder


def convert_here(output: str, **changes: Any) -> dict[str, bytes]:
    """What this process makes of `rows.csv`, with the command's small shards."""
    given = {"model_name": str(MODEL), "input": "rows.csv", "output": output, "num_workers": 1, **changes}
    with mock.patch.multiple(plan, CHUNK_ROWS=ROWS_PER_SHARD, FEWEST_BYTES=1):
        conversion.convert_dataset(ConvertOptions(**given))
    return data_of(Path(output))


def data_of(folder: Path) -> dict[str, bytes]:
    """A dataset's files by name, without the settings, which name the output, and the list of its files."""
    files = (path for path in folder.iterdir() if path.name not in (SETTINGS_FILE, RECORD))
    return {path.name: path.read_bytes() for path in files}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def finished(place: Path) -> Marks:
    """The shards' files that the journal names as finished."""
    journal = place / ".out.partial/shards"
    files = [f"data-{int(entry.stem):05d}-of-{SHARDS:05d}.arrow" for entry in journal.glob("*.json")]
    return marks(place / ".out.partial/dataset", files)


def marks(folder: Path, files: Iterable[str]) -> Marks:
    statuses = {name: (folder / name).stat() for name in files}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in statuses.items()}


# --- for the test ----------------------------------------------------------------------------------------


class Command:
    """`convert-dataset rows.csv --output out` in a folder."""

    def __init__(self, place: Path, *words: str, csv: str = "rows.csv", **environment: str) -> None:
        self.signs = Path(tempfile.mkdtemp(prefix="signs-", dir=place.parent))
        self.stage = 0
        given = ["convert-dataset", csv, "--output", "out", "--model-name", str(MODEL), *words]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *given], cwd=place, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "SIGNS": str(self.signs), **environment}, start_new_session=True,
        )  # fmt: skip

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_until_held(self, processes: int = 1) -> None:
        """Wait until so many of its processes are at the next stage."""
        pattern = f"held-{self.stage}-*"
        wait_for(lambda: len([*self.signs.glob(pattern)]) >= processes or not self.is_running)
        assert self.is_running, self.process.communicate()[1]

    def go_on(self) -> None:
        (self.signs / f"go-{self.stage}").touch()
        self.stage += 1

    def written(self) -> list[int]:
        """The shards that it has written down."""
        log = self.signs / "log"
        return [*map(int, log.read_text().split())] if log.exists() else []

    def end(self) -> tuple[int, str]:
        """Wait for its end, and for that of its workers; exit status and what was said."""
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said

    def kill(self) -> None:
        """Kill the process, but not its workers: they have to end by themselves."""
        self.process.kill()
        assert self.end()[0] == -signal.SIGKILL

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def workers(self) -> list[int]:
        return [child for child in children(self.process.pid) if b"spawn_main" in _command_line(child)]


@contextmanager
def killing_all() -> Iterator[Callable[..., Command]]:
    """Makes commands; none of them outlives the test."""
    made: list[Command] = []

    def start(*words: Any, **more: Any) -> Command:
        made.append(Command(*words, **more))
        return made[-1]

    try:
        yield start
    finally:
        for command in made:
            if command.is_running:
                os.killpg(command.process.pid, signal.SIGKILL)
            command.process.communicate(timeout=PATIENCE)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# --- for the process -------------------------------------------------------------------------------------


def _hold(stage: int) -> None:
    signs = Path(os.environ["SIGNS"])
    (signs / f"held-{stage}-{os.getpid()}").touch()
    while not (signs / f"go-{stage}").exists():
        time.sleep(0.01)


def _before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Do something before each call of a function."""
    function = getattr(owner, name)

    @wraps(function)
    def wrapped(*words: Any, **more: Any) -> Any:
        act(*words)
        return function(*words, **more)

    setattr(owner, name, wrapped)


def _hold_at(instruction: str, stage: int) -> None:
    module, path, count = instruction.split(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    calls: list[None] = []

    def act(*_: Any) -> None:
        calls.append(None)
        if len(calls) == int(count):
            _hold(stage)

    _before(owner, name, act)


def _log(_: Any, shard: Any, *more: Any) -> None:
    with (Path(os.environ["SIGNS"]) / "log").open("a") as file:
        file.write(f"{shard.number}\n")


def _prepare() -> None:
    plan.CHUNK_ROWS, plan.FEWEST_BYTES, conversion.FEW_ROWS = ROWS_PER_SHARD, 1, 1
    _before(WorkFolder, "commit", _log)
    for stage, instruction in enumerate(os.environ.get("HOLD", "").split()):
        _hold_at(instruction, stage)
    if "LIMIT" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whose parent runs in the background lacks it
    _prepare()
    main()
elif __name__ == "__mp_main__":  # a worker
    if "STARTING" in os.environ:
        _hold(0)
    _prepare()
