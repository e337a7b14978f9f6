"""Long recordings in windows: where they lie, how transcripts are joined, and that a window is a row."""

import errno
import json
import random
import shlex
import signal
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mdl_toolkit.audio import loading
from mdl_toolkit.audio.segments import Segment
from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.data import open_audio
from mdl_toolkit.errors import InputError, RowsError, UnavailableError, UsageError
from mdl_toolkit.inference import windows as windowing
from mdl_toolkit.inference.journal import AnswerJournal
from mdl_toolkit.inference.run import infer
from mdl_toolkit.inference.windows import find_seam, join_transcript, windows
from tests.support.fleet import fleet
from tests.support.inferences import infer_options, stop_after, stopped, table
from tests.support.processes import wait_for
from tests.support.runs import copy_checkpoint, make_rows, write_csv
from tests.support.server import FileServer, needs_server
from tests.support.waves import wave

RATE = 16_000


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = FileServer()
    yield served
    served.close()


def make_long(folder, seconds=7.1, name="long.wav"):
    file = folder / name
    soundfile.write(file, wave(round(seconds * RATE), 3), RATE, subtype="PCM_16")
    return str(file)


# --- where windows lie ---


@pytest.mark.parametrize("start", [0.0, 12.5])
@pytest.mark.parametrize("length", [30.0, 30.1, 31.0, 58.0, 58.3, 86.01, 3600.0])
@pytest.mark.parametrize("overlap", [0.0, 2.0, 15.0])
def test_windows_cover_a_segment_and_share_the_overlap(start, length, overlap):
    cut = windows(Segment(start, channel=2), start + length, 30.0, overlap)
    assert (cut[0].start, cut[-1].end) == (start, start + length)
    assert all(each.channel == 2 for each in cut)
    for one, two in pairwise(cut):
        assert (one.length, one.end - two.start) == pytest.approx((30, overlap))
    # The last one has sound of its own, enough for an audio token, and is hardly longer than a window.
    assert cut[-1].length <= 30.2 + 1e-6
    if len(cut) > 1:
        assert cut[-1].end - cut[-2].end >= 0.2


def test_a_segment_that_ends_too_late_is_still_refused(model, tmp_path):
    rows = [{"audio": make_long(tmp_path), "start": "1", "end": "9"}]
    source = write_csv(tmp_path / "in.csv", rows)
    with pytest.raises(RowsError, match="column end '9': the recording ends after 7.100 s"):
        infer(infer_options(source, model, tmp_path / "out.csv", window=2, overlap=0.5))


# --- how transcripts are joined ---

TEXT = (
    "In the beginning nobody had told the old captain that the harbour, which he knew from his "
    "childhood, was closed. He had sailed for nine days against the wind; the men were tired, the water "
    "was foul and the cook had begun to sing in the evenings. When the light on the pier came into "
    "sight he gave the order to take in the sails, and for a while there was nothing to be heard but "
    "the sea and the creaking of the old ropes."
)
CHINESE = (
    "老船长从小就熟悉这个港口，却没有人告诉他港口已经关闭了。他顶着风航行了九天，船员们都很疲惫，淡水也变了味，厨师"
    "每天晚上都在唱歌。看到码头上的灯光时，他下令收起船帆，有一阵子除了海浪和旧绳索的吱呀声之外什么也听不见。"
)


def heard(units, window, overlap, errors=0.0, seed=0):
    """What a model hears in windows over a text, of two words or five characters a second."""
    draw = random.Random(seed)
    step = window - overlap
    parts = [units[start : start + window] for start in range(0, max(len(units) - overlap, 1), step)]
    return [
        [unit if draw.random() >= errors else f"<{draw.random():.3f}>" for unit in part] for part in parts
    ]


@pytest.mark.parametrize("overlap", [0, 3, 5, 10])
def test_words_of_overlaps_stand_once(overlap):
    words = TEXT.split()
    texts = [" ".join(part) for part in heard(words, 20, overlap)]
    assert len(texts) > 4
    assert "".join(join_transcript(texts, overlap / 2)).strip() == TEXT


