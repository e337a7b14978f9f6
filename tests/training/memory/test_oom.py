"""Steps that cannot be computed as asked: too little memory, and numbers that are not finite any more."""

import errno
import math
import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import ModelError, ToolkitError
from mdl_toolkit.i18n import Verbatim
from mdl_toolkit.inference.generate import Answerer
from mdl_toolkit.training import trainer
from mdl_toolkit.training.checkpoints import Checkpoint, checkpoints, damage
from mdl_toolkit.training.memory.oom import MicroBatcher
from mdl_toolkit.training.run import train
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.step import ForwardPass, TrainableState
from mdl_toolkit.training.trainer import Trainer
from mdl_toolkit.utils.run_folder import read_log
from tests.support.paths import MODEL
from tests.support.runs import evaluations, make_csv, train_options


@pytest.fixture
def compute(monkeypatch):
    """Lets a test change how the loss of a batch is computed: `compute(function of trainer, rows, loss)`."""
    real, prepare, trainers = ForwardPass.loss, Trainer.__post_init__, []

    def prepared(self):
        prepare(self)
        trainers.append(self)

    def change(act):
        def loss(self, batch, tokens):
            return act(trainers[-1], len(batch["input_ids"]), lambda: real(self, batch, tokens))

        monkeypatch.setattr(Trainer, "__post_init__", prepared)
        monkeypatch.setattr(ForwardPass, "loss", loss)

    return change


def figures(output):
    return [
        (line["step"], line["loss"], line["grad_norm"], line["rows"])
        for line in read_log(output / "log.jsonl")
    ]


def adapter(output):
    return Checkpoint(checkpoints(output)[-1], {}).adapter()


def check_same(output, expected):
    for found, wanted in zip(figures(output), figures(expected), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    tensors = adapter(output), adapter(expected)
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.allclose(t, tensors[1][n], atol=1e-5, rtol=1e-5) for n, t in tensors[0].items())


@pytest.mark.parametrize(
    ("split", "most", "said"),
    [
        ((8, 1), 2, [4, 2]),
        ((8, 1), 1, [4, 2, 1]),
        ((5, 2), 2, [3, 2]),  # 5, then 3, then 2 at once
        ((2, 4), 1, [1]),
        ((8, 1), 8, []),
    ],
)
def test_batches_are_halved_until_they_fit_and_the_steps_stay_what_they_were(
    tmp_path, compute, capsys, split, most, said
):
    """Also if the error comes in the middle of an accumulation, when gradients are half added up."""
    csv = make_csv(tmp_path, 21)
    settings = {
        "batch_size": split[0], "gradient_accumulation_steps": split[1], "num_epochs": 2, "lr": 1e-3,
        "merge_lora": False,
    }  # fmt: skip
    train(train_options(csv, MODEL, tmp_path / "undisturbed", **settings))
    capsys.readouterr()
    calls = []

    def scarce(_, rows, loss):
        calls.append(rows)
        if rows > most and len(calls) > 1:  # the first batch of the run still goes well
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss()

    compute(scarce)
    train(train_options(csv, MODEL, tmp_path / "run", **settings))
    warnings = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("warning") and "too few" not in line and "too little" not in line
    ]
    assert warnings == [
        f"warning: the GPU ran out of memory: {rows} {'rows' if rows > 1 else 'row'} at once from now on, "
        "the same effective batch"
        for rows in said
    ]
    assert max(calls[-10:]) == min(most, split[0])  # nor are smaller batches made than need be
    check_same(tmp_path / "run", tmp_path / "undisturbed")


def test_on_a_cpu_batches_are_halved_too_and_it_is_the_machine_that_lacks_memory(tmp_path, compute, capsys):
    """The first step needs more than a process can address, until two rows are computed at once."""

    def scarce(_, rows, loss):
        if rows > 2:
            torch.empty(2**60)
        return loss()

    compute(scarce)
    train(train_options(make_csv(tmp_path, 8), MODEL, tmp_path / "run", merge_lora=False))
    said = capsys.readouterr().err
    assert (
        "warning: the machine ran out of memory: 2 rows at once from now on, the same effective batch" in said
    )
    assert "GPU" not in said


