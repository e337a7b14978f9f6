"""What is written to disk comes back, through us and through `datasets`; what is damaged is refused."""

import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.audio.flac import PackedAudio, pack_audio, unpack_audio
from mdl_toolkit.cli.main import run
from mdl_toolkit.data import dataset_writer
from mdl_toolkit.data.dataset import (
    RECORD_FILE,
    ConvertedDataset,
    Record,
    is_converted,
)
from mdl_toolkit.data.dataset_writer import ShardWriter, check_output, shard_name, write_metadata
from mdl_toolkit.data.tokenization import Tokens
from mdl_toolkit.errors import DatasetError, InputError
from mdl_toolkit.utils.files import check_apart, replace_folder
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles
from tests.support.paths import MODEL
from tests.support.runs import files_below, make_csv
from tests.support.waves import wave

RECORD = Record("0123456789abcdef", "fedcba9876543210", "Be brief.", None, toolkit="1.0")
BESIDE = {"state.json", "dataset_info.json", "mdl-toolkit.json"}

# --- audio -----------------------------------------------------------------------------------------------

INT16 = st.lists(st.integers(-32768, 32767), min_size=1, max_size=200)


@settings(max_examples=300, deadline=None)
@given(samples=INT16, quieter=st.integers(0, 15))
def test_16_bit_recordings_are_kept_exactly(samples, quieter):
    waveform = (np.array(samples) >> quieter).astype(np.float32) / np.float32(32768)
    assert_exact(waveform)


@pytest.mark.parametrize("extreme", [[-32768], [32767], [-32768, 32767], [0], [1], [-1], [-32768] * 3200])
def test_extremes_are_kept_exactly(extreme):
    assert_exact(np.array(extreme, np.float32) / np.float32(32768))


def assert_exact(waveform: np.ndarray) -> None:
    packed = pack_audio(waveform)
    assert len(packed.data) <= 2 * len(waveform)
    again = unpack_audio(packed)
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, waveform)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 100),
    length=st.integers(1, 600),
    exponent=st.integers(-90, 90),
    fraction=st.floats(1, 2, width=32),
)
def test_other_recordings_are_rounded_once(seed, length, exponent, fraction):
    """To half a step at any level, from a whisper to far above full scale; 70 dB below the peak or better."""
    shape = np.random.default_rng(seed).uniform(-1, 1, length)
    waveform = (shape / np.abs(shape).max() * fraction * 2.0**exponent).astype(np.float32)
    packed = pack_audio(waveform)
    assert len(packed.data) <= 2 * length
    assert packed.length == length
    error = np.abs(unpack_audio(packed).astype(np.float64) - waveform).max()
    assert error <= packed.scale / 32768 / 2
    assert error <= np.abs(waveform).max() * 10 ** (-70 / 20)


@pytest.mark.parametrize(
    "peak", [1.0, 1 - 2**-17, 1 + 2**-20, 1.99999, 2.0, 30.0, -1.0, -1.00001, -2.0, -4.1]
)
def test_nothing_is_clipped(peak):
    waveform = np.array([peak, peak / 2, -peak / 3], np.float32)
    packed = pack_audio(waveform)
    assert np.abs(unpack_audio(packed) - waveform).max() <= packed.scale / 32768 / 2


def test_silence():
    assert unpack_audio(pack_audio(np.zeros(3200, np.float32))).tolist() == [0.0] * 3200
    assert pack_audio(np.zeros(3200, np.float32)).format == "flac"


def test_flac_is_flac():
    waveform = wave(16_000, 1)
    packed = pack_audio(waveform)
    assert packed.format == "flac"
    about = soundfile.info(io.BytesIO(packed.data))
    assert (about.format, about.subtype, about.samplerate, about.channels, about.frames) == (
        "FLAC", "PCM_16", 16_000, 1, 16_000,
    )  # fmt: skip
    samples, _ = soundfile.read(io.BytesIO(packed.data))
    np.testing.assert_allclose(samples * packed.scale, waveform, atol=packed.scale / 32768)


