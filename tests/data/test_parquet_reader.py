"""Parquet with recordings in it: rows and dataset of a CSV, and nothing written to anybody's folder."""

import datetime
import io
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, load_from_disk

from mdl_toolkit.audio import embedded
from mdl_toolkit.audio.embedded import ParquetAudio
from mdl_toolkit.audio.loading import load
from mdl_toolkit.config.data import CheckOptions, ConversionOptions, SplitOptions
from mdl_toolkit.data.check.run import check
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.split import copied_content, split_dataset
from mdl_toolkit.errors import AudioError, InputError
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.run import train
from tests.support.inferences import infer_options, table
from tests.support.paths import MODEL
from tests.support.runs import convert, history, make_rows, train_options, write_csv

AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture
def rows(tmp_path):
    return make_rows(tmp_path / "audio", 5)


def write(path, rows, *, group=2, embedded=True, column="audio"):
    """A file with the bytes of the rows' recordings, or their paths alone, in groups of so many rows."""
    sound = [
        {"bytes": Path(row["audio"]).read_bytes() if embedded else None, "path": row["audio"]} for row in rows
    ]
    others = {name: [row[name] for row in rows] for name in rows[0] if name != "audio"}
    table = pa.table({column: pa.array(sound, AUDIO), **others})
    pq.write_table(table, path, row_group_size=group)
    return path


def rows_of(path, **changes):
    manifest = read_manifest(path, ConversionOptions(**changes), needs_prediction=True)
    return [(row.line, row.audio, row.user_prompt, row.prediction) for row in manifest.rows()]


def same_rows(one, other):
    one, other = (load_from_disk(str(each)).remove_columns("line").to_list() for each in (one, other))
    return one == other


@pytest.mark.parametrize(("group", "embedded"), [(1, True), (2, True), (99, True), (2, False)])
def test_the_dataset_is_that_of_the_csv(tmp_path, rows, capsys, group, embedded):
    file = write(tmp_path / "a.parquet", rows, group=group, embedded=embedded)
    before = {path.name for path in tmp_path.iterdir()}
    one = convert(write_csv(tmp_path / "a.csv", rows), MODEL, tmp_path / "one")
    two = convert(file, MODEL, tmp_path / "two")
    assert same_rows(one, two)
    assert load_from_disk(str(two))["line"][:] == [1, 2, 3, 4, 5]
    assert f"{file}: taken for Parquet, whose rows are counted as lines\n" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before | {"a.csv", "one", "two"}


def test_what_hugging_face_s_library_writes_is_read(tmp_path, rows):
    values = {name: [row[name] for row in rows] for name in rows[0]}
    made = Dataset.from_dict(values).cast_column("audio", Audio(decode=False))
    made.map(
        lambda row: {"audio": {**row["audio"], "bytes": Path(row["audio"]["path"]).read_bytes()}}
    ).to_parquet(str(tmp_path / "a.parquet"))
    assert same_rows(
        convert(tmp_path / "a.parquet", MODEL, tmp_path / "one"),
        convert(write_csv(tmp_path / "a.csv", rows), MODEL, tmp_path / "two"),
    )


def test_a_training_is_that_of_the_csv(tmp_path, rows):
    for name, data in (
        ("one", write_csv(tmp_path / "a.csv", rows)), ("two", write(tmp_path / "a.parquet", rows)),
    ):  # fmt: skip
        train(train_options(data, MODEL, tmp_path / name, merge_lora=False))
    assert history(tmp_path / "one") == history(tmp_path / "two")


def test_answers_and_parts_name_recordings_that_can_be_read_again(tmp_path, rows):
    file = write(tmp_path / "a.parquet", rows, column="speech")
    infer(infer_options(file, MODEL, tmp_path / "out.csv"))
    answers = table(tmp_path / "out.csv")
    assert [row["audio"] for row in answers] == [f"{file}#{number}" for number in range(1, 6)]
    infer(infer_options(write_csv(tmp_path / "a.csv", rows), MODEL, tmp_path / "csv.csv"))
    assert [row["prediction"] for row in answers] == [
        row["prediction"] for row in table(tmp_path / "csv.csv")
    ]
    for number, row in enumerate(rows, 1):
        assert (load(f"{file}#{number}").samples == load(row["audio"]).samples).all()
    # The third is a copy of the first: both go to one side.
    copies = write(tmp_path / "b.parquet", [rows[0], rows[1], rows[0], rows[2]], group=1)
    parts = split_dataset(SplitOptions(input=str(copies), output=str(tmp_path / "parts"), eval=0.4, seed=1))
    sides = [{row["audio"].partition("#")[2] for row in table(part)} for part in parts.values()]
    assert any({"1", "3"} <= side for side in sides)
    check(CheckOptions(input=tuple(map(str, parts.values())), model_name=str(MODEL)))