def test_one_row_that_does_not_fit_is_the_end(tmp_path, compute, capsys):
    def scarce(trained, rows, loss):
        if trained.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss()

    compute(scarce)
    options = train_options(make_csv(tmp_path, 16), MODEL, tmp_path / "run", save_steps=1)
    with pytest.raises(ModelError, match="ran out of memory; lower --batch-size"):
        train(options)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    assert capsys.readouterr().err.count(" at once from now on") == 2


def test_activations_that_are_kept_are_given_up_before_rows_are_halved(tmp_path, compute, capsys):
    """Of a single row too, and nothing is lost by it."""
    csv, calls = make_csv(tmp_path, 4), []
    settings = {"batch_size": 1, "gradient_checkpointing": True, "lr": 1e-3, "merge_lora": False}
    train(train_options(csv, MODEL, tmp_path / "undisturbed", **settings))

    def scarce(trained, rows, loss):
        calls.append(trained.keeps_activations)
        if calls == [True, True]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss()

    compute(scarce)
    train(train_options(csv, MODEL, tmp_path / "run", **settings))
    assert calls == [True, True, False, False, False]
    said = capsys.readouterr().err
    assert (
        "the GPU ran out of memory: gradient checkpointing computes all activations again from now on" in said
    )
    assert "rows at once" not in said
    check_same(tmp_path / "run", tmp_path / "undisturbed")


