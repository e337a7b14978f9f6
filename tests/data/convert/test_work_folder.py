"""The work folder: what counts as finished, what is cleared away, who is kept out, and what a kill leaves."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mdl_toolkit.data.convert.plan import Plan, Shard
from mdl_toolkit.data.convert.stats import ConversionStats
from mdl_toolkit.data.convert.work_folder import KIND, WorkFolder
from mdl_toolkit.data.dataset_writer import shard_name
from mdl_toolkit.errors import DatasetError, InputError, Problems, RowProblem
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.ownership import seal
from tests.support.runs import files_below

LOADED = time.time()
SHARDS = (Shard(0, 4, "a"), Shard(1, 5, "b"), Shard(2, 6, "c"))
PLAN = Plan(SHARDS, Problems(), "identity", "abc")
OTHER = """
import sys
from pathlib import Path
from mdl_toolkit.errors import Problems
from mdl_toolkit.data.convert.work_folder import KIND, WorkFolder
from mdl_toolkit.data.convert.plan import Plan, Shard

shards = (Shard(0, 4, "a"), Shard(1, 5, "b"), Shard(2, 6, "c"))
with WorkFolder(Path(sys.argv[1]), int(sys.argv[2])) as work:
    print("in", flush=True)
    for line in sys.stdin:
        word, value = line.split()
        if word == "begin":
            work.begin(Plan(shards, Problems(), "identity", value))
        else:
            assert work.claim(shards[int(value)])
        print("done", flush=True)
