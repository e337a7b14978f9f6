"""Configuration files that hold what they must not: refused by file and key before any weight is loaded."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl_toolkit.cli.main import run
from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.adapters import make_adapter
from tests.support.model_folders import change_json, find, refused
from tests.support.runs import copy_checkpoint, make_rows, write_csv

NAN, HUGE = float("nan"), 10**20
TEXT = (None, 5, True, ["a"], {"a": 1})
OBJECT = (5, True, "x", [], [{}])
BOOLEAN = (None, 0, 1, "true", [True], {})
NUMBER = (None, True, "1", [1], {"a": 1}, NAN, float("inf"))
SHARE = (*NUMBER, -0.1, 1.1)
COUNT = (None, True, "8", 1.5, [8], {"a": 8}, -1, HUGE, NAN)
SIZE = (*COUNT, 0)
IDS = (True, "8", 1.5, {"a": 8}, -1, HUGE, [None], ["8"], [[8]], [512], 512)
ID = (True, "8", 1.5, [8], {"a": 8}, -1, HUGE, 512)
OR_NONE = (True, "8", 1.5, [8], {"a": 8}, -2, HUGE, 512)
TOKEN = (5, True, ["a"], {"content": None}, {"content": 5}, {})
TEMPLATE = (5, True, {"a": 1}, ["x"], [{"name": "default"}], [{"name": 5, "template": "x"}])
TEXTS = (5, "x", {"a": 1}, [5], [None], [["x"]])
MODULES = (5, True, {"a": 1}, [5], [None], "(", "*")
RANKS = (5, "x", ["q_proj"], {"q_proj": "8"}, {"q_proj": 0}, {"q_proj": None}, {"q_proj": 1.5}, {"(": 8})
ALPHAS = (5, "x", ["q_proj"], {"q_proj": "8"}, {"q_proj": None}, {"q_proj": NAN}, {"*": 8})

# Every key of each file by name: what it must not be.
WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json": {
        **dict.fromkeys(("audio_encoder_config", "text_config"), (None, *OBJECT)),
        "subsample_factor": SIZE,
        "audio_token_id": ID,
        "tie_word_embeddings": BOOLEAN,
        "quantization_config": OBJECT,
        "quantization_config.quant_method": TEXT,
        "architectures": TEXTS,
        "auto_map": OBJECT,
        "dtype": (5, [], {}, "float99"),
        **{
            f"audio_encoder_config.{key}": SIZE
            for key in (
                "embed_dim", "depth", "num_heads", "target_length", "outputdim", "n_fft", "win_length",
                "hop_length", "n_mels",
            )
        },
        **dict.fromkeys(("audio_encoder_config.qkv_bias",), BOOLEAN),
        "audio_encoder_config.mlp_ratio": (*NUMBER, 0, -4),
        "audio_encoder_config.init_values": NUMBER[1:],
        **{
            f"audio_encoder_config.patch_{key}":
            (None, True, "8", 1.5, {}, [], [64], [64, 4, 1], [64, "4"], 0, [64, 0])
            for key in ("size", "stride")
        },
        "audio_encoder_config.input_channels": (*SIZE, 2),
        "audio_encoder_config.sample_rate": (*SIZE, 8000),
        "audio_encoder_config.center": (*BOOLEAN, False),
        **{f"audio_encoder_config.{key}": (*NUMBER, 0.1) for key in ("drop_rate", "attn_drop_rate")},
        **{f"audio_encoder_config.{key}": (*NUMBER, -1, 8001) for key in ("f_min", "f_max")},
        **{
            f"text_config.{key}": SIZE
            for key in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings",
            )
        },
        **{f"text_config.{key}": SIZE[1:] for key in ("num_key_value_heads", "head_dim")},
        "text_config.sliding_window": COUNT[1:],
        "text_config.max_window_layers": COUNT,
        "text_config.model_type": (*TEXT, "llama"),
        "text_config.hidden_act": (*TEXT, "loud"),
        "text_config.initializer_range": (*NUMBER, -1),
        **{f"text_config.{key}": SHARE for key in ("rms_norm_eps", "attention_dropout")},
        **{
            f"text_config.{key}": BOOLEAN
            for key in ("use_cache", "tie_word_embeddings", "attention_bias", "use_sliding_window")
        },
        "text_config.layer_types": (*TEXTS, ["full_attention"], ["sliding_attention"] * 2),
        "text_config.rope_theta": (*NUMBER, 0, -1),
        **{f"text_config.rope_{key}": OBJECT for key in ("scaling", "parameters")},
        "text_config.rope_scaling.rope_type": (*TEXT, "other"),
        "text_config.rope_scaling.factor": (*NUMBER, 0),
        "text_config.rope_scaling.mrope_section": (None, 5, "x", {"a": 1}, ["x"], [None], [-1]),
        "text_config.bos_token_id": ID,
        "text_config.pad_token_id": OR_NONE,
        "text_config.eos_token_id": IDS,
    },
    "generation_config.json": {
        "eos_token_id": IDS,
        "bos_token_id": ID,
        "pad_token_id": OR_NONE,
        "do_sample": BOOLEAN[1:],
        "temperature": (*NUMBER[1:], -1),
        "top_p": SHARE[1:],
        "top_k": (*COUNT[1:6], -2, *COUNT[7:]),
        **dict.fromkeys(("max_length", "max_new_tokens", "num_beams"), SIZE[1:]),
        "repetition_penalty": (*NUMBER[1:], 0),
    },
    "preprocessor_config.json": {
        "sampling_rate": (*SIZE, 8000, 16000.5),
        "feature_size": (*SIZE, 2),
        "padding_value": NUMBER,
        "padding_side": (*TEXT, "both"),
        "do_normalize": BOOLEAN,
        "return_attention_mask": BOOLEAN[1:],
        "auto_map": OBJECT,
    },
    "processor_config.json": {
        "model_subsampling": (*SIZE, 4),
        **{f"audio{key}_token": TOKEN for key in ("", "_bos", "_eos")},
        "chat_template": TEMPLATE,
    },
    "tokenizer_config.json": {
        **{f"{key}_token": TOKEN for key in ("audio", "audio_bos", "audio_eos", "pad", "eos", "bos", "unk")},
        "chat_template": TEMPLATE,
    },
    "chat_template.json": {"chat_template": TEMPLATE},
    "model.safetensors.index.json": {
        "weight_map": (None, *OBJECT, {"a": None}, {"a": 5}, {"a": "../model.safetensors"}, {"a": "/a"}),
        "metadata": OBJECT,
    },
    "mdl-toolkit.json": {
        "base": OBJECT,
        "base.name": TEXT,
        "base.revision": TEXT[1:],
        "base.fingerprint": TEXT,
        **dict.fromkeys(("prompts", "prompts_differ"), (None, *OBJECT, {})),
        **{f"prompts.{key}": TEXT[1:] for key in ("system", "user")},
        **{f"prompts_differ.{key}": BOOLEAN for key in ("system", "user")},
        **dict.fromkeys(("data", "metrics"), (None, *OBJECT, {"rows": None}, {"rows": "7"}, {"rows": [7]})),
        "toolkit": TEXT,
    },
    "adapter_config.json": {
        **dict.fromkeys(("peft_type",), TEXT),
        **dict.fromkeys(("base_model_name_or_path", "task_type", "revision"), TEXT[1:]),
        "r": SIZE,
        "lora_alpha": NUMBER,
        "lora_dropout": SHARE,
        **dict.fromkeys(("target_modules", "exclude_modules"), MODULES),
        "modules_to_save": TEXTS,
        "rank_pattern": RANKS,
        "alpha_pattern": ALPHAS,
        "layers_to_transform": (True, "1", 1.5, {}, -1, ["1"], [None]),
        "layers_pattern": (5, True, {"a": 1}, [5], [None]),
        "bias": (*TEXT, "some"),
        "init_lora_weights": (5, [], {}),
        **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"), BOOLEAN),
    },
}  # fmt: skip
# What the files must hold beside the key in question.
MORE: dict[str, dict[str, Any]] = {
    "config.json": {},
    "mdl-toolkit.json": {
        "base": {"name": "a", "revision": None, "fingerprint": "b"},
        "prompts": {"system": None, "user": "What?"},
        "prompts_differ": {"system": False, "user": False},
        "data": {"rows": 7},
        "toolkit": "0.2",
    },
    "model.safetensors.index.json": {"weight_map": {}},
}


@pytest.fixture
def model(golden, tmp_path) -> Path:
    return copy_checkpoint(golden, "A-small", tmp_path)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is an error: what is refused must be refused before."""

    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(MiDashengLMModel, "from_pretrained", fail)