def test_memory_that_runs_out_while_batches_are_read_ahead_costs_no_step(tmp_path, monkeypatch):
    csv, calls, real = make_csv(tmp_path, 24), [], ForwardPass.batch
    settings = {"batch_size": 4, "lr": 1e-3, "merge_lora": False}
    train(train_options(csv, MODEL, tmp_path / "undisturbed", **settings))

    def scarce(self, *words, **more):
        calls.append(words)
        if len(calls) == 3:
            raise MemoryError
        return real(self, *words, **more)

    monkeypatch.setattr(ForwardPass, "batch", scarce)
    train(train_options(csv, MODEL, tmp_path / "run", **settings))
    assert len(calls) > 6
    check_same(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_a_run(tmp_path, compute, value, where):
    """Before they reach the weights; the message names the step, and the rows as they stand in the CSV."""
    csv, output = make_csv(tmp_path, 11), tmp_path / "run"
    calls = []

    def break_down(trained, _, loss):
        calls.append(trained.step)
        if calls != [0, 0, 1, 1, 2, 2, 3]:
            return loss()
        return loss() * value if where == "loss" else _Spoiling.apply(loss(), value)

    compute(break_down)
    changes = {"batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2, "save_steps": 1}
    with pytest.raises(ToolkitError) as caught:
        train(train_options(csv, MODEL, output, **changes))
    assert calls[-1] == 3
    lines = ", ".join(str(row + 2) for row in sorted(rows_of_step(tmp_path, csv, 3)))
    assert caught.value.message.en == (
        "step 4: the loss or its gradient is not finite; try a smaller --lr, or look at "
        f"lines {lines} of the training data"
    )
    assert caught.value.exit_status == 1
    assert [line["step"] for line in read_log(output / "log.jsonl")] == [1, 2, 3]
    assert checkpoints(output)[-1].name == "checkpoint-3"
    assert all(bool(tensor.isfinite().all()) for tensor in adapter(output).values())


def test_fewer_rows_at_once_are_remembered(tmp_path, compute, capsys):
    """What dropout drops depends on which rows are computed together."""
    csv = make_csv(tmp_path, 16)
    changes = {"batch_size": 8, "lora_dropout": 0.1, "save_steps": 1, "num_epochs": 2, "merge_lora": False}
    calls = []

    def scarce(_, rows, loss):
        calls.append(rows)
        if rows > 4 and len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss()

    compute(scarce)
    whole, again = (train_options(csv, MODEL, tmp_path / name, **changes) for name in ("whole", "again"))
    train(whole)
    train(replace(again, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2")))
    assert calls == [8, *[4] * 8, *[4] * 4]
    assert all(torch.equal(t, adapter(tmp_path / "whole")[n]) for n, t in adapter(tmp_path / "again").items())


@pytest.mark.parametrize("most", [3, 1])
def test_an_evaluation_that_does_not_fit_is_computed_in_parts(tmp_path, compute, capsys, most):
    csv = make_csv(tmp_path, 6)
    changes = {"eval_dataset": str(csv), "eval_batch_size": 6, "merge_lora": False}
    whole = train(train_options(csv, MODEL, tmp_path / "whole", **changes))

    def scarce(trained, rows, loss):
        if rows > most and not trained.forward.model.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss()

    compute(scarce)
    done = train(train_options(csv, MODEL, tmp_path / "run", **changes))
    assert done.eval_loss == pytest.approx(whole.eval_loss, rel=1e-5)
    said = capsys.readouterr().err
    assert said.count(" at once from now on, when evaluating") == (1 if most == 3 else 3)
    assert said.count(" at once from now on") == said.count("when evaluating")


def test_no_more_rows_are_tried_than_there_are(capsys):
    """Of three rows, half of eight would be all of them again; and one row is not halved."""
    batcher, tried = MicroBatcher(8, torch.device("cpu"), Verbatim("here", "此处")), []

    def scarce(most):
        tried.append(most)
        if most > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return most

    assert (batcher.run(3, scarce), batcher.run(9, scarce), tried) == (2, 2, [8, 2, 2])
    batcher.most = 8
    with pytest.raises(torch.OutOfMemoryError):
        batcher.run(1, scarce)
    assert capsys.readouterr().err.count("2 rows at once from now on, here") == 1


def test_a_size_that_others_depend_on_stays(capsys):
    batcher, tried = MicroBatcher(8, torch.device("cpu"), Verbatim("here", "此处"), is_fixed=True), []

    def scarce(most):
        tried.append(most)
        raise MemoryError

    with pytest.raises(MemoryError):
        batcher.run(8, scarce, has_reserve=lambda: True)
    assert tried == [8]
    assert capsys.readouterr().err == ""


def test_answers_that_do_not_fit_are_made_with_fewer_rows_at_once(tmp_path, monkeypatch, capsys):
    """As many times as need be, and then for good."""
    csv, real, sizes = make_csv(tmp_path, 6), Answerer.__init__, []
    changes = {
        "eval_dataset": str(csv), "eval_batch_size": 6, "eval_metric": "cer", "eval_steps": 1,
        "merge_lora": False,
    }  # fmt: skip
    train(train_options(csv, MODEL, tmp_path / "whole", **changes))

    def scarce(self, model, encoder, batch_size, *more):
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        real(self, model, encoder, batch_size, *more)

    monkeypatch.setattr(Answerer, "__init__", scarce)
    capsys.readouterr()
    train(train_options(csv, MODEL, tmp_path / "run", **changes))
    # Beside each stands one that answers row by row what a batch could not.
    assert [size for size in sizes if size > 1] == [6, 3, 2, 2]
    assert capsys.readouterr().err.count(" at once from now on, when answering") == 2
    found = [line["eval_cer"] for line in evaluations(tmp_path / "run")]
    assert found == [line["eval_cer"] for line in evaluations(tmp_path / "whole")]


@pytest.mark.parametrize("problem", [ValueError("broken"), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_fails_leaves_the_steps_that_were_made(tmp_path, compute, problem):
    """In an evaluation or in a step; from there the run goes on as if nothing had been."""
    csv = make_csv(tmp_path, 16)
    changes = {"eval_dataset": str(csv), "eval_steps": 3, "save_steps": 0, "merge_lora": False}
    train(train_options(csv, MODEL, tmp_path / "whole", **changes))
    output, is_failing = tmp_path / "run", {3: True, 2: True}

    def fail(trained, _, loss):
        if is_failing.get(trained.step) and trained.forward.model.training == (trained.step == 2):
            raise problem
        return loss()

    compute(fail)
    for step in (2, 3):
        with pytest.raises((ValueError, ModelError)):
            train(train_options(csv, MODEL, output, **changes, resume_from_checkpoint=step == 3))
        assert [path.name for path in checkpoints(output)][-1] == f"checkpoint-{step}"
        is_failing[step] = False
    train(train_options(csv, MODEL, output, **changes, resume_from_checkpoint=True))
    close = torch.equal if isinstance(problem, ValueError) else partial(torch.allclose, atol=1e-4, rtol=1e-4)
    assert all(close(t, adapter(tmp_path / "whole")[n]) for n, t in adapter(output).items())


@pytest.mark.parametrize("merge", [True, False])
def test_weights_that_are_not_finite_are_no_result(tmp_path, merge):
    """Of a last step that was too wide, no loss tells any more."""
    options = train_options(make_csv(tmp_path, 4), MODEL, tmp_path / "run", lr=1e300, merge_lora=merge)
    with pytest.raises(ToolkitError, match="step 1: the trained weights are not finite any more; try"):
        train(options)
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("cadence", [2, 0])
def test_a_step_that_spoils_the_weights_costs_no_good_checkpoint(tmp_path, monkeypatch, cadence):
    """The next one finds out; what was saved before is there, and nothing that is spoilt."""
    real, csv, output = TrainableState.update, make_csv(tmp_path, 24), tmp_path / "run"
    calls = []

    def too_wide(self, rate):
        real(self, rate)
        calls.append(rate)
        if len(calls) == 3:
            self.parameters[0].data[:] = math.inf

    monkeypatch.setattr(TrainableState, "update", too_wide)
    with pytest.raises(
        ToolkitError, match="step 3: the trained weights are not finite any more; try a small"
    ):
        train(train_options(csv, MODEL, output, save_steps=cadence, save_total_limit=1))
    assert len(calls) == 3
    assert [path.name for path in checkpoints(output)] == (["checkpoint-2"] if cadence else [])
    assert not cadence or damage(output / "checkpoint-2") is None


def test_a_failing_step_deletes_no_checkpoint(tmp_path, compute):
    def fail(trained, _, loss):
        return loss() * math.nan if trained.step == 3 else loss()

    compute(fail)
    options = train_options(make_csv(tmp_path, 24), MODEL, tmp_path / "run", save_steps=2, save_total_limit=1)
    with pytest.raises(ToolkitError, match="step 4: the loss or its gradient is not finite"):
        train(options)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]


def test_a_failing_step_that_cannot_leave_a_checkpoint_does_not_say_that_it_goes_on(
    tmp_path, compute, monkeypatch, capsys
):
    def fail(trained, _, loss):
        return loss() * math.nan if trained.step == 2 else loss()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    compute(fail)
    monkeypatch.setattr(trainer, "save", full)
    with pytest.raises(ToolkitError, match="step 3: the loss or its gradient is not finite"):
        train(train_options(make_csv(tmp_path, 24), MODEL, tmp_path / "run", save_steps=0))
    assert "goes on" not in capsys.readouterr().err


class _Spoiling(torch.autograd.Function):
    """The same value, with another gradient."""

    @staticmethod
    def forward(context, loss, value):
        context.value = value
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.value, None


def rows_of_step(folder, csv, step):
    convert_dataset(ConvertOptions(input=str(csv), output=str(folder / "data"), model_name=str(MODEL)))
    data = ConvertedDataset(folder / "data")
    return BatchSampler(data.token_counts, data.supervised_counts, 2, 2, 1, 42).examples(step)
