"""Answers while training: the metric, the best checkpoint, and stopping early."""

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import ToolkitError, UsageError
from mdl_toolkit.evaluation.text_metrics import LOSS, TEXT_METRICS, Best, normalized
from mdl_toolkit.inference.run import infer
from mdl_toolkit.reporting.run_section import run_values
from mdl_toolkit.training import trainer
from mdl_toolkit.training.answer_eval import AnswerEvaluator, draw
from mdl_toolkit.training.checkpoints import CHECKSUMS, STATE, checkpoints
from mdl_toolkit.training.evaluator import half_interval
from mdl_toolkit.training.run import train
from tests.support.paths import MODEL
from tests.support.runs import (
    ANSWERS,
    copy_checkpoint,
    evaluations,
    make_csv,
    make_rows,
    train_options,
    write_csv,
)


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def answers_of(final: Path, csv: Path, place: Path) -> list[str]:
    return infer(InferenceOptions(input=str(csv), output=str(place / "p.csv"), model_name=str(final)))


# --- the metric ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reference", "prediction", "expected"),
    [
        ("accuracy", "a b", " a b\n", (1, 1)),
        ("accuracy", "a b", "A b", (0, 1)),
        ("wer", "The cat sat.", "the cat sat", (0, 3)),
        ("wer", "the cat sat", "the dog sat down", (2, 3)),
        ("wer", "", "two words", (2, 0)),
        ("cer", "狗在叫。", "猫在 叫", (1, 3)),
        ("cer", "abc", "", (3, 3)),
    ],
)
def test_counts(name, reference, prediction, expected):
    assert TEXT_METRICS[name].count(reference, prediction) == expected


def test_normalisation():
    assert normalized("  Ｈｅｌｌｏ,\tWORLD！ ") == "hello world"


@pytest.mark.parametrize("name", ["accuracy", "cer"])
def test_the_metric_is_that_of_the_answers_that_inference_gives(model, tmp_path, name):
    csv = make_csv(tmp_path, 6)
    options = train_options(csv, model, tmp_path / "run", eval_dataset=str(csv), num_epochs=8)
    done = train(replace(options, eval_metric=name, eval_batch_size=4))
    answers = answers_of(done.final, csv, tmp_path)
    counts = [TEXT_METRICS[name].count(*pair) for pair in zip(ANSWERS, answers, strict=True)]
    expected = sum(part for part, _ in counts) / sum(whole for _, whole in counts)
    assert 0 < expected < 1 or name == "accuracy"
    assert evaluations(tmp_path / "run")[-1][f"eval_{name}"] == pytest.approx(expected)


def test_answering_changes_nothing_in_the_training(model, tmp_path):
    csv, results = make_csv(tmp_path, 6), []
    for name, metric in (("with", "wer"), ("without", None)):
        options = train_options(
            csv, model, tmp_path / name, eval_dataset=str(csv), eval_steps=1, num_epochs=3
        )
        done = train(replace(options, eval_metric=metric, lora_dropout=0.1))
        results.append(load_file(done.final / "model.safetensors"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("metric", "answer", "is_said"), [("wer", "今天天气很好", True), ("cer", "今天", False)]
)
def test_word_errors_of_a_language_without_spaces_are_warned_of(tmp_path, capsys, metric, answer, is_said):
    rows = [{**row, "prediction": answer} for row in make_rows(tmp_path / "audio", 2)]
    csv = write_csv(tmp_path / "train.csv", rows)
    options = train_options(csv, MODEL, tmp_path / "run", eval_dataset=str(csv), eval_metric=metric)
    train(replace(options, num_epochs=0.1))
    assert ("warning: WER counts what stands between spaces" in capsys.readouterr().err) is is_said


def test_the_same_rows_are_answered_every_time():
    lengths = np.arange(50)
    rows = draw(lengths, 10, 3)
    assert len(set(rows.tolist())) == 10
    assert rows.tolist() == draw(lengths, 10, 3).tolist() == sorted(rows, reverse=True)
    assert sorted(draw(lengths, 99, 3)) == [*range(50)]


def test_unknown_metrics_are_refused():
    with pytest.raises(UsageError, match="--eval-metric"):
        TrainOptions(train_dataset="d", output="o", eval_metric="bleu")


# --- the best checkpoint ---------------------------------------------------------------------------------


def test_the_best_evaluation_s_checkpoint_becomes_the_result(model, tmp_path, losses, capsys):
    losses += [3.0, 1.0, 2.0, 1.5]
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    options = train_options(csv, model, output, eval_dataset=str(csv), eval_steps=1, num_epochs=2)
    done = train(replace(options, keep_best=True, merge_lora=False, save_total_limit=1))
    best = load_file(output / "checkpoint-2/adapter_model.safetensors")
    final = load_file(done.final / "adapter_model.safetensors")
    last = load_file(output / "checkpoint-4/adapter_model.safetensors")
    assert all(torch.equal(best[name], final[name]) for name in best)
    assert any(not torch.equal(last[name], final[name]) for name in best)
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert "the best evaluation was after step 2: that is the result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "changes", "told"),
    [
        ([3.0, 1.0, 1.5, 2.0], {}, "1.0000 < 1.5000 < 2.0000"),
        ([1.0, 1.5, 2.0, 2.5], {}, "1.0000 < 1.5000 < 2.0000"),
        ([3.0, 1.0, 2.0, 1.5], {}, None),
        ([1.0, 1.5, 2.0, 2.5], {"keep_best": True}, None),
    ],
)
def test_a_loss_that_rises_twice_is_told_of_once(model, tmp_path, losses, capsys, found, changes, told):
    losses += found
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    options = train_options(csv, model, output, eval_dataset=str(csv), eval_steps=1, num_epochs=2, **changes)
    train(replace(options, merge_lora=False, save_steps=1))
    said = [line for line in capsys.readouterr().err.splitlines() if "risen twice in a row" in line]
    assert len(said) == (told is not None)
    assert not said or (told in said[0] and "--keep-best" in said[0])
    if told:
        losses[:] = [*found[:3], 2.2]
        again = replace(options, merge_lora=False, resume_from_checkpoint=str(output / "checkpoint-3"))
        train(again)
        assert ("risen twice" in capsys.readouterr().err) == (found[2] < 2.2)


