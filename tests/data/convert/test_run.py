"""A CSV becomes a dataset: all of it, the same every time, or nothing at all and one message."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mdl_toolkit import __version__
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, from_mapping, read_settings
from mdl_toolkit.data import open_audio
from mdl_toolkit.data.convert import plan
from mdl_toolkit.data.convert.run import FEW_ROWS, convert_dataset, convert_rows
from mdl_toolkit.data.dataset import FORMAT, ConvertedDataset
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.tokenization import IGNORE_INDEX, ChatTokenizer
from mdl_toolkit.errors import InputError, ModelError, RowsError
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.paths import MODEL, PHRASES
from tests.support.recordings import pcm_wav
from tests.support.runs import copy_checkpoint, files_below, make_rows, write_csv
from tests.support.server import needs_server
from tests.support.waves import wave

DATA_FILES = {"data-00000-of-00001.arrow", "dataset_info.json", "mdl-toolkit.json", "state.json"}


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """A new shard after every eight rows, so that a few rows are work for several processes."""
    monkeypatch.setattr(plan, "CHUNK_ROWS", 8)
    monkeypatch.setattr(plan, "FEWEST_BYTES", 1)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current directory, empty; what lies above it is the test's own too."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def options(**changes: Any) -> ConvertOptions:
    return ConvertOptions(**{"model_name": str(MODEL), "input": "rows.csv", "output": "out", **changes})


def convert(rows: list[dict[str, str]], **changes: Any) -> ConvertedDataset:
    write_csv(Path("rows.csv"), rows)
    given = options(**changes)
    convert_dataset(given)
    return ConvertedDataset(Path(given.output))


def listing(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, hidden or not, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def save(name: str, samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> str:
    soundfile.write(name, samples, rate, subtype=subtype)
    return name


# --- what comes out --------------------------------------------------------------------------------------


def test_a_dataset_holds_all_that_training_needs(place):
    import datasets

    rows = make_rows(place / "audio", 5)
    dataset = convert(rows, system_prompt="Be brief.")
    assert files_below(place / "out") == {*DATA_FILES, SETTINGS_FILE}
    assert {path.name for path in place.iterdir()} == {"audio", "rows.csv", "out"}
    tokenizer = ChatTokenizer(read_tokenizer_files(MODEL))
    manifest = read_manifest("rows.csv", options(system_prompt="Be brief."), needs_prediction=True)
    read = [*manifest.rows()]
    recordings = [soundfile.read(row["audio"], dtype="float32")[0] for row in rows]
    shutil.rmtree(place / "audio")
    (place / "rows.csv").unlink()
    assert datasets.load_from_disk("out").num_rows == 5
    for row, recording, sample in zip(read, recordings, dataset, strict=True):
        tokens = tokenizer.encode_row(row, audio_token_count(len(recording)), with_answer=True)
        np.testing.assert_array_equal(sample.waveform, recording)
        np.testing.assert_array_equal(sample.input_ids, tokens.input_ids)
        np.testing.assert_array_equal(sample.labels, tokens.labels)


def test_the_record(place):
    dataset = convert(make_rows(place / "audio", 5), user_prompt="Was ist das?", system_prompt="Kurz.")
    files = read_tokenizer_files(MODEL)
    samples = list(dataset)
    lengths = sorted(len(sample.waveform) / 16_000 for sample in samples)
    positions = sorted(len(sample.input_ids) for sample in samples)
    audio_id = ChatTokenizer(files).id_of("<|AUDIO|>")
    audio = sum(int((sample.input_ids == audio_id).sum()) for sample in samples)
    assert json.loads((place / "out/mdl-toolkit.json").read_text(encoding="utf-8")) == {
        "toolkit": __version__,
        "format": FORMAT,
        "tokenizer": files.tokenizer_fingerprint,
        "chat_template": files.template_fingerprint,
        "system_prompt": "Kurz.",
        "user_prompt": "Was ist das?",
        "rows": 5,
        "seconds": sum(lengths),
        "shortest_seconds": lengths[0],
        "longest_seconds": lengths[-1],
        "median_tokens": positions[2],
        "p95_tokens": positions[4],
        "most_tokens": positions[4],
        "audio_tokens": audio,
        "text_tokens": sum(len(sample.input_ids) for sample in samples) - audio,
        "padded": 0,
        "silent": 0,
        "clipped": 0,
        "truncated": 0,
        "prompts": {
            "system": "Kurz.",
            "system_differs": False,
            "user": "What is it?",
            "user_differs": False,
        },
        "bytes": (place / "out/data-00000-of-00001.arrow").stat().st_size,
    }
    dataset.record.check_model(files, "out")


def test_the_settings_can_be_given_back(place):
    given = options(
        output="sub/out", base_dir=str(place), user_prompt="Was? #1: 'x'", tokenizing_batch_size=3
    )
    write_csv(place / "rows.csv", make_rows(place / "audio", 2))
    convert_dataset(given)
    assert from_mapping(ConvertOptions, read_settings(f"sub/out/{SETTINGS_FILE}", ConvertOptions)) == given


def test_each_row_has_its_own_prompts(place):
    audio = make_rows(place / "audio", 1)[0]["audio"]
    own = {"audio": audio, "prediction": "x", "system_prompt": "Mine.", "user_prompt": "What?"}
    dataset = convert([own, {**own, "system_prompt": "", "user_prompt": "null"}], user_prompt="Default?")
    tokenizer = ChatTokenizer(read_tokenizer_files(MODEL)).backend
    first, second = (tokenizer.decode(sample.input_ids, skip_special_tokens=False) for sample in dataset)
    assert first.startswith("<|im_start|>system\nMine.<|im_end|>")
    assert "<|audio_eos|>What?<|im_end|>" in first
    assert second.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    assert "<|audio_eos|>Default?<|im_end|>" in second


def test_prompts_alone_for_inference(place):
    write_csv(place / "rows.csv", make_rows(place / "audio", 3))
    manifest = read_manifest("rows.csv", options(), needs_prediction=True)
    tokenizer = ChatTokenizer(read_tokenizer_files(MODEL))
    convert_rows(manifest, place / "work", tokenizer, options(), with_answer=False)
    for row, sample in zip(manifest.rows(), ConvertedDataset(place / "work"), strict=True):
        count = audio_token_count(len(sample.waveform))
        prompt = tokenizer.encode_row(row, count, with_answer=False)
        np.testing.assert_array_equal(sample.input_ids, prompt.input_ids)
        assert set(sample.labels) == {IGNORE_INDEX}


@pytest.mark.parametrize(
    ("language", "said"), [("en", "out: 2 rows, 0.00 hours, "), ("zh_CN", "out：2 行，")]
)
def test_what_is_said(place, capsys, monkeypatch, language, said):
    monkeypatch.setenv("LANGUAGE", language)
    convert(make_rows(place / "audio", 2))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 4


# --- recordings out of the ordinary ----------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 256, 3039, 3199])
def test_a_very_short_clip_is_padded_to_one_audio_token(place, capsys, samples):
    rows = make_rows(place, 2)
    rows[0]["audio"] = save("short.wav", wave(samples, 1))
    dataset = convert(rows)
    tokenizer = ChatTokenizer(read_tokenizer_files(MODEL))
    assert (dataset[0].input_ids == tokenizer.id_of("<|AUDIO|>")).sum() == 1
    assert len(dataset[0].waveform) == 3200
    assert not dataset[0].waveform[samples:].any()
    assert dataset.record.padded == 1
    assert "1 clip is shorter than 0.2 s and was padded to one audio token" in capsys.readouterr().err


def test_a_clip_of_one_token_is_not_padded(place, capsys):
    dataset = convert([{"audio": save("just.wav", wave(3200, 1)), "prediction": "x"}])
    assert dataset.record.padded == 0
    assert "warning" not in capsys.readouterr().err


def test_silent_clips_are_counted(place, capsys):
    silent = [save(f"{i}.wav", np.zeros(16_000)) for i in range(2)]
    dataset = convert(
        [{"audio": name, "prediction": "x"} for name in [*silent, save("w.wav", wave(9000, 0))]]
    )
    assert dataset.record.silent == 2
    assert "warning: 2 clips are silent\n" in capsys.readouterr().err


def test_a_cut_off_file_is_refused_or_named(place, capsys):
    samples = np.rint(wave(16_000, 3) * 32768)
    (place / "cut.wav").write_bytes(pcm_wav(samples[:9000], size=32_000))
    rows = [*make_rows(place / "audio", 1), {"audio": "cut.wav", "user_prompt": "", "prediction": "x"}]
    with pytest.raises(RowsError) as caught:
        convert(rows)
    assert [(problem.line, problem.value) for problem in caught.value.problems] == [(3, "cut.wav")]
    assert "--allow-truncated" in caught.value.message.en
    capsys.readouterr()
    dataset = convert(rows, allow_truncated=True)
    np.testing.assert_array_equal(dataset[1].waveform * 32768, samples[:9000])
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert warned[0].startswith("warning: line 3: cut.wav: ")


# --- which outputs are refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("rows.csv", "--output rows.csv: "),
        ("rows.csv/out", "inside the input rows.csv"),
        (".", "--output .: audio is there, which"),
        ("..", "--output ..: "),
        ("audio", "--output audio: audio/clip-0-0.wav is there"),
        ("model", "--output model: model/added_tokens.json is there"),
        ("model/out", "inside the input model"),
        ("note.txt", "--output note.txt: note.txt is there"),
        ("cache/out", "inside --download-cache cache"),
        ("pipe", "--output pipe: pipe is there"),  # it could be /dev/null
    ],
)
def test_outputs_that_would_swallow_something(place, golden, output, reason):
    write_csv(place / "rows.csv", make_rows(place / "audio", 2))
    copy_checkpoint(golden, "A-small", place).rename("model")
    (place / "note.txt").write_text("mine")
    os.mkfifo("pipe")
    before = listing(place)
    with pytest.raises(InputError) as caught:
        convert_dataset(options(output=output, model_name="model", download_cache="cache"))
    assert reason in caught.value.message.en
    assert caught.value.message.zh.startswith(f"--output {output}：")
    assert listing(place) == before


def test_recordings_inside_the_old_dataset_are_not_swallowed(place):
    convert(make_rows(place / "audio", 1))
    (place / "out/sub").mkdir()
    rows = make_rows(place / "out/sub", 1)
    before = listing(place / "out")
    with pytest.raises(InputError, match="--output out: out/sub/clip-0-0.wav is there"):
        convert(rows)
    assert listing(place / "out") == before


def test_an_empty_folder_and_an_old_dataset_are_replaced(place):
    rows = make_rows(place / "audio", 3)
    (place / "out").mkdir()
    assert len(convert(rows[:1])) == 1
    (place / "out/.cache").write_text("old")
    assert len(convert(rows)) == 3
    assert {path.name for path in place.iterdir()} == {"audio", "rows.csv", "out"}
    assert files_below(place / "out") == {*DATA_FILES, SETTINGS_FILE, ".cache"}


def test_the_current_directory_may_be_the_old_dataset(place, monkeypatch):
    rows = make_rows(place / "audio", 2)
    convert(rows[:1])
    write_csv(place / "rows.csv", rows)
    monkeypatch.chdir("out")
    assert convert_dataset(options(input=str(place / "rows.csv"), output=".")).rows == 2
    assert len(ConvertedDataset(place / "out")) == 2


# --- all or nothing --------------------------------------------------------------------------------------


def spoil(rows: list[dict[str, str]], line: int, audio: str) -> None:
    rows[line - 2] = {**rows[line - 2], "audio": audio}


def bad_recordings() -> dict[str, str]:
    """Names of recordings that cannot be used, each with a part of what must be said of it."""
    Path("text.wav").write_text("this is no recording\n" * 100)
    Path("empty.wav").touch()
    Path("cut.wav").write_bytes(pcm_wav(np.zeros(100), size=32_000))
    save("none.wav", np.zeros(0))
    save("nan.wav", np.array([0.5, np.nan] * 5000), subtype="FLOAT")
    return {
        "nowhere.wav": "not found",
        "text.wav": "",
        "empty.wav": "0 bytes",
        "cut.wav": "cut off",
        "none.wav": "no samples",
        "nan.wav": "NaN",
    }


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("workers", "size"), [(1, 8), (2, 5)])
def test_all_bad_rows_come_in_one_message(place, workers, size):
    rows = phrases(72)
    lines = [2, 3, 20, 39, 40, 73]
    bad = bad_recordings()
    for line, name in zip(lines, bad, strict=True):
        spoil(rows, line, name)
    rows[9] = {**rows[9], "prediction": ""}
    before = {path.name for path in place.iterdir()} | {"rows.csv"}
    with pytest.raises(RowsError) as caught:
        convert(rows, num_workers=workers, tokenizing_batch_size=size)
    found = [(each.line, each.column, each.value) for each in caught.value.problems]
    expected = [(line, "audio", name) for line, name in zip(lines, bad, strict=True)]
    assert found == sorted([*expected, (11, "prediction", "")])
    said = {each.value: each.reason.en for each in caught.value.problems}
    assert all(part in said[name] for name, part in bad.items())
    assert all(each.reason.zh != each.reason.en for each in caught.value.problems)
    assert {path.name for path in place.iterdir()} == before


def test_bad_rows_leave_the_old_dataset(place):
    convert(make_rows(place / "audio", 2))
    rows = make_rows(place / "audio", 40)
    spoil(rows, 41, save("nan.wav", np.full(9000, np.nan), subtype="FLOAT"))
    write_csv(place / "rows.csv", rows)
    before = listing(place)
    with pytest.raises(RowsError):
        convert_dataset(options())
    assert listing(place) == before


@pytest.mark.parametrize("what", ["model", "template", "tokenizer"])
def test_a_model_that_cannot_be_used_leaves_the_old_dataset(place, golden, what):
    convert(make_rows(place / "audio", 2))
    copy_checkpoint(golden, "A-small", place).rename("model")
    if what == "model":
        shutil.rmtree("model")
    else:
        Path("model", {"template": "chat_template.jinja", "tokenizer": "tokenizer.json"}[what]).write_text(
            "{}"
        )
    before = listing(place)
    with pytest.raises(ModelError):
        convert_dataset(options(model_name="./model"))
    assert listing(place) == before


@pytest.mark.usefixtures("small_shards")
def test_an_error_in_a_worker_is_the_command_s(place, golden):
    model = copy_checkpoint(golden, "A-small", place)
    (model / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    with pytest.raises(ModelError, match="not today"):
        convert(phrases(70), model_name=str(model), num_workers=2)
    assert {path.name for path in place.iterdir()} == {"rows.csv", "A-small"}
    assert multiprocessing.active_children() == []


def wait_for(condition: Any, seconds: float = 50) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


# --- addresses -------------------------------------------------------------------------------------------


@needs_server
def test_each_address_is_fetched_once(place, server):
    samples = [np.rint(wave(5000 + i, i) * 32768) for i in range(2)]
    server.files = {f"/{i}.wav": pcm_wav(each) for i, each in enumerate(samples)}
    order = [0, 1, 0, 0, 1]
    rows = [{"audio": f"{server.url}/{i}.wav", "prediction": "x"} for i in order]
    dataset = convert(rows, tokenizing_batch_size=2)
    assert sorted(server.asked) == ["/0.wav", "/1.wav"]
    for number, sample in zip(order, dataset, strict=True):
        np.testing.assert_array_equal(sample.waveform * 32768, samples[number])
    assert {path.name for path in place.iterdir()} == {"rows.csv", "out"}
    assert files_below(place / "out") == {*DATA_FILES, SETTINGS_FILE}


@needs_server
def test_addresses_that_fail_are_reported_with_their_rows(place, server):
    server.files = {"/good.wav": pcm_wav(np.rint(wave(5000, 0) * 32768)), "/page": b"<html>no</html>" * 100}
    private = f"http://me:secret@{server.host}/private.wav"
    addresses = [f"{server.url}/good.wav", f"{server.url}/gone.wav", private, f"{server.url}/page"]
    rows = [{"audio": address, "prediction": "x"} for address in addresses]
    save("nan.wav", np.full(9000, np.nan), subtype="FLOAT")
    with pytest.raises(RowsError) as caught:
        convert([*rows, {"audio": "nan.wav", "prediction": "x"}])
    assert [each.line for each in caught.value.problems] == [3, 4, 5, 6]
    assert "404" in caught.value.problems[0].reason.en
    for text in (caught.value.message.en, caught.value.message.zh):
        assert f"http://{server.host}/private.wav" in text
        assert "secret" not in text
    assert {path.name for path in place.iterdir()} == {"rows.csv", "nan.wav"}


@needs_server
def test_a_warning_shows_no_password(place, server, capsys):
    server.files = {"/cut.wav": pcm_wav(np.rint(wave(5000, 0) * 32768), size=99_000)}
    address = f"http://me:secret@{server.host}/cut.wav"
    convert([{"audio": address, "prediction": "x"}], allow_truncated=True)
    said = capsys.readouterr().err
    assert f"warning: line 2: http://{server.host}/cut.wav: " in said
    assert "secret" not in said


def test_what_may_be_fine_later_leaves_what_is_finished(place, small_shards, monkeypatch, capsys):
    rows = make_rows(place / "audio", 17)
    whole = convert(rows, output="whole").record
    decode, broken = open_audio.load_segments, rows[-1]["audio"]

    def fail(path, *more):
        if str(path) == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return decode(path, *more)

    with monkeypatch.context() as at_first:
        at_first.setattr(open_audio, "load_segments", fail)
        with pytest.raises(RowsError, match=r"the file cannot be read \(Input/output error\); try again"):
            convert(rows)
    assert "16 of 17 rows are finished" in capsys.readouterr().err
    assert convert(rows).record == whole
    assert "going on from an earlier run: 16 of 17 rows are converted already" in capsys.readouterr().err
    assert {path.name for path in place.iterdir()} == {"audio", "rows.csv", "whole", "out"}


# --- always the same -------------------------------------------------------------------------------------


def phrases(count: int) -> list[dict[str, str]]:
    """Rows of real recordings, at 8 kHz."""
    names = sorted((PHRASES / "audio").iterdir())[:count]
    return [{"audio": str(name), "prediction": f"{name.stem} 狗<|im_end|>"} for name in names]


@pytest.mark.usefixtures("small_shards")
def test_workers_and_groups_change_no_byte(place):
    rows = phrases(FEW_ROWS + 6)
    first = convert(rows, output="0", num_workers=1, tokenizing_batch_size=8)
    assert [len(sample.waveform) for sample in first] == [
        2 * soundfile.info(row["audio"]).frames for row in rows
    ]
    for number, (workers, size) in enumerate([(1, 1), (1, 100), (2, 8), (2, 1)], start=1):
        convert(rows, output=str(number), num_workers=workers, tokenizing_batch_size=size)
        names = files_below(place / "0")
        assert files_below(place / str(number)) == names
        assert sum(name.endswith("-of-00009.arrow") for name in names) == 9
        for name in names - {SETTINGS_FILE}:
            assert (place / str(number) / name).read_bytes() == (place / "0" / name).read_bytes(), name


def test_nothing_heavy_is_imported(tmp_path):
    """Each process of a conversion would take a quarter of a gigabyte more with torch."""
    write_csv(tmp_path / "rows.csv", phrases(4))
    words = ["convert-dataset", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "out")]
    code = (
        "import sys; from mdl_toolkit.cli.main import run; "
        f"assert run({[*words, '--model-name', str(MODEL)]!r}) == 0; "
        "print(*{'torch', 'scipy', 'datasets'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