def test_rows_are_read_in_any_order_and_few_at_once(tmp_path, rows):
    file = write(tmp_path / "a.parquet", rows * 8, group=30)
    reader = ParquetAudio(str(file))
    for number in [40, 1, 17, 18, 35, 34, 16, 31]:
        assert reader.read(number) == Path(rows[(number - 1) % 5]["audio"]).read_bytes()
    assert len(reader) == 40


def test_a_read_that_fails_gives_nobody_another_recording(tmp_path, rows, monkeypatch):
    file = write(tmp_path / "a.parquet", rows * 8, group=40)
    whole = pq.ParquetFile.iter_batches

    def failing(*given):
        for number, batch in enumerate(whole(*given)):
            if number == 1:
                raise OSError("Input/output error")
            yield batch

    reader = ParquetAudio(str(file))
    with monkeypatch.context() as context:
        context.setattr(pq.ParquetFile, "iter_batches", failing)
        assert reader.read(1)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                reader.read(18)
    for number in (18, 19, 33, 1):
        assert reader.read(number) == Path(rows[(number - 1) % 5]["audio"]).read_bytes()


def test_long_recordings_are_held_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "BATCH_BYTES", 1 << 20, raising=False)
    sound = [random.randbytes(1 << 20) for _ in range(16)]
    values = pa.array([{"bytes": each, "path": None} for each in sound], AUDIO)
    form = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
    pq.write_table(pa.table({"audio": values}), tmp_path / "a.parquet", **form)
    reader = ParquetAudio(str(tmp_path / "a.parquet"))
    before = pa.total_allocated_bytes()
    for number, each in enumerate(sound, 1):
        assert reader.read(number) == each
        assert pa.total_allocated_bytes() - before < 6 << 20


def test_copies_are_looked_for_in_the_order_of_the_file(tmp_path, rows, monkeypatch):
    file = write(tmp_path / "a.parquet", rows * 4, group=20)
    read, asked = ParquetAudio.read, []

    def noted(self, row):
        asked.append(row)
        return read(self, row)

    monkeypatch.setattr(ParquetAudio, "read", noted)
    alike = copied_content([f"{file}#{number}" for number in range(1, 21)])
    assert asked == [*range(1, 21)]
    assert alike[:5] == alike[5:10]


def test_shards_are_one_table_by_their_first(tmp_path, rows):
    for number, part in enumerate((rows[:2], rows[2:])):
        write(tmp_path / f"train-0000{number}-of-00002.parquet", part)
    found = rows_of(tmp_path / "train-00000-of-00002.parquet")
    assert [(line, Path(audio).name) for line, audio, *_ in found] == [
        (number, f"train-0000{shard}-of-00002.parquet#{row}")
        for number, shard, row in ((1, 0, 1), (2, 0, 2), (3, 1, 1), (4, 1, 2), (5, 1, 3))
    ]
    assert len(rows_of(tmp_path / "train-00001-of-00002.parquet")) == 3
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(
        InputError, match=r"1 of 2 shards is missing, the first is train-00001-of-00002\.parquet"
    ):
        rows_of(tmp_path / "train-00000-of-00002.parquet")