@pytest.mark.parametrize(("rows", "is_chance"), [(8, True), (4000, False)])
def test_a_choice_by_few_rows_is_called_chance(model, tmp_path, losses, monkeypatch, capsys, rows, is_chance):
    """Half of the answers right: 8 rows tell that to 35 points, 4000 to 1.5; the choice is by 12."""
    losses += [(2.0, 0.5), (1.0, 0.62), (1.0, 0.5)]
    counts = (rows / 2, rows, rows / 2, rows / 2, rows)
    monkeypatch.setattr(AnswerEvaluator, "count", lambda *_: counts)
    csv = make_csv(tmp_path, 6)
    options = train_options(csv, model, tmp_path / "run", eval_dataset=str(csv), eval_steps=1, batch_size=2)
    train(replace(options, keep_best=True, merge_lora=False, eval_metric="accuracy"))
    said = [line for line in capsys.readouterr().err.splitlines() if "chance may have chosen" in line]
    assert len(said) == is_chance
    assert not said or "accuracy 0.6200 after step 2 against 0.5000 at last" in said[0]


def test_half_an_interval_is_the_bootstrap_s():
    """Of a word error rate over 300 rows, by resampling them; of a proportion, by the binomial's variance."""
    random = np.random.default_rng(0)
    whole = random.integers(1, 12, 300)
    part = random.binomial(whole, 0.3)
    sums = (part.sum(), whole.sum(), (part**2).sum(), (part * whole).sum(), (whole**2).sum())
    drawn = random.integers(0, 300, (4000, 300))
    rates = part[drawn].sum(1) / whole[drawn].sum(1)
    low, high = np.quantile(rates, [0.025, 0.975])
    assert half_interval(*map(float, sums)) == pytest.approx((high - low) / 2, rel=0.05)
    assert half_interval(25, 100, 25, 25, 100) == pytest.approx(1.96 * (0.25 * 0.75 / 100) ** 0.5)


def test_a_resumed_run_remembers_the_best(model, tmp_path, losses):
    losses += [3.0, 1.0, 2.0, 1.5]
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    options = train_options(csv, model, output, eval_dataset=str(csv), eval_steps=1, num_epochs=2)
    options = replace(options, keep_best=True, merge_lora=False, save_steps=1)
    train(options)
    best = load_file(output / "checkpoint-2/adapter_model.safetensors")
    again = train(replace(options, resume_from_checkpoint=str(output / "checkpoint-3")))
    final = load_file(again.final / "adapter_model.safetensors")
    assert all(torch.equal(best[name], final[name]) for name in best)


