"""Rows to shards: the cuts depend on nothing but rows and sizes, the fingerprints on all that matters."""

import itertools
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.audio.segments import Segment
from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.data.convert import plan as room
from mdl_toolkit.data.convert.plan import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    MOST_BYTES,
    MOST_ROWS,
    URL_BYTES,
    Plan,
    make_plan,
    read_shards,
)
from mdl_toolkit.data.manifest import Manifest, Row, read_manifest
from mdl_toolkit.errors import InputError, RowProblem
from mdl_toolkit.i18n import Verbatim

MEBIBYTE = 2**20


class Rows(list):
    """Stands for a manifest."""

    def rows(self) -> Iterator[Row]:
        return (item for item in self if isinstance(item, Row))

    def no_rows(self) -> InputError:
        return InputError("no rows")


def row(number: int, size: int = 1000, **changes: Any) -> Row:
    name = f"/data/{number}.wav"
    return replace(Row(number + 2, name, name, None, "What?", "x", (), (size, 7)), **changes)


def look(_: Row) -> None:
    pass


def plan_of(rows: Rows | Manifest, identity: str = "identity") -> Plan:
    return make_plan(rows, identity, look)


def cuts(plan: Plan) -> list[int]:
    return [shard.rows for shard in plan.shards]


# --- where shards begin and end --------------------------------------------------------------------------

# So many rows after each other with files of such a size.
SIZES = st.lists(
    st.tuples(
        st.integers(1, 1500),
        st.one_of(
            st.integers(1, 1000), st.integers(1, 2 * MEBIBYTE), st.integers(1, 2 * MOST_BYTES), st.just(0)
        ),
    ),
    min_size=1, max_size=6,
).map(lambda runs: [size for count, size in runs for _ in range(count)])  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES)
def test_every_row_is_in_one_shard(sizes):
    rows = Rows(row(number, size) for number, size in enumerate(sizes))
    plan = plan_of(rows)
    found = [*read_shards(rows, plan, lambda _: True)]
    assert [each for _, kept in found for each in kept] == rows
    assert [shard for shard, _ in found] == [*plan.shards]
    assert [shard.number for shard in plan.shards] == [*range(len(plan.shards))]
    assert cuts(plan) == [len(kept) for _, kept in found]
    assert plan.rows == len(rows)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES)
def test_shards_are_neither_large_nor_many(sizes):
    plan = plan_of(Rows(row(number, size) for number, size in enumerate(sizes)))
    total, start = sum(sizes), 0
    share = min(max(total / 64, MEBIBYTE), 256 * MEBIBYTE)
    for rows in cuts(plan):
        assert 1 <= rows <= MOST_ROWS
        of_shard = sum(sizes[start : start + rows])
        assert of_shard < share + CHUNK_BYTES + max(sizes)
        start += rows
    most = max(64, total // (256 * MEBIBYTE)) + len(sizes) // (MOST_ROWS - CHUNK_ROWS) + 1
    assert len(plan.shards) <= most


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_nothing_but_sizes_moves_a_cut(sizes, seed):
    first = Rows(row(number, size) for number, size in enumerate(sizes))
    second = Rows(
        row(
            number * 3 + seed, size, audio=f"/other/{seed}/{number}", stamp=(size, seed),
            system_prompt="s" * seed, user_prompt=None, prediction="long " * (number % 9), cells=("a",),
        )
        for number, size in enumerate(sizes)
    )  # fmt: skip
    assert cuts(plan_of(first)) == cuts(plan_of(second, "other identity"))


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (1, 1, [1]),
        (5000, 1, [4096, 904]),  # by rows
        (100, 32_000, [64, 36]),  # by bytes, in whole pieces of 64 rows
        (3, 300 * MEBIBYTE, [1, 1, 1]),  # larger than any limit
        (6, 4 * MEBIBYTE, [1] * 6),
    ],
)
def test_some_cuts(count, size, expected):
    assert cuts(plan_of(Rows(row(number, size) for number in range(count)))) == expected


@pytest.mark.parametrize(("hours", "shards"), [(1, 20), (100, 63), (1000, 426)])
def test_shards_of_a_large_corpus(hours, shards):
    """16-bit recordings of a minute."""
    rows = Rows(row(number, 60 * 32_000) for number in range(hours * 60))
    assert len(plan_of(rows).shards) == shards


def test_addresses_count_as_some_seconds_each():
    addresses = Rows(row(number, audio=f"https://x/{number}", stamp=(0, 0)) for number in range(300))
    assert cuts(plan_of(addresses)) == cuts(plan_of(Rows(row(n, URL_BYTES) for n in range(300))))
    assert len(plan_of(addresses).shards) > 1