def test_noise_is_stored_plainly():
    noise = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.float32) / 32768
    packed = pack_audio(noise)
    assert (packed.format, len(packed.data)) == ("pcm16", 8000)
    np.testing.assert_array_equal(np.frombuffer(packed.data, "<i2"), noise * 32768)


@pytest.mark.parametrize("kind", ["flac", "pcm16"])
def test_damaged_bytes(kind):
    with pytest.raises(ValueError, match=r"."):
        unpack_audio(PackedAudio(b"x" * 101, kind, 1.0, 50))
    good = pack_audio(wave(3200, 0)) if kind == "flac" else PackedAudio(bytes(6400), kind, 1.0, 3200)
    with pytest.raises(ValueError, match="3200 of 3201 samples"):
        unpack_audio(replace(good, length=3201))


# --- writing and reading ---------------------------------------------------------------------------------

Rows = list[tuple[Tokens, np.ndarray]]


def make_rows(count: int) -> Rows:
    rows = []
    for number in range(count):
        ids = np.arange(3 + number % 7, dtype=np.int32) + number
        labels = np.where(np.arange(len(ids)) < 2, -100, ids).astype(np.int32)
        rows.append((Tokens(ids, labels), np.rint(wave(3200 + 10 * number, number) * 32768) / 32768))
    return [(tokens, samples.astype(np.float32)) for tokens, samples in rows]


def write(folder: Path, rows: Rows, rows_per_shard: int = 10**9) -> Path:
    folder.mkdir()
    starts = range(0, len(rows), rows_per_shard)
    total = 0
    for number, start in enumerate(starts):
        writer = ShardWriter(folder / shard_name(number, len(starts)))
        for tokens, waveform in rows[start : start + rows_per_shard]:
            writer.append(tokens, pack_audio(waveform))
        total += writer.close()
    assert total == sum(file.stat().st_size for file in folder.iterdir())
    write_metadata(folder, len(starts), replace(RECORD, rows=len(rows)))
    return folder


def assert_equal(dataset: ConvertedDataset, rows: Rows) -> None:
    assert len(dataset) == dataset.record.rows == len(rows)
    for index, (tokens, waveform) in enumerate(rows):
        sample = dataset[index]
        np.testing.assert_array_equal(sample.input_ids, tokens.input_ids)
        np.testing.assert_array_equal(sample.labels, tokens.labels)
        np.testing.assert_array_equal(sample.waveform, waveform)
        assert sample.input_ids.dtype == sample.labels.dtype == np.int32
        assert sample.waveform.dtype == np.float32
    assert dataset.token_counts.tolist() == [len(tokens.input_ids) for tokens, _ in rows]
    assert dataset.audio_lengths.tolist() == [len(waveform) for _, waveform in rows]


@pytest.mark.parametrize(
    ("count", "rows_per_shard", "shards"),
    [(1, 10**9, 1), (5, 1, 5), (31, 10**9, 1), (32, 10**9, 1), (33, 10**9, 1), (70, 20, 4)],
)
def test_rows_come_back_in_order(tmp_path, count, rows_per_shard, shards):
    rows = make_rows(count)
    folder = write(tmp_path / "data", rows, rows_per_shard)
    names = sorted(files_below(folder) - BESIDE)
    assert len(names) == shards
    assert names == [f"data-{i:05d}-of-{len(names):05d}.arrow" for i in range(len(names))]
    assert_equal(ConvertedDataset(folder), rows)


def test_long_recordings_are_written_in_small_batches(tmp_path, monkeypatch):
    """An Arrow column holds at most 2 GiB of bytes per batch."""
    rows = make_rows(7)
    monkeypatch.setattr(dataset_writer, "BATCH_BYTES", 10_000)
    folder = write(tmp_path / "data", rows)
    with pa.ipc.open_stream((folder / "data-00000-of-00001.arrow").read_bytes()) as stream:
        sizes = [batch.column("audio").nbytes for batch in stream]
    assert len(sizes) > 2
    assert max(sizes) < 10_000 + 2 * len(rows[-1][1])
    assert_equal(ConvertedDataset(folder), rows)