def put(file: Path, key: str, value: Any) -> None:
    """Give a key of a JSON file a value; the file is made if it is not there."""
    values = (
        json.loads(file.read_text()) if file.is_file() else json.loads(json.dumps(MORE.get(file.name, {})))
    )
    inner = values
    *way, name = key.split(".")
    for each in way:
        inner[each] = inner.get(each) or {}
        inner = inner[each]
    inner[name] = value
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in WRONG.items() for key in keys])
def test_a_wrong_value_is_refused_by_file_and_key(model, name, key):
    file = model / name
    before = file.read_bytes() if file.is_file() else None
    for wrong in WRONG[name][key]:
        put(file, key, wrong)
        said = refused(find, model, weights=False)
        assert said.startswith(f"{file}: "), (wrong, said)
        assert key in said, (wrong, said)
        file.unlink()
        if before is not None:
            file.write_bytes(before)
    assert find(model, weights=False) == model


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"text_config.pad_token_id": -1, "text_config.sliding_window": 0}),
        ("config.json", {"text_config.head_dim": 16, "text_config.num_key_value_heads": None}),
        ("preprocessor_config.json", {"return_attention_mask": None}),
        ("generation_config.json", {"top_k": -1, "pad_token_id": -1}),
    ],
)
def test_unusual_values_that_transformers_takes_change_nothing(golden, model, name, values):
    """Null key heads are as many as the others: each of the folder's is stored for both that share it."""
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = MiDashengLMModel.from_pretrained(golden / "checkpoints/A-small")(input_ids=ids).logits
    for key, value in values.items():
        put(model / name, key, value)
        if value is None and key.endswith("heads"):
            tensors = load_file(model / "model.safetensors")
            for each in [each for each in tensors if re.search(r"decoder.*\.[kv]_proj\.", each)]:
                heads = tensors[each].unflatten(0, (2, 16))
                tensors[each] = heads.repeat_interleave(2, 0).flatten(0, 1).contiguous()
            save_file(tensors, model / "model.safetensors")
    assert find(model) == model
    read_tokenizer_files(model)
    torch.testing.assert_close(MiDashengLMModel.from_pretrained(model)(input_ids=ids).logits, expected)