def test_values_are_text(tmp_path, rows):
    values = {
        "audio": [row["audio"] for row in rows[:2]],
        "prediction": ["0012", "a\nb"],
        "day": [datetime.date(2026, 1, 2), None],
        "count": [3, None],
        "share": [0.5, 1.0],
        "is_good": [True, False],
        "tags": [["x", "y"], []],
        "picture": [b"\x00", b"\x01"],
    }
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    manifest = read_manifest(tmp_path / "a.parquet", ConversionOptions(), needs_prediction=True)
    assert manifest.columns == ("audio", "prediction", "day", "count", "share", "is_good", "tags")
    assert [row.cells[1:] for row in manifest.rows()] == [
        ("0012", "2026-01-02", "3", "0.5", "true", '["x", "y"]'),
        ("a\nb", "", "", "1.0", "false", "[]"),
    ]


def test_chats_are_read_as_in_json(tmp_path, rows):
    turns = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "Rain."}]
    sound = [{"bytes": Path(rows[0]["audio"]).read_bytes(), "path": "x.wav"}]
    table = pa.table({"messages": [turns], "audio": pa.array(sound, AUDIO)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(1, f"{tmp_path / 'a.parquet'}#1", "What?", "Rain.")]


def test_what_is_wrong_is_said(tmp_path, rows):
    good = write(tmp_path / "good.parquet", rows).read_bytes()
    for name, content, said in (
        ("cut.parquet", good[: len(good) // 2], r"cut\.parquet: cannot be read as Parquet"),
        ("other.bin", good, r"other\.bin: a file with recordings in it is to be called \.parquet"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=said):
            rows_of(tmp_path / name)
    damaged = [{"bytes": b"no sound at all" * 9, "path": "x"}, {"bytes": b"", "path": "y"}]
    table = pa.table({"audio": pa.array(damaged, AUDIO), "prediction": ["x", "y"]})
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(InputError) as refused:
        convert(tmp_path / "bad.parquet", MODEL, tmp_path / "out")
    assert "line 1, column audio" in refused.value.message.en
    assert "row 2 of the Parquet file holds no bytes" in refused.value.message.en
    paths = [str(tmp_path / "good.parquet#9"), str(tmp_path / "gone.parquet#1")]
    csv = write_csv(tmp_path / "a.csv", [{"audio": path, "prediction": "x"} for path in paths])
    with pytest.raises(InputError) as refused:
        convert(csv, MODEL, tmp_path / "out")
    assert "the file has 5 rows; correct the number" in refused.value.message.en
    assert "line 3, column audio" in refused.value.message.en
    with pytest.raises(AudioError, match="cannot be opened"):
        load(tmp_path / "gone.parquet#1")
    with pytest.raises(AudioError, match="the file has 5 rows"):
        load(tmp_path / "good.parquet#9")


def test_a_reference_into_what_holds_no_recordings_is_refused(tmp_path, rows):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "folder.parquet").mkdir()
    paths = [str(tmp_path / f"{name}.parquet#1") for name in ("text", "pipe", "folder")]
    csv = write_csv(tmp_path / "a.csv", [{"audio": path, "prediction": "x"} for path in paths])
    with pytest.raises(InputError) as refused:
        convert(csv, MODEL, tmp_path / "out")
    said = refused.value.message.en.splitlines()[1:]
    for line, words in zip(
        said, ("no column of the file", "device or pipe", "this is a folder"), strict=True
    ):
        assert words in line


def test_a_row_without_audio_among_paths_is_its_own_problem(tmp_path, rows):
    sound = [{"bytes": None, "path": rows[0]["audio"]}, None]
    table = pa.table({"audio": pa.array(sound, AUDIO), "prediction": ["x", "y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="line 2, column audio .*row 2 of the Parquet file holds no bytes"):
        convert(tmp_path / "a.parquet", MODEL, tmp_path / "out")


def test_a_file_with_such_a_name_is_itself(tmp_path, rows):
    named = tmp_path / "a.parquet#1"
    named.write_bytes(Path(rows[0]["audio"]).read_bytes())
    assert (load(named).samples == load(rows[0]["audio"]).samples).all()
    csv = write_csv(tmp_path / "a.csv", [{"audio": str(named), "prediction": "x"}])
    assert rows_of(csv) == [(2, str(named), None, "x")]


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, rows):
    file = write(tmp_path / "a.parquet", rows)
    manifest = read_manifest(file, ConversionOptions(), needs_prediction=True)
    buffer = io.BytesIO()
    write(buffer, rows[:3])
    file.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="was changed while it was being read"):
        list(manifest)
