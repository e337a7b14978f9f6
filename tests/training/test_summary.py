"""What is said before the first step and after the last one: figures that are true, in both languages."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.training import log as runlog
from mdl_toolkit.training import summary as briefing
from mdl_toolkit.training.log import Pace, TimeForecast
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.run import train
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.summary import say_results
from mdl_toolkit.utils import console
from mdl_toolkit.utils.run_folder import read_log
from tests.support.fleet import fleet, slow_steps
from tests.support.paths import MODEL
from tests.support.runs import copy_checkpoint, make_csv, make_rows, train_options, write_csv


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


# --- before ---------------------------------------------------------------------------------------------


def test_the_briefing(tmp_path, capsys):
    rows = make_rows(tmp_path / "audio", 11)
    seconds = sum(soundfile.info(row["audio"]).duration for row in rows)
    csv, asked = write_csv(tmp_path / "train.csv", rows), make_csv(tmp_path / "e", 3, seed=50)
    options = train_options(
        csv, MODEL, tmp_path / "run", batch_size=2, gradient_accumulation_steps=2, num_epochs=1.5,
        train_target=("decoder", "projector", "lm_head"), eval_dataset=str(asked), save_steps=0,
    )  # fmt: skip
    train(options)
    said = lines_of(capsys)
    first = said.index("device: cpu; base weights: float32")
    data, steps, recipe, memory, loading, *targets = said[first + 1 : first + 10]
    weights = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    assert loading == f"loading weights: {weights / 1e6:.3g} MB from {MODEL}"
    assert memory.startswith("memory predicted: ")
    assert data.startswith(
        f"training data: 11 rows, {seconds / 3600:.2g} hours of audio; evaluation data: 3 rows, "
    )
    assert steps == (
        "steps: 5 in 1.5 epochs of 3; effective batch: 4 = 2 x 2 x 1 (batch x accumulation x processes)"
    )
    assert recipe == (
        "recipe: adamw, learning rate 0.01 (linear, warm-up 0 steps), beta2 0.999, weight decay 0, gradient "
        "norm at most 1, label smoothing 0, LoRA+ ratio 1"
    )
    adapter = load_file(tmp_path / "run/checkpoint-5/adapter_model.safetensors")
    base = sum(tensor.numel() for file in MODEL.glob("*.safetensors") for tensor in load_file(file).values())
    for target, name in (
        ("decoder", ".decoder.model.layers."),
        ("projector", ".audio_projector."),
        ("lm_head", ".lm_head."),
    ):
        (line,) = [line for line in targets if line.startswith(f"training {target}: ")]
        count = sum(tensor.numel() for key, tensor in adapter.items() if name in key)
        assert f", {count:,} parameters (" in line
    trained = sum(tensor.numel() for tensor in adapter.values())
    found = re.fullmatch(r"training ([\d,]+) of ([\d,]+) parameters \(([\d.]+)%\)", targets[-1])
    there = int(found[2].replace(",", ""))
    assert int(found[1].replace(",", "")) == trained
    assert there == pytest.approx(base + trained, rel=2e-3)  # buffers of the file are no parameters
    assert float(found[3]) == pytest.approx(100 * trained / there, abs=0.01)


def test_the_briefing_in_chinese(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    csv = make_csv(tmp_path, 4)
    train(train_options(csv, MODEL, tmp_path / "run", eval_dataset=str(csv)))
    said = "\n".join(lines_of(capsys))
    for text in (
        "设备：cpu；基础权重：float32",
        "训练数据：4 行，",
        "；评估数据：4 行，",
        "步数：1 个 epoch 共 1 步，",
        "共训练 ",
    ):
        assert text in said
    note = r"损失 [\d.]+，学习率 0.01，每秒 [\d.e+]+ 个样本，[\d.e+]+x"
    assert re.search(rf"训练：1/1，{note}，还需 0:00", said)
    for text in ("已训练 1 步，1 个 epoch；平滑损失：", "用时 0:0", "评估 ", "  最佳"):
        assert text in said


def test_tied_embeddings_are_told_of(golden, tmp_path, capsys):
    model = copy_checkpoint(golden, "B-small-tied", tmp_path)
    train(train_options(make_csv(tmp_path, 4), model, tmp_path / "run", train_target=("lm_head",)))
    assert "training one trains both" in capsys.readouterr().err


def test_quantized_weights_and_several_processes(capsys):
    import torch

    briefing.say_machine(torch.device("cpu"), torch.bfloat16, "4bit", 3)
    assert lines_of(capsys) == [
        "device: cpu, 3 processes; base weights: quantized in 4bit, computed in bfloat16"
    ]


# --- how long it will take ------------------------------------------------------------------------------


def sampler(rows=400):
    lengths = np.random.default_rng(1).integers(20, 400, rows)
    return BatchSampler(lengths, lengths // 4, 2, 2, 1, seed=3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"warmup_steps": 2}, []),
        ({"warmup_steps": 3}, ["0.67"]),
        ({"warmup_steps": 30}, ["0.067"]),
        ({"warmup_ratio": 0.9}, ["0.67"]),
        ({"warmup_steps": 30, "lr_scheduler": "constant"}, []),
    ],
)
def test_a_warm_up_that_never_ends_is_warned_of(tmp_path, capsys, changes, told):
    options = train_options("d", MODEL, tmp_path, num_epochs=1, **changes)
    lengths = np.ones(12, np.int64)
    briefing.say_steps(options, BatchSampler(lengths, lengths, 4, 1, 1, 0), Schedule.of(3, options))
    assert [
        line.split()[-3] for line in lines_of(capsys) if line.startswith("warning: the warm-up takes")
    ] == told


@pytest.mark.parametrize(
    ("every", "told"), [(500, True), (3, True), (2, False), (0, False), (0.5, False), ("epoch", True)]
)
def test_a_run_that_saves_nothing_before_its_end_says_so(tmp_path, capsys, every, told):
    lengths = np.ones(12, np.int64)
    options = train_options("d", MODEL, tmp_path, save_steps=every, num_epochs=1)
    briefing.say_steps(options, BatchSampler(lengths, lengths, 4, 1, 1, 0), Schedule.of(3, options))
    line = f"nothing is saved before the end, after step 3: --save-steps is {every}"
    assert (line in lines_of(capsys)) == told


def test_what_is_left_of_a_resumed_run_goes_by_the_steps_since(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress(1000, "training") as shown:
        # The time before the first step does not count.
        now[0] = 100.0
        shown.begin(900)
        now[0] += 20.0
        shown.advance(50)
    assert lines_of(capsys) == ["training: 950/1000, 0:20 left"]


def test_a_forecast_goes_by_the_length_of_steps():
    """Steps are of one length each, and of very different ones: the first few are no sample of all."""
    order, total, elapsed = sampler(), 200, 0.0
    cost = [
        0.01 * int(order.lengths[order.examples(step)].sum()) + (30 if step == 0 else 0)
        for step in range(total)
    ]
    cost[0] -= 20  # warming up, but not so long that it is all that is known
    forecast, told = TimeForecast(order, total), []
    for step in range(total):
        elapsed += cost[step]
        told.append(forecast.step(step + 1, order.examples(step), cost[step], 1.0))
    assert [n for n, left in enumerate(told) if left is not None] == [2]
    assert told[2] == pytest.approx(sum(cost[3:]), rel=0.05)


def test_a_slow_first_step_is_told_of_at_once():
    order = sampler()
    left = TimeForecast(order, 100).step(1, order.examples(0), 25.0, 25.0)
    mean = order.lengths.sum() / 100
    assert left == pytest.approx(25 / order.lengths[order.examples(0)].sum() * mean * 99)


def test_a_run_that_is_over_soon_is_not_forecast(tmp_path, capsys):
    train(train_options(make_csv(tmp_path, 12), MODEL, tmp_path / "run", num_epochs=2))
    assert "time: about" not in capsys.readouterr().err


def few_seconds_matter():
    runlog.PLAIN_INTERVAL = 0.2
    slow_steps(0.1)


def test_in_a_pipe_the_time_is_told_once(tmp_path):
    options = train_options(make_csv(tmp_path, 24), MODEL, tmp_path / "run", num_epochs=2, save_steps=0)
    with fleet(tmp_path) as start:
        job = start(as_command(options).split()[1:], few_seconds_matter)
        assert job.end() == 0
    told = [line for line in job.said().splitlines() if line.startswith("time: about")]
    assert len(told) == 1
    assert re.fullmatch(
        r"time: about 0:0\d, of which 0:0\d are left; evaluations still to come not counted", told[0]
    )


# --- after ----------------------------------------------------------------------------------------------


def write_log(folder, lines):
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_the_results_of_a_run(tmp_path, capsys):
    lines = [{"step": n, "loss": 2.0 if n < 50 else 1.0, "epoch": n / 50} for n in range(1, 101)]
    lines.insert(50, {"step": 50, "eval_loss": 1.25, "eval_tokens": 9, "eval_accuracy": 0.75, "epoch": 1.0})
    lines.append({"step": 100, "eval_loss": 1.5, "eval_tokens": 9, "eval_accuracy": 0.5, "epoch": 2.0})
    write_log(tmp_path, lines)
    say_results(tmp_path, 50, Pace(examples=400, audio=7200.0, seconds=200.0, waited=3.0))
    assert lines_of(capsys) == [
        "trained: 100 steps, 2 epochs; smoothed loss: 2.0000 at first, 1.0046 at last",
        "time: 3:20; 2 samples/s, 36 hours of audio in an hour, 1.5% of the time waiting for data",
        "evaluation     step      loss  accuracy",
        "                 50    1.2500    0.7500  best",
        "                100    1.5000    0.5000",
    ]


def test_of_many_evaluations_the_last_and_the_best_are_shown(tmp_path, capsys):
    write_log(tmp_path, [{"step": n, "eval_loss": 1.0, "eval_tokens": 9, "epoch": n} for n in range(1, 31)])
    say_results(tmp_path, 4, Pace(0, 0.0, 0.0, 0.0))
    said = lines_of(capsys)
    assert [int(line.split()[0]) for line in said[1:]] == [4, *range(21, 31)]
    assert [line.endswith("best") for line in said[1:]] == [True, *[False] * 10]


def test_without_a_log_there_is_the_pace(tmp_path, capsys):
    say_results(tmp_path, None, Pace(10, 10.0, 5.0, 0.0))
    assert len(lines_of(capsys)) == 1


def test_the_pace_is_that_of_the_life_and_the_losses_are_those_of_the_run(tmp_path, capsys):
    csv = make_csv(tmp_path, 12)
    options = train_options(csv, MODEL, tmp_path / "run", num_epochs=4, save_steps=3)
    train(options)
    whole = [line for line in lines_of(capsys) if line.startswith("trained: ")]
    paces = []
    say = partial(say_results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mdl_toolkit.training.run.say_results", lambda *words: [paces.append(words[2]), say(*words)]
        )
        train(replace(options, resume_from_checkpoint=str(tmp_path / "run/checkpoint-9")))
    assert [line for line in lines_of(capsys) if line.startswith("trained: ")] == whole
    assert paces[0].examples == 12
    assert paces[0].audio == pytest.approx(
        sum(soundfile.info(f).duration for f in (tmp_path / "audio").glob("*")), abs=1
    )
    logged = read_log(tmp_path / "run/log.jsonl")[-1]
    assert paces[0].seconds == pytest.approx(logged["elapsed"], abs=2)
