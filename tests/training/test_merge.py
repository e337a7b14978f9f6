"""The command `merge`: any time later, elsewhere, for adapters of ours and of others; and its peak."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.train import MergeOptions
from mdl_toolkit.errors import InputError, ModelError
from mdl_toolkit.inference.run import infer
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.training import merge as merging
from mdl_toolkit.training.merge import merge_adapter
from mdl_toolkit.training.run import train
from mdl_toolkit.weights.provenance import read_provenance
from tests.support.adapters import adapted
from tests.support.runs import copy_checkpoint, files_below, make_csv, train_options
from tests.support.weight_files import heads_of, reshard, tensors_of

OURS = {"README.md", "mdl-toolkit.json", "mdl-toolkit.yaml"}


@pytest.fixture
def base(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def merged(adapter, output, **changes):
    return merge_adapter(MergeOptions(adapter=str(adapter), output=str(output), **changes))


def bytes_of(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


def others(folder):
    """All files but weights, and those that are written anew."""
    return {name for name in files_below(folder) if not name.endswith(".safetensors")} - OURS


@pytest.fixture
def published(base):
    """A folder as it is published: shards, code of its own, a card, a licence, folders."""
    reshard(base)
    for name in ("configuration", "modeling", "processing"):
        (base / f"{name}_midashenglm.py").write_text("raise SystemExit('never run')\n")
    (base / "LICENSE").write_bytes("许可 \r\n".encode("utf-16"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, zh]\n---\n# The base\n")
    (base / "assets").mkdir()
    (base / "assets/figure.png").write_bytes(b"\x89PNG\r\n")
    return base


def test_all_but_weights_and_card_is_the_base_byte_for_byte(published, tmp_path):
    done = train(train_options(make_csv(tmp_path, 4), published, tmp_path / "run"))
    later = merged(tmp_path / "run/checkpoint-1", tmp_path / "later")
    for folder in (done.final, later):
        assert others(folder) == others(published)
        assert bytes_of(folder, others(folder)) == bytes_of(published, others(published))
        assert heads_of(folder) == heads_of(published)
        assert files_below(folder) - others(folder) == OURS | set(heads_of(published))
    weights = [name for name in files_below(later) if name.endswith(".safetensors")]
    assert bytes_of(later, weights) == bytes_of(done.final, weights)
    assert read_provenance(later).base == read_provenance(done.final).base
    assert "license: apache-2.0" in (later / "README.md").read_text()


def test_weights_of_other_programs_are_left_out(base, tmp_path, capsys):
    (base / "model-q4.gguf").write_bytes(b"GGUF")
    (base / ".cache").mkdir()
    (base / ".cache/x").write_text("")
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    output = merged(tmp_path / "adapter", tmp_path / "out", model_name=str(base))
    assert others(output) == others(base) - {"model-q4.gguf", ".cache/x"}
    assert "model-q4.gguf: left out" in capsys.readouterr().err


def test_the_base_may_have_moved(base, tmp_path):
    train(train_options(make_csv(tmp_path, 4), base, tmp_path / "run", merge_lora=False))
    base.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "run/final", tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="--model-name"):
        merged(tmp_path / "elsewhere", tmp_path / "out")
    output = merged(tmp_path / "elsewhere", tmp_path / "out", model_name=str(tmp_path / "moved"))
    assert not torch.equal(
        tensors_of(output)["audio_projector.net.0.weight"],
        tensors_of(tmp_path / "moved")["audio_projector.net.0.weight"],
    )


def test_a_wrong_base_is_refused_with_both_names(base, golden, tmp_path):
    train(train_options(make_csv(tmp_path, 4), base, tmp_path / "run", merge_lora=False))
    tensors = load_file(base / "model.safetensors")
    shutil.copytree(base, tmp_path / "other")
    save_file({n: t + 1 for n, t in tensors.items()}, tmp_path / "other/model.safetensors")
    with pytest.raises(
        ModelError, match=r"trained on .*A-small \([0-9a-f]{16}\), and .*other \([0-9a-f]{16}\)"
    ):
        merged(tmp_path / "run/final", tmp_path / "out", model_name=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()
    save_file({n: t + 1 for n, t in tensors.items()}, base / "model.safetensors")  # nor does inference use it
    options = InferenceOptions(
        input=str(tmp_path / "train.csv"),
        output=str(tmp_path / "p.csv"),
        model_name=str(tmp_path / "run/final"),
    )
    with pytest.raises(ModelError, match="has other weights"):
        infer(options)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype(published, tmp_path, dtype, capsys):
    adapted(published, tmp_path / "adapter", target_modules=["q_proj", "qkv"])
    plain = merged(tmp_path / "adapter", tmp_path / "plain", model_name=str(published), verify=False)
    output = merged(tmp_path / "adapter", tmp_path / "out", model_name=str(published), dtype=dtype)
    assert "proven: 3 rows" in capsys.readouterr().err
    expected, found = tensors_of(plain), tensors_of(output)
    assert list(expected) == list(found)
    for name, tensor in found.items():
        is_kept = "init_bn" in name
        wanted = expected[name] if is_kept else expected[name].to(DTYPES[dtype])
        assert torch.equal(tensor, wanted), name
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    same = {"config.json", "model.safetensors.index.json"}
    assert bytes_of(output, others(output) - same) == bytes_of(published, others(published) - same)
    if dtype == "float32":
        assert heads_of(output) == heads_of(published)
        assert (output / "config.json").read_bytes() == (published / "config.json").read_bytes()
    assert MiDashengLMModel.from_pretrained(output, dtype="auto").decoder.dtype == DTYPES[dtype]


def test_what_does_not_fit_in_sixteen_bits_is_named(base, tmp_path):
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    tensors["decoder.model.norm.weight"][3] = 1e5
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"decoder\.model\.norm\.weight: not finite"):
        merged(tmp_path / "adapter", tmp_path / "out", model_name=str(base), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_places_that_are_refused(base, tmp_path):
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    adapter, name = tmp_path / "adapter", {"model_name": str(base)}
    for output in (adapter, adapter / "x", base, base / "deep/x", tmp_path):
        with pytest.raises(InputError, match="--output"):
            merged(adapter, output, **name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes.txt is there, which merge did not write"):
        merged(adapter, tmp_path / "mine", **name)
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"
    merged(adapter, tmp_path / "out", verify=False, **name)
    merged(adapter, tmp_path / "out", verify=False, **name)  # an earlier result is replaced


def test_what_is_no_adapter_is_refused(base, tmp_path):
    with pytest.raises(ModelError, match="no adapter"):
        merged(base, tmp_path / "out")


def test_a_damaged_checkpoint_is_refused(base, tmp_path, monkeypatch):
    train(train_options(make_csv(tmp_path, 4), base, tmp_path / "run"))
    weights = tmp_path / "run/checkpoint-1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    monkeypatch.setattr(merging, "export_merged", None)
    with pytest.raises(ModelError, match=r"not a complete checkpoint \(adapter_model.safetensors is damaged"):
        merged(tmp_path / "run/checkpoint-1", tmp_path / "out")


def test_a_full_disk_leaves_nothing(base, tmp_path):
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    words = ["merge", tmp_path / "adapter", "--output", tmp_path / "out", "--model-name", base]
    done = subprocess.run(
        [sys.executable, "-m", "mdl_toolkit", *map(str, words)], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"error: --output {tmp_path / 'out'}: cannot be written: File too large\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A-small", "adapter"]


# --- the peak --------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

import torch
torch.set_num_threads(1)
from mdl_toolkit.weights.merge import merge
small, large = map(Path, sys.argv[1:])
merge(small / "base", small / "adapter", small / "out")  # whatever is loaded at the first use
before = peak()
merge(large / "base", large / "adapter", large / "out")
print(peak() - before)
"""
WIDTH, SHARDS, PER_SHARD = 1024, 3, 17  # float32 matrices of 4 MiB; shards of 68 MiB


