"""A conversion that is killed, interrupted or runs out of disk goes on where it was, and ends the same."""

import csv
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE
from mdl_toolkit.data import open_audio as recordings
from mdl_toolkit.data.convert import plan
from mdl_toolkit.data.convert import run as conversion
from mdl_toolkit.data.convert.work_folder import WorkFolder
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import IGNORE_INDEX, ChatTokenizer
from mdl_toolkit.errors import DatasetError, RowsError
from mdl_toolkit.utils.ownership import seal
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.commands import (
    ROWS,
    ROWS_PER_SHARD,
    SHARDS,
    Command,
    Marks,
    convert_here,
    data_of,
    finished,
    killing_all,
    make_place,
    marks,
    names,
)
from tests.support.paths import MODEL
from tests.support.processes import wait_for
from tests.support.runs import copy_checkpoint, write_csv
from tests.support.waves import wave

OLD = {"old.arrow": b"old", "mdl-toolkit.json": b"{}", "state.json": b"{}"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    """The data of the rows of `place`, which do not depend on where that is."""
    folder = make_place(tmp_path_factory.mktemp("unbroken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = convert_here("out")
    assert sum(name.endswith(f"-of-{SHARDS:05d}.arrow") for name in data) == SHARDS
    return data


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current directory, with rows, recordings and something at the output."""
    folder = make_place(tmp_path / "place")
    monkeypatch.chdir(folder)
    (folder / "out").mkdir()
    for name, content in OLD.items():
        (folder / "out" / name).write_bytes(content)
    (folder / "out" / SETTINGS_FILE).write_text("# mdl-toolkit convert-dataset\n", encoding="utf-8")
    seal(folder / "out", "convert-dataset")
    return folder


@pytest.fixture
def start(place) -> Iterator[Callable[..., Command]]:
    """Starts the command in `place`."""
    with killing_all() as start:
        yield lambda *words, **more: start(place, *words, **more)


def rows_of_csv() -> list[dict[str, str]]:
    with Path("rows.csv").open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def spoil_recordings(files: Marks) -> None:
    """Make the recordings of finished shards useless, in a way that only reading them tells."""
    for name in files:
        first = int(name.split("-")[1]) * ROWS_PER_SHARD
        for row in rows_of_csv()[first : first + ROWS_PER_SHARD]:
            path = Path(row["audio"])
            status = path.stat()
            path.write_bytes(b"x" * status.st_size)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def going_on(shards: int) -> str:
    rows = shards * ROWS_PER_SHARD
    return f"going on from an earlier run: {rows} of {ROWS} rows are converted already\n"


def kept(place: Path, shards: int) -> str:
    rows, folder = shards * ROWS_PER_SHARD, place / ".out.partial"
    return f"{rows} of {ROWS} rows are finished (in {folder}): the same command goes on from there\n"


# --- killed ----------------------------------------------------------------------------------------------

MOMENTS = {  # where, in how many processes, and how many shards are finished then
    "reading the CSV": ("mdl_toolkit.data.manifest:Row.__init__:5", 1, 0),
    "before the fourth shard is written down": (
        "mdl_toolkit.data.convert.work_folder:WorkFolder.commit:4",
        1,
        3,
    ),
    "between the third shard's file and its line": ("pathlib:Path.replace:6", 1, 2),
    "workers in the middle of shards": ("mdl_toolkit.data.convert.worker:pack_audio:6", 2, 2),
    "in the middle of the metadata": ("mdl_toolkit.data.dataset_writer:asdict:2", 1, SHARDS),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(place, start, unbroken, capsys, moment):
    hold, processes, shards = MOMENTS[moment]
    command = start("--num-workers", str(processes), HOLD=hold)
    command.wait_until_held(processes)
    command.kill()
    assert data_of(place / "out") == OLD
    assert names(place) == {"audio", "rows.csv", "out", ".out.partial"}
    before = finished(place)
    assert len(before) == shards
    spoil_recordings(before)
    capsys.readouterr()
    if processes == 1:
        convert_here("out")
        said = capsys.readouterr().err
    else:
        status, said = start("--num-workers", str(processes)).end()
        assert status == 0, said
    assert said.startswith(going_on(shards) if shards else "out: ")
    assert data_of(place / "out") == unbroken
    assert marks(place / "out", before) == before
    assert names(place) == {"audio", "rows.csv", "out"}


def test_killed_again_and_again_at_any_moment(place, start, unbroken):
    while data_of(place / "out") == OLD:
        kill_after_two_shards(place, start("--num-workers", "1"))
    assert data_of(place / "out") == unbroken
    convert_here("out")  # the last one may have been killed when it cleared up
    assert names(place) == {"audio", "rows.csv", "out"}


def kill_after_two_shards(place: Path, command: Command) -> None:
    journal = place / ".out.partial/shards"
    before = len([*journal.glob("*.json")])
    wait_for(lambda: len([*journal.glob("*.json")]) >= before + 2 or not command.is_running)
    command.process.kill()
    command.end()


def test_killed_at_the_very_moment_of_putting_in_place(place, start, unbroken):
    """Then there is nothing at the output; the next run brings back what was, before it does anything."""
    command = start(HOLD="pathlib:Path.rename:2")
    command.wait_until_held()
    command.kill()
    assert names(place) == {"audio", "rows.csv", ".out.partial"}
    command = start(HOLD="mdl_toolkit.data.manifest:Row.__init__:9")
    command.wait_until_held()
    assert data_of(place / "out") == OLD
    command.go_on()
    status, said = command.end()
    assert (status, said.splitlines()[0]) == (0, going_on(SHARDS).rstrip())
    assert data_of(place / "out") == unbroken
    assert names(place) == {"audio", "rows.csv", "out"}


def test_killed_when_all_is_in_place(place, start, unbroken):
    command = start(HOLD="mdl_toolkit.data.convert.work_folder:WorkFolder.remove:1")
    command.wait_until_held()
    command.kill()
    assert data_of(place / "out") == unbroken
    assert convert_here("out") == unbroken
    assert names(place) == {"audio", "rows.csv", "out"}


# --- killed, and something is changed --------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A place where a run was killed after four of six shards."""
    folder = make_place(tmp_path_factory.mktemp("killed") / "place")
    with killing_all() as start:
        command = start(
            folder, "--num-workers", "1", HOLD="mdl_toolkit.data.convert.work_folder:WorkFolder.commit:5"
        )
        command.wait_until_held()
        command.kill()
    shutil.copytree(folder, folder.with_name("saved"))
    return folder


@pytest.fixture
def killed_place(killed, monkeypatch) -> Path:
    """That place again, as it was; the current directory."""
    shutil.rmtree(killed)
    shutil.copytree(killed.with_name("saved"), killed)  # with all times
    monkeypatch.chdir(killed)
    assert len(finished(killed)) == 4
    return killed


def edit(change: Callable[[list[dict[str, str]]], Any]) -> None:
    rows = rows_of_csv()
    change(rows)
    write_csv(Path("rows.csv"), rows)


def touch() -> None:
    os.utime(rows_of_csv()[5]["audio"])


def record_anew() -> None:
    soundfile.write(rows_of_csv()[5]["audio"], wave(7777, 99), 16_000, subtype="PCM_16")


def push_lines_down() -> None:
    text = Path("rows.csv").read_text(encoding="utf-8")
    Path("rows.csv").write_text(text.replace("\n", "\n\n", 1), encoding="utf-8")


def other_model(file: str, change: Callable[[str], str]) -> dict[str, str]:
    folder = copy_checkpoint(MODEL.parents[1], MODEL.name, Path.cwd())
    text = (folder / file).read_text(encoding="utf-8")
    (folder / file).write_text(change(text), encoding="utf-8")
    return {"model_name": str(folder)}


def forget_merges(text: str) -> str:
    values = json.loads(text)
    del values["model"]["merges"][100:]
    return json.dumps(values)


CHANGES = {  # what is changed (and the options with it), the shards that can be used still, other data or not
    "a prediction": (lambda: edit(lambda rows: rows[1].update(prediction="other")), {1, 2, 3}, True),
    "a prompt": (lambda: edit(lambda rows: rows[5].update(user_prompt="Why?")), {0, 2, 3}, True),
    "two rows change places": (lambda: edit(lambda rows: rows.insert(14, rows.pop(15))), {0, 1, 2}, True),
    "a row more": (lambda: edit(lambda rows: rows.append(rows[0])), set(), True),
    "another column": (lambda: edit(lambda rows: [r.update(note="x") for r in rows]), {0, 1, 2, 3}, False),
    "line numbers": (push_lines_down, set(), True),
    "a recording is touched": (touch, {0, 2, 3}, False),
    "a recording is another one": (record_anew, {0, 2, 3}, True),
    "the system prompt": (lambda: {"system_prompt": "Kurz."}, set(), True),
    "a prompt that no row needs": (lambda: {"user_prompt": "Hm?"}, {0, 1, 2, 3}, False),
    "an option for recordings": (lambda: {"allow_truncated": True}, set(), False),
    "the tokenizer": (lambda: other_model("tokenizer.json", forget_merges), set(), True),
    "the chat template": (
        lambda: other_model("chat_template.jinja", lambda text: text.replace("helpful ", "")), set(), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_is_converted_anew(killed_place, unbroken, what):
    change, usable, is_other = CHANGES[what]
    before = finished(killed_place)
    options = change() or {}
    data = convert_here("out", **options)
    assert data == convert_here("fresh", **options)
    after = marks(Path("out"), before.keys() & data.keys())
    assert {int(name.split("-")[1]) for name, mark in after.items() if mark == before[name]} == usable
    shards = [name for name in unbroken if name.endswith(".arrow")]
    assert ([data.get(name) for name in shards] != [unbroken[name] for name in shards]) == is_other


SPELLINGS = {  # the current directory, what stands before each path, and where recordings are looked for
    "a dot": (".", "./", None),
    "a link": (".", "link/", "link"),
    "another directory": ("audio", "../", ".."),
    "absolute paths": (".", "{}/", "{}/link"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_work_spelt_otherwise_goes_on(killed_place, unbroken, monkeypatch, capsys, spelling):
    before = finished(killed_place)
    (killed_place / "link").symlink_to(killed_place)
    folder, start, base_dir = (each and each.format(killed_place) for each in SPELLINGS[spelling])
    rows = [{**row, "audio": os.path.relpath(row["audio"], killed_place)} for row in rows_of_csv()]
    write_csv(Path("rows.csv"), rows)
    monkeypatch.chdir(folder)
    model = os.path.relpath(MODEL)
    data = convert_here(f"{start}out", input=f"{start}rows.csv", base_dir=base_dir, model_name=model)
    assert data == unbroken
    after = marks(killed_place / "out", before.keys() & data.keys())
    assert {name: after[name] for name in before} == before
    said = capsys.readouterr().err
    assert going_on(4) in said
    assert "removed" not in said


def test_finished_shards_of_other_work_are_removed_with_a_word(killed_place, capsys):
    convert_here("out", system_prompt="Kurz.")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "removed" in line]
    assert line.startswith(f"{killed_place / '.out.partial'}: 4 shards of an earlier run are ")


VERSIONS = {
    "toolkit": lambda patch: patch.setattr(conversion, "__version__", "0"),
    "a library": lambda patch: patch.setattr(conversion, "version", lambda name: name),
    "libsndfile": lambda patch: patch.setattr(soundfile, "__libsndfile_version__", "0"),
    "the format": lambda patch: patch.setattr(conversion, "FORMAT", 0),
}


@pytest.mark.parametrize("what", VERSIONS)
def test_what_another_version_made_is_not_used(killed_place, unbroken, monkeypatch, what):
    before = finished(killed_place)
    VERSIONS[what](monkeypatch)
    assert convert_here("out") == unbroken
    assert not set(marks(Path("out"), before).values()) & set(before.values())


def test_what_has_answers_is_not_used_for_inference(killed_place, monkeypatch):
    options = ConvertOptions(model_name=str(MODEL), input="rows.csv", output="out", num_workers=1)
    manifest = conversion.read_manifest("rows.csv", options, needs_prediction=True)
    tokenizer = ChatTokenizer(read_tokenizer_files(MODEL))
    monkeypatch.setattr(plan, "CHUNK_ROWS", ROWS_PER_SHARD)
    monkeypatch.setattr(plan, "FEWEST_BYTES", 1)
    conversion.convert_rows(manifest, Path("out"), tokenizer, options, with_answer=False)
    dataset = ConvertedDataset(Path("out"))
    assert len(dataset) == ROWS
    assert {label for sample in dataset for label in sample.labels} == {IGNORE_INDEX}


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "entry"])
def test_a_damaged_shard_is_converted_anew(killed_place, unbroken, damage):
    name, before = f"data-00001-of-{SHARDS:05d}.arrow", finished(killed_place)
    file, entry = (Path(".out.partial", path) for path in (f"dataset/{name}", "shards/1.json"))
    if damage == "entry":
        entry.write_text(entry.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    elif damage == "removed":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1 if damage == "cut" else 0)
    assert convert_here("out") == unbroken
    after = marks(Path("out"), before)
    assert {other for other in before if after[other] == before[other]} == before.keys() - {name}


# --- ends that are no kill -------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_finished(place, start, unbroken):
    command = start("--num-workers", "2", HOLD="mdl_toolkit.data.convert.work_folder:WorkFolder.commit:4")
    command.wait_until_held()
    command.interrupt()
    assert command.end() == (130, f"{kept(place, 3)}interrupted\n")
    assert data_of(place / "out") == OLD
    before = finished(place)
    assert len(before) == 3
    command = start(HOLD="mdl_toolkit.data.manifest:Row.__init__:9")  # and once more, before it goes on
    command.wait_until_held()
    command.interrupt()
    assert command.end() == (130, "interrupted\n")
    status, said = start().end()
    assert (status, said.splitlines()[0]) == (0, going_on(3).rstrip())
    assert data_of(place / "out") == unbroken
    assert marks(place / "out", before) == before


def test_ctrl_c_before_anything_is_finished(place, start):
    command = start(HOLD="mdl_toolkit.data.convert.work_folder:WorkFolder.commit:1")
    command.wait_until_held()
    command.interrupt()
    assert command.end() == (130, "interrupted\n")
    assert data_of(place / "out") == OLD
    assert names(place) == {"audio", "rows.csv", "out"}


def test_ctrl_c_while_workers_are_started(place, start):
    """The terminal interrupts them too, but they say nothing."""
    command = start("--num-workers", "2", STARTING="1")
    command.wait_until_held(2)
    command.interrupt()
    assert command.end() == (130, "interrupted\n")
    assert names(place) == {"audio", "rows.csv", "out"}


def test_bad_rows_leave_nothing_even_of_an_earlier_run(killed_place, capsys):
    before = names(killed_place) - {".out.partial"}
    soundfile.write("audio/clip-0-23.wav", np.full(9000, np.nan), 16_000, subtype="FLOAT")
    status, said = Command(killed_place, "--num-workers", "1").end()
    assert status == 1
    assert "rows.csv: 1 bad row(s):\n  line 25, column audio" in said
    assert names(killed_place) == before


@pytest.mark.parametrize("change", [os.utime, Path.unlink])
def test_a_recording_that_is_changed_while_it_is_read(place, monkeypatch, change):
    def load_and_change(path: Path, *more: Any) -> Any:
        clips = load(path, *more)
        if path.name == "clip-0-7.wav":
            change(path)
        return clips

    load = recordings.load_segments
    monkeypatch.setattr(recordings, "load_segments", load_and_change)
    with pytest.raises(RowsError, match=r"1 bad row\(s\):\n  line 9, .*: the file was changed while"):
        convert_here("out")
    assert data_of(place / "out") == OLD


def test_a_full_disk(place, start, capsys):
    """One shard is too large for it; the others are kept, and when there is room it goes on."""
    loud = np.random.default_rng(0).integers(-9999, 9999, 300_000).astype(np.int16)
    soundfile.write("audio/clip-0-18.wav", loud, 16_000, subtype="PCM_16")
    shutil.rmtree("out")
    status, said = start("--num-workers", "1", LIMIT="500000").end()
    place_of_it = place / ".out.partial/writing"
    assert status == 1
    assert said.startswith(f"{kept(place, 4)}error: {place_of_it}: cannot be written: ")
    assert said.count("\n") == 2
    assert "File too large" in said
    assert names(place) == {"audio", "rows.csv", ".out.partial"}
    before = finished(place)
    data = convert_here("out")
    assert capsys.readouterr().err.startswith(going_on(4))
    assert marks(place / "out", before) == before
    assert data == convert_here("fresh")


def test_a_killed_worker(place, start, unbroken):
    command = start("--num-workers", "2", HOLD="mdl_toolkit.data.convert.worker:pack_audio:6")
    command.wait_until_held(2)
    before = finished(place)
    os.kill(command.workers()[0], signal.SIGKILL)
    status, said = command.end()
    assert status == 1
    # Where that takes long, how far it is is said too.
    assert re.sub(r"(?m)^converting: .*\n", "", said) == (
        f"{kept(place, 2)}error: a worker process was ended by the system (out of memory?); "
        "try a smaller --num-workers\n"
    )
    assert data_of(place / "out") == OLD
    assert convert_here("out") == unbroken
    assert marks(place / "out", before) == before


def test_work_that_somebody_removes(place, unbroken, monkeypatch):
    """Rather an error than a dataset that lacks a shard."""
    name = f"data-00002-of-{SHARDS:05d}.arrow"
    with monkeypatch.context() as patch:
        commit, shards = WorkFolder.commit, []

        def commit_and_remove(*words: Any) -> Any:
            shards.append(commit(*words))
            if len(shards) == SHARDS:
                (place / ".out.partial/dataset" / name).unlink()
            return shards[-1]

        patch.setattr(WorkFolder, "commit", commit_and_remove)
        with pytest.raises(DatasetError) as caught:
            convert_here("out")
    folder = place / ".out.partial"
    assert caught.value.message.en == f"{folder}: something else has changed what is in it; start again"
    assert caught.value.message.zh == f"{folder}：其中的内容被其他程序改动；请重新运行"
    assert data_of(place / "out") == OLD
    assert convert_here("out") == unbroken


def test_two_conversions_into_one_output(place, start, unbroken):
    first = start(HOLD="mdl_toolkit.data.convert.work_folder:WorkFolder.commit:2")
    first.wait_until_held()
    status, said = Command(place, "--system-prompt", "another").end()
    assert (status, said) == (
        1, "error: --output out: another conversion is writing it; wait for its end\n"
    )  # fmt: skip
    first.go_on()
    assert first.end()[0] == 0
    assert data_of(place / "out") == unbroken
    assert names(place) == {"audio", "rows.csv", "out"}