@pytest.mark.parametrize("overlap", [0, 10, 24])
def test_characters_are_the_words_of_languages_without_spaces(overlap):
    texts = ["".join(part) for part in heard(CHINESE, 50, overlap)]
    assert len(texts) > 2
    assert "".join(join_transcript(texts, overlap / 5)) == CHINESE


def test_case_punctuation_and_words_cut_at_the_edges_do_not_matter():
    texts = ["the men were tired, the water was fou", "ired the Water was foul. And the cook sang."]
    assert "".join(join_transcript(texts, 2)) == "the men were tired, the water was foul. And the cook sang. "


def test_a_word_that_both_happen_to_have_is_no_overlap():
    texts = ["nobody told him that the harbour was closed for good", "I saw the dog"]
    assert "".join(join_transcript(texts, 2)).split() == " ".join(texts).split()
    assert (find_seam([], ["a"]), find_seam(["a"], [])) == ((0, 0), (1, 0))


def test_silent_windows_add_nothing():
    assert "".join(join_transcript(["", "one two", "", "three"], 2)) == "one two three "


@pytest.mark.parametrize("errors", [0.05, 0.15])
def test_joined_texts_have_no_more_errors_than_the_windows(errors):
    """At a seam a word heard wrong is one of two, so errors must not rise; few words may be there twice."""
    words = TEXT.split() * 3
    wrong = joined = twice = 0
    for seed in range(20):
        parts = heard(words, 60, 6, errors, seed)
        wrong += sum(word.startswith("<") for part in parts for word in part)
        text = "".join(join_transcript([" ".join(part) for part in parts], 3)).split()
        joined += sum(word.startswith("<") for word in text)
        assert len(text) >= len(words)
        twice += len(text) - len(words)
    assert joined <= wrong
    assert twice <= errors * len(words)


# --- a window is a row ---