@pytest.mark.parametrize(("count", "rows_per_shard"), [(3, 10**9), (70, 20)])
def test_datasets_opens_it(tmp_path, count, rows_per_shard):
    import datasets

    rows = make_rows(count)
    opened = datasets.load_from_disk(str(write(tmp_path / "data", rows, rows_per_shard)))
    packed = [pack_audio(waveform) for _, waveform in rows]
    assert opened.to_dict() == {
        "input_ids": [tokens.input_ids.tolist() for tokens, _ in rows],
        "labels": [tokens.labels.tolist() for tokens, _ in rows],
        "audio": [each.data for each in packed],
        "audio_format": [each.format for each in packed],
        "audio_scale": [each.scale for each in packed],
        "audio_length": [each.length for each in packed],
    }
    assert opened.features == datasets.Features(
        input_ids=datasets.List(datasets.Value("int32")),
        labels=datasets.List(datasets.Value("int32")),
        audio=datasets.Value("binary"),
        audio_format=datasets.Value("string"),
        audio_scale=datasets.Value("float32"),
        audio_length=datasets.Value("int64"),
    )


def test_datasets_tells_two_of_them_apart(tmp_path):
    """It names what it caches by the fingerprint."""
    prints = set()
    for number, record in enumerate((RECORD, replace(RECORD, seconds=1.5), replace(RECORD, text_tokens=3))):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_metadata(folder, 1, record)
        prints.add(json.loads((folder / "state.json").read_text())["_fingerprint"])
    assert len(prints) == 3


def test_writing_twice_gives_the_same_bytes(tmp_path):
    rows = make_rows(40)
    first, second = (write(tmp_path / name, rows, 15) for name in "ab")
    assert files_below(first) == files_below(second)
    for name in files_below(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_data_loader_worker_reads_the_same(tmp_path):
    rows = make_rows(40)
    dataset = ConvertedDataset(write(tmp_path / "data", rows, 15))
    assert_equal(dataset, rows)
    sent = pickle.dumps(dataset)
    assert len(sent) < 2000
    assert_equal(pickle.loads(sent), rows)


def test_no_row_beyond_the_ends(tmp_path):
    dataset = ConvertedDataset(write(tmp_path / "data", make_rows(3)))
    assert len(list(dataset)) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset[index]


def test_a_full_disk(tmp_path):
    folder = tmp_path / "data"
    with pytest.raises(DatasetError) as caught, at_most(50_000):
        write(folder, make_rows(40))
    assert caught.value.message.en.startswith(f"{folder}: cannot be written: ")
    assert not is_converted(folder)


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file may become larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- the record ------------------------------------------------------------------------------------------


FILES = TokenizerFiles('{"a": 1, "b": 2}', "{{ x }}", ())
RECORD_OF_FILES = replace(
    RECORD, tokenizer=FILES.tokenizer_fingerprint, chat_template=FILES.template_fingerprint
)


@pytest.mark.parametrize("tokenizer", ['{"a": 1, "b": 2}', '{"b":2,\n "a":1}'])
def test_the_same_text_side_is_accepted_however_it_is_written(tokenizer):
    RECORD_OF_FILES.check_model(replace(FILES, tokenizer=tokenizer), "data")


@pytest.mark.parametrize(
    ("other", "what", "what_zh"),
    [
        (replace(FILES, tokenizer='{"a": 2, "b": 2}'), "tokenizer", "分词器"),
        (replace(FILES, chat_template="{{ y }}"), "chat template", "对话模板"),
    ],
)
def test_another_text_side_is_refused(other, what, what_zh):
    with pytest.raises(DatasetError) as caught:
        RECORD_OF_FILES.check_model(other, "data")
    name = {"tokenizer": "tokenizer_fingerprint", "chat template": "template_fingerprint"}[what]
    ours, theirs = getattr(FILES, name), getattr(other, name)
    assert ours != theirs
    assert caught.value.message.en == (
        f"data was converted with another {what} ({ours}) than the model's ({theirs}); "
        "convert it again with this model"
    )
    assert all(part in caught.value.message.zh for part in (what_zh, ours, theirs))


# --- damage ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A good dataset of 40 rows in two batches of one shard."""
    return write(tmp_path / "data", make_rows(40))


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))

    return change


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(part: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / ARROW).read_bytes()
        (folder / ARROW).write_bytes(content[: int(len(content) * part)])

    return change


