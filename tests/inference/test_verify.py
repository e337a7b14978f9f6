"""Proven before it says done: what differs by rounding alone passes, whatever else is refused."""

import gc
import re
import weakref

import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mdl_toolkit.audio import load
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import ModelError
from mdl_toolkit.inference import verify as proof
from mdl_toolkit.inference.verify import choose_samples, synthesize_samples, verify_merge
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.training import result
from mdl_toolkit.training.run import train
from mdl_toolkit.weights import merge as export
from mdl_toolkit.weights.loading import load_model, with_adapter
from mdl_toolkit.weights.merge import merge
from mdl_toolkit.weights.provenance import Prompts
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.adapters import adapted, make_adapter
from tests.support.runs import copy_checkpoint, files_below, make_csv, train_options, write_csv
from tests.support.waves import wave
from tests.support.weight_files import tensors_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LINE = re.compile(r"largest logit difference (\S+) \(allowed (\S+), largest logit (\S+)\), (\d) of 3 greedy")


def living(kind):
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


@pytest.fixture
def one_at_a_time(monkeypatch):
    """A model is loaded only when no other one is there, those aside that other tests have left."""
    load, before = proof.load_model, {*map(id, living(MiDashengLMModel))}

    def check(*words, **more):
        assert {*map(id, living(MiDashengLMModel))} <= before
        return load(*words, **more)

    monkeypatch.setattr(proof, "load_model", check)


@pytest.fixture(params=DTYPES)
def parts(request, golden, tmp_path):
    """Base in a dtype, adapter of all kinds of targets, and their merged folder."""
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter")
    dtype = DTYPES[request.param]
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors_of(base).items()}
    save_file(tensors, base / "model.safetensors")
    (merged := tmp_path / "merged").mkdir()
    merge(base, adapter, merged)
    gc.collect()
    return base, adapter, merged


def rows(base):
    return synthesize_samples(ChatTokenizer(read_tokenizer_files(base)), Prompts("Be brief.", "What is it?"))


@pytest.mark.usefixtures("one_at_a_time")
def test_the_right_weights_pass(parts, capsys):
    base, adapter, merged = parts
    verify_merge(base, adapter, merged, rows(base))
    found, allowed, largest, same = map(float, LINE.search(capsys.readouterr().err).groups())
    assert found <= allowed / 1.5
    assert allowed <= 0.2 * largest
    assert same >= 2


# What could go wrong, the smallest last: one layer of 28 that was left as it was.
MISTAKES = ("base", "scale", "one layer")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_weights_are_refused(parts, mistake):
    base, adapter, merged = parts
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    if mistake == "base":
        wrong = before
    elif mistake == "scale":
        wrong = {
            name: tensor + (tensor - before[name]) if tensor.is_floating_point() else tensor
            for name, tensor in after.items()
        }
    else:
        name = "decoder.model.layers.1.mlp.down_proj.weight"
        wrong = {**after, name: before[name]}
    save_file(wrong, merged / "model.safetensors")
    said = (
        r"does not answer as base and adapter do: largest logit difference .* the adapter stays in .*adapter"
    )
    with pytest.raises(ModelError, match=said):
        verify_merge(base, adapter, merged, rows(base))