def test_the_best_so_far_stays_until_a_better_one_is_saved(model, tmp_path, losses, monkeypatch):
    losses += [2.0, 3.0, 1.0]
    real, csv = trainer.save, str(make_csv(tmp_path, 12))

    def full_at_last(output, step, **more):
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(output, step, **more)

    monkeypatch.setattr(trainer, "save", full_at_last)
    options = train_options(
        csv, model, tmp_path / "run", eval_dataset=csv, eval_steps=1, save_steps=1, keep_best=True,
        save_total_limit=1,
    )  # fmt: skip
    with pytest.raises(ToolkitError, match="checkpoint-3 cannot be saved"):
        train(options)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


def test_too_many_evaluations_without_a_better_one_end_the_run(model, tmp_path, losses):
    losses += [3.0, 2.0, 2.5, 2.1, 1.0, 1.0, 1.0, 1.0]
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    options = train_options(csv, model, output, eval_dataset=str(csv), eval_steps=1, num_epochs=4)
    done = train(replace(options, early_stopping_patience=2))
    assert done.steps == 4
    assert (output / "checkpoint-4").is_dir()
    assert done.final.is_dir()
    assert len(evaluations(output)) == 4


# --- evaluations of equal value ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found", "steps", "worse"),
    [
        ("accuracy", [(3.0, 0.5), (2.0, 0.5), (2.5, 0.5), (9.0, 0.75)], [1, 2, 2, 4], [0, 0, 1, 0]),
        ("wer", [(3.0, 0.5), (2.0, 0.5), (1.0, 0.75), (2.0, 0.5)], [1, 2, 2, 2], [0, 0, 1, 2]),
        ("loss", [(3.0, 3.0), (3.0, 3.0), (2.0, 2.0)], [1, 1, 3], [0, 1, 0]),
    ],
)
def test_of_equal_values_the_one_with_the_lower_loss_is_the_better(name, found, steps, worse):
    best, told = Best(), []
    for step, (loss, value) in enumerate(found, 1):
        best = best.after({**TEXT_METRICS, "loss": LOSS}[name], step, value, loss)
        told.append((best.step, best.worse))
    assert told == [*zip(steps, worse, strict=True)]


def test_the_result_among_checkpoints_of_equal_accuracy(model, tmp_path, losses, capsys):
    losses += [(3.0, 0.5), (1.0, 0.5), (2.0, 0.5), (1.5, 0.25)]
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    options = train_options(csv, model, output, eval_dataset=str(csv), eval_steps=1, num_epochs=2)
    done = train(replace(options, eval_metric="accuracy", keep_best=True, merge_lora=False))
    second = load_file(output / "checkpoint-2/adapter_model.safetensors")
    final = load_file(done.final / "adapter_model.safetensors")
    assert all(torch.equal(second[name], final[name]) for name in second)
    (told,) = [each for each in run_values(output)["outcome"] if each["title"]["en"] == "evaluation accuracy"]
    assert told["best"] == {"value": 0.5, "step": 2}


def test_a_checkpoint_of_a_time_when_ties_were_left_to_the_first(model, tmp_path, losses):
    """It does not say what its best evaluation's loss was: an equal value does not beat that."""
    losses += [(3.0, 0.5), (1.0, 0.5), (2.0, 0.25), (2.0, 0.25)]
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    options = train_options(csv, model, output, eval_dataset=str(csv), eval_steps=1, num_epochs=2)
    options = replace(options, eval_metric="accuracy", keep_best=True, merge_lora=False, save_steps=1)
    train(options)
    first = output / "checkpoint-1"
    state = json.loads((first / STATE).read_text())
    assert state["best"].pop("loss") == 3.0
    (first / STATE).write_text(content := json.dumps(state))
    sums = json.loads((first / CHECKSUMS).read_text())
    sums[STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
    (first / CHECKSUMS).write_text(json.dumps(sums))
    done = train(replace(options, resume_from_checkpoint=str(first)))
    trained, final = (load_file(each / "adapter_model.safetensors") for each in (first, done.final))
    assert all(torch.equal(trained[name], final[name]) for name in trained)


def test_what_is_no_number_is_worse_than_any():
    nan, accuracy = float("nan"), TEXT_METRICS["accuracy"]
    assert Best().after(LOSS, 1, nan, nan).after(LOSS, 2, 9.0, 9.0).step == 2
    assert Best().after(LOSS, 1, 9.0, 9.0).after(LOSS, 2, nan, nan).step == 1
    assert Best().after(accuracy, 1, 0.5, nan).after(accuracy, 2, 0.5, 9.0).step == 2
    assert Best().after(accuracy, 1, nan, 1.0).after(accuracy, 2, 0.0, 9.0).step == 2