def test_problems_are_in_no_shard():
    problems = [RowProblem(line, "audio", "x", Verbatim("bad", "坏")) for line in (3, 5)]
    rows = Rows([row(0), problems[0], row(2), problems[1]])
    plan = plan_of(rows)
    assert (plan.rows, plan.problems.first, plan.problems.count) == (2, problems, 2)
    assert [kept for _, kept in read_shards(rows, plan, lambda _: True)] == [[rows[0], rows[2]]]


def test_problems_alone():
    plan = plan_of(Rows([RowProblem(2, "audio", "x", Verbatim("bad", "坏"))]))
    assert (plan.shards, plan.problems.count) == ((), 1)


def test_no_row_at_all():
    with pytest.raises(InputError, match="no rows"):
        plan_of(Rows())


def test_every_usable_row_is_shown():
    shown: list[Row] = []
    rows = Rows([row(0), RowProblem(3, "audio", "x", Verbatim("bad", "坏")), row(2)])
    make_plan(rows, "identity", shown.append)
    assert shown == [rows[0], rows[2]]


# --- fingerprints ----------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Shards of four rows."""
    monkeypatch.setattr(room, "CHUNK_ROWS", 4)
    monkeypatch.setattr(room, "FEWEST_BYTES", 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "change",
    [
        {"audio": "/data/other.wav"}, {"stamp": (1000, 8)}, {"stamp": (1001, 7)}, {"system_prompt": ""},
        {"system_prompt": "s"}, {"user_prompt": None}, {"user_prompt": "what?"}, {"prediction": "x "},
        {"prediction": None}, {"prediction": ""}, {"line": 99}, {"user_prompt": "x", "prediction": "What?"},
    ],
    ids=str,
)  # fmt: skip
def test_a_changed_row_changes_its_shard(change):
    rows = Rows(map(row, range(12)))
    before = plan_of(rows)
    rows[5] = replace(rows[5], **change)
    after = plan_of(rows)
    assert cuts(before) == cuts(after) == [4, 4, 4]
    same = [old == new for old, new in zip(before.shards, after.shards, strict=True)]
    assert same == [True, False, True]
    assert before.fingerprint != after.fingerprint


def test_another_segment_changes_the_shard():
    segments = [Segment(), Segment(1.0), Segment(0.0, 1.0), Segment(channel=1), Segment(channel=2)]
    plans = [plan_of(Rows([row(0, segment=segment)])) for segment in segments]
    assert len({plan.shards[0].fingerprint for plan in plans}) == len(segments)


def test_rows_of_a_recording_stay_in_one_shard():
    """A second each, of files of 100 MB; the others are cut as ever."""
    rows = Rows(
        row(number, 10**8, audio=f"/data/{number // 500}.wav", segment=Segment(number, number + 1))
        for number in range(1500)
    )
    ends = [*itertools.accumulate(cuts(plan_of(rows)))]
    assert {500, 1000, 1500} >= {*ends} >= {1500}


@pytest.mark.usefixtures("small")
def test_rows_that_change_places_change_the_shard():
    rows = Rows(map(row, range(8)))
    before = plan_of(rows)
    rows[1], rows[2] = replace(rows[2], line=rows[1].line), replace(rows[1], line=rows[2].line)
    after = plan_of(rows)
    assert before.shards[0] != after.shards[0]
    assert before.shards[1] == after.shards[1]


@pytest.mark.usefixtures("small")
def test_another_identity_changes_all_shards():
    rows = Rows(map(row, range(8)))
    before, after = plan_of(rows), plan_of(rows, "other")
    assert not {shard.fingerprint for shard in before.shards} & {shard.fingerprint for shard in after.shards}
    assert before.fingerprint != after.fingerprint
    assert before == plan_of(Rows(map(row, range(8))))


@pytest.mark.usefixtures("small")
def test_a_row_less_changes_the_plan():
    """Also where the shards that are left are the same."""
    rows = Rows(map(row, range(8)))
    plan, less = plan_of(rows), plan_of(Rows(rows[:4]))
    assert plan.shards[:1] == less.shards
    assert plan.fingerprint != less.fingerprint


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        (tmp_path / f"{number}.wav").write_bytes(b"x" * (number + 1))
    return tmp_path


def manifest_of(text: str, base_dir: str | None = None) -> Manifest:
    Path("rows.csv").write_text(text, encoding="utf-8")
    return read_manifest("rows.csv", ConversionOptions(base_dir=base_dir), needs_prediction=True)