def test_what_is_not_a_number_is_refused(golden, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter")
    (merged := tmp_path / "merged").mkdir()
    merge(base, adapter, merged)
    tensors = load_file(merged / "model.safetensors")
    tensors["decoder.lm_head.weight"][5] = torch.nan
    save_file(tensors, merged / "model.safetensors")
    with pytest.raises(ModelError, match=r"decoder\.lm_head\.weight holds NaN"):
        verify_merge(base, adapter, merged, rows(base))


# --- in a training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "4bit"])
@pytest.mark.parametrize("name", ["A-small", "B-small-tied"])
def test_a_training_is_proven_without_the_model_it_trained(
    golden, tmp_path, monkeypatch, capsys, name, quantization
):
    model = copy_checkpoint(golden, name, tmp_path)
    seen, before = [], {*map(id, living(PeftModel))}

    def look(*words, **named):
        seen.extend(each for each in living(PeftModel) if id(each) not in before)
        verify_merge(*words, **named)

    monkeypatch.setattr(result, "verify_merge", look)
    options = train_options(
        make_csv(tmp_path, 8), model, tmp_path / "run", quantization=quantization,
        train_target=("decoder", "embed_tokens"),
    )  # fmt: skip
    train(options)
    assert not seen
    found, allowed, *_, same = map(float, LINE.search(capsys.readouterr().err).groups())
    assert found < allowed / 10
    assert same == 3


def test_a_training_whose_merging_went_wrong_keeps_what_another_attempt_needs(golden, tmp_path, monkeypatch):
    model = copy_checkpoint(golden, "A-small", tmp_path)
    files = export.weight_files

    def wrong(base, adapter, output, dtype=None):
        merge(base, adapter, output, dtype)
        for file in files(base):
            (output / file.path.name).write_bytes(file.path.read_bytes())

    monkeypatch.setattr(export, "merge", wrong)
    options = train_options(make_csv(tmp_path, 8), model, tmp_path / "run", num_epochs=3)
    with pytest.raises(ModelError, match=r"stays in .*run/checkpoint-6"):
        train(options)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".dataset", ".mdl-toolkit-files.json", "checkpoint-6", "log.jsonl", "mdl-toolkit.json",
        "mdl-toolkit.yaml",
    }  # fmt: skip
    assert "adapter_model.safetensors" in files_below(tmp_path / "run/checkpoint-6")


def test_without_verify_nothing_is_loaded(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(result, "verify_merge", None)
    model = copy_checkpoint(golden, "A-small", tmp_path)
    assert train(train_options(make_csv(tmp_path, 4), model, tmp_path / "run", verify=False)).final.is_dir()


def test_the_proof_hears_what_was_recorded_not_what_16_bits_hold_of_it(golden, tmp_path, capsys):
    """Telephone, quiet and too loud recordings, as the float path gives them."""
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter")
    (merged := tmp_path / "merged").mkdir()
    merge(base, adapter, merged)
    kinds = [(8_000, 1.0, "PCM_16"), (44_100, 1e-3, "FLOAT"), (48_000, 1.5, "FLOAT"), (16_000, 1.0, "FLOAT")]
    rows = []
    for number, (rate, gain, subtype) in enumerate(kinds):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, gain * wave(rate * (number + 4) // 4, number), rate, subtype=subtype)
        rows.append({"audio": str(path), "prediction": "x"})
    source, data = str(write_csv(tmp_path / "rows.csv", rows)), str(tmp_path / "data")
    convert_dataset(ConvertOptions(input=source, output=data, model_name=str(base), num_workers=1))
    samples = choose_samples(ConvertedDataset(tmp_path / "data"))
    assert len(samples) == 3
    recorded = [load(row["audio"]).samples for row in rows]
    for sample in samples:
        (heard,) = (each for each in recorded if len(each) == len(sample.waveform))
        # Half a step of 16 bits is 1.5e-5.
        np.testing.assert_allclose(sample.waveform, heard, atol=2e-8)
    capsys.readouterr()
    verify_merge(base, adapter, merged, samples)
    assert LINE.search(capsys.readouterr().err)[4] == "3"


def test_dora_is_proven_too(golden, tmp_path, capsys):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapted(base, tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "down_proj", "fc1"])
    (merged := tmp_path / "merged").mkdir()
    merge(base, tmp_path / "adapter", merged)
    verify_merge(base, tmp_path / "adapter", merged, rows(base))
    assert "3 of 3 greedy texts the same" in capsys.readouterr().err


def test_a_gpu_that_is_too_small_is_let_go_before_the_cpu_proves(parts, monkeypatch, capsys):
    """What a failed attempt held is freed when the second one begins."""
    base, adapter, merged = parts
    load, held = proof.load_model, []

    def lacking(folder, *, dtype, device):
        if device.type == "cpu":
            gc.collect()
            assert held[0]() is None
            return load(folder, dtype=dtype, device=device)
        model = load(folder, dtype=dtype, device=torch.device("cpu"))
        held.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(proof, "load_model", lacking)
    monkeypatch.setattr(proof, "best_device", lambda: torch.device("cuda"))
    verify_merge(base, adapter, merged, rows(base))
    assert LINE.search(capsys.readouterr().err)


def test_an_adapter_that_lacks_memory_does_not_pass_for_one_that_does_not_fit(parts, monkeypatch):
    base, adapter, _ = parts

    def lacking(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PeftModel, "from_pretrained", lacking)
    plain = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        with_adapter(plain, adapter)