def make_pair(folder, width):
    """A base in shards, an adapter for it, and an empty folder; the adapter's tensors."""
    for name in ("base", "adapter", "out"):
        (folder / name).mkdir(parents=True)
    names = [f"layers.{number}" for number in range(SHARDS * PER_SHARD)]
    for shard in range(SHARDS):
        part = {f"{name}.weight": torch.randn(width, width) for name in names[shard::SHARDS]}
        save_file(part, folder / f"base/model-{shard}.safetensors")
    shapes = {"A": (8, width), "B": (width, 8)}
    state = {f"{name}.lora_{side}.weight": torch.randn(shapes[side]) for name in names for side in shapes}
    file = folder / "adapter/adapter_model.safetensors"
    save_file({f"base_model.model.{name}": tensor for name, tensor in state.items()}, file)
    (folder / "base/config.json").write_text("{}")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    return state


def test_the_peak_is_far_below_a_shard(tmp_path):
    make_pair(tmp_path / "small", 8)
    state = make_pair(tmp_path / "large", WIDTH)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = sorted((tmp_path / "large/base").glob("*.safetensors"))
    largest = max(file.stat().st_size for file in files)
    assert largest > 64 << 20
    assert int(done.stdout) < largest / 2
    before, after = load_file(files[-1]), load_file(tmp_path / "large/out" / files[-1].name)
    for name, tensor in before.items():
        a, b = (state[f"{name.removesuffix('weight')}lora_{side}.weight"] for side in "AB")
        assert torch.allclose(after[name], tensor + b @ a, atol=1e-5)
