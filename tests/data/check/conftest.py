"""A model, spoilt files and a command line for the tests of `check`."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.checks import Done
from tests.support.spoilt import Table, make_spoilt


@pytest.fixture(scope="module")
def model(golden) -> str:
    return str(golden / "checkpoints" / "A-small")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> tuple[Table, Table]:
    return make_spoilt(tmp_path_factory.mktemp("spoilt"))


@pytest.fixture
def run(capsys, model) -> Callable[..., Done]:
    def run(*words: Any, model: str = model) -> Done:
        return Done(capsys, *map(str, words), "--model-name", model, "--num-workers", "1")

    return run
