"""The optional acoustic branch of the encoder: against plain numpy, under the checkpoint's own names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mdl_toolkit.model import CheckpointError, MiDashengLMModel
from mdl_toolkit.training.lora import add_adapters, check_targets
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.merge import merge
from tests.support.model_folders import find, refused
from tests.support.paths import GOLDEN
from tests.support.runs import copy_checkpoint
from tests.support.waves import padded, wave

BINS = 100
LENGTHS = [3_200, 16_001, 4_799, 161_760, 200_000]
ACOUSTIC = ("patch_embed.weight", "patch_embed.bias", "norm.weight", "norm.bias")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with the branch, by the names of the authors' other model."""
    folder = copy_checkpoint(GOLDEN, "A-small", tmp_path_factory.mktemp("acoustic"))
    configure(folder, n_mels_patch=BINS)
    weights, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    encoder = {name: weights.pop(name) for name in [*weights] if name.startswith("audio_encoder.")}
    weights |= {f"audio_encoder.model.{name.partition('.')[2]}": each for name, each in encoder.items()}
    shapes = [(48, 1, BINS, 4), (48,), (48,), (48,)]
    for name, shape in zip(ACOUSTIC, shapes, strict=True):
        weights[f"audio_encoder.{name}"] = torch.randn(shape, generator=random) * 0.05
    # A front end's constants may be there.
    weights["audio_encoder.front_end.mel_spec.mel_scale.fb"] = torch.ones(513, BINS)
    weights["audio_encoder.model.front_end.0.spectrogram.window"] = torch.ones(512)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["audio_encoder_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(content))


def load(folder: Path) -> MiDashengLMModel:
    return load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def plain_mel(clip: np.ndarray) -> np.ndarray:
    """Natural logarithms of mel magnitudes in float64, frame by frame: `[frames, BINS]`."""
    reflected = np.concatenate([clip[512:0:-1], clip, clip[-2:-514:-1]]).astype(np.float64)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = [reflected[start : start + 1024] * window for start in range(0, len(clip) + 1, 160)]
    magnitude = np.abs(np.fft.rfft(np.array(frames)))
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), BINS + 2) / 2595) - 1)
    filters = [np.interp(np.arange(513) * 15.625, corners[n : n + 3], [0, 1, 0]) for n in range(BINS)]
    return np.log(np.maximum(magnitude @ np.array(filters).T, 1e-7))