def test_heads_of_a_width_of_their_own_need_not_divide_the_hidden_size(model):
    """As in Qwen3; without `head_dim` they must."""
    put(model / "config.json", "text_config.num_attention_heads", 6)
    assert "hidden_size" in refused(find, model, weights=False)
    put(model / "config.json", "text_config.head_dim", 16)
    assert find(model, weights=False) == model


@pytest.mark.parametrize("value", [None, 151646])
def test_an_audio_token_that_is_not_said_is_the_published_one(model, value):
    put(model / "config.json", "audio_token_id", value)
    put(model / "config.json", "text_config.vocab_size", 151_700)
    assert MiDashengLMConfig.from_pretrained(model).audio_token_id == 151_646
    said = refused(read_tokenizer_files, find(model, weights=False))
    assert "audio_token_id: expected 486, the id of <|AUDIO|> in tokenizer.json, not 151646" in said


def test_no_file_of_a_folder_is_left_out(model):
    """Of each JSON file that transformers or PEFT reads, the test above knows keys."""
    unread = {"added_tokens.json", "special_tokens_map.json", "tokenizer.json", "vocab.json"}
    assert {file.name for file in model.glob("*.json")} - unread <= {*WRONG}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "5", "null", '{"a"', "9" * 5000])
def test_what_is_no_object_is_refused_by_file(model, name, content):
    (model / name).write_text(content)
    assert refused(find, model, weights=False).startswith(f"{model / name}: ")


# --- keys that do not belong together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("text_config.num_attention_heads", 3, "num_attention_heads"),
        ("text_config.num_key_value_heads", 3, "num_key_value_heads"),
        ("audio_encoder_config.num_heads", 5, "num_heads"),
        ("audio_encoder_config.n_mels", 80, "patch_size"),
        ("audio_encoder_config.patch_size", [64, 8], "patch_stride"),
        ("audio_encoder_config.n_fft", 400, "win_length"),
        ("audio_encoder_config.f_min", 8000, "f_max"),
        ("text_config.vocab_size", 486, "audio_token_id"),
        ("text_config.vocab_size", 487, "vocab_size"),
        ("text_config.num_hidden_layers", 3, "layer_types"),
        ("subsample_factor", 4, "model_subsampling"),
    ],
)
def test_two_keys_that_do_not_belong_together(model, key, value, other):
    put(model / "config.json", key, value)
    (model / "generation_config.json").write_text("{}")

    def read() -> None:
        read_tokenizer_files(find(model, weights=False))

    said = refused(read)
    assert key.rpartition(".")[2] in said
    assert other in said


