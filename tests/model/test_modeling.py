"""The model's numbers: against `golden/`, and against plain loops written here.

Alone, in one batch and in another order they must be the same. The tolerances are the task's. Measured on a
CPU: 2e-6 in the encoder, 1e-5 in logits, 1e-7 relative in the loss, 7e-7 relative in gradient norms.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig

from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel
from mdl_toolkit.model.encoder import PatchLayout
from mdl_toolkit.model.kernels import cross_entropy
from mdl_toolkit.model.lengths import audio_token_count, patch_count, visible_patch_count
from mdl_toolkit.model.mel import log_mel, window_and_filters
from mdl_toolkit.model.transformers_names import checkpoint_activations
from tests.support.paths import GOLDEN
from tests.support.waves import padded, wave

CHECKPOINTS = ("A-small", "B-small", "B-small-tied")
ORDERS = {"as they are": (0, 1, 2, 3, 4, 5), "another order": (3, 5, 0, 4, 2, 1)}
PAD_ID = 483  # <|endoftext|> of the small tokenizers
LONE_HIDDEN_PATCH = 161_760  # T = 253: the last chunk holds one patch, and nobody may see it
LONE_USED_PATCH = 323_040  # T = 505: as above, and the projector uses that patch


@cache
def numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def fresh_model(name: str = "A-small", **kwargs: Any) -> MiDashengLMModel:
    return MiDashengLMModel.from_pretrained(GOLDEN / "checkpoints" / name, **kwargs)


@cache
def model_of(name: str) -> MiDashengLMModel:
    """A model to look at, not to change."""
    return fresh_model(name)


@pytest.fixture
def model() -> MiDashengLMModel:
    """A model to change."""
    return fresh_model()


@dataclass(frozen=True)
class Row:
    """One golden conversation with its clip and the numbers that belong to it."""

    ids: Tensor
    labels: Tensor
    clip: np.ndarray
    logits_at_supervised: np.ndarray
    logits_last4: np.ndarray
    greedy: list[int]

    @property
    def predicting(self) -> Tensor:
        """True at the positions that predict a supervised token; the last one predicts nothing."""
        return torch.cat([self.labels[1:] != -100, torch.tensor([False])])

    @property
    def prompt(self) -> "Row":
        """The row without its answer."""
        answer = int(self.predicting.nonzero()[0]) + 1
        return Row(self.ids[:answer], self.labels[:answer], self.clip, *(np.empty(0),) * 2, self.greedy)


@cache
def golden_rows(name: str) -> tuple[Row, ...]:
    table = numbers(f"alone_{name}")

    def row(clip: str) -> Row:
        ids, labels = (torch.tensor(table[f"{clip}_{key}"]) for key in ("input_ids", "labels"))
        samples = wave(int(table[f"{clip}_n"]), int(table[f"{clip}_seed"]))
        logits = (table[f"{clip}_logits_{key}"] for key in ("at_supervised", "last4"))
        return Row(ids, labels, samples, *logits, table[f"{clip}_greedy"].tolist())

    return tuple(row(f"clip{i}") for i in range(6))


def as_batch(*rows: Row) -> dict[str, Tensor]:
    """The model's inputs: text padded on the left, clips on the right."""
    longest = max(len(row.ids) for row in rows)

    def left(values: Tensor, filler: int) -> Tensor:
        return functional.pad(values, (longest - len(values), 0), value=filler)

    return {
        "input_ids": torch.stack([left(row.ids, PAD_ID) for row in rows]),
        "attention_mask": torch.stack([left(torch.ones_like(row.ids), 0) for row in rows]),
        "labels": torch.stack([left(row.labels, -100) for row in rows]),
        "input_values": torch.tensor(padded([row.clip for row in rows])),
        "audio_length": torch.tensor([len(row.clip) for row in rows]),
    }


def prompts(*rows: Row) -> dict[str, Tensor]:
    batch = as_batch(*(row.prompt for row in rows))
    del batch["labels"]
    return batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def loss_and_gradients(model: MiDashengLMModel, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), gradients(model)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def encode(model: MiDashengLMModel, waves: list[np.ndarray]) -> tuple[Tensor, PatchLayout]:
    return model.audio_encoder(torch.tensor(padded(waves)), [len(clip) for clip in waves])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- front end ---


