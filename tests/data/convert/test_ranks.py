"""Two ranks on one file system: they divide the shards, take over from each other, and end the same."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from mdl_toolkit.data.convert import rank
from mdl_toolkit.data.convert.work_folder import WorkFolder
from mdl_toolkit.errors import UsageError
from mdl_toolkit.utils.launcher import Ranks
from tests.support.commands import (
    SHARDS,
    Command,
    convert_here,
    data_of,
    finished,
    killing_all,
    make_place,
    names,
)
from tests.support.processes import wait_for

COMMIT = "mdl_toolkit.data.convert.work_folder:WorkFolder.commit:{}"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    """What one process makes of the rows of `place`."""
    folder = make_place(tmp_path_factory.mktemp("unbroken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return convert_here("out")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    folder = make_place(tmp_path / "place")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def start(place) -> Iterator[Callable[..., Command]]:
    """Starts one of two ranks, by itself one process, in `place`."""
    with killing_all() as start:
        yield lambda rank, *words, **more: start(place, "--num-workers", "1", *words, rank=rank, **more)


def test_two_ranks_make_the_same(place, start, unbroken):
    first = start(0, HOLD=COMMIT.format(2))
    second = start(1)
    wait_for(second.written)
    first.go_on()
    status, said = first.end()
    assert (status, said.count("out: 24 rows")) == (0, 1)
    assert second.end() == (0, "")
    assert data_of(place / "out") == unbroken
    assert names(place) == {"audio", "rows.csv", "out"}
    assert first.written()
    assert sorted(first.written() + second.written()) == [*range(SHARDS)]


def test_a_killed_rank_is_replaced(place, start, unbroken):
    first = start(0, HOLD=f"{COMMIT.format(1)} mdl_toolkit.data.convert.rank:say:1")
    second = start(1, HOLD=COMMIT.format(2))
    first.wait_until_held()
    second.wait_until_held()
    first.go_on()
    first.wait_until_held()
    assert len(finished(place)) == SHARDS - 1  # all but the one that the second rank has
    second.kill()
    first.go_on()
    status, said = first.end()
    assert status == 0
    assert said.startswith("waiting for other ranks (1 parts)\nout: 24 rows")
    assert data_of(place / "out") == unbroken
    assert names(place) == {"audio", "rows.csv", "out"}


def test_the_first_rank_is_killed(place, start, unbroken, capsys):
    """The other one goes on to the end; then the first one only has to put all in place."""
    first = start(0, HOLD=COMMIT.format(2))
    first.wait_until_held()
    second = start(1)
    wait_for(lambda: len(finished(place)) == SHARDS - 1)
    assert second.end() == (0, "")
    first.kill()
    assert convert_here("out") == unbroken
    going_on = "going on from an earlier run: 20 of 24 rows are converted already\n"
    assert capsys.readouterr().err.startswith(going_on)


def test_a_rank_may_be_missing(place, start, unbroken):
    assert start(0).end()[0] == 0
    assert data_of(place / "out") == unbroken


def test_a_rank_that_comes_too_late(place, start, unbroken):
    """It was started in time, but was slow to come to the rows; all is done and cleared away by then."""
    second = start(1, HOLD="mdl_toolkit.data.convert.run:find_model:1")
    second.wait_until_held()
    assert start(0).end()[0] == 0
    second.go_on()
    assert second.end() == (0, "")
    assert data_of(place / "out") == unbroken
    assert names(place) == {"audio", "rows.csv", "out"}


def test_a_rank_that_is_still_reading_when_all_is_done(place, start, unbroken):
    second = start(1, HOLD="mdl_toolkit.data.manifest:Row.__init__:20")
    second.wait_until_held()
    assert start(0, FAREWELL="0").end()[0] == 0
    second.go_on()
    assert second.end() == (0, "")
    assert data_of(place / "out") == unbroken
    assert names(place) == {"audio", "rows.csv", "out"}


def test_a_rank_waits_for_the_first_one(place, start, unbroken):
    second = start(1)
    wait_for((place / ".out.partial/lock").exists)
    first = start(0, HOLD="mdl_toolkit.data.manifest:Row.__init__:20")
    first.wait_until_held()
    assert second.is_running
    first.go_on()
    assert [command.end()[0] for command in (first, second)] == [0, 0]
    assert data_of(place / "out") == unbroken


def test_a_rank_that_is_alone(place, start):
    status, said = start(1, PATIENCE="0.5").end()
    assert (status, said) == (1, "error: rank 1: rank 0 has not begun after 0 s; start both\n")
    assert names(place) == {"audio", "rows.csv"}


def test_waiting_starts_no_process_and_reads_no_rows(place, start, unbroken, monkeypatch):
    """The first rank is this process; the other one has a shard, and is killed when it was waited for."""
    second = start(1, HOLD=COMMIT.format(1))
    calls = Counter()
    spy(monkeypatch, calls, WorkFolder, "commit", lambda count: count > 1 or second.wait_until_held())
    waiting = SimpleNamespace(monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(rank, "time", waiting)
    spy(monkeypatch, calls, waiting, "sleep", lambda count: second.kill() if count == 3 else None)
    spy(monkeypatch, calls, rank, "read_shards")
    spy(monkeypatch, calls, rank, "work_through")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert convert_here("out") == unbroken
    assert calls == {"commit": SHARDS, "sleep": 3, "read_shards": 3, "work_through": 3}


def spy(monkeypatch, calls: Counter, owner: Any, name: str, act: Callable[[int], Any] = int) -> None:
    function = getattr(owner, name)

    def wrapped(*words: Any) -> Any:
        calls[name] += 1
        act(calls[name])
        return function(*words)

    monkeypatch.setattr(owner, name, wrapped)


def test_bad_rows_of_all_ranks_come_in_one_message(place, start):
    """From the first rank, and only when nobody looks any more at what it then removes."""
    for row in (1, 6, 23):  # shards 0, 1 and 5
        soundfile.write(f"audio/clip-0-{row}.wav", np.full(9000, np.nan), 16_000, subtype="FLOAT")
    before = names(place)
    first = start(0, HOLD=f"{COMMIT.format(1)} mdl_toolkit.data.convert.work_folder:WorkFolder.is_held:1")
    first.wait_until_held()
    # Its own three shards are done: it looks for more.
    second = start(1, HOLD="mdl_toolkit.data.convert.work_folder:WorkFolder.is_free:4")
    second.wait_until_held()
    assert second.written() == [1, 3, 5]
    first.go_on()
    first.wait_until_held()
    first.go_on()
    second.go_on()
    assert second.end() == (0, "")
    status, said = first.end()
    assert status == 1
    assert [line.split(",")[0] for line in said.splitlines()] == [
        "error: rows.csv: 3 bad row(s):", "  line 3", "  line 8", "  line 25",
    ]  # fmt: skip
    assert names(place) == before


@pytest.mark.parametrize("what", ["option", "csv"])
def test_ranks_that_do_not_fit(place, start, unbroken, what):
    """The one that does not fit says so and ends; the first one is not disturbed."""
    first = start(0, HOLD=COMMIT.format(1))
    first.wait_until_held()
    Path("other.csv").write_text(Path("rows.csv").read_text().replace("rain", "snow"))
    words = ["--system-prompt", "Another."] if what == "option" else []
    status, said = start(1, *words, csv="other.csv" if what == "csv" else "rows.csv").end()
    assert status == 1
    assert said == (
        "error: rank 1 finds another CSV, other recordings, options or versions than rank 0; "
        "give all ranks the same\n"
    )
    first.go_on()
    assert first.end()[0] == 0
    assert data_of(place / "out") == unbroken
    assert names(place) == {"audio", "rows.csv", "other.csv", "out"}


def test_a_rank_that_is_started_twice(place, start, unbroken):
    first = start(0, HOLD=COMMIT.format(1))
    first.wait_until_held()
    second = start(1, HOLD=COMMIT.format(1))
    second.wait_until_held()
    status, said = start(1).end()
    assert (status, said) == (
        1, "error: --output out: another conversion is writing it; wait for its end\n"
    )  # fmt: skip
    for command in (first, second):
        command.go_on()
    assert [command.end()[0] for command in (first, second)] == [0, 0]
    assert data_of(place / "out") == unbroken


def test_ctrl_c_in_all_ranks(place, start, unbroken):
    first = start(0, HOLD=COMMIT.format(3))
    first.wait_until_held()
    second = start(1, HOLD=COMMIT.format(1))
    second.wait_until_held()
    for command in (second, first):
        command.interrupt()
    assert second.end() == (130, "interrupted\n")
    status, said = first.end()
    assert status == 130
    assert said.startswith("8 of 24 rows are finished")
    assert convert_here("out") == unbroken


# --- what a launcher says --------------------------------------------------------------------------------


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


def test_nonsense_is_a_usage_error(place, start):
    status, said = start(3).end()
    assert (status, said) == (
        2, "error: RANK=3 and WORLD_SIZE=2 in the environment do not fit; unset or correct them\n"
    )  # fmt: skip
    assert names(place) == {"audio", "rows.csv"}