def keep_one_batch(folder: Path) -> None:
    """As if the writer had been stopped exactly between two batches."""
    with pa.ipc.open_stream((folder / ARROW).read_bytes()) as stream:
        schema, batch = stream.schema, stream.read_next_batch()
    with pa.OSFile(str(folder / ARROW), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_batch(batch.slice(0, 32))


def other_columns(folder: Path) -> None:
    table = pa.table({"input_ids": [[1]] * 40, "labels": [[1]] * 40})
    with pa.OSFile(str(folder / ARROW), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


ARROW = "data-00000-of-00001.arrow"
INCOMPLETE = "not a complete dataset written by convert-dataset; convert again"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, INCOMPLETE),
    "no state": (lambda folder: (folder / "state.json").unlink(), INCOMPLETE),
    "no record": (lambda folder: (folder / RECORD_FILE).unlink(), INCOMPLETE),
    "no data": (lambda folder: (folder / ARROW).unlink(), ARROW),
    "empty data": (put(ARROW, b""), "damaged"),
    "other data": (put(ARROW, b"RIFF" * 1000), "damaged"),
    "data cut in the header": (cut(0.001), "damaged"),
    "data cut in the middle": (cut(0.5), "damaged"),
    "data cut near the end": (cut(0.99), "damaged"),
    "data cut between batches": (keep_one_batch, "32 rows, 40 recorded"),
    "other columns": (other_columns, "columns ['input_ids', 'labels']"),
    "more rows recorded": (change_json(RECORD_FILE, rows=41), "40 rows, 41 recorded"),
    "another format": (change_json(RECORD_FILE, format=2), "format 2, this version reads 1"),
    "another format with news": (
        change_json(RECORD_FILE, format=2, news="!"),
        "format 2, this version reads 1",
    ),
    "an unknown key": (change_json(RECORD_FILE, news="!"), "news"),
    "a record without format": (put(RECORD_FILE, b"{}"), "format"),
    "a record that lacks keys": (put(RECORD_FILE, b'{"format": 1}'), "tokenizer"),
    "a record that is a list": (put(RECORD_FILE, b"[1]"), "damaged"),
    "a record that is no JSON": (put(RECORD_FILE, b'{"rows": 4'), "damaged"),
    "a record that is no text": (put(RECORD_FILE, b"\xff\xfe\x00"), "damaged"),
    "a state without files": (put("state.json", b"{}"), "_data_files"),
    "a state that is a list": (put("state.json", b"[]"), "damaged"),
    "a state with no names": (change_json("state.json", _data_files=[{"filename": None}]), "damaged"),
    "a state that names the folder": (change_json("state.json", _data_files=[{"filename": ".."}]), "damaged"),
    "a state that names nothing": (change_json("state.json", _data_files=[{"filename": ""}]), "damaged"),
    "no files at all": (change_json("state.json", _data_files=[]), "0 rows, 40 recorded"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused_in_one_sentence(folder, damage, reason):
    ConvertedDataset(folder)
    damage(folder)
    with pytest.raises(DatasetError) as caught:
        ConvertedDataset(folder)
    en, zh = caught.value.message.en, caught.value.message.zh
    assert en.startswith(f"{folder}: ")
    assert zh.startswith(f"{folder}：")
    assert reason in en
    assert en.endswith("convert again")
    assert zh.endswith("请重新转换")
    assert "\n" not in en + zh


def test_a_damaged_recording_is_named_when_it_is_read(folder):
    content = bytearray((folder / ARROW).read_bytes())
    place = content.index(b"fLaC", content.index(b"fLaC") + 4)  # the second row's
    content[place : place + 4] = b"xxxx"
    (folder / ARROW).write_bytes(content)
    dataset = ConvertedDataset(folder)
    assert len(dataset[0].waveform) == 3200
    with pytest.raises(DatasetError, match=r"the dataset is damaged \(row 1: .*\); convert again"):
        dataset[1]


def test_names_do_not_lead_out_of_the_folder(folder, tmp_path):
    secret = write(tmp_path / "secret", make_rows(40)) / ARROW
    secret.rename(tmp_path / "secret.arrow")
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow")):
        change_json("state.json", _data_files=[{"filename": name}])(folder)
        with pytest.raises(DatasetError, match="damaged"):
            ConvertedDataset(folder)
    change_json("state.json", _data_files=[{"filename": f"/elsewhere/{ARROW}"}])(folder)
    assert_equal(ConvertedDataset(folder), make_rows(40))


# --- putting in place ------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, str]:
    """Everything below a folder, hidden files and empty folders too."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def fill(work: Path) -> None:
    (work / "new").write_text("new")


def test_a_new_output(tmp_path):
    with replace_folder(tmp_path / "out") as work:
        assert list(work.iterdir()) == []
        assert work.parent == tmp_path
        fill(work)
        assert not (tmp_path / "out").exists()
    assert content(tmp_path) == {"out": "folder", "out/new": "new"}


@pytest.fixture
def old(tmp_path):
    """An output with something in it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    (tmp_path / "out/.hidden").write_text("hidden")
    return tmp_path / "out"


def test_an_output_is_replaced_whole(old, tmp_path):
    with replace_folder(old) as work:
        fill(work)
        assert (old / "old").read_text() == "old"
    assert content(tmp_path) == {"out": "folder", "out/new": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(old, tmp_path, error):
    before = content(tmp_path)
    with pytest.raises(error):
        fail(old, error)
    assert content(tmp_path) == before


def fail(output: Path, error: type[BaseException]) -> None:
    with replace_folder(output) as work:
        fill(work)
        raise error


def test_a_failure_leaves_no_new_folders(tmp_path):
    with pytest.raises(ValueError, match=r"^$"):
        fail(tmp_path / "a/b/out", ValueError)
    assert content(tmp_path) == {}
    with replace_folder(tmp_path / "a/b/out") as work:
        fill(work)
    assert content(tmp_path) == {"a": "folder", "a/b": "folder", "a/b/out": "folder", "a/b/out/new": "new"}


def test_what_cannot_be_put_in_place_leaves_what_was_there(old, tmp_path):
    before = content(tmp_path)
    with pytest.raises(FileNotFoundError), replace_folder(old) as work:
        shutil.rmtree(work)
    assert content(tmp_path) == before


def test_a_link_is_followed_and_stays(old, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere/link"
    link.symlink_to(old)
    with replace_folder(link) as work:
        fill(work)
    assert link.is_symlink()
    assert content(tmp_path / "out") == {"new": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


def test_the_current_directory(old, monkeypatch):
    monkeypatch.chdir(old)
    with replace_folder(Path()) as work:
        fill(work)
    assert content(old) == {"new": "new"}


def test_what_a_killed_process_left_behind_is_in_nobody_s_way(old, tmp_path):
    """Process numbers come again, in containers soon: each work folder has a name of its own."""
    with replace_folder(old) as first:
        kept = first.with_name("kept")
        shutil.copytree(first, kept)
        with replace_folder(old) as second:
            assert first != second
            fill(second)
        fill(first)
    assert content(old) == {"new": "new"}


@pytest.mark.parametrize("is_moved_away", [False, True])
def test_what_a_killed_process_left_behind_is_removed_or_put_back(old, tmp_path, is_moved_away):
    before = content(old)
    (tmp_path / ".out.partial-0123abcd").mkdir()
    (tmp_path / ".out.partial-0123abcd/half").write_text("half")
    if is_moved_away:
        old.rename(tmp_path / ".out.old-0123abcd")
    else:
        shutil.copytree(old, tmp_path / ".out.old-4567abcd")
    others = {".out.partial-mine", ".output.partial-0123abcd"}
    for name in others:
        (tmp_path / name).mkdir()
    with replace_folder(old) as work:
        assert content(old) == before
        fill(work)
    assert content(old) == {"new": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"} | others


def test_an_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError), replace_folder(tmp_path / "file/out"):
        pass
    assert content(tmp_path) == {"file": "x"}


# --- which outputs are refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "source", "fine"),
    [
        ("a", "a", False),
        ("a", "a/b/c.csv", False),
        ("a/b", "a", False),
        ("a/x/../b", "a/b", False),
        ("link", "a", False),
        ("link/b", "a", False),
        ("a", "ab", True),
        ("ab", "a", True),
        ("a/b", "a/c", True),
        ("new", "a/c.csv", True),
    ],
)
def test_outputs_apart_from_inputs(tmp_path, monkeypatch, output, source, fine):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    for first, second in ((output, source), (str(tmp_path / output), source)):
        if fine:
            check_apart(Path(first), Path(second))
        else:
            with pytest.raises(InputError) as caught:
                check_apart(Path(first), Path(second))
            assert caught.value.message.en.startswith(f"--output {first}: ")
            assert second in caught.value.message.en


# --- datasets of 0.1.0 -----------------------------------------------------------------------------------


def save_as_0_1_0(folder: Path) -> Path:
    """Write two padded rows as mdl-toolkit 0.1.0 did, with `datasets` and these columns."""
    import datasets
    from datasets import List, Value

    datasets.disable_progress_bars()
    columns = datasets.Features(
        input_ids=List(Value("int64")),
        attention_mask=List(Value("int64")),
        input_values=List(Value("float32")),
        audio_length=Value("int64"),
        labels=List(Value("int64")),
    )
    row = {"attention_mask": [0, 1, 1], "input_values": [0.5] * 3200, "labels": [-100, -100, 7]}
    rows = [{**row, "input_ids": [0, 6, word], "audio_length": 3200} for word in (7, 8)]
    datasets.Dataset.from_list(rows, features=columns).save_to_disk(folder)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_of_0_1_0_is_refused_with_the_command_that_converts_its_csv_again(tmp_path, capsys):
    """The command is run as it stands there, with names in place of its three capital words."""
    old, csv = save_as_0_1_0(tmp_path / "old"), make_csv(tmp_path, 2)
    before = contents(old)
    words = [
        "train",
        "--train-dataset",
        str(old),
        "--model-name",
        str(MODEL),
        "--output",
        str(tmp_path / "run"),
    ]
    assert run(words) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("convert its CSV again") == said.count(str(old)) == 1
    assert "mdl-toolkit 0.1.0" in said
    assert contents(old) == before
    assert not (tmp_path / "run").exists()
    with pytest.raises(DatasetError) as caught:
        ConvertedDataset(old)
    texts = (caught.value.message.en, caught.value.message.zh)
    (command,) = {re.split("[:：]", text)[-1].strip() for text in texts}
    given = {"CSV": csv, "NEW": tmp_path / "new", "MODEL": MODEL}
    program, *words = [str(given.get(word, word)) for word in shlex.split(command)]
    assert program == "mdl-toolkit"
    assert run(words) == 0
    assert len(ConvertedDataset(tmp_path / "new")) == 2


@pytest.mark.parametrize(
    "content", [None, "", "null", "[]", "{}", '{"features": null}', '{"features": {"labels": {}}}']
)
def test_other_folders_are_not_taken_for_one_of_0_1_0(tmp_path, content):
    if content is not None:
        (tmp_path / "dataset_info.json").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match="not a complete dataset written by convert-dataset"):
        ConvertedDataset(tmp_path)


# --- outputs ---------------------------------------------------------------------------------------------


def test_outputs_that_may_be_replaced(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (folder / "cache-1.arrow").write_text("what `datasets` leaves")
    for name in ("new", "empty", "link", "dangling", "data"):
        check_output(tmp_path / name)


def test_outputs_that_may_not(folder, tmp_path):
    (folder / "state.json").unlink()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/.x").touch()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in (folder, tmp_path, *(tmp_path / name for name in ("hidden", "file", "pipe"))):
        with pytest.raises(InputError, match=f"--output {path}: something else than a converted dataset"):
            check_output(path)


def test_a_mounted_folder_cannot_be_replaced():
    with pytest.raises(InputError, match="--output /: a mounted folder cannot be replaced"):
        check_output(Path("/"))