def test_window_and_filters_are_the_published_ones():
    table, config = numbers("frontend"), model_of("A-small").config.audio_encoder_config
    sizes = config.n_fft, config.win_length, config.n_mels, config.sample_rate, config.f_min, config.f_max
    window, filters = window_and_filters(*sizes, torch.device("cpu"))
    np.testing.assert_array_equal(window.numpy(), table["win"])
    np.testing.assert_array_equal(filters.numpy(), table["fbanks"])


def golden_mels() -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    table = numbers("frontend")
    second = table["wav_1s"]
    # A thousandth is a factor, not a divisor: the two roundings of the waveform differ in its quietest bins.
    batch = [second, second * np.float32(1e-3), np.zeros_like(second)]
    return {
        "1s": ([second], table["mel_1s"][None]),
        "02s": ([table["wav_02s"]], table["mel_02s"][None]),
        "loud": ([second * 30], table["mel_loud"][None]),
        "silence": ([np.zeros(1600, np.float32)], table["mel_silence"][None]),
        "batch": (batch, table["mel_batch"]),
    }


@pytest.mark.parametrize("name", ["1s", "02s", "loud", "silence", "batch"])
def test_log_mel_is_golden(name: str):
    clips, wanted = golden_mels()[name]
    mel = log_mel(
        torch.tensor(padded(clips)),
        [len(clip) for clip in clips],
        model_of("A-small").config.audio_encoder_config,
    )
    # An FFT's rounding errors are alike in all bins of a frame, so in decibels they weigh more where there is
    # less energy: 50 dB and more below a clip's loudest bin, two CPUs' FFTs are up to 4e-4 dB apart.
    loudest = wanted.max(axis=(1, 2), keepdims=True)
    tolerance = np.where(wanted > loudest - 40, 1e-4, 1e-3)
    np.testing.assert_array_less(np.abs(mel.numpy() - wanted), tolerance)


def test_log_mel_of_a_clip_does_not_depend_on_its_company():
    config = model_of("A-small").config.audio_encoder_config
    # A burst midway between two frames, in silence that lies 120 dB below it. In the reflection that follows
    # the clip it would meet the middle of a frame, be louder, and raise the silence.
    burst = np.zeros(8040, np.float32)
    burst[1022:1059] = 300 * wave(37, 4)
    clips = [wave(16000, 1), 30 * wave(257, 2), wave(48111, 3) * np.float32(1e-3), burst]
    together = log_mel(torch.tensor(padded(clips)), [len(clip) for clip in clips], config)
    for mel, clip in zip(together, clips, strict=True):
        alone = log_mel(torch.tensor(clip)[None], [len(clip)], config)[0]
        torch.testing.assert_close(mel[:, : alone.shape[1]], alone, atol=1e-4, rtol=0)