def csv_of(line: Callable[[int], str], header: str = "audio,prediction") -> str:
    return "\n".join([header, *map(line, range(12))]) + "\n"


@pytest.mark.parametrize(
    "way", ["other columns", "absolute paths", "a base folder", "a link", "another encoding"]
)
def test_what_does_not_matter(place, way):
    plain = csv_of(lambda n: f"{n}.wav,text {n}")
    expected = plan_of(manifest_of(plain))
    base_dir = None
    if way == "other columns":
        text = csv_of(lambda n: f"note {n},text {n},{n}.wav,more", "note,prediction,audio,x")
    elif way == "absolute paths":
        text = csv_of(lambda n: f'{place}/{n}.wav,"text {n}"')
    elif way == "a base folder":
        text, base_dir = plain, f"../{place.name}"
    elif way == "a link":
        (place / "link").symlink_to(place)
        text, base_dir = plain, "link/./link"
    else:
        text = "\ufeff" + plain.replace("\n", "\r\n")
    assert plan_of(manifest_of(text, base_dir)) == expected
    assert expected.rows == 12


def test_two_folders_that_a_shortened_path_would_confuse(place):
    """`link/..` is where the link leads, and not where it lies."""
    (place / "far/away").mkdir(parents=True)
    (place / "link").symlink_to("far/away")
    for folder in (place, place / "far"):
        (folder / "0.wav").write_bytes(b"x")
        os.utime(folder / "0.wav", ns=(1, 1))
    text = "audio,prediction\n0.wav,x\n"
    here, far, same = (plan_of(manifest_of(text, base_dir)) for base_dir in (".", "link/..", "far"))
    assert here.fingerprint != far.fingerprint
    assert far.fingerprint == same.fingerprint


# --- the second reading ----------------------------------------------------------------------------------


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("change", [touch, grow, Path.unlink, make_folder])
def test_a_recording_that_is_changed_meanwhile(place, change):
    manifest = manifest_of(csv_of(lambda n: f"{n}.wav,x"))
    plan = plan_of(manifest)
    change(place / "5.wav")
    found = read_shards(manifest, plan, lambda _: True)
    assert [each.line for each in next(found)[1]] == [2, 3, 4, 5]
    with pytest.raises(InputError) as caught:
        next(found)
    assert caught.value.message.en == "rows.csv: recordings were changed while it was being read; start again"
    assert caught.value.message.zh == "rows.csv：读取过程中有音频文件被修改；请重新运行"


@pytest.mark.usefixtures("small")
def test_a_csv_that_is_changed_meanwhile(place):
    manifest = manifest_of(csv_of(lambda n: f"{n}.wav,x"))
    plan = plan_of(manifest)
    manifest_of(csv_of(lambda n: f"{n}.wav,x and more"))
    with pytest.raises(InputError, match="the file was changed while it was being read"):
        next(read_shards(manifest, plan, lambda _: True))


@pytest.mark.usefixtures("small")
def test_shards_are_asked_for_and_read_one_by_one(place):
    manifest, asked = manifest_of(csv_of(lambda n: f"{n}.wav,x")), []
    plan = plan_of(manifest)

    def is_wanted(shard: Any) -> bool:
        asked.append(shard.number)
        return shard.number > 0

    found = read_shards(manifest, plan, is_wanted)
    assert asked == []
    shard, kept = next(found)
    assert (shard.number, [each.line for each in kept], asked) == (1, [6, 7, 8, 9], [0, 1])
    shard, kept = next(found)
    assert (shard.number, [each.line for each in kept], asked) == (2, [10, 11, 12, 13], [0, 1, 2])
    assert [*found] == []


# --- memory ----------------------------------------------------------------------------------------------


def memory_of_a_survey(rows: int) -> int:
    """The most bytes that Python has at a time."""
    with Path("rows.csv").open("w", encoding="utf-8") as file:
        file.write("audio,prediction\n")
        file.writelines(f"0.wav,this is the text of row {number}\n" for number in range(rows))
    manifest = read_manifest("rows.csv", ConversionOptions(), needs_prediction=True)
    tracemalloc.start()
    try:
        assert plan_of(manifest).rows == rows
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_hardly_grows_with_the_rows(place):
    """Under 16 bytes for a row more, where recordings are short; its text alone takes more than 80."""
    memory_of_a_survey(10)
    few, many = memory_of_a_survey(1_000), memory_of_a_survey(21_000)
    assert many - few < 16 * 20_000