"""


class Other:
    """Another process in the work folder."""

    def __init__(self, output: Path, rank: int) -> None:
        words = [sys.executable, "-c", OTHER, str(output), str(rank)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "in\n"

    def do(self, word: str, value: Any) -> None:
        self.process.stdin.write(f"{word} {value}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def end(self, *, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait() in ((-signal.SIGKILL,) if kill else (0, -signal.SIGKILL))


@contextmanager
def other(output: Path, rank: int = 0) -> Iterator[Other]:
    process = Other(output, rank)
    try:
        yield process
    finally:
        if process.process.returncode is None:
            process.end()


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def partial(output) -> Path:
    return output.with_name(".out.partial")


def commit(
    work: WorkFolder, shard: Shard, content: bytes = b"0123456789", problems: Problems | None = None
) -> None:
    file = work.file_to_write()
    file.write_bytes(content)
    stats = ConversionStats(rows=shard.rows, bytes=len(content), problems=problems or Problems())
    work.commit(shard, file, stats)


def fill(output: Path, *shards: Shard) -> None:
    """What a run leaves that ends after these shards."""
    with WorkFolder(output) as work:
        work.begin(PLAN)
        for shard in shards:
            commit(work, shard)


# --- one conversion at a time ----------------------------------------------------------------------------


def test_a_second_conversion_is_refused(output, partial):
    with other(output) as first:
        with pytest.raises(InputError) as caught, WorkFolder(output):
            pass
        assert caught.value.message.en == (
            f"--output {output}: another conversion is writing it; wait for its end"
        )
        assert caught.value.message.zh == f"--output {output}：另一个转换正在写入该位置；请等待其结束"
        first.do("begin", "abc")  # it is not disturbed
        assert (partial / "plan.json").exists()
    with WorkFolder(output):
        pass


def test_a_killed_conversion_locks_nobody_out(output):
    with other(output) as first:
        first.end(kill=True)
    with WorkFolder(output):
        pass


def test_each_rank_may_be_there_once(output):
    with other(output, 1), WorkFolder(output, 0) as work, WorkFolder(output, 2):
        assert work.is_held(1)
        assert not work.is_held(3)
        with pytest.raises(InputError, match="another conversion"), WorkFolder(output, 1):
            pass


def test_a_look_at_the_lock_locks_nobody_out(output, monkeypatch):
    """Ranks see by locking for a moment whether another one is there."""
    real, calls = fcntl.lockf, []

    def lockf(*words):
        calls.append(words)
        if len(calls) <= 3:
            raise OSError(errno.EAGAIN, "for a moment")
        return real(*words)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with WorkFolder(output):
        pass
    assert len(calls) == 4


def test_a_folder_that_is_removed_while_it_is_locked(output, partial, monkeypatch):
    """By a run that has just ended: a lock on a removed file would keep nobody out."""
    real, opened = os.open, []

    def open_and_remove(path, *words, **more):
        descriptor = real(path, *words, **more)
        if Path(path).name == "lock" and not opened:
            opened.append(path)
            shutil.rmtree(partial)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_remove)
    with WorkFolder(output):
        assert (partial / "lock").exists()
        process = subprocess.run(
            [sys.executable, "-c", OTHER, str(output), "0"], capture_output=True, text=True, check=False
        )
        assert "another conversion" in process.stderr


def test_where_there_are_no_locks(output, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with WorkFolder(output) as first, WorkFolder(output, 1) as second:
        assert not second.join(PLAN)
        first.begin(PLAN)
        assert second.join(PLAN)
        assert first.claim(SHARDS[0])
        assert second.claim(SHARDS[0])  # done twice at worst
        commit(first, SHARDS[0])
        assert not second.claim(SHARDS[0])
        assert second.is_held(0)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught, WorkFolder(tmp_path / "file/out"):
        pass
    assert caught.value.message.en.startswith(f"--output {tmp_path}/file/out: cannot be written: ")


# --- what counts as finished -----------------------------------------------------------------------------


def test_finished_shards_are_known_again(output, partial):
    fill(output, SHARDS[0], SHARDS[2])
    with WorkFolder(output) as work:
        assert work.begin(PLAN) == 10
        assert work.entry(SHARDS[0]) == ConversionStats(rows=4, bytes=10)
        assert work.entry(SHARDS[1]) is None
        assert not work.claim(SHARDS[2])
        assert work.finished(PLAN) == 10
    assert files_below(partial / "dataset") == {shard_name(0, 3), shard_name(2, 3)}


def test_finished_shards_are_counted_before_it_begins(output):
    fill(output, SHARDS[1])
    with WorkFolder(output) as work:
        assert work.finished(PLAN) == 5


def test_what_is_stale_is_removed(output, partial):
    fill(output, *SHARDS)
    for name in ("dataset/state.json", f"dataset/{shard_name(0, 9)}", "shards/0.1234", "writing/x.arrow"):
        (partial / name).touch()
    changed = replace(PLAN, shards=(SHARDS[0], Shard(1, 5, "changed"), SHARDS[2]), fingerprint="new")
    with WorkFolder(output) as work:
        assert work.begin(changed) == 10
        assert work.entry(changed.shards[1]) is None
    assert files_below(partial / "dataset") == {shard_name(0, 3), shard_name(2, 3)}
    assert files_below(partial / "shards") == {"0.json", "2.json"}
    assert files_below(partial / "writing") == set()


def test_another_number_of_shards_makes_all_stale(output, partial):
    fill(output, *SHARDS)
    with WorkFolder(output) as work:
        assert work.begin(replace(PLAN, shards=SHARDS[:2])) == 0
    assert files_below(partial / "dataset") == set()


GOOD = {"fingerprint": "a", "tally": ConversionStats(rows=4, bytes=10).to_json()}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "7", '{"fingerprint": "a"}', json.dumps({**GOOD, "tally": {}}),
        json.dumps({**GOOD, "tally": []}), json.dumps({**GOOD, "tally": None}),
        json.dumps({**GOOD, "tally": {**GOOD["tally"], "unheard": 1}}),
        json.dumps({**GOOD, "tally": {**GOOD["tally"], "positions": {"x": 1}}}),
        json.dumps({**GOOD, "tally": {**GOOD["tally"], "problems": {"first": [{}], "count": 1}}}),
        json.dumps({**GOOD, "fingerprint": "b"}), "\udcff",
    ],
)  # fmt: skip
def test_lines_that_do_not_count(output, partial, text):
    fill(output, SHARDS[0])
    line = partial / "shards/0.json"
    assert json.loads(line.read_text(encoding="utf-8")) == GOOD
    line.write_text(text, encoding="utf-8", errors="surrogateescape")
    with WorkFolder(output) as work:
        assert work.finished(PLAN) == 0
        assert work.begin(PLAN) == 0
        assert work.claim(SHARDS[0])
    assert files_below(partial / "dataset") == files_below(partial / "shards") == set()


@pytest.mark.parametrize("size", [None, 0, 9, 11])
def test_a_file_of_another_size_does_not_count(output, partial, size):
    fill(output, SHARDS[0])
    file = partial / "dataset" / shard_name(0, 3)
    file.unlink() if size is None else os.truncate(file, size)
    with WorkFolder(output) as work:
        assert work.begin(PLAN) == 0
        assert work.claim(SHARDS[0])


@pytest.mark.parametrize("keeps_going", [False, True])
def test_a_shard_with_a_bad_row_counts_for_this_run_only_unless_it_keeps_going(output, keeps_going):
    bad = Problems([RowProblem(2, "audio", "a.wav", Localized("no recording"))], 1)
    with WorkFolder(output) as work:
        work.begin(PLAN)
        commit(work, SHARDS[0], problems=bad)
        assert not work.claim(SHARDS[0])
        assert work.begin(PLAN, keeps_going=keeps_going) == (4 if keeps_going else 0)
        assert work.claim(SHARDS[0]) is not keeps_going


def test_a_shard_that_cannot_be_kept(output, partial):
    with WorkFolder(output) as work:
        work.begin(PLAN)
        shutil.rmtree(partial / "dataset")
        with pytest.raises(DatasetError, match="cannot be written"):
            commit(work, SHARDS[0])


# --- several ranks ---------------------------------------------------------------------------------------


def test_a_shard_belongs_to_one_process(output):
    with WorkFolder(output) as work, other(output, 1) as second:
        work.begin(PLAN)
        second.do("claim", 1)
        assert [work.is_free(shard) for shard in SHARDS] == [True, False, True]
        assert not work.claim(SHARDS[1])
        second.end(kill=True)
        assert work.is_free(SHARDS[1])
        assert work.claim(SHARDS[1])


def test_a_rank_joins_when_the_first_one_has_begun(output):
    with WorkFolder(output, 1) as work:
        assert not work.join(PLAN)
        with other(output) as first:
            assert not work.join(PLAN)
            first.do("begin", "abc")
            assert work.join(PLAN)
        assert not work.join(PLAN)  # it has ended, or was killed


def test_an_earlier_run_s_plan_is_not_joined(output, partial):
    """Not in the moment either when the first rank is there and has not removed it yet."""
    fill(output)
    plan = (partial / "plan.json").read_bytes()
    with WorkFolder(output, 1) as work, other(output) as first:
        (partial / "plan.json").write_bytes(plan)
        assert not work.join(PLAN)
        first.do("begin", "abc")
        assert work.join(PLAN)


def test_ranks_know_the_run_by_one_name(output, partial):
    with WorkFolder(output, 1) as work, other(output) as first:
        first.do("begin", "abc")
        work.join(PLAN)
        assert work.run == json.loads((partial / "plan.json").read_text(encoding="utf-8"))["run"]


def test_another_plan_is_refused(output):
    with WorkFolder(output, 1) as work, other(output) as first:
        first.do("begin", "other")
        with pytest.raises(DatasetError) as caught:
            work.join(PLAN)
    assert caught.value.message.en == (
        "rank 1 finds another CSV, other recordings, options or versions than rank 0; give all ranks the same"
    )
    assert caught.value.message.zh == "进程 1 与主进程的 CSV、音频、选项或版本不一致；请使各进程保持一致"


@pytest.mark.parametrize(("seconds", "completed"), [(-3600, False), (0, True), (3600, True)])
def test_an_output_that_was_completed_meanwhile(output, seconds, completed):
    """Since this process was started, however long it took to get here."""
    output.mkdir()
    with WorkFolder(output, 1) as work:
        assert not work.was_completed()
        (output / "state.json").touch()
        os.utime(output / "state.json", (LOADED + seconds, LOADED + seconds))
        assert work.was_completed() == completed


# --- the end ---------------------------------------------------------------------------------------------


def test_it_is_put_in_place(output, tmp_path):
    output.mkdir()
    (output / "old").touch()
    seal(output, KIND)
    with WorkFolder(output) as work:
        work.begin(PLAN)
        commit(work, SHARDS[0])
        work.finish()
    assert files_below(tmp_path) == {f"out/{shard_name(0, 3)}"}


def test_a_link_is_followed_and_stays(output, tmp_path):
    output.symlink_to("other/place")
    (tmp_path / "other").mkdir()
    with WorkFolder(output) as work:
        work.begin(PLAN)
        assert (tmp_path / "other/.place.partial/dataset").is_dir()
        work.finish()
    assert output.is_symlink()
    assert (tmp_path / "other/place").is_dir()
    assert not (tmp_path / "other/.place.partial").exists()


def test_the_lock_is_removed_last(output, partial, monkeypatch):
    """A large old dataset takes a while to remove, and whoever comes meanwhile must not come in."""
    fill(output, *SHARDS)
    for folder in ("previous", "downloads"):
        (partial / folder).mkdir()
        (partial / folder / "large").touch()
    real = os.unlink

    def unlink(path, **more):
        if path == "lock":
            assert files_below(partial) == {"lock"}
        removed.add(Path(path).name)
        real(path, **more)

    removed: set[str] = set()
    with WorkFolder(output) as work:
        monkeypatch.setattr(os, "unlink", unlink)
        work.remove()
    assert {"lock", "large"} <= removed
    assert not partial.exists()


@pytest.mark.parametrize(
    ("rank", "is_there", "found"), [(0, False, "old"), (0, True, "new"), (1, False, None)]
)
def test_killed_between_the_two_renames(output, partial, rank, is_there, found):
    fill(output, SHARDS[0])
    (partial / "previous").mkdir()
    (partial / "previous/old").touch()
    if is_there:
        output.mkdir()
        (output / "new").touch()
    with WorkFolder(output, rank):
        assert files_below(output) == ({found} if found else set())


def test_leaving_alone(output, partial):
    with WorkFolder(output, 1) as work:
        work.leave()
    assert not partial.exists()


def test_leaving_what_an_earlier_run_has_begun(output, partial):
    fill(output)
    with WorkFolder(output, 1) as work:
        work.leave()
    assert not partial.exists()


def test_leaving_finished_shards(output, partial):
    fill(output, SHARDS[0])
    with WorkFolder(output) as work:
        work.leave()
        assert work.begin(PLAN) == 4


def test_leaving_another_rank_at_work(output, partial):
    with WorkFolder(output, 1) as work, other(output) as first:
        work.leave()
        first.do("begin", "abc")
        assert files_below(partial) == {"lock", "plan.json"}