def test_ids_of_another_tokenizer(model):
    put(model / "config.json", "audio_token_id", 485)
    said = refused(read_tokenizer_files, find(model, weights=False))
    assert said.startswith(f"{model / 'config.json'}: audio_token_id: expected 486, the id of <|AUDIO|>")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"text_config.vocab_size": 600}, "text_config.vocab_size"),
        ({"text_config.hidden_size": 128, "text_config.head_dim": 16}, "text_config.hidden_size"),
        ({"text_config.intermediate_size": 97}, "text_config.intermediate_size"),
        (
            {"text_config.num_attention_heads": 8, "text_config.head_dim": 16},
            "text_config.num_attention_heads",
        ),
        ({"text_config.num_key_value_heads": 4}, "text_config.num_key_value_heads"),
        (
            {"text_config.num_hidden_layers": 1, "text_config.layer_types": None},
            "text_config.num_hidden_layers",
        ),
        ({"audio_encoder_config.embed_dim": 96}, "audio_encoder_config.embed_dim"),
        ({"audio_encoder_config.depth": 4}, "audio_encoder_config.depth"),
        ({"audio_encoder_config.mlp_ratio": 2}, "audio_encoder_config.mlp_ratio"),
        ({"audio_encoder_config.target_length": 2016}, "audio_encoder_config.target_length"),
        (
            {f"audio_encoder_config.{key}": value for key, value in
             {"n_mels": 80, "patch_size": [80, 4], "patch_stride": [80, 4]}.items()},
            "audio_encoder_config.n_mels",
        ),
        (
            {"audio_encoder_config.patch_size": [64, 8], "audio_encoder_config.patch_stride": [64, 8]},
            "audio_encoder_config.patch_stride",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)  # fmt: skip
def test_sizes_that_are_not_those_of_the_tensors(model, changes, key):
    for each, value in changes.items():
        put(model / "config.json", each, value)
    said = refused(find, model)
    assert said.startswith(f"{model / 'config.json'}: {key}: expected ")


def test_audio_tokens_of_another_size(model):
    for name, key in (("config.json", "subsample_factor"), ("processor_config.json", "model_subsampling")):
        put(model / name, key, 4)
    assert "config.json: subsample_factor: expected what fits" in refused(find, model)


def test_a_head_that_is_not_there(model):
    tensors = load_file(model / "model.safetensors")
    head = tensors.pop("decoder.lm_head.weight")
    save_file(tensors, model / "model.safetensors")
    assert "tie_word_embeddings: expected true, as there is no tensor" in refused(find, model)
    put(model / "config.json", "tie_word_embeddings", True)
    assert find(model) == model
    # The same matrix, stored twice.
    save_file({**tensors, "decoder.lm_head.weight": tensors["decoder.model.embed_tokens.weight"].clone()},
              model / "model.safetensors")  # fmt: skip
    assert find(model) == model
    assert not torch.equal(head, tensors["decoder.model.embed_tokens.weight"])


def test_keys_that_are_not_there_have_their_defaults(golden):
    """All three architectures are accepted as they are, and without what a model has defaults for."""
    for folder in (golden / "checkpoints").iterdir():
        assert find(folder) == folder


# --- commands --------------------------------------------------------------------------------------------


def commands(adapter: bool) -> Iterator[list[str]]:
    if adapter:
        yield ["merge", "model", "--output", "out"]
    else:
        yield ["convert-dataset", "in.csv", "--output", "out", "--model-name", "model"]
        yield ["train", "--train-dataset", "in.csv", "--output", "out", "--model-name", "model"]
        yield ["check", "in.csv", "--model-name", "model"]
    yield ["inference", "in.csv", "--output", "out", "--model-name", "model"]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "text_config.num_attention_heads", 5),
        ("config.json", "audio_encoder_config", []),
        ("generation_config.json", "eos_token_id", "</s>"),
        ("preprocessor_config.json", "sampling_rate", 44_100),
        ("processor_config.json", "audio_token", 5),
        ("tokenizer_config.json", "pad_token", {"content": None}),
        ("chat_template.json", "chat_template", {}),
        ("mdl-toolkit.json", "prompts.user", 5),
    ],
)
def test_every_command_refuses_it_with_one_sentence(model, tmp_path, monkeypatch, capsys, name, key, value):
    monkeypatch.chdir(tmp_path)
    model.rename("model")
    write_csv(Path("in.csv"), make_rows(Path("audio"), 1))
    put(Path("model", name), key, value)
    for words in commands(adapter=False):
        refuses(words, capsys, f"error: model/{name}: ", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", "8"),
        ("r", 5),
        ("lora_alpha", None),
        ("target_modules", {"q": 1}),
        ("exclude_modules", "("),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {".*q_proj": 3}),
        ("alpha_pattern", {"q_proj": None}),
    ],
)
def test_every_command_refuses_an_adapter(golden, tmp_path, monkeypatch, capsys, key, value):
    base = golden / "checkpoints/A-small"
    make_adapter(base, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    write_csv(Path("in.csv"), make_rows(Path("audio"), 1))
    change_json(Path("model/adapter_config.json"), **{key: value})
    monkeypatch.setattr(MiDashengLMModel, "from_pretrained", None)
    for words in commands(adapter=True):
        refuses(words, capsys, "adapter_config.json: ", key)


def refuses(words: list[str], capsys: Any, *parts: str) -> None:
    capsys.readouterr()
    assert run(words) == 1
    said = capsys.readouterr().err
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert all(part in error for part in parts), error
    assert "bug" not in said
    assert not Path("out").exists()
