"""What is written to disk comes back, through us and through `datasets`; what is damaged is refused."""

import json
import os
import pickle
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mdl_toolkit.audio.flac import pack_audio
from mdl_toolkit.config.yaml import SETTINGS_FILE
from mdl_toolkit.data import dataset_writer
from mdl_toolkit.data.dataset import (
    RECORD_FILE,
    ConvertedDataset,
    Record,
    is_converted,
)
from mdl_toolkit.data.dataset_writer import ShardWriter, check_output, shard_name, write_metadata
from mdl_toolkit.data.tokenization import ChatTokenizer, Tokens
from mdl_toolkit.errors import DatasetError, InputError
from mdl_toolkit.model import MiDashengLMConfig
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles, read_tokenizer_files
from tests.support.paths import MODEL
from tests.support.runs import files_below
from tests.support.waves import wave

RECORD = Record("0123456789abcdef", "fedcba9876543210", "Be brief.", None, toolkit="1.0")
BESIDE = {"state.json", "dataset_info.json", "mdl-toolkit.json"}

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
    total, checksums = 0, []
    for number, start in enumerate(starts):
        writer = ShardWriter(folder / shard_name(number, len(starts)))
        for index, (tokens, waveform) in enumerate(rows[start : start + rows_per_shard], start):
            writer.append(3 * index + 4, tokens, pack_audio(waveform))
        size, crc32 = writer.close()
        total += size
        checksums.append(crc32)
    assert total == sum(file.stat().st_size for file in folder.iterdir())
    write_metadata(folder, checksums, replace(RECORD, rows=len(rows)))
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
    assert [dataset.line(index) for index in range(len(rows))] == [*range(4, 4 + 3 * len(rows), 3)]
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
        "line": [*range(4, 4 + 3 * count, 3)],
    }
    assert opened.features == datasets.Features(
        input_ids=datasets.List(datasets.Value("int32")),
        labels=datasets.List(datasets.Value("int32")),
        audio=datasets.Value("binary"),
        audio_format=datasets.Value("string"),
        audio_scale=datasets.Value("float32"),
        audio_length=datasets.Value("int64"),
        line=datasets.Value("int64"),
    )


def test_a_folder_whose_name_is_no_text(tmp_path):
    rows = make_rows(3)
    assert_equal(ConvertedDataset(write(tmp_path / os.fsdecode(b"\xff"), rows)), rows)


