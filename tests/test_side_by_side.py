"""Rows of a batch in lanes: the gradients of the whole, the same every time, where it is worth it."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mdl_toolkit import dealing as dealing_room
from mdl_toolkit.batching import Collator, Featured
from mdl_toolkit.checkpoints import checkpoints
from mdl_toolkit.dataset import Sample
from mdl_toolkit.dealing import WHOLE, Dealing
from mdl_toolkit.forward import Forward
from mdl_toolkit.memory import on_paper
from mdl_toolkit.model import MiDashengLMConfig
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.recomputing import recompute
from mdl_toolkit.runlog import read_log
from mdl_toolkit.side_by_side import SideBySide
from mdl_toolkit.trained import Trained
from mdl_toolkit.training import train
from runs import make_csv, train_options
from test_checkpoints import same_weights
from test_low_rank import TARGETS, adapted

MODEL = Path(__file__).parent / "golden/checkpoints/A-small"
CPU, F32 = torch.device("cpu"), torch.float32
TWO = Dealing(2)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def losses_in(monkeypatch):
    """The thread and the rows of every batch whose loss is computed."""
    seen, real = [], Forward.loss

    def loss(self, batch, tokens):
        seen.append((threading.current_thread().name, len(batch["input_ids"])))
        return real(self, batch, tokens)

    monkeypatch.setattr(Forward, "loss", loss)
    return seen


def samples_of(model, count=5):
    """Rows of noise and words, of different lengths."""
    config, random, found = model.base_model.model.config, np.random.default_rng(0), []
    for row in range(count):
        waveform = random.normal(0, 0.1, 16_000 + 4_000 * row).astype(np.float32)
        words = random.integers(10, 200, 12 + row)
        ids = np.concatenate([[config.audio_token_id] * audio_token_count(len(waveform)), words])
        labels = np.where(np.arange(len(ids)) < len(ids) - 6, -100, ids)
        found.append(Sample(ids.astype(np.int32), labels.astype(np.int32), waveform))
    return found


def featured(model, samples):
    """What a frozen encoder and projector make of these rows."""
    with torch.no_grad():
        return [
            Featured(
                each.input_ids, each.labels,
                model.base_model.model.audio_features(torch.from_numpy(each.waveform)[None]),
                len(each.waveform),
            )
            for each in samples
        ]  # fmt: skip


def gradients_of(model, batches, dealing):
    """Losses of batches, and the sum of their gradients."""
    trained = Trained(model, CPU)
    trained.forget()
    lanes = SideBySide(Forward(model, Collator(0), CPU, F32), trained, dealing)
    losses = [float(lanes.backward(batch, 7)) for batch in batches]
    lanes.close()
    assert all(p.grad.stride() == p.stride() for p in trained.parameters if p.grad is not None)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return losses, {name: gradient.clone() for name, gradient in found.items()}


@pytest.fixture
def always(monkeypatch):
    """However uneven, lanes are worth it."""
    monkeypatch.setattr(dealing_room, "WORTH", 10.0)


@pytest.mark.parametrize("has_features", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lanes_make_the_gradients_of_the_whole(
    golden, two_threads, always, losses_in, has_features, checkpointing
):
    """Of several batches added up, too; and twice the same to the bit, whichever lane is the faster."""
    model = adapted(golden, "A-small", ("decoder",) if has_features else TARGETS)
    if checkpointing:
        recompute(model)
    samples = featured(model, samples_of(model)) if has_features else samples_of(model)
    batches = [Collator(0)(samples), Collator(0)(samples[1:])]
    whole, gradients = gradients_of(model, batches, WHOLE)
    assert losses_in == [("MainThread", 5), ("MainThread", 4)]
    losses_in.clear()
    losses, found = gradients_of(model, batches, TWO)
    assert {name.partition("_")[0] for name, _ in losses_in} == {"MainThread", "lanes"}
    assert sum(count for _, count in losses_in) == 9
    assert losses == pytest.approx(whole, rel=1e-5)
    assert found.keys() == gradients.keys()
    assert all(torch.allclose(found[n], g, rtol=1e-4, atol=1e-5) for n, g in gradients.items())
    for _ in range(3):
        again = gradients_of(model, batches, TWO)
        assert again[0] == losses
        assert all(torch.equal(again[1][name], gradient) for name, gradient in found.items())


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("threads", [2, 4])
def test_a_lane_that_fails_ends_the_step_when_no_other_is_under_way(
    golden, two_threads, always, monkeypatch, is_first, threads
):
    model, ended, real = adapted(golden, "A-small"), [], Forward.loss
    torch.set_num_threads(threads)

    def loss(self, batch, tokens):
        if (threading.current_thread() is threading.main_thread()) == is_first:
            raise ValueError("broken")
        time.sleep(0.3)
        ended.append(torch.get_num_threads())
        return real(self, batch, tokens)

    monkeypatch.setattr(Forward, "loss", loss)
    with pytest.raises(ValueError, match="broken"):
        gradients_of(model, [Collator(0)(samples_of(model))], TWO)
    assert ended == [threads // 2]
    assert torch.get_num_threads() == threads


def test_a_parameter_that_a_loss_does_not_reach_gets_no_gradient(golden):
    model = adapted(golden, "A-small")
    trained = Trained(model, CPU)
    first, *others = trained.parameters
    gradients = trained.gradients((2 * first).sum())
    trained.add(gradients)
    trained.add(gradients)
    assert torch.equal(first.grad, torch.full_like(first, 4.0))
    assert [parameter.grad for parameter in others] == [None] * len(others)


# --- a run -------------------------------------------------------------------------------------------------


def figures(output):
    return [(line["loss"], line["grad_norm"]) for line in read_log(output / "log.jsonl")]


def test_a_run_in_lanes_follows_one_without_and_resumes_bit_for_bit(tmp_path, two_threads, always, losses_in):
    options = train_options(
        make_csv(tmp_path, 22), MODEL, tmp_path / "lanes", gradient_accumulation_steps=2, save_steps=2,
        num_epochs=2, merge_lora=False, lr=1e-3,
    )  # fmt: skip
    train(options)
    assert {name.partition("_")[0] for name, _ in losses_in} == {"MainThread", "lanes"}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("lanes")]
    resumed = replace(
        options, output=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "lanes/checkpoint-2"),
    )  # fmt: skip
    train(resumed)
    assert same_weights(tmp_path / "resumed/final", tmp_path / "lanes/final")
    torch.set_num_threads(1)
    losses_in.clear()
    train(replace(options, output=str(tmp_path / "whole")))
    assert {name for name, _ in losses_in} == {"MainThread"}
    assert len(checkpoints(tmp_path / "whole")) == len(checkpoints(tmp_path / "lanes")) == 3
    assert np.allclose(figures(tmp_path / "lanes"), figures(tmp_path / "whole"), rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1},
        {"bf16": True},
        {"train_target": ("decoder", "lm_head")},
        {"quantization": "8bit"},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_where_there_are_no_lanes(tmp_path, two_threads, always, losses_in, changes):
    train(train_options(make_csv(tmp_path, 4), MODEL, tmp_path / "run", merge_lora=False, **changes))
    assert {name for name, _ in losses_in} == {"MainThread"}


# --- which row in which lane ---------------------------------------------------------------------------


def deal(dealing, positions, samples=0):
    positions = np.array(positions)
    return [lane.tolist() for lane in dealing.deal(positions, np.full(len(positions), samples))]


@pytest.mark.parametrize(
    ("dealing", "positions", "lanes"),
    [
        (TWO, [10] * 8, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (TWO, [40, 10, 10, 20], [[0], [1, 2, 3]]),  # not by their number
        (TWO, [10, 10, 10], [[0, 1, 2]]),  # one lane would have twice as much
        (TWO, [10], [[0]]),
        (WHOLE, [10] * 8, [[*range(8)]]),
        (replace(TWO, beginning=5), [100] * 8, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (replace(TWO, beginning=80), [100] * 8, [[*range(8)]]),  # each lane would compute it
    ],
)
def test_rows_are_dealt_where_lanes_are_even_and_share_little(dealing, positions, lanes):
    assert deal(dealing, positions) == lanes


def test_audio_counts_as_what_the_encoder_makes_of_it():
    """Where it is nothing, as with features that are kept, a long recording is a row like any other."""
    positions, samples = np.full(4, 100), np.array([3000, 1000, 1000, 1000])
    lanes = [Dealing(2, 1.0, sample).deal(positions, samples) for sample in (0.0, 1.0)]
    assert [[*map(len, each)] for each in lanes] == [[2, 2], [1, 3]]


def test_arithmetic_is_that_of_the_matrices():
    config = MiDashengLMConfig.from_pretrained(MODEL)
    audio, _ = config.parts
    options = train_options(Path("data"), MODEL, Path("run"), num_epochs=2)
    torch.set_num_threads(2)
    try:
        found = Dealing.of(config, options, CPU, F32, None, 3)
        frozen = Dealing.of(config, replace(options, train_target=("decoder",)), CPU, F32, None, 3)
        cached = Dealing.of(
            config, replace(options, train_target=("decoder",), cache_audio_features=True), CPU, F32, None, 3
        )
        once = replace(options, train_target=("decoder",), cache_audio_features=True, num_epochs=1)
        ignored = Dealing.of(config, once, CPU, F32, None, 3)
        dropping = MiDashengLMConfig.from_pretrained(MODEL)
        dropping.parts[1].attention_dropout = 0.1
        drops = Dealing.of(dropping, options, CPU, F32, None, 3)
        on_gpu = Dealing.of(config, options, torch.device("cuda"), F32, None, 3)
        torch.set_num_threads(3)
        odd = Dealing.of(config, options, CPU, F32, None, 3)
    finally:
        torch.set_num_threads(1)
    model = on_paper(MODEL)
    layers, blocks = (
        sum(weight.numel() for name, weight in part.named_parameters() if weight.ndim == 2)
        for part in (model.decoder.model.layers, model.audio_encoder.blocks)
    )
    assert found == Dealing(2, 2 * layers, 2 * blocks / (audio.hop_length * audio.patch_frames), 3)
    assert (frozen.sample, cached.sample, ignored.sample) == (found.sample / 2, 0.0, frozen.sample)
    assert on_gpu == odd == drops == WHOLE
