"""Warnings that save a day: each is given when it is due, and not when it is not."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data import dataset
from mdl_toolkit.data import warnings as advice
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.data.warnings import LossWatch, advise, find_leaks
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import read_log
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.paths import MODEL
from tests.support.runs import make_csv, make_rows, train_options, write_csv
from tests.support.waves import wave


def convert(folder, rows, name="data"):
    csv = write_csv(folder / f"{name}.csv", rows)
    convert_dataset(ConvertOptions(input=str(csv), output=str(folder / name), model_name=str(MODEL)))
    return ConvertedDataset(folder / name)


def with_answers(rows, answers):
    return [{**row, "prediction": answer} for row, answer in zip(rows, answers, strict=True)]


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


# --- long answers ---------------------------------------------------------------------------------------


def test_long_answers(tmp_path, capsys):
    rows = make_rows(tmp_path / "audio", 4)
    long = "A dog barks, rain falls on a roof, somebody speaks, and far away there is a train. " * 6
    data = convert(tmp_path, with_answers(rows, [long, long, long, "short"]))
    audio = ChatTokenizer(read_tokenizer_files(MODEL)).id_of("<|AUDIO|>")
    samples = [data[row] for row in range(4)]
    answer = sum((s.labels != -100).sum() for s in samples) / 4
    prompt = sum(((s.labels == -100) & (s.input_ids != audio)).sum() for s in samples) / 4
    capsys.readouterr()
    assert advice.warn_of_long_answers(data)
    (line,) = said(capsys)
    assert f"answers are longer than prompts: {answer:.1f} tokens to {prompt:.1f}, mean of 4 rows" in line


def test_a_few_long_answers_among_short_ones(tmp_path, capsys):
    rows = make_rows(tmp_path / "audio", 6)
    data = convert(tmp_path, with_answers(rows, ["word " * 60, *["short"] * 5]))
    capsys.readouterr()
    assert not advice.warn_of_long_answers(data)
    assert said(capsys) == []


# --- identical answers ----------------------------------------------------------------------------------


def test_identical_answers(tmp_path, capsys):
    data = convert(tmp_path, with_answers(make_rows(tmp_path / "audio", 5), ["rain"] * 5))
    capsys.readouterr()
    assert advice.warn_of_identical_answers(data)
    assert said(capsys)[0].startswith("warning: all 5 rows have the same answer: ")


@pytest.mark.parametrize("other", ["rain and wind", "niar"])
def test_one_other_answer_will_do(tmp_path, capsys, other):
    rows = make_rows(tmp_path / "audio", 5)
    data = convert(tmp_path, with_answers(rows, [*["rain"] * 4, other]))
    capsys.readouterr()
    assert not advice.warn_of_identical_answers(data)
    assert said(capsys) == []


def test_one_row_alone_is_no_reason(tmp_path):
    assert not advice.warn_of_identical_answers(convert(tmp_path, make_rows(tmp_path / "audio", 1)))


def test_answers_of_the_same_length_that_differ(tmp_path):
    """Lengths do not decide it: the ids do."""
    rows = make_rows(tmp_path / "audio", 3)
    data = convert(tmp_path, with_answers(rows, ["a", "a", "b"]))
    assert np.ptp(data.supervised_counts) == 0
    assert not advice.warn_of_identical_answers(data)


# --- leaks ----------------------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path):
    """Rows to learn, and to evaluate on: the last ones are those of training, changed in this and that."""
    learnt = make_rows(tmp_path / "learnt", 6)
    copy = tmp_path / "copy.wav"
    copy.write_bytes((tmp_path / "learnt/clip-0-3.wav").read_bytes())
    quieter = tmp_path / "quieter.wav"
    soundfile.write(quieter, 0.5 * wave(16_000, 0), 16_000, subtype="PCM_16")
    asked = [
        *make_rows(tmp_path / "asked", 3, seed=40),  # as long as those of training, but others
        learnt[1],
        {**learnt[2], "user_prompt": "And this?"},
        {**learnt[3], "audio": str(copy)},
        {**learnt[4], "prediction": "another"},
        {**learnt[0], "audio": str(quieter)},
    ]
    return convert(tmp_path, learnt, "learnt-data"), convert(tmp_path, asked, "asked-data")


def test_leaks_by_kind(sets, capsys, monkeypatch):
    monkeypatch.setattr(dataset, "unpack_audio", None)  # nothing is decoded
    capsys.readouterr()
    leaks = find_leaks(*sets)
    assert (leaks.same, leaks.other_text) == ([3, 5], [4, 6])
    assert advice.warn_of_leaks(*sets)
    (line,) = said(capsys)
    assert "4 of 8 evaluation rows have a recording that is also trained on: " in line
    assert "2 with the same prompt and answer (line 5, 7); " in line
    assert "2 with another prompt or answer (line 6, 8); " in line


def test_one_of_several_rows_with_a_recording_decides(tmp_path):
    """A recording that is asked about more than once: what is the same is found behind what is not."""
    row, *_ = make_rows(tmp_path / "audio", 1)
    asked = [{**row, "user_prompt": prompt} for prompt in ("Who?", "What?", "Where?")]
    leaks = find_leaks(convert(tmp_path, asked, "a"), convert(tmp_path, [asked[2]], "b"))
    assert (leaks.same, leaks.other_text) == ([0], [])


def test_sets_apart(tmp_path, capsys):
    learnt, asked = (make_rows(tmp_path / str(seed), 6, seed=seed) for seed in (0, 50))
    pair = convert(tmp_path, learnt, "a"), convert(tmp_path, asked, "b")
    capsys.readouterr()
    assert np.array_equal(pair[0].audio_lengths, pair[1].audio_lengths)
    assert not advice.warn_of_leaks(*pair)
    assert said(capsys) == []


def test_recordings_of_other_lengths_are_not_read(tmp_path, monkeypatch):
    rows = make_rows(tmp_path / "audio", 6)
    pair = convert(tmp_path, rows[:3], "a"), convert(tmp_path, rows[3:], "b")
    assert not {*pair[0].audio_lengths.tolist()} & {*pair[1].audio_lengths.tolist()}
    monkeypatch.setattr(ConvertedDataset, "encoded_audio", None)
    assert not advice.warn_of_leaks(*pair)


def test_many_are_counted_and_the_first_named(tmp_path, capsys):
    data = convert(tmp_path, make_rows(tmp_path / "audio", 14))
    capsys.readouterr()
    advise(data, data)
    (line,) = said(capsys)
    assert "14 of 14 evaluation rows" in line
    assert "(line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...)" in line


def test_a_training_warns_before_it_loads_weights(tmp_path, capsys):
    rows = with_answers(make_rows(tmp_path / "audio", 4), ["rain"] * 4)
    csv = write_csv(tmp_path / "train.csv", rows)
    train(train_options(csv, MODEL, tmp_path / "run", eval_dataset=str(csv), num_epochs=12))
    lines = capsys.readouterr().err.splitlines()
    ours = [n for n, line in enumerate(lines) if line.startswith("warning: ")]
    assert [" same answer" in lines[n] or "trained on" in lines[n] for n in ours] == [True, True]
    assert max(ours) < lines.index("device: cpu; base weights: float32")


def test_a_training_without_reason_warns_of_nothing(tmp_path, capsys):
    learnt, asked = make_csv(tmp_path / "t", 6), make_csv(tmp_path / "e", 6, seed=50)
    train(train_options(learnt, MODEL, tmp_path / "run", eval_dataset=str(asked), num_epochs=12))
    assert said(capsys) == []


# --- the loss -------------------------------------------------------------------------------------------


def watched(losses, warmup=0, total=None):
    """The step after which it is warned, if any."""
    watch = LossWatch(total or len(losses), warmup, 1e-4)
    warned = [step for step, loss in enumerate(losses, 1) if watch.see(step, float(loss))]
    assert len(warned) < 2
    return warned[0] if warned else None


def noisy(curve, seed, spread):
    """Losses about a curve, never below 0: some steps are far above it, as hard rows are."""
    return np.asarray(curve) * np.random.default_rng(seed).lognormal(-(spread**2) / 2, spread, len(curve))


@pytest.mark.parametrize(
    ("losses", "warmup", "warns"),
    [
        ([4.0], 0, True),
        ([4.0, 3.9, 3.95], 0, True),
        ([4.0] * 49, 0, True),
        ([*np.linspace(4, 1, 49)], 0, False),
        ([4.0, 1.0], 0, False),
        # Judged while it ran, or warned of before: it is said once.
        ([4.0] * 50, 0, False),
        ([4.0] * 10, 10, False),
    ],
)
def test_a_run_too_short_to_learn_is_told_of_at_its_end(capsys, losses, warmup, warns):
    watch = LossWatch(len(losses), warmup, 1e-4)
    watched = [watch.see(step, loss) for step, loss in enumerate(losses, 1)]
    capsys.readouterr()
    assert watch.end(len(losses)) == warns
    assert watched == [False] * len(watched) or len(losses) == 50
    few = "1 step is" if len(losses) == 1 else f"{len(losses)} steps are"
    assert [f"{few} too few to learn much" in line for line in said(capsys)] == [True] * warns


def test_a_short_run_whose_losses_are_not_known_is_not_judged(capsys):
    watch = LossWatch(30, 0, 1e-4)
    watch.see(30, 4.0)
    assert not watch.end(30)
    assert not watch.end(0)


STEPS = np.arange(500)


@pytest.mark.parametrize(
    "curve",
    [
        3 * 0.5 ** (STEPS / 60),
        2 + 1.0 * 0.5 ** (STEPS / 5),  # falls at once, and stays
        2 - 0.8 * STEPS / 500 - 0.4 * (STEPS > 20),
    ],
    ids=["slowly", "at once", "a little"],
)
@pytest.mark.parametrize("warmup", [0, 100])
def test_noisy_runs_that_learn_are_left_alone(curve, warmup):
    warned = [watched(noisy(curve, seed, 0.25), warmup) for seed in range(200)]
    assert sum(step is not None for step in warned) <= 4


@pytest.mark.parametrize("curve", [2 + 0 * STEPS, 2 + STEPS / 250], ids=["flat", "rising"])
def test_runs_that_do_not_learn_are_warned_of(curve):
    warned = [watched(noisy(curve, seed, 0.1)) for seed in range(200)]
    assert sum(step is not None for step in warned) >= (100 if curve[-1] == 2 else 199)
    assert {*warned} <= {None, 100}  # a fifth of the steps
    assert watched(curve) == 100


@pytest.mark.parametrize(
    ("steps", "warmup", "at"),
    [(49, 0, None), (50, 0, 50), (200, 0, 50), (1000, 0, 200), (200, 100, 120), (200, 190, None)],
)
def test_when_it_is_judged(steps, warmup, at):
    assert watched([2.0] * steps, warmup) == at


def test_a_fall_that_is_none(capsys):
    watched([*[2.0] * 20, *[1.97] * 30])
    (line,) = said(capsys)
    assert "2.0000 in the first 20 steps, 1.9700 in the last 25 up to step 50 of 50; " in line
    assert "another --lr than 0.0001" in line
    assert watched([*[2.0] * 20, *[1.95] * 30]) is None


def test_a_training_on_rows_beyond_the_positions_is_advised_what_it_has(tmp_path, capsys):
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = 8
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", max_steps=1, merge_lora=False))
    (line,) = [line for line in said(capsys) if "has learnt no more than 8 positions" in line]
    assert line.endswith("; cut the recordings by `start` and `end`")


@pytest.mark.parametrize(("rate", "warns"), [(1e-9, True), (1e-2, False)])
def test_a_training_that_does_not_learn(tmp_path, capsys, rate, warns):
    csv = make_csv(tmp_path, 12)
    train(train_options(csv, MODEL, tmp_path / "run", lr=rate, num_epochs=18, batch_size=4))
    lines = said(capsys)
    assert sum("too little to learn" in line for line in lines) == warns
    assert sum(line.startswith("warning: the loss does not fall") for line in lines) == warns


def test_a_resumed_run_knows_the_losses_before(tmp_path, capsys):
    csv = make_csv(tmp_path, 12)
    options = {"lr": 1e-9, "batch_size": 4, "save_steps": 15}
    train(train_options(csv, MODEL, tmp_path / "run", num_epochs=15, **options))
    assert sum("45 steps are too few" in line for line in said(capsys)) == 1
    train(train_options(csv, MODEL, tmp_path / "run", num_epochs=18, resume_from_checkpoint=True, **options))
    assert len(read_log(tmp_path / "run/log.jsonl")) == 54
    assert sum("the loss does not fall" in line for line in said(capsys)) == 1
