"""What a launcher says in the environment."""

import pytest

from mdl_toolkit.errors import UsageError
from mdl_toolkit.utils.launcher import Ranks


@pytest.mark.parametrize(
    ("rank", "size", "found"),
    [
        (None, None, Ranks(0, 1)), ("0", None, Ranks(0, 1)), (None, "2", Ranks(0, 2)),
        ("0", "1", Ranks(0, 1)), ("1", "2", Ranks(1, 2)), ("15", "16", Ranks(15, 16)),
    ],
)  # fmt: skip
def test_ranks(monkeypatch, rank, size, found):
    set_ranks(monkeypatch, rank, size)
    assert Ranks.from_environment() == found


@pytest.mark.parametrize(
    ("rank", "size"),
    [("3", "2"), ("2", "2"), ("1", None), ("-1", "2"), ("one", "2"), ("", "2"), ("0", "0"), ("0", "1.5")],
)
def test_ranks_that_are_nonsense(monkeypatch, rank, size):
    set_ranks(monkeypatch, rank, size)
    with pytest.raises(UsageError) as caught:
        Ranks.from_environment()
    assert caught.value.message.en == (
        f"RANK={rank} and WORLD_SIZE={size or 1} in the environment do not fit; unset or correct them"
    )
    assert caught.value.message.zh == f"环境变量 RANK={rank} 与 WORLD_SIZE={size or 1} 不一致；请取消或更正"


def set_ranks(monkeypatch, rank, size):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