def test_windows_are_answered_as_rows_with_start_and_end(model, tmp_path):
    """The same by hand: rows of one recording with other times; the short row is as without windows."""
    (short,) = make_rows(tmp_path / "audio", 1)
    rows = [
        {"audio": make_long(tmp_path), "note": "a,b", "prediction": "old"},
        {"audio": short["audio"], "note": "", "prediction": ""},
    ]
    times = [("0", "3"), ("2", "5"), ("4", "7.1")]
    by_hand = [{**rows[0], "start": start, "end": end} for start, end in times]
    by_hand = write_csv(tmp_path / "hand.csv", [*by_hand, {**rows[1], "start": "", "end": ""}])
    expected = infer(infer_options(by_hand, model, tmp_path / "expected.csv"))
    assert len({*expected}) == 4
    source = write_csv(tmp_path / "in.csv", rows)
    chosen = {"window": 3, "overlap": 1}
    listed = infer(infer_options(source, model, tmp_path / "list.csv", **chosen, join="list"))
    assert listed == expected
    assert (tmp_path / "list.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    joined = infer(infer_options(source, model, tmp_path / "out.csv", **chosen))
    assert joined == ["".join(join_transcript(expected[:3], 1)).strip(), expected[3]]
    written = table(tmp_path / "out.csv")
    assert [line["prediction"] for line in written] == joined
    assert [line["note"] for line in written] == ["a,b", ""]


def test_the_columns_of_the_input_name_the_windows(model, tmp_path):
    rows = [{"audio": make_long(tmp_path), "offset": "1", "duration": "5", "channel": "1"}]
    source = write_csv(tmp_path / "in.csv", rows)
    infer(infer_options(source, model, tmp_path / "out.csv", window=3, overlap=1, join="list"))
    written = table(tmp_path / "out.csv")
    assert [(row["offset"], row["duration"], row["end"]) for row in written] == [
        ("1", "3", "4"),
        ("3", "3", "6"),
    ]
    # What is written can be asked again.
    again = infer(infer_options(tmp_path / "out.csv", model, tmp_path / "again.csv"))
    assert again == [row["prediction"] for row in written]


@pytest.mark.parametrize("join", ["transcript", "list"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(model, tmp_path, monkeypatch, join):
    """Also if it is to be joined in another way than before."""
    rows = [{"audio": make_long(tmp_path, 4 + n, f"{n}.wav")} for n in range(3)]
    source = write_csv(tmp_path / "in.csv", rows)
    whole = infer_options(source, model, tmp_path / "whole.csv", window=2, overlap=0.5, join=join)
    infer(whole)
    first = infer_options(source, model, tmp_path / "out.csv", window=2, overlap=0.5)
    stopped(monkeypatch, 3, first)
    # Neither measured nor decoded again.
    monkeypatch.setattr(loading, "decode_whole", lambda *_: pytest.fail("decoded again"))
    asked = stop_after(monkeypatch, 99)
    infer(replace(first, join=join))
    assert len(asked) == 10 - 3
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not [*tmp_path.glob(".out*")]


def test_a_window_that_cannot_be_used_leaves_its_row_alone_without_an_answer(model, tmp_path):
    samples = wave(round(7.1 * RATE), 3).astype(np.float32)
    whole = [make_long(tmp_path), str(tmp_path / "nan.wav")]
    soundfile.write(whole[1], np.where(np.arange(len(samples)) == 5 * RATE, np.nan, samples), RATE, "FLOAT")
    rows = [
        {"audio": audio, "duration": "7"} for audio in (*whole, make_rows(tmp_path / "audio", 1)[0]["audio"])
    ]
    source = write_csv(tmp_path / "in.csv", rows)
    chosen = {"window": 3, "overlap": 1, "on_error": "keep"}
    with pytest.raises(InputError, match="1 of its rows has no prediction"):
        infer(infer_options(source, model, tmp_path / "out.csv", **chosen, join="list"))
    written = table(tmp_path / "out.csv")
    assert [bool(row["prediction"]) for row in written] == [True, True, True, False, True]
    assert ["NaN" in row["error"] for row in written] == [False, False, False, True, False]
    # Beside a start, the length of a whole recording would be taken for a window's.
    assert [row["duration"] for row in written] == ["3", "3", "3.1", "", ""]


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (UnavailableError("{n} busy", n=503), "503 busy"),
        (OSError(errno.EIO, "Input/output error"), "the file cannot be read"),
        (MemoryError(), "the machine ran out of memory"),
    ],
)
def test_a_row_that_cannot_be_measured_is_not_answered_whole(model, tmp_path, monkeypatch, problem, said):
    """A problem that passes: when the row would be converted, its recording is there again."""
    measured = open_audio.load_length

    def failing(path, *rest):
        if "long" in str(path):
            raise problem
        return measured(path, *rest)

    monkeypatch.setattr(open_audio, "load_length", failing)
    rows = [{"audio": make_long(tmp_path)}, {"audio": make_rows(tmp_path / "audio", 1)[0]["audio"]}]
    source = write_csv(tmp_path / "in.csv", rows)
    with pytest.raises(InputError, match="1 of its rows has no prediction"):
        infer(infer_options(source, model, tmp_path / "out.csv", window=2, overlap=0.5, on_error="keep"))
    one, two = table(tmp_path / "out.csv")
    assert said in one["error"]
    assert (one["prediction"], bool(two["prediction"]), two["error"]) == ("", True, "")
    with pytest.raises(RowsError, match=f"line 2, column audio .*{said}"):
        infer(infer_options(source, model, tmp_path / "none.csv", window=2, overlap=0.5))


def test_lengths_outlive_an_interruption(model, tmp_path, monkeypatch, capsys):
    rows = [{"audio": make_long(tmp_path, 4 + n, f"{n}.wav")} for n in range(3)]
    options = infer_options(
        write_csv(tmp_path / "in.csv", rows), model, tmp_path / "out.csv", window=2, overlap=0.5
    )
    measured, asked = open_audio.load_length, []

    def interrupted(path, *rest):
        asked.append(path.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return measured(path, *rest)

    monkeypatch.setattr(open_audio, "load_length", interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer(options)
    assert "recordings that were measured or fetched are kept" in capsys.readouterr().err
    infer(options)
    assert asked == ["0.wav", "1.wav", "2.wav", "2.wav"]
    assert not [*tmp_path.glob(".out*")]


def test_lengths_are_written_down_on_the_way(model, tmp_path, monkeypatch):
    """A run that is killed loses what it has measured since they were, not more."""
    rows = [{"audio": make_long(tmp_path, 4 + n, f"{n}.wav")} for n in range(3)]
    source = write_csv(tmp_path / "in.csv", rows)
    monkeypatch.setattr(windowing, "KEPT_EVERY", -1)
    file, found = AnswerJournal(tmp_path / "out.csv").lengths, []
    measured = open_audio.load_length

    def noted(*given):
        found.append([values[2] for values in json.loads(file.read_text()).values()] if file.exists() else [])
        return measured(*given)

    monkeypatch.setattr(open_audio, "load_length", noted)
    infer(infer_options(source, model, tmp_path / "out.csv", window=2, overlap=0.5))
    assert found == [[], [4], [4, 5]]


@needs_server
def test_what_is_fetched_to_be_measured_is_converted_and_measured_anew_the_next_time(
    model, tmp_path, monkeypatch, server
):
    def serve(seconds):
        server.files["/a.wav"] = Path(make_long(tmp_path, seconds)).read_bytes()

    serve(7.1)
    source = write_csv(tmp_path / "in.csv", [{"audio": f"{server.url}/a.wav"}])
    options = infer_options(source, model, tmp_path / "out.csv", window=2, overlap=0.5, join="list")
    stopped(monkeypatch, 1, options)
    assert server.asked == ["/a.wav"]
    serve(4)
    infer(options)
    assert [row["end"] for row in table(tmp_path / "out.csv")][-1] == "4"
    assert server.asked == ["/a.wav"] * 2


@needs_server
def test_a_recording_that_never_comes_keeps_nobody_from_stopping(model, tmp_path, server):
    rows = [{"audio": make_long(tmp_path)}, {"audio": f"{server.url}/slow"}]
    source = write_csv(tmp_path / "in.csv", rows)
    words = as_command(infer_options(source, model, tmp_path / "out.csv", window=2, overlap=0.5))
    with fleet(tmp_path) as start:
        job = start(shlex.split(words)[1:])
        assert job.until(lambda: server.asked)
        job.signal(signal.SIGINT)
        wait_for(lambda: not job.is_running, 20)
        assert job.end() == 130, job.said()


def test_many_recordings_are_measured_in_processes(model, tmp_path, monkeypatch):
    rows = [{"audio": make_long(tmp_path, 4 + n, f"{n}.wav")} for n in range(3)]
    source = write_csv(tmp_path / "in.csv", [*rows, {"audio": str(tmp_path / "bad.wav")}])
    (tmp_path / "bad.wav").write_bytes(b"no sound at all")
    one, two = (tmp_path / name for name in ("one.csv", "two.csv"))
    for output in (one, two):
        with pytest.raises(InputError, match="1 of its rows has no prediction"):
            infer(
                infer_options(
                    source, model, output, window=2, overlap=0.5, on_error="keep", join="list", num_workers=2
                )
            )
        monkeypatch.setattr(windowing, "FEW_BYTES", 1)
        monkeypatch.setattr(open_audio, "load_length", lambda *_: pytest.fail("in this process"))
    assert one.read_bytes() == two.read_bytes()
    assert len(table(one)) == 11


def test_an_hour_is_measured_in_little_memory(tmp_path):
    """Lengths are measured block by block: 3,600 s of float32 at 16 kHz would be 230 MB."""
    file = tmp_path / "hour.wav"
    with soundfile.SoundFile(file, "w", RATE, 1, "PCM_16") as sound:
        for _ in range(60):
            sound.write(np.zeros(60 * RATE, np.int16))
    tracemalloc.start()
    try:
        assert loading.load_length(file) == 3600
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": 3.0}, "--overlap 2: give at most half of --window 3"),
        ({"overlap": 1.0}, "--overlap has no effect without --window"),
        ({"join": "list"}, "--join has no effect without --window"),
        ({"window": 30.0, "choices": "labels.txt"}, "give --join list"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        windowing.check_windows(infer_options("in.csv", "model", tmp_path / "out.csv", **changes))
