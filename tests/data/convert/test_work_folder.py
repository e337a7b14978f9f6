"""The work folder: what counts as finished, what is cleared away, who is kept out, and what a kill leaves."""

import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mdl_toolkit.data.convert.plan import Plan, Shard
from mdl_toolkit.data.convert.stats import ConversionStats
from mdl_toolkit.data.convert.work_folder import KIND, WorkFolder
from mdl_toolkit.data.dataset_writer import shard_name
from mdl_toolkit.errors import DatasetError, InputError, Problems, RowProblem
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.ownership import seal
from tests.support.runs import files_below

SHARDS = (Shard(0, 4, "a"), Shard(1, 5, "b"), Shard(2, 6, "c"))
PLAN = Plan(SHARDS, Problems(), "identity", "abc")


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
    with WorkFolder(output).locked() as work:
        work.begin(PLAN)
        for shard in shards:
            commit(work, shard)


# --- one conversion at a time ----------------------------------------------------------------------------


def test_a_second_conversion_is_refused(output, partial):
    with WorkFolder(output).locked() as first:
        with pytest.raises(InputError) as caught, WorkFolder(output).locked():
            pass
        assert caught.value.message.en == (
            f"--output {output}: another conversion is writing it; wait for its end"
        )
        assert caught.value.message.zh == f"--output {output}：另一个转换正在写入该位置；请等待其结束"
        # It is not disturbed.
        first.begin(PLAN)
        assert (partial / "dataset").is_dir()
    with WorkFolder(output).locked():
        pass


def test_where_there_are_no_locks(output, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with WorkFolder(output).locked() as first, WorkFolder(output).locked() as second:
        first.begin(PLAN)
        commit(first, SHARDS[0])
        assert second.begin(PLAN) == 4


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught, WorkFolder(tmp_path / "file/out").locked():
        pass
    assert caught.value.message.en.startswith(f"--output {tmp_path}/file/out: cannot be written: ")


# --- what counts as finished -----------------------------------------------------------------------------


def test_finished_shards_are_known_again(output, partial):
    fill(output, SHARDS[0], SHARDS[2])
    with WorkFolder(output).locked() as work:
        assert work.begin(PLAN) == 10
        assert work.entry(SHARDS[0]) == ConversionStats(rows=4, bytes=10)
        assert work.entry(SHARDS[1]) is None
        assert work.finished(PLAN) == 10
    assert files_below(partial / "dataset") == {shard_name(0, 3), shard_name(2, 3)}


def test_finished_shards_are_counted_before_it_begins(output):
    fill(output, SHARDS[1])
    with WorkFolder(output).locked() as work:
        assert work.finished(PLAN) == 5


def test_what_is_stale_is_removed(output, partial):
    fill(output, *SHARDS)
    for name in ("dataset/state.json", f"dataset/{shard_name(0, 9)}", "shards/0.1234", "writing/x.arrow"):
        (partial / name).touch()
    changed = replace(PLAN, shards=(SHARDS[0], Shard(1, 5, "changed"), SHARDS[2]), fingerprint="new")
    with WorkFolder(output).locked() as work:
        assert work.begin(changed) == 10
        assert work.entry(changed.shards[1]) is None
    assert files_below(partial / "dataset") == {shard_name(0, 3), shard_name(2, 3)}
    assert files_below(partial / "shards") == {"0.json", "2.json"}
    assert files_below(partial / "writing") == set()


def test_another_number_of_shards_makes_all_stale(output, partial):
    fill(output, *SHARDS)
    with WorkFolder(output).locked() as work:
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
    with WorkFolder(output).locked() as work:
        assert work.finished(PLAN) == 0
        assert work.begin(PLAN) == 0
        assert work.entry(SHARDS[0]) is None
    assert files_below(partial / "dataset") == files_below(partial / "shards") == set()


@pytest.mark.parametrize("size", [None, 0, 9, 11])
def test_a_file_of_another_size_does_not_count(output, partial, size):
    fill(output, SHARDS[0])
    file = partial / "dataset" / shard_name(0, 3)
    file.unlink() if size is None else os.truncate(file, size)
    with WorkFolder(output).locked() as work:
        assert work.begin(PLAN) == 0
        assert work.entry(SHARDS[0]) is None


@pytest.mark.parametrize("keeps_going", [False, True])
def test_a_shard_with_a_bad_row_counts_for_this_run_only_unless_it_keeps_going(output, keeps_going):
    bad = Problems([RowProblem(2, "audio", "a.wav", Localized("no recording"))], 1)
    with WorkFolder(output).locked() as work:
        work.begin(PLAN)
        commit(work, SHARDS[0], problems=bad)
        assert work.entry(SHARDS[0]).problems == bad
        assert work.begin(PLAN, keeps_going=keeps_going) == (4 if keeps_going else 0)
        assert (work.entry(SHARDS[0]) is not None) is keeps_going


def test_a_shard_that_cannot_be_kept(output, partial):
    with WorkFolder(output).locked() as work:
        work.begin(PLAN)
        shutil.rmtree(partial / "dataset")
        with pytest.raises(DatasetError, match="cannot be written"):
            commit(work, SHARDS[0])


# --- the end ---------------------------------------------------------------------------------------------


def test_it_is_put_in_place(output, tmp_path):
    output.mkdir()
    (output / "old").touch()
    seal(output, KIND)
    with WorkFolder(output).locked() as work:
        work.begin(PLAN)
        commit(work, SHARDS[0])
        work.finish()
    assert files_below(tmp_path) == {f"out/{shard_name(0, 3)}"}


def test_a_link_is_followed_and_stays(output, tmp_path):
    output.symlink_to("other/place")
    (tmp_path / "other").mkdir()
    with WorkFolder(output).locked() as work:
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
    with WorkFolder(output).locked() as work:
        monkeypatch.setattr(os, "unlink", unlink)
        work.remove()
    assert {"lock", "large"} <= removed
    assert not partial.exists()


@pytest.mark.parametrize(("is_there", "found"), [(False, "old"), (True, "new")])
def test_killed_between_the_two_renames(output, partial, is_there, found):
    fill(output, SHARDS[0])
    (partial / "previous").mkdir()
    (partial / "previous/old").touch()
    if is_there:
        output.mkdir()
        (output / "new").touch()
    with WorkFolder(output).locked():
        assert files_below(output) == {found}


def test_leaving_what_an_earlier_run_has_begun(output, partial):
    fill(output)
    with WorkFolder(output).locked() as work:
        work.leave()
    assert not partial.exists()


def test_leaving_finished_shards(output, partial):
    fill(output, SHARDS[0])
    with WorkFolder(output).locked() as work:
        work.leave()
        assert work.begin(PLAN) == 4
