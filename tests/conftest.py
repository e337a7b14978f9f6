"""What the tests share: a quiet, offline environment and the golden numbers."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import GOLDEN, ROOT
from tests.support.server import FileServer

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    # The models here are so small that threads only wait for each other.
    OMP_NUM_THREADS="1",
)
# Whoever starts the tests with `nohup` has them ignore it, and commands respect that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for _name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES"):
    os.environ.pop(_name, None)
os.environ["LANG"] = "C.UTF-8"
# Commands that the tests start find `tests.support` wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden numbers and checkpoints; read only."""
    return GOLDEN


def pytest_collection_finish() -> None:
    """Spare each full garbage collection, of which a training makes four, the objects of all libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float | tuple[float, float]]:
    """Evaluations find what the test wants, a loss or loss and score; the real ones are done all the same."""
    from mdl_toolkit.training.evaluator import Evaluator
    from tests.support.runs import evaluations

    wanted: list[float | tuple[float, float]] = []
    record = Evaluator.record

    def recorded(self: Evaluator, step: int, loss: float, score: float, *others: Any) -> None:
        found = wanted[len(evaluations(Path(self.options.output)))]
        loss, score = found if isinstance(found, tuple) else (found, score)
        record(self, step, loss, score, *others)

    monkeypatch.setattr(Evaluator, "record", recorded)
    return wanted


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serve files on this machine as long as the test runs."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = FileServer()
    yield served
    served.close()
