import sys
from types import ModuleType

import pytest

from tests.support.command_line import Door

WORK = {
    "data.convert.run": "convert_dataset",
    "training.run": "train",
    "inference.run": "infer",
    "training.merge": "merge_adapter",
    "api": "check",
    "demo": "run_demo",
}


@pytest.fixture
def door(capsys, monkeypatch):
    """Command lines whose work only listens."""
    door = Door(capsys)
    for name, function in WORK.items():
        module = ModuleType(f"mdl_toolkit.{name}")
        setattr(module, function, door.work(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return door
