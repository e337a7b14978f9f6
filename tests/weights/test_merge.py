"""Merging: W + (alpha / r) B A against a plain loop, in the base folder's own format."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl_toolkit.errors import ModelError
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.weights.merge import export_adapter, export_merged, merge
from mdl_toolkit.weights.model_card import ResultMetadata
from mdl_toolkit.weights.provenance import Provenance
from tests.support.adapters import make_adapter
from tests.support.runs import copy_checkpoint, files_below
from tests.support.weight_files import heads_of, layout, reshard, tensors_of

CPU = torch.device("cpu")
ABOUT = ResultMetadata(Provenance(), None, "")


@pytest.mark.parametrize("name", ["A-small", "B-small"])
def test_merged_weights_against_a_plain_loop(golden, tmp_path, name):
    base = copy_checkpoint(golden, name, tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter")
    (output := tmp_path / "merged").mkdir()
    merge(base, adapter, output)
    before, after, state = (
        tensors_of(base),
        tensors_of(output),
        load_file(adapter / "adapter_model.safetensors"),
    )
    changed = 0
    for key, tensor in before.items():
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in state:
            a, b = state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"]
            expected = torch.stack([row + 1.5 * (b[i] @ a) for i, row in enumerate(tensor)])
            assert torch.allclose(after[key], expected, atol=1e-6)
            changed += 1
        elif f"{stem}.weight" in state:
            assert torch.equal(after[key], state[f"{stem}.weight"])
            changed += 1
        else:
            assert torch.equal(after[key], tensor)
    assert changed == 12 + 2 + 14 + 2


def test_shards_names_dtypes_and_metadata_are_the_bases(golden, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    reshard(base)
    half = {
        n: t.bfloat16() if "decoder" in n else t
        for n, t in load_file(base / "model-00001-of-00003.safetensors").items()
    }
    save_file(half, base / "model-00001-of-00003.safetensors", metadata={"format": "pt", "note": "kept"})
    (output := tmp_path / "merged").mkdir()
    merge(base, make_adapter(golden / "checkpoints/A-small", tmp_path / "adapter"), output)
    assert layout(output) == layout(base)
    assert heads_of(output) == heads_of(base)
    assert files_below(output) == files_below(base)
    assert {f.stat().st_mode for f in output.iterdir()} == {f.stat().st_mode for f in base.iterdir()}
    unchanged = files_below(base) - {file.name for file in base.glob("*.safetensors")}
    assert all((output / file).read_bytes() == (base / file).read_bytes() for file in unchanged)
    MiDashengLMModel.from_pretrained(output)


def test_remote_code_files_and_auto_map_travel_along(golden, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    (base / "modeling_midashenglm.py").write_text("raise SystemExit('never run')")
    (output := tmp_path / "merged").mkdir()
    merge(base, make_adapter(base, tmp_path / "adapter", ("projector",)), output)
    assert (output / "modeling_midashenglm.py").read_text() == "raise SystemExit('never run')"
    assert "auto_map" in json.loads((output / "config.json").read_text())


@pytest.mark.parametrize("is_named", [True, False])
def test_code_that_a_copied_configuration_names_comes_along_with_an_adapter(golden, tmp_path, is_named):
    """And what that imports; without such a configuration no code does."""
    base = copy_checkpoint(golden, "A-small", tmp_path)
    for name in ("processing_midashenglm.py", "helpers.py"):
        (base / name).write_text(f"raise SystemExit('{name} never runs')")
    named = set()
    for file in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        values = json.loads((base / file).read_text())
        values.pop("auto_map", None)
        if is_named and file == "processor_config.json":
            values["auto_map"] = {"AutoProcessor": "processing_midashenglm.MiDashengLMProcessor"}
        (base / file).write_text(json.dumps(values))
    output = tmp_path / "final"
    export_adapter(base, make_adapter(base, tmp_path / "adapter", ("projector",)), output, ABOUT)
    for file in output.glob("*_config.json"):
        values = json.loads(file.read_text()).get("auto_map", {}).values()
        named |= {f"{value.partition('.')[0]}.py" for value in values}
    assert named == ({"processing_midashenglm.py"} if is_named else set())
    assert {file.name for file in output.glob("*.py")} == ({*named, "helpers.py"} if is_named else set())


@pytest.mark.parametrize(("with_head", "shards"), [(False, 1), (True, 1), (True, 3), (False, 3)])
def test_tied_embeddings_stay_tied(golden, tmp_path, with_head, shards):
    base = copy_checkpoint(golden, "B-small-tied", tmp_path)
    embedding, head = "decoder.model.embed_tokens.weight", "decoder.lm_head.weight"
    if with_head:
        tensors = load_file(base / "model.safetensors")
        save_file(
            {**tensors, head: tensors[embedding].clone()},
            base / "model.safetensors",
            metadata={"format": "pt"},
        )
    adapter = make_adapter(base, tmp_path / "adapter", ("lm_head",))
    if shards > 1:
        reshard(base, shards)
    (output := tmp_path / "merged").mkdir()
    merge(base, adapter, output)
    after = tensors_of(output)
    assert (head in after) == with_head
    assert not torch.equal(after[embedding], tensors_of(base)[embedding])
    model = MiDashengLMModel.from_pretrained(output)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, after[embedding])


def test_a_result_that_is_not_finite_is_named_and_nothing_is_written(golden, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", ("projector",))
    state = load_file(adapter / "adapter_model.safetensors")
    state["base_model.model.audio_projector.net.2.lora_B.weight"][0, 0] = torch.inf
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"audio_projector\.net\.2\.weight: not finite"):
        export_merged(base, adapter, tmp_path / "final", ABOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A-small", "adapter"]


def test_an_adapter_of_another_model_is_refused(golden, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", ("decoder",))
    state = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in state.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    (output := tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"no tensors decoder\.model\.layers\.9\."):
        merge(base, adapter, output)


def test_an_adapter_of_another_shape_is_refused(golden, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", ("projector",))
    state = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.audio_projector.net.2.lora_B.weight"
    save_file({**state, name: state[name][:-1].clone()}, adapter / "adapter_model.safetensors")
    (output := tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"audio_projector\.net\.2\.weight: the adapter's shape \[63, 64\]"):
        merge(base, adapter, output)


def test_an_unmerged_export_holds_adapter_and_text_side(golden, tmp_path):
    base = copy_checkpoint(golden, "A-small", tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter")
    export_adapter(base, adapter, tmp_path / "final", ABOUT)
    beside = files_below(base) - {"config.json", "model.safetensors"}
    assert files_below(tmp_path / "final") == beside | {
        "adapter_config.json", "adapter_model.safetensors", "mdl-toolkit.yaml", "mdl-toolkit.json",
        "README.md",
    }  # fmt: skip