def test_datasets_tells_two_of_them_apart(tmp_path):
    """It names what it caches by the fingerprint."""
    prints = set()
    for number, record in enumerate((RECORD, replace(RECORD, seconds=1.5), replace(RECORD, text_tokens=3))):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_metadata(folder, [0], record)
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
    # An earlier version's, which has no checksum.
    change_json(RECORD_FILE, format=1)(folder)


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
    "data cut between batches": (keep_one_batch, f"{ARROW}: its checksum is another, it was changed"),
    "another shard's data": (
        lambda folder: (
            write(folder / "new", make_rows(40)[::-1]) and (folder / "new" / ARROW).replace(folder / ARROW)
        ),
        f"{ARROW}: its checksum",
    ),
    "no checksum": (change_json("state.json", _data_files=[{"filename": ARROW}]), f"{ARROW}: its checksum"),
    "other columns": (other_columns, f"{ARROW}: columns ['input_ids', 'labels']"),
    "more rows recorded": (change_json(RECORD_FILE, rows=41), "40 rows, 41 recorded"),
    "another format": (change_json(RECORD_FILE, format=3), "format 3, this version reads 2"),
    "another format with news": (
        change_json(RECORD_FILE, format=3, news="!"),
        "format 3, this version reads 2",
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


NAN = float("nan")
COUNT = (None, True, "7", 1.5, [7], {}, -1, NAN)
SECONDS = (None, True, "7", [7], {}, -1, NAN, float("inf"))
TEXT, PROMPT = (None, 5, True, ["a"], {}), (5, True, ["a"], {})
WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tokenizer", "chat_template", "toolkit"), TEXT),
    **dict.fromkeys(("system_prompt", "user_prompt"), PROMPT),
    "prompts": (
        None,
        5,
        "x",
        [],
        {"system": 5},
        {"user": ["a"]},
        {"user_differs": 1},
        {"system_differs": None},
    ),
    **dict.fromkeys(("rows", "text_tokens", "audio_tokens", "median_tokens", "p95_tokens"), COUNT),
    **dict.fromkeys(("most_tokens", "padded", "silent", "clipped", "truncated", "bytes", "format"), COUNT),
    **dict.fromkeys(("seconds", "shortest_seconds", "longest_seconds"), SECONDS),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_record_that_holds_what_it_must_not_is_refused_by_key(folder, key):
    record = (folder / RECORD_FILE).read_bytes()
    assert {*json.loads(record)} == {*WRONG}
    for wrong in WRONG[key]:
        change_json(RECORD_FILE, **{key: wrong})(folder)
        with pytest.raises(DatasetError, match=rf"damaged \({RECORD_FILE}\.{key}[.:].*\); convert again"):
            ConvertedDataset(folder)
        (folder / RECORD_FILE).write_bytes(record)
    assert len(ConvertedDataset(folder)) == 40


@pytest.mark.parametrize("files", [None, 5, "x", {}, [5], [{}], [{"filename": 5}]])
def test_a_list_of_shards_that_is_none_is_refused_by_key(folder, files):
    change_json("state.json", _data_files=files)(folder)
    with pytest.raises(DatasetError, match=r"damaged \(state\.json\._data_files.*\); convert again"):
        ConvertedDataset(folder)


@pytest.mark.parametrize("crc32", ["7", 1.5, [7], -1, 2**32])
def test_a_checksum_that_is_none_is_refused_by_key(folder, crc32):
    change_json("state.json", _data_files=[{"filename": ARROW, "crc32": crc32}])(folder)
    with pytest.raises(DatasetError, match=r"state\.json\._data_files\[0\]\.crc32: expected"):
        ConvertedDataset(folder)


@pytest.mark.parametrize("name", [RECORD_FILE, "state.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"5", b"null", b"9" * 5000])
def test_what_is_no_object_is_refused_by_file(folder, name, content):
    put(name, content)(folder)
    with pytest.raises(DatasetError, match=rf"damaged \({name}: .*\); convert again"):
        ConvertedDataset(folder)


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
    """Of a dataset with the right checksum, or of an earlier version, which has none."""
    content = bytearray((folder / ARROW).read_bytes())
    place = content.index(b"fLaC", content.index(b"fLaC") + 4)  # the second row's
    content[place : place + 4] = b"xxxx"
    (folder / ARROW).write_bytes(content)
    change_json("state.json", _data_files=[{"filename": ARROW, "crc32": zlib.crc32(content)}])(folder)
    dataset = ConvertedDataset(folder)
    assert len(dataset[0].waveform) == 3200
    with pytest.raises(DatasetError, match=rf"is damaged \({ARROW}, line 7 of the CSV: .*\); convert again"):
        dataset[1]


def test_every_changed_byte_is_noticed(tmp_path):
    folder = write(tmp_path / "data", make_rows(3))
    content = (folder / ARROW).read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (folder / ARROW).write_bytes(changed)
        with pytest.raises(DatasetError, match=rf"is damaged \({ARROW}: .*\); convert again"):
            ConvertedDataset(folder)
    assert place > 10_000


@pytest.mark.parametrize(
    ("ids", "labels", "reason"),
    [
        ([5, -1, 7], [-100, -100, 7], "a token below 0"),
        ([5, 6, 7], [-100, -100, 8], "labels that are not its tokens"),
        ([5, 6, 7], [-100, -101, 7], "labels that are not its tokens"),
        ([5, 6, 7], [-100, 7], "labels that are not its tokens"),
    ],
)
def test_tokens_and_labels_that_cannot_be(tmp_path, ids, labels, reason):
    """Whole as they are by their checksums: whoever wrote them."""
    rows = [(Tokens(np.array(ids, np.int32), np.array(labels, np.int32)), make_rows(1)[0][1])]
    folder = write(tmp_path / "data", rows)
    with pytest.raises(DatasetError, match=rf"is damaged \({ARROW}: {reason}\); convert again"):
        ConvertedDataset(folder)


def test_a_token_outside_the_vocabulary(tmp_path):
    files = read_tokenizer_files(MODEL)
    size = files.vocabulary_size
    assert (
        ChatTokenizer(files).end_id < size <= MiDashengLMConfig.from_pretrained(MODEL).text_config.vocab_size
    )
    for highest in (size - 1, size):
        ids = np.array([0, highest], np.int32)
        folder = write(tmp_path / str(highest), [*make_rows(1), (Tokens(ids, ids), make_rows(1)[0][1])])
        fingerprints = {"tokenizer": files.tokenizer_fingerprint, "chat_template": files.template_fingerprint}
        change_json(RECORD_FILE, **fingerprints)(folder)
        if highest < size:
            ConvertedDataset(folder).check_model(files)
    reason = f"{ARROW}: token {size}, of {size} in the vocabulary"
    with pytest.raises(DatasetError, match=rf"is damaged \({reason}\); convert again"):
        ConvertedDataset(folder).check_model(files)


def test_names_do_not_lead_out_of_the_folder(folder, tmp_path):
    secret = write(tmp_path / "secret", make_rows(40)) / ARROW
    secret.rename(tmp_path / "secret.arrow")
    (file,) = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow")):
        change_json("state.json", _data_files=[{**file, "filename": name}])(folder)
        with pytest.raises(DatasetError, match="damaged"):
            ConvertedDataset(folder)
    change_json("state.json", _data_files=[{**file, "filename": f"/elsewhere/{ARROW}"}])(folder)
    assert_equal(ConvertedDataset(folder), make_rows(40))


# --- outputs ---------------------------------------------------------------------------------------------


def test_outputs_that_may_be_replaced(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (folder / SETTINGS_FILE).write_text("# mdl-toolkit convert-dataset\n")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/.x").touch()
    for name in ("new", "empty", "link", "dangling", "data", "hidden"):
        check_output(tmp_path / name)


def test_outputs_that_may_not(folder, tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in (folder, tmp_path, *(tmp_path / name for name in ("file", "pipe"))):
        with pytest.raises(InputError, match=f"--output {path}: {path}.* is there, which"):
            check_output(path)


def test_a_mounted_folder_cannot_be_replaced():
    with pytest.raises(InputError, match="--output /: a mounted folder cannot be replaced"):
        check_output(Path("/"))


def test_a_device_in_place_of_a_shard_is_refused_before_it_is_opened(folder):
    (folder / ARROW).unlink()
    (folder / ARROW).symlink_to("/dev/zero")
    with pytest.raises(DatasetError, match=f"{ARROW}: a FIFO, socket or device, which is never read here"):
        ConvertedDataset(folder)
