"""Refusals of a model folder, and changes to one."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdl_toolkit.errors import ModelError
from mdl_toolkit.weights.resolve import find_model
from tests.support.chinese import wrong_in


def find(name: str | Path, **more: bool) -> Path:
    return find_model(str(name), **{"from_modelscope": False, "weights": True, **more})


def refused(action: Any, *words: Any, **more: Any) -> str:
    """The English message, which is one sentence as is the Chinese one."""
    with pytest.raises(ModelError) as caught:
        action(*words, **more)
    en, zh = caught.value.message.en, caught.value.message.zh
    assert "\n" not in en + zh
    assert not wrong_in(zh)
    assert any("\u4e00" <= character <= "\u9fff" for character in zh) or en == zh.replace("：", ": ")
    return en


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