def mel_seen_by(model: MiDashengLMModel, clip: np.ndarray) -> tuple[Tensor, Tensor]:
    """What goes into the encoder's BatchNorm, and what comes out of it."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.audio_encoder.init_bn.register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0], output))
    )
    encode(model, [clip])
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("how", ["loaded", "constructed", "cast", "autocast"])
def test_front_end_stays_float32_whatever_the_weights_are(how: str, model: MiDashengLMModel):
    clip = wave(32333, 41)
    mel, normalised = mel_seen_by(model, clip)
    window_and_filters.cache_clear()
    if how == "loaded":
        got = mel_seen_by(fresh_model(dtype=torch.bfloat16), clip)
    elif how == "constructed":
        with default_dtype(torch.bfloat16):
            half = MiDashengLMModel(AutoConfig.from_pretrained(GOLDEN / "checkpoints/A-small"))
            half.load_state_dict(model.state_dict())
            assert half.audio_encoder.norm.weight.dtype == torch.bfloat16
            got = mel_seen_by(half, clip)
    elif how == "cast":
        got = mel_seen_by(model.to(torch.bfloat16), clip)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = mel_seen_by(model, clip)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert torch.equal(got[0], mel)
    if how in ("loaded", "autocast"):  # else the statistics themselves are in bfloat16
        assert torch.equal(got[1], normalised)


# --- lengths ---


def test_lengths_are_golden():
    for samples, _, tokens, patches, visible, rows in numbers("audio_tokens")["table"].tolist():
        assert audio_token_count(samples) == tokens == rows
        assert patch_count(samples) == patches
        assert visible_patch_count(samples) == visible


@pytest.mark.parametrize("samples", numbers("audio_tokens")["table"][:, 0].tolist())
def test_projector_gives_as_many_rows_as_there_are_audio_tokens(samples: int):
    features = model_of("A-small").audio_features(torch.zeros(1, samples), torch.tensor([samples]))
    assert features.shape == (audio_token_count(samples), 64)


# --- encoder and projector ---

ENCODER_CASES = [key.removesuffix("_n") for key in numbers("encoder_A-small") if key.endswith("_n")]


@torch.no_grad()
@pytest.mark.parametrize("company", ["alone", "together"])
def test_encoder_and_projector_are_golden(company: str):
    model, table = model_of("A-small"), numbers("encoder_A-small")
    clips = [wave(int(table[f"{case}_n"]), int(table[f"{case}_seed"])) for case in ENCODER_CASES]
    batches = [clips] if company == "together" else [[clip] for clip in clips]
    encoded, projected = [], []
    for batch in batches:
        row, layout = encode(model, batch)
        encoded += row.split(list(layout.clips))
        projected += model.audio_projector(row, layout).split([n // 5 for n in layout.clips])
    for case, enc, proj in zip(ENCODER_CASES, encoded, projected, strict=True):
        np.testing.assert_allclose(enc.numpy(), table[f"{case}_enc"], atol=1e-4, rtol=0, err_msg=case)
        np.testing.assert_allclose(proj.numpy(), table[f"{case}_proj"], atol=1e-4, rtol=0, err_msg=case)


def plain_encoder(model: MiDashengLMModel, clip: np.ndarray, filters: np.ndarray) -> Tensor:
    """Encode one clip, chunk by chunk and head by head: `[patches, embed_dim]`."""
    w = {name.removeprefix("audio_encoder."): t.detach() for name, t in model.state_dict().items()}
    dim, heads = w["norm.weight"].shape[0], model.config.audio_encoder_config.num_heads

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (dim,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attend(x: Tensor, name: str, keys: int) -> Tensor:
        out = []
        q, k, v = linear(x, f"{name}.qkv").chunk(3, dim=-1)
        for q1, k1, v1 in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v)), strict=True):
            scores = q1 @ k1[:keys].T / (dim // heads) ** 0.5
            out.append(scores.softmax(-1) @ v1[:keys])
        return linear(torch.cat(out, dim=-1), f"{name}.proj")

    reflected = functional.pad(torch.tensor(clip)[None], (256, 256), mode="reflect")[0]
    window = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(512, dtype=torch.float64) / 512)
    power = torch.fft.rfft(reflected.unfold(0, 512, 160) * window.float()).abs() ** 2
    decibels = 10 * torch.log10((power @ torch.tensor(filters)).clamp(min=1e-10))
    decibels = decibels.clamp(min=decibels.max().item() - 120)
    mean, var = w["init_bn.running_mean"], w["init_bn.running_var"]
    mel = (decibels - mean) / (var + 1e-5).sqrt() * w["init_bn.weight"] + w["init_bn.bias"]
    patches = functional.conv2d(
        mel.T[None, None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], (64, 4)
    )
    patches, visible, out = patches[0, :, 0].T, len(clip) // 640, []
    for start in range(0, len(patches), 252):
        x = patches[start : start + 252]
        keys = max(visible - start, 1)
        x = x + w["time_pos_embed"][0, :, 0, : len(x)].T + w["freq_pos_embed"][0, :, 0, 0]
        for block in (f"blocks.{i}" for i in range(model.config.audio_encoder_config.depth)):
            gamma1, gamma2 = (w.get(f"{block}.{ls}.gamma", torch.tensor(1.0)) for ls in ("ls1", "ls2"))
            x = x + gamma1 * attend(layer_norm(x, f"{block}.norm1"), f"{block}.attn", keys)
            hidden = linear(layer_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            x = x + gamma2 * linear(hidden, f"{block}.mlp.fc2")
        out.append(layer_norm(x, "norm"))
    return torch.cat(out)


@cache
def model_with_layer_scale() -> MiDashengLMModel:
    config = AutoConfig.from_pretrained(GOLDEN / "checkpoints/A-small")
    config.audio_encoder_config.init_values = 0.3
    model = MiDashengLMModel(config)
    missing, unexpected = model.load_state_dict(model_of("A-small").state_dict(), strict=False)
    assert {name.split(".", 3)[3] for name in missing} == {"ls1.gamma", "ls2.gamma"}
    assert unexpected == []
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.audio_encoder.named_parameters():
        if name.endswith("gamma"):
            assert torch.all(parameter == 0.3)
            parameter.data.uniform_(0.2, 2, generator=generator)
        elif "embed" in name:  # so small that LayerNorm's eps counts
            parameter.data *= 3e-3
    return model.eval()


lengths_of_clips = st.lists(
    st.one_of(
        st.integers(480, 9000),
        st.integers(161_000, 162_600),
        st.sampled_from([LONE_HIDDEN_PATCH, LONE_USED_PATCH, 162_400]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("which", ["plain", "layer scale"])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=lengths_of_clips)
def test_packed_encoder_equals_a_plain_loop(which: str, lengths: list[int]):
    model = model_of("A-small") if which == "plain" else model_with_layer_scale()
    clips = [wave(n, seed) for seed, n in enumerate(lengths)]
    with torch.no_grad():
        encoded, layout = encode(model, clips)
    for got, clip in zip(encoded.split(list(layout.clips)), clips, strict=True):
        wanted = plain_encoder(model, clip, numbers("frontend")["fbanks"])
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("samples", "patches", "visible"),
    [(3040, 5, 4), (161_279, 252, 251), (LONE_HIDDEN_PATCH, 253, 252), (LONE_USED_PATCH, 505, 504)],
)
def test_a_hidden_last_patch_is_computed_and_finite(samples: int, patches: int, visible: int):
    model = fresh_model()
    assert (patch_count(samples), visible_patch_count(samples)) == (patches, visible)
    encoded, layout = encode(model, [wave(samples, 9), wave(16000, 1)])
    assert layout.clips == (patches, 25)
    features = model.audio_projector(encoded, layout)
    features.square().sum().backward()
    assert encoded.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_clips_without_a_patch_give_no_feature():
    model = model_of("A-small")
    short, long = wave(300, 1), wave(3200, 2)
    alone = model.audio_features(torch.tensor(long)[None], torch.tensor([3200]))
    both = model.audio_features(torch.tensor(padded([short, long, short])), torch.tensor([300, 3200, 300]))
    torch.testing.assert_close(both, alone, atol=1e-6, rtol=0)
    assert model.audio_features(torch.tensor(short)[None], torch.tensor([300])).shape == (0, 64)


def test_eager_and_sdpa_give_the_same_numbers():
    eager, sdpa = fresh_model(attn_implementation="eager"), fresh_model()
    assert eager.decoder.model.config._attn_implementation == "eager"
    assert sdpa.decoder.model.config._attn_implementation == "sdpa"
    batch = as_batch(*golden_rows("A-small"))
    labels = batch.pop("labels")
    supervised = labels[:, 1:] != -100
    logits, wanted = (m(**batch).logits[:, :-1][supervised] for m in (eager, sdpa))
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    loss = eager(**batch, labels=labels).loss.item()
    assert loss == pytest.approx(functional.cross_entropy(wanted, labels[:, 1:][supervised]).item(), rel=1e-6)


# --- the whole model ---


@torch.no_grad()
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_single_clips_are_golden(name: str):
    model, total = model_of(name), 0.0
    supervised = int(numbers(f"alone_{name}")["supervised_tokens"])
    for row in golden_rows(name):
        out = model(**as_batch(row), return_logits=True, num_items_in_batch=supervised)
        logits = out.logits[0].numpy()
        wanted = row.logits_at_supervised
        np.testing.assert_allclose(logits[row.predicting.numpy()], wanted, atol=2e-4, rtol=0)
        np.testing.assert_allclose(logits[-4:], row.logits_last4, atol=2e-4, rtol=0)
        total += out.loss.item()
    assert total == pytest.approx(float(numbers(f"alone_{name}")["loss"]), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_a_batch_are_golden(name: str, order: tuple[int, ...]):
    rows = [golden_rows(name)[i] for i in order]
    out = model_of(name)(**as_batch(*rows), return_logits=True)
    for row, logits in zip(rows, out.logits.numpy(), strict=True):
        at_supervised = logits[-len(row.ids) :][row.predicting.numpy()]
        np.testing.assert_allclose(at_supervised, row.logits_at_supervised, atol=2e-4, rtol=0)
        np.testing.assert_allclose(logits[-4:], row.logits_last4, atol=2e-4, rtol=0)
    assert out.loss.item() == pytest.approx(float(numbers(f"alone_{name}")["loss"]), rel=1e-5)


@pytest.mark.parametrize("company", ["alone", *ORDERS])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_loss_and_gradients_are_golden(name: str, company: str):
    model, rows, table = fresh_model(name), golden_rows(name), numbers(f"alone_{name}")
    model.train()
    batches = [[row] for row in rows] if company == "alone" else [[rows[i] for i in ORDERS[company]]]
    total = sum(
        model(**as_batch(*batch), num_items_in_batch=int(table["supervised_tokens"])).loss
        for batch in batches
    )
    total.backward()
    assert total.item() == pytest.approx(float(table["loss"]), rel=1e-5)
    grads = gradients(model)
    assert grads.keys() - set(table["grad_names"]) == {
        "audio_encoder.init_bn.weight",
        "audio_encoder.init_bn.bias",
    }
    for parameter, norm in zip(table["grad_names"].tolist(), table["grad_norms"].tolist(), strict=True):
        assert grads[parameter].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), parameter
    whole = [key for key in table if key.startswith("grad:")]
    assert len(whole) == 5
    for key in whole:
        np.testing.assert_allclose(grads[key[5:]].numpy(), table[key], atol=1e-4, rtol=0, err_msg=key)


@pytest.mark.parametrize("company", ["alone", *ORDERS])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_answers_are_golden(name: str, company: str):
    rows = golden_rows(name)
    batches = [[row] for row in rows] if company == "alone" else [[rows[i] for i in ORDERS[company]]]
    greedy = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    for batch in batches:
        answers = model_of(name).generate(**prompts(*batch), **greedy)
        assert answers.tolist() == [row.greedy for row in batch]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16_loss_is_near_the_float32_loss(name: str):
    batch, wanted = as_batch(*golden_rows(name)), float(numbers(f"alone_{name}")["loss"])
    loaded, cast = fresh_model(name, dtype=torch.bfloat16), fresh_model(name).to(torch.bfloat16)
    for model in (loaded, cast):
        loss = model(**batch).loss
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(wanted, rel=0.02)
        loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert model_of(name)(**batch).loss.item() == pytest.approx(wanted, rel=0.02)


def test_batch_norm_stays_in_float32_when_loaded_in_bfloat16():
    model = fresh_model(dtype=torch.bfloat16)
    wanted = model_of("A-small").audio_encoder.init_bn.state_dict()
    assert_same(model.audio_encoder.init_bn.state_dict(), wanted, atol=0)
    others = {t.dtype for name, t in model.named_parameters() if "init_bn" not in name}
    assert others == {torch.bfloat16}


def test_batch_norm_never_trains(model: MiDashengLMModel):
    batch = as_batch(*golden_rows("A-small"))
    before = {name: t.clone() for name, t in model.audio_encoder.init_bn.named_buffers()}
    evaluated = model.eval()(**batch).loss.item()
    assert model.train()(**batch).loss.item() == evaluated
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model(**batch).loss.backward()
    optimizer.step()
    assert model.training
    assert not model.audio_encoder.init_bn.training
    assert_same(dict(model.audio_encoder.init_bn.named_buffers()), before, atol=0)


# --- only what is needed is computed ---


def counted(module: nn.Module) -> list[int]:
    """Rows that go through a linear layer, call by call."""
    rows: list[int] = []
    module.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    return rows


def test_only_real_patches_are_computed():
    model = fresh_model()
    lengths = [400_077, 3040, 16_000, 161_760]
    block = model.audio_encoder.blocks[0]
    layers = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
    rows, tokens = [counted(layer) for layer in layers], counted(model.audio_projector.net[0])
    encoded, layout = encode(model, [wave(n, n) for n in lengths])
    model.audio_projector(encoded, layout)
    assert rows == [[sum(patch_count(n) for n in lengths)]] * 4
    assert tokens == [sum(audio_token_count(n) for n in lengths)]


def test_only_supervised_positions_meet_the_output_head(
    model: MiDashengLMModel, monkeypatch: pytest.MonkeyPatch
):
    rows, batch = golden_rows("A-small"), as_batch(*golden_rows("A-small"))
    supervised = sum(int(row.predicting.sum()) for row in rows)
    whole, wanted = loss_and_gradients(model, batch)
    met = counted(model.decoder.lm_head)
    assert model(**batch).logits is None
    assert met == [supervised] == [25]
    met.clear()
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 512 * 4)
    loss = model(**batch).loss
    slices = [4, 4, 4, 4, 4, 4, 1]
    assert met == slices
    loss.backward()
    assert sorted(met) == sorted(2 * slices)  # each slice's logits were not kept but made again
    assert loss.item() == pytest.approx(whole, rel=1e-6)
    assert_same(gradients(model), wanted, atol=1e-6)
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(whole, rel=1e-6)


def test_logits_come_with_labels_only_when_asked_for(model: MiDashengLMModel):
    batch = as_batch(golden_rows("A-small")[0])
    assert model(**batch).logits is None
    everything = model(**batch, return_logits=True)
    labels = batch.pop("labels")
    bare = model(**batch)
    assert bare.loss is None
    assert torch.equal(bare.logits, everything.logits)
    kept = model(**batch, logits_to_keep=4).logits
    torch.testing.assert_close(kept, bare.logits[:, -4:], atol=1e-5, rtol=0)
    wanted = functional.cross_entropy(bare.logits[0, :-1], labels[0, 1:], ignore_index=-100)
    assert everything.loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_batch_without_supervised_tokens_has_loss_zero(model: MiDashengLMModel):
    batch = as_batch(golden_rows("A-small")[0])
    batch["labels"].fill_(-100)
    loss, grads = loss_and_gradients(model, batch)
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(model: MiDashengLMModel, reentrant: bool):
    batch = as_batch(*golden_rows("A-small"))
    model.train()
    loss, wanted = loss_and_gradients(model, batch)
    encoder = counted(model.audio_encoder.blocks[0].mlp.fc1)
    decoder = counted(model.decoder.model.layers[0].mlp.up_proj)
    checkpoint_activations(model, {"use_reentrant": reentrant})
    again, grads = loss_and_gradients(model, batch)
    assert (len(encoder), len(decoder)) == (2, 2)  # forward, and once more in the backward pass
    assert again == loss
    assert_same(grads, wanted, atol=1e-6)


# --- the 7B ---


def config_7b() -> MiDashengLMConfig:
    settings_7b = json.loads((GOLDEN / "checkpoints/A-small/config.json").read_text())
    settings_7b["audio_encoder_config"] |= {"embed_dim": 1280, "depth": 32, "num_heads": 16}
    settings_7b["text_config"] |= {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "layer_types": ["full_attention"] * 28,
    }  # fmt: skip
    return MiDashengLMConfig(**settings_7b)


def test_the_7b_has_the_published_tensors():
    with torch.device("meta"):
        model = MiDashengLMModel(config_7b())
    published = json.loads((GOLDEN / "tensors_7b.json").read_text())
    assert {name: [list(t.shape)] for name, t in model.state_dict().items()} == published
    trainable = sum(p.numel() for p in model.parameters())
    assert trainable == 8_350_708_352 - 68_968_448  # the published whole at rank 32, less its adapter
