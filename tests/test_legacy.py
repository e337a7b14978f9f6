"""What mdl-toolkit 0.1.0 converted is read as our own conversion of the same rows, or refused by name.

0.1.0 is written again in `old_version.py`, with transformers' tokenizer and `datasets`.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import LargeList, List, Value

from mdl_toolkit.batching import Collator
from mdl_toolkit.conversion import convert_dataset
from mdl_toolkit.dataset import ConvertedDataset, Sample
from mdl_toolkit.errors import DatasetError, ToolkitError
from mdl_toolkit.legacy import LegacyDataset, is_legacy
from mdl_toolkit.options import ConvertOptions
from mdl_toolkit.runlog import read_log
from mdl_toolkit.text_files import read_text_files
from mdl_toolkit.tokens import Encoder
from mdl_toolkit.training import train
from old_version import (
    HEADER,
    MODEL,
    Row,
    features,
    ids_of,
    old_row,
    old_rows,
    places,
    recordings,
    save,
    tokenizer,
)
from runs import copy_checkpoint, files_below, train_options, write_csv


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def encoder(model: Path = MODEL) -> Encoder:
    return Encoder(read_text_files(model))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("legacy")


@pytest.fixture(scope="module")
def csv_rows(place):
    return recordings(place)


@pytest.fixture(scope="module")
def ours(place, csv_rows) -> ConvertedDataset:
    """Our own conversion of the same rows."""
    csv = write_csv(place / "rows.csv", csv_rows)
    output = str(place / "ours")
    convert_dataset(ConvertOptions(input=str(csv), output=output, model_name=str(MODEL)))
    return ConvertedDataset(place / "ours")


@pytest.fixture(scope="module")
def rows(csv_rows) -> list[Row]:
    return old_rows(csv_rows)


def assert_same(legacy: LegacyDataset, ours: ConvertedDataset) -> None:
    assert len(legacy) == len(ours) > 0
    for index in range(len(ours)):
        assert_samples(legacy[index], ours[index])
    assert legacy.positions.tolist() == ours.positions.tolist()
    assert legacy.samples.tolist() == ours.samples.tolist()


def assert_samples(got: Sample, expected: Sample) -> None:
    for name in ("input_ids", "labels", "waveform"):
        one, other = getattr(got, name), getattr(expected, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# --- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "shards"),
    [
        (features(), 1),
        (features(ints="int32", mask="int8"), 3),
        (features(LargeList, ints="int16", mask="bool", floats="float64"), 2),
        (features(ints="int64", mask="uint8", floats="float64"), 10),
    ],
)
def test_samples_are_those_of_our_own_conversion(tmp_path, rows, ours, columns, shards):
    folder = save(tmp_path / "old", rows, columns, shards)
    assert len(list(folder.glob("data-*.arrow"))) == shards
    legacy = LegacyDataset(folder, encoder())
    assert_same(legacy, ours)
    assert any(row["attention_mask"][0] == 0 for row in rows)
    assert {len(legacy[2].waveform), len(legacy[5].waveform)} == {3_200}


def test_several_record_batches_in_a_file(tmp_path, rows, ours):
    folder = save(tmp_path / "old", rows)
    (file,) = folder.glob("data-*.arrow")
    with pa.memory_map(str(file)) as mapped:
        assert [len(batch) for batch in pa.ipc.open_stream(mapped)] == [3, 3, 3, 1]
    assert_same(LegacyDataset(folder, encoder()), ours)


def test_lists_of_a_fixed_size(tmp_path, csv_rows, ours):
    rows = old_rows(csv_rows, batch_size=len(csv_rows))
    columns = features()
    for name in ("input_ids", "attention_mask", "labels", "input_values"):
        columns[name] = List(columns[name].feature, length=len(rows[0][name]))
    folder = save(tmp_path / "old", rows, columns, shards=2)
    with pa.memory_map(str(next(folder.glob("*.arrow")))) as mapped:
        assert pa.types.is_fixed_size_list(pa.ipc.open_stream(mapped).schema.field("input_ids").type)
    assert_same(LegacyDataset(folder, encoder()), ours)


@pytest.mark.parametrize("trained", ["all", "to the end token", "after the role", "no header"])
def test_whatever_of_the_header_it_supervised(tmp_path, csv_rows, ours, trained):
    rows = old_rows(csv_rows, 3, trained)
    legacy = LegacyDataset(save(tmp_path / "old", rows), encoder())
    assert_same(legacy, ours)
    learnt = legacy[3].labels[legacy[3].labels != -100].tolist()
    assert tokenizer().decode(learnt) == csv_rows[3]["prediction"] + "<|im_end|>"


def test_an_answer_keeps_end_tokens_that_are_not_its_last(tmp_path, csv_rows):
    row = csv_rows[0] | {"prediction": "one<|im_end|>two"}
    old = old_row(row, trained="all")
    legacy = LegacyDataset(save(tmp_path / "old", [old]), encoder())
    learnt = legacy[0].labels[legacy[0].labels != -100].tolist()
    assert learnt == ids_of("one<|im_end|>two<|im_end|>")


def test_columns_of_no_concern_are_ignored(tmp_path, rows, ours):
    columns = datasets.Features({"note": Value("string"), **features()})
    assert_same(
        LegacyDataset(save(tmp_path / "old", [row | {"note": "x"} for row in rows], columns), encoder()), ours
    )


def test_a_row_number_beyond_the_end(tmp_path, rows):
    legacy = LegacyDataset(save(tmp_path / "old", rows), encoder())
    for index in (len(rows), -1):
        with pytest.raises(IndexError):
            legacy[index]


def test_it_travels_to_workers_without_the_data(tmp_path, rows, ours):
    legacy = LegacyDataset(save(tmp_path / "old", rows, shards=2), encoder())
    assert_same(legacy, ours)
    sent = pickle.dumps(legacy)
    assert len(sent) < 5_000 < sum(len(row["input_values"]) for row in rows)
    assert_same(pickle.loads(sent), ours)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed on Linux only")
def test_no_file_stays_open(tmp_path, rows, ours):
    legacy = LegacyDataset(save(tmp_path / "old", rows, shards=5), encoder())
    assert is_legacy(tmp_path / "old")
    assert_same(legacy, ours)
    opened = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [file for file in opened if file.is_relative_to(tmp_path)]
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert mapped.count(str(tmp_path)) == 5


def test_only_files_of_the_folder_itself_are_read(tmp_path, rows, ours):
    folder = save(tmp_path / "old", rows)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    name = state["_data_files"][0]["filename"]
    state["_data_files"][0]["filename"] = f"../elsewhere/{name}"
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    save(folder / "more", rows[:1])  # not listed
    assert is_legacy(folder)
    assert_same(LegacyDataset(folder, encoder()), ours)
    (tmp_path / "elsewhere").mkdir()
    (folder / name).rename(tmp_path / "elsewhere" / name)
    assert not is_legacy(folder)
    with pytest.raises(DatasetError, match="damaged"):
        LegacyDataset(folder, encoder())


# --- what it says ----------------------------------------------------------------------------------------


EN = ": 10 rows, converted by mdl-toolkit 0.1.0: padding is stripped, the header is not trained"
ZH = "：10 行，由 mdl-toolkit 0.1.0 转换：去除填充，不训练角色标记"


@pytest.mark.parametrize(
    ("language", "line", "short"),
    [
        ("C.UTF-8", EN, ", 2 clip(s) are padded to 0.2 s"),
        ("zh_CN.UTF-8", ZH, "，2 个音频补零至 0.2 秒"),
    ],
)
def test_one_line_says_what_is_done(tmp_path, rows, capsys, monkeypatch, language, line, short):
    monkeypatch.setenv("LANG", language)
    whole = [row for row in rows if row["audio_length"] >= 3_200] + rows[:1] * 2
    for folder, data, more in ((tmp_path / "a", rows, short), (tmp_path / "b", whole, "")):
        save(folder, data)
        capsys.readouterr()
        LegacyDataset(folder, encoder())
        assert capsys.readouterr().err == f"{folder}{line}{more}\n"


def test_only_the_first_process_speaks(tmp_path, rows, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    folder = save(tmp_path / "old", rows[:1])
    capsys.readouterr()
    assert len(LegacyDataset(folder, encoder())) == 1
    assert not capsys.readouterr().err


# --- what it is trusted with -----------------------------------------------------------------------------


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Row], Row]:
    return lambda row: row | {name: change(row[name])}


def replaced(old: str, new: str = "x", *, last: bool = False) -> Callable[[Row], Row]:
    """Another token wherever one is, or in its last place alone, in ids and labels."""
    (one,), (other,) = ids_of(old), ids_of(new)

    def change(row: Row) -> Row:
        found = places(row["input_ids"], [one])[-1 if last else 0 :]
        ids = [other if i in found else token for i, token in enumerate(row["input_ids"])]
        labels = [-100 if label == -100 else token for token, label in zip(ids, row["labels"], strict=True)]
        return row | {"input_ids": ids, "labels": labels}

    return change


def unsupervised(text: str) -> Callable[[Row], Row]:
    (token,) = ids_of(text)
    return changed("labels", lambda labels: [-100 if label == token else label for label in labels])


BAD = {
    "nothing supervised": (
        changed("labels", lambda row: [-100] * len(row)),
        "supervise nothing",
        "未监督任何",
    ),
    "no end token": (unsupervised("<|im_end|>"), "more than one stretch", "不连续"),
    "another end": (replaced("<|im_end|>", "<|endoftext|>", last=True), "no <|im_end|>", "未监督 <|im_end|>"),
    "a label that is no id": (
        changed("labels", lambda row: [*row[:-1], row[-1] + 1]),
        "differ from",
        "不一致",
    ),
    "an unknown id": (changed("input_ids", lambda row: [*row[:-1], 9_999]), "does not have", "没有的 id"),
    "a negative id": (changed("input_ids", lambda row: [*row[:-1], -1]), "does not have", "没有的 id"),
    "another header": (replaced("<|im_start|>", last=True), "header of the model's", "角色标记"),
    "an audio token more": (
        replaced("<|audio_eos|>", "<|AUDIO|>", last=True),
        "audio tokens, and its",
        "个音频词元",
    ),
    "no audio tokens": (replaced("<|AUDIO|>"), "0 audio tokens, and its", "0 个音频词元"),
    "more samples": (changed("audio_length", lambda _: 999_999), "audio_length is", "实际有"),
    "fewer samples": (changed("audio_length", lambda _: 6_400), "its audio becomes 2", "音频对应 2 个"),
    "no samples": (changed("audio_length", lambda _: 0), "audio_length is 0", "audio_length 为 0"),
    "a negative length": (changed("audio_length", lambda _: -1), "audio_length is -1", "audio_length 为 -1"),
    "padding on the right": (
        changed("attention_mask", lambda row: [*row[:-1], 0]),
        "on the left",
        "不在左侧",
    ),
    "all padding": (changed("attention_mask", lambda row: [0] * len(row)), "supervise nothing", "未监督任何"),
    "a short mask": (changed("attention_mask", lambda row: row[1:]), "differ in length", "长度不同"),
    "labels too long": (changed("labels", lambda row: [-100, *row]), "differ in length", "长度不同"),
}


def assert_refused(open_it: Callable[[], Any], folder: Path, row: int, en: str, zh: str) -> None:
    with pytest.raises(DatasetError) as caught:
        open_it()
    text = caught.value.text
    assert text.en.startswith(f"{folder}, row {row} (counted from 0): ")
    assert text.zh.startswith(f"{folder} 第 {row} 行（从 0 计）：")
    assert en in text.en
    assert zh in text.zh
    assert text.en.endswith("convert the CSV again with convert-dataset")
    assert text.zh.endswith("请用 convert-dataset 重新转换 CSV")


@pytest.mark.parametrize("number", [0, 3, 9])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_by_number(tmp_path, rows, name, number):
    change, en, zh = BAD[name]
    bad = [change(row) if index == number else row for index, row in enumerate(rows)]
    folder = save(tmp_path / "old", bad, shards=2)
    assert_refused(lambda: LegacyDataset(folder, encoder()), folder, number, en, zh)


def test_a_short_clip_without_a_place_for_its_token(tmp_path, rows):
    assert not places(rows[5]["input_ids"], ids_of("<|AUDIO|>"))
    bad = [*rows[:5], replaced("<|audio_eos|>", last=True)(rows[5])]
    folder = save(tmp_path / "old", bad)
    assert_refused(lambda: LegacyDataset(folder, encoder()), folder, 5, "no place for one", "放置词元")


def test_a_header_in_the_users_words_that_a_search_took_for_the_answers(tmp_path, csv_rows):
    row = csv_rows[0] | {"user_prompt": f"Say {HEADER} twice"}
    folder = save(tmp_path / "old", old_rows([csv_rows[1], row]))
    assert_refused(lambda: LegacyDataset(folder, encoder()), folder, 1, "more than one turn", "不止一轮")


def test_a_header_at_the_end_of_the_row_before_is_none_of_its_own(tmp_path, csv_rows):
    first, second = (old_row(row, trained="all") for row in csv_rows[:2])
    header = ids_of(HEADER)
    first = extended(first, input_ids=header, attention_mask=[1] * len(header), labels=[-100] * len(header))
    answer = places(second["input_ids"], header)[0] + len(header)
    cut = {name: second[name][answer:] for name in ("input_ids", "attention_mask", "labels")}
    folder = save(tmp_path / "old", [first, second | cut])
    assert_refused(lambda: LegacyDataset(folder, encoder()), folder, 1, "header of the model's", "角色标记")


def extended(row: Row, **more: list[int]) -> Row:
    return row | {name: row[name] + values for name, values in more.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_samples_that_are_no_numbers_are_found_when_they_are_read(tmp_path, rows, ours, value):
    bad = [dict(row) for row in rows]
    bad[1]["input_values"] = [*rows[1]["input_values"]]
    bad[1]["input_values"][rows[1]["audio_length"] - 1] = value
    bad[3]["input_values"] = [*rows[3]["input_values"][:-1], value]  # in the padding
    folder = save(tmp_path / "old", bad)
    legacy = LegacyDataset(folder, encoder())
    assert_refused(lambda: legacy[1], folder, 1, "NaN or infinite", "NaN 或无穷大")
    assert_samples(legacy[3], ours[3])


def test_another_models_tokenizer(tmp_path, rows):
    """Its template asks otherwise: what it was trained on could not be asked for."""
    model = copy_checkpoint(MODEL.parent.parent, "A-small", tmp_path)
    template = model / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("|>assistant\n", "|>assistant\n<think>"), encoding="utf-8")
    folder = save(tmp_path / "old", rows)
    assert_refused(
        lambda: LegacyDataset(folder, encoder(model)), folder, 0, "header of the model's", "角色标记"
    )


# --- files that are damaged, or something else -----------------------------------------------------------


def cut(byte_count: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: byte_count if byte_count > 0 else len(content) + byte_count])

    return damage


def assert_damaged(folder: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        LegacyDataset(folder, encoder())
    assert caught.value.text.en.startswith(f"{folder}: the dataset is damaged (")
    assert caught.value.text.zh.startswith(f"{folder}：数据集已损坏（")
    return caught.value.text.en


@pytest.mark.parametrize(
    "damage", [cut(40_000), cut(-8), cut(-1), Path.unlink, lambda file: file.write_text("")]
)
def test_a_damaged_second_file(tmp_path, rows, damage):
    folder = save(tmp_path / "old", rows, shards=2)
    damage(folder / "data-00001-of-00002.arrow")
    assert is_legacy(folder)
    assert_damaged(folder)


def test_damaged_offsets(tmp_path, rows):
    folder = save(tmp_path / "old", rows)
    file = next(folder.glob("data-*.arrow"))
    length = len(rows[0]["input_ids"])
    sound, broken = (np.array([0, length, end, 3 * length], "<i4").tobytes() for end in (2 * length, 2**30))
    content = file.read_bytes()
    assert content.count(sound) >= 3  # ids, mask and labels of three rows
    file.write_bytes(content.replace(sound, broken))
    assert_damaged(folder)


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("input_ids", List(Value("float32")), [1.0]),
        ("labels", Value("int64"), 1),
        ("attention_mask", List(Value("string")), ["1"]),
        ("input_ids", List(List(Value("int64"))), [[1]]),
        ("input_values", List(Value("int16")), [1]),
        ("audio_length", List(Value("int64")), [1]),
        ("audio_length", Value("float32"), 1.0),
    ],
)
def test_columns_of_other_kinds(tmp_path, rows, name, kind, value):
    columns = datasets.Features({**features(), name: kind})
    folder = save(tmp_path / "old", [rows[0] | {name: value}], columns)
    assert "expected" in assert_damaged(folder)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "input_values", "audio_length", "labels"])
@pytest.mark.parametrize("inside", [False, True])
def test_missing_values(tmp_path, rows, name, inside):
    inside = inside and name != "audio_length"
    bad = rows[1] | {name: [*rows[1][name][:-1], None] if inside else None}
    assert "missing values" in assert_damaged(save(tmp_path / "old", [rows[0], bad]))


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"_data_files": []}', '{"_data_files": [{}]}', None])
def test_without_a_list_of_files_it_is_no_legacy_dataset(tmp_path, rows, damage):
    folder = save(tmp_path / "old", rows[:2])
    assert is_legacy(folder)
    (folder / "state.json").unlink()
    if damage is not None:
        (folder / "state.json").write_text(damage, encoding="utf-8")
    assert not is_legacy(folder)


def test_what_is_no_legacy_dataset(tmp_path, rows, ours):
    assert not is_legacy(ours.folder)
    assert not is_legacy(tmp_path / "nowhere")
    folder = save(tmp_path / "old", rows[:2])
    shutil.copy(ours.folder / "mdl-toolkit.json", folder)
    assert not is_legacy(folder)


# --- training --------------------------------------------------------------------------------------------


def losses(output: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_log(output / "log.jsonl") if "loss" in line]


def test_training_from_it_is_training_from_our_conversion(tmp_path, rows, ours, capsys):
    model = copy_checkpoint(MODEL.parent.parent, "A-small", tmp_path)
    folder = save(tmp_path / "old", rows, shards=2)
    before = files_below(folder)
    capsys.readouterr()
    done = {}
    for name, data in (("legacy", folder), ("ours", ours.folder)):
        options = train_options(data, model, tmp_path / name, num_epochs=2, eval_dataset=str(data))
        done[name] = train(options)
    said = capsys.readouterr().err
    assert said.count(f"{folder}: 10 rows, converted by mdl-toolkit 0.1.0") == 2  # to train, and to evaluate
    curves = {name: losses(tmp_path / name) for name in done}
    assert len(curves["ours"]) == done["ours"].steps == 6
    assert curves["legacy"] == curves["ours"]
    assert done["legacy"].eval_loss == done["ours"].eval_loss
    assert files_below(folder) == before


def test_its_rows_make_batches(tmp_path, rows, ours):
    legacy = LegacyDataset(save(tmp_path / "old", rows), encoder())
    batches = [Collator(0)([data[i] for i in range(4)]) for data in (legacy, ours)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


def test_other_folders_are_refused_as_before(tmp_path, rows):
    model = copy_checkpoint(MODEL.parent.parent, "A-small", tmp_path)
    columns = features()
    del columns["attention_mask"]
    data = datasets.Dataset.from_list([{name: rows[0][name] for name in columns}], features=columns)
    data.save_to_disk(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "other", tmp_path / "empty"):
        with pytest.raises(ToolkitError, match="not a complete dataset written by convert-dataset"):
            train(train_options(folder, model, tmp_path / "run"))