def plain_branch(folder: Path, clip: np.ndarray) -> np.ndarray:
    """What the branch adds to the encoder's output, `[patches, embed_dim]`."""
    tensors = load_file(folder / "model.safetensors")
    kernel, bias, scale, shift = (tensors[f"audio_encoder.{name}"].double().numpy() for name in ACOUSTIC)
    mel = plain_mel(clip)
    out = []
    for start in range(0, len(mel) // 4 * 4, 4):
        patch = np.einsum("bf,ebf->e", mel[start : start + 4].T, kernel[:, 0]) + bias
        out.append((patch - patch.mean()) / np.sqrt(patch.var() + 1e-5) * scale + shift)
    return np.array(out)


@torch.no_grad()
def encode(model: MiDashengLMModel, clips: list[np.ndarray]) -> list[torch.Tensor]:
    encoded, layout = model.audio_encoder(torch.tensor(padded(clips)), [*map(len, clips)])
    return [*encoded.split(list(layout.clips))]


def test_the_branch_is_added_to_the_encoder_as_plain_numpy_has_it(folder):
    clips = [wave(length, seed) for seed, length in enumerate(LENGTHS)]
    without = MiDashengLMModel.from_pretrained(GOLDEN / "checkpoints/A-small")
    model = load(folder)
    together = encode(model, clips)
    for clip, semantic, found in zip(clips, encode(without, clips), together, strict=True):
        added = plain_branch(folder, clip)
        assert np.abs(added).max() > 0.1
        np.testing.assert_allclose(found.numpy(), semantic.numpy() + added, atol=2e-4, rtol=0)
        torch.testing.assert_close(encode(model, [clip])[0], found, atol=1e-5, rtol=0)


def test_a_clip_too_short_for_a_patch_has_none(folder):
    assert [len(each) for each in encode(load(folder), [wave(560, 1), wave(530, 2)])] == [1, 1]
    with pytest.raises(ValueError, match="clip 0 has 512 samples; from 513 to 512 are possible"):
        encode(load(folder), [wave(512, 1)])


def test_its_front_end_stays_in_float32(folder):
    clip = wave(16_000, 3)
    model = load(folder)
    heard = []
    model.audio_encoder.patch_embed.register_forward_pre_hook(lambda _, given: heard.append(given[0].clone()))
    model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        encode(model, [clip])
    wanted = plain_mel(clip)[:100].reshape(25, 4, BINS).transpose(0, 2, 1)
    np.testing.assert_allclose(heard[0][:, 0].float().numpy(), wanted, atol=0.04, rtol=0)


def test_names_are_those_that_the_configuration_gives(folder, tmp_path):
    other = copy_checkpoint(GOLDEN, "A-small", tmp_path)
    names = {
        "semantic_module": "semantic",
        "acoustic_patch_embed_module": "fine",
        "acoustic_norm_module": "level",
    }
    configure(other, n_mels_patch=BINS, **names)
    renamed = {
        ".model.": ".semantic.",
        "encoder.patch_embed.": "encoder.fine.",
        "encoder.norm.": "encoder.level.",
    }
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next((old for old in renamed if name.startswith("audio_") and old in name), "")
        weights[name.replace(old, renamed[old], 1) if old else name] = tensor
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    clip = wave(8_000, 5)
    assert torch.equal(encode(load(other), [clip])[0], encode(load(folder), [clip])[0])
    load(other).save_pretrained(tmp_path / "again")
    kept = {name for name in weights if "front_end" not in name}
    assert load_file(tmp_path / "again/model.safetensors").keys() == kept


def test_its_folder_is_a_model_s(folder, tmp_path):
    assert find(folder) == folder
    assert "audio_encoder_config.depth: expected 3, as many layers as are stored" in refused_with(
        folder, tmp_path / "depth", depth=2
    )
    assert "fits the tensor" in refused_with(folder, tmp_path / "ratio", mlp_ratio=2)
    for wrong in ({"n_mels_patch": 0}, {"semantic_module": "a.b"}, {"acoustic_norm_module": 5}):
        assert next(iter(wrong)) in refused_with(folder, tmp_path / next(iter(wrong)), **wrong)


def refused_with(folder: Path, copy: Path, **changes) -> str:
    configure(Path(shutil.copytree(folder, copy)), **changes)
    return refused(find, copy)


def test_a_branch_that_is_not_configured_is_unknown(folder, tmp_path):
    other = copy_checkpoint(GOLDEN, "A-small", tmp_path)
    save_file(load_file(folder / "model.safetensors"), other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unknown: audio_encoder\.model\.blocks"):
        MiDashengLMModel.from_pretrained(other)


def test_a_branch_that_is_configured_but_not_there_is_missing(tmp_path):
    other = copy_checkpoint(GOLDEN, "A-small", tmp_path)
    configure(other, n_mels_patch=BINS)
    with pytest.raises(CheckpointError, match=r"missing: .*audio_encoder\.model\.blocks"):
        MiDashengLMModel.from_pretrained(other)


def test_its_encoder_is_trained_and_merged(folder, tmp_path):
    base = load(folder)
    check_targets(base, ("encoder",))
    adapted, (count,) = add_adapters(base, ("encoder",), rank=2, alpha=4, dropout=0.0, base_name=str(folder))
    blocks = AutoConfig.from_pretrained(folder).audio_encoder_config.depth
    assert count.layers == 4 * blocks
    for number, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    adapted.save_pretrained(tmp_path / "adapter")
    clip = wave(8_000, 7)
    wanted = encode(adapted.get_base_model().eval(), [clip])[0]
    (tmp_path / "merged").mkdir()
    merge(folder, tmp_path / "adapter", tmp_path / "merged", "bfloat16")
    stored = load_file(tmp_path / "merged/model.safetensors")
    kept = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert kept == {
        f"audio_encoder.model.init_bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(encode(load(tmp_path / "merged"), [clip])[0], wanted, atol=1e-5, rtol=0)
    assert (wanted - encode(load(folder), [clip])[0]).abs().max() > 1e-3
