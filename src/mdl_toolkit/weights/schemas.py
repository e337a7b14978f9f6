"""Tables of what the configuration files of a model or adapter must hold, and of how keys belong together.

A key is in a table if the model, the processor, the chat template, transformers or PEFT reads it. Bounds are
far from any published model's, and near enough that no number within them exhausts memory or time.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mdl_toolkit.i18n import Localized
from mdl_toolkit.model.constants import SAMPLE_RATE, SEMANTIC_MODULE, TEXT_MODEL_TYPES
from mdl_toolkit.utils.schema import (
    BOOLEAN,
    FILE_NAME,
    OBJECT,
    REGEX,
    TEXT,
    Rule,
    Schema,
    either,
    integer,
    list_of,
    mapping_of,
    number,
    object_of,
    one_of,
    optional,
    required,
)

MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG, PREPROCESSOR_CONFIG = "generation_config.json", "preprocessor_config.json"
TOKENIZER_CONFIG, PROCESSOR_CONFIG = "tokenizer_config.json", "processor_config.json"
TEMPLATE_CONFIG, INDEX = "chat_template.json", "model.safetensors.index.json"

# --- rules -----------------------------------------------------------------------------------------------


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as the one item of a list."""
    return value if isinstance(value, list) else [value]


def pair_of(patch: Any) -> tuple[Any, Any]:
    """Return the bins and frames of a patch; None for both if these are not two numbers, or one for both."""
    sizes = as_list(patch) * (2 if isinstance(patch, int) else 1)
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (None, None)


SIZE, LAYERS, SAMPLES, TOKEN_ID = integer(1, 2**22), integer(1, 2**10), integer(1, 2**16), integer()
EVEN = Rule(
    Localized("an even number from 2 to {most}", most=2**10),
    lambda value: integer(2, 2**10).accepts(value) and value % 2 == 0,
)
SHARE, POSITIVE = number(0, 1), number(1e-30, 1e30)
TOKEN_IDS = optional(either(TOKEN_ID, list_of(TOKEN_ID)))
# Where transformers takes -1 for none.
TOKEN_OR_NONE = optional(integer(-1))
DTYPE = optional(one_of("float32", "bfloat16", "float16", "float64"))
PATCH = Rule(
    Localized("a whole number, or a list of two"),
    lambda value: None not in pair_of(value) and all(map(SIZE.accepts, as_list(value))),
)
TEXTS = optional(list_of(TEXT))
MODULE_NAME = Rule(
    Localized("a name of letters, digits and underscores"),
    lambda value: isinstance(value, str) and re.fullmatch(r"\w+", value) is not None,
)
TOKEN = optional(either(TEXT, object_of({"content": required(TEXT)})))
TEMPLATE = optional(either(TEXT, list_of(object_of({"name": required(TEXT), "template": required(TEXT)}))))
TOKENS: Schema = {
    **dict.fromkeys(("audio_token", "audio_bos_token", "audio_eos_token"), TOKEN),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), TOKEN),
    "chat_template": TEMPLATE,
}
# Some modules of a model: a regular expression, or ends of names.
MODULES = optional(either(REGEX, list_of(TEXT)))

# --- tables ----------------------------------------------------------------------------------------------

ENCODER: Schema = {
    "embed_dim": SIZE,
    "depth": LAYERS,
    "num_heads": SIZE,
    "mlp_ratio": number(0.01, 1000),
    "qkv_bias": BOOLEAN,
    "init_values": optional(number()),
    "patch_size": PATCH,
    "patch_stride": PATCH,
    "input_channels": one_of(1),
    "target_length": SIZE,
    "outputdim": SIZE,
    "drop_rate": one_of(0),
    "attn_drop_rate": one_of(0),
    "n_fft": SAMPLES,
    "win_length": SAMPLES,
    "hop_length": SAMPLES,
    "n_mels": integer(1, 2**12),
    "f_min": number(0, SAMPLE_RATE / 2),
    "f_max": number(0, SAMPLE_RATE / 2),
    "sample_rate": one_of(SAMPLE_RATE),
    "center": one_of(True),
    "n_mels_patch": optional(integer(1, 2**12)),
    **dict.fromkeys(("semantic_module", "acoustic_patch_embed_module", "acoustic_norm_module"), MODULE_NAME),
    "dtype": DTYPE,
}
ROPE_TYPE = one_of("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ROPE = optional(
    object_of(
        {
            **dict.fromkeys(("rope_type", "type"), ROPE_TYPE),
            "rope_theta": POSITIVE,
            "factor": POSITIVE,
            "mrope_section": list_of(integer()),
        }
    )
)
DECODER: Schema = {
    "model_type": one_of(*TEXT_MODEL_TYPES),
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": SIZE,
    "num_key_value_heads": optional(SIZE),
    "head_dim": optional(EVEN),
    "hidden_act": one_of("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    "max_position_embeddings": integer(1),
    "initializer_range": number(0),
    "rms_norm_eps": SHARE,
    "use_cache": BOOLEAN,
    "tie_word_embeddings": BOOLEAN,
    "attention_bias": BOOLEAN,
    "attention_dropout": SHARE,
    "use_sliding_window": BOOLEAN,
    "sliding_window": optional(integer()),
    "max_window_layers": integer(),
    "layer_types": optional(list_of(one_of("full_attention"))),
    "rope_theta": POSITIVE,
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "pad_token_id": TOKEN_OR_NONE,
    "bos_token_id": optional(TOKEN_ID),
    "eos_token_id": TOKEN_IDS,
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
}
SCHEMAS: Mapping[str, Schema] = {
    MODEL_CONFIG: {
        "audio_encoder_config": object_of(ENCODER),
        "text_config": object_of(DECODER),
        "subsample_factor": integer(1, 1000),
        "audio_token_id": optional(TOKEN_ID),
        "tie_word_embeddings": BOOLEAN,
        "quantization_config": optional(
            object_of({"quant_method": TEXT, **dict.fromkeys(("load_in_4bit", "load_in_8bit"), BOOLEAN)})
        ),
        "architectures": TEXTS,
        "auto_map": optional(OBJECT),
        **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    },
    GENERATION_CONFIG: {
        "eos_token_id": TOKEN_IDS,
        "pad_token_id": TOKEN_OR_NONE,
        "bos_token_id": optional(TOKEN_ID),
        "do_sample": optional(BOOLEAN),
        "temperature": optional(number(0)),
        "top_p": optional(SHARE),
        "top_k": optional(integer(-1)),
        "repetition_penalty": optional(POSITIVE),
        **dict.fromkeys(("max_length", "max_new_tokens", "num_beams"), optional(integer(1))),
    },
    PREPROCESSOR_CONFIG: {
        "sampling_rate": one_of(SAMPLE_RATE),
        "feature_size": one_of(1),
        "padding_value": number(),
        "padding_side": one_of("right", "left"),
        "do_normalize": BOOLEAN,
        "return_attention_mask": optional(BOOLEAN),
        "auto_map": optional(OBJECT),
    },
    TOKENIZER_CONFIG: TOKENS,
    PROCESSOR_CONFIG: {**TOKENS, "model_subsampling": integer(1, 1000)},
    TEMPLATE_CONFIG: {"chat_template": TEMPLATE},
    INDEX: {"weight_map": required(mapping_of(FILE_NAME)), "metadata": optional(OBJECT)},
    ADAPTER_CONFIG: {
        "peft_type": TEXT,
        "base_model_name_or_path": optional(TEXT),
        "task_type": optional(TEXT),
        "inference_mode": BOOLEAN,
        "r": integer(1, 2**16),
        "lora_alpha": number(),
        "lora_dropout": SHARE,
        "target_modules": MODULES,
        "exclude_modules": MODULES,
        "modules_to_save": TEXTS,
        "rank_pattern": optional(mapping_of(integer(1, 2**16), REGEX)),
        "alpha_pattern": optional(mapping_of(number(), REGEX)),
        "layers_to_transform": optional(either(integer(), list_of(integer()))),
        "layers_pattern": optional(either(TEXT, list_of(TEXT))),
        "bias": one_of("none", "all", "lora_only"),
        "init_lora_weights": optional(either(BOOLEAN, TEXT)),
        **dict.fromkeys(
            ("fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"),
            BOOLEAN,
        ),
        "revision": optional(TEXT),
    },
}

# Too long to be read whenever a folder is looked at.
TOKENIZER: Schema = {
    "added_tokens": optional(list_of(object_of({"id": required(TOKEN_ID), "content": required(TEXT)}))),
    "model": required(object_of({"vocab": required(mapping_of(TOKEN_ID))})),
}

# --- keys that belong together ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Relation:
    """Say what a key must be beside one of `config.json`.

    Attributes:
        file: where it stands.
        key: the way to it.
        other: the way to the key of `config.json`.
        wanted: says so, given the other key and its value.
        holds: tells whether the two values belong together.
        unless: the way to a key of `config.json` with which they need not.
    """

    file: str
    key: str
    other: str
    wanted: Callable[[str, Any], Localized]
    holds: Callable[[Any, Any], bool]
    unless: str = ""


def below(value: Any, limit: int) -> bool:
    """Tell whether a number, or each of a list, is less than a limit."""
    return all(each < limit for each in as_list(value))


MULTIPLE = (
    lambda other, number: Localized("a multiple of {other} ({number})", other=other, number=number),
    lambda value, number: value % number == 0,
)
BELOW = (
    lambda other, number: Localized("less than {other} ({number})", other=other, number=number),
    below,
)
AT_MOST = (
    lambda other, number: Localized("at most {other} ({number})", other=other, number=number),
    lambda value, number: value <= number,
)
LIKE = (
    lambda other, value: Localized("the same as {other} ({value})", other=other, value=value),
    lambda value, same: as_list(value) == as_list(same),
)
PATCH_OF = (
    lambda other, number: Localized("[{number}, frames], as {other} says", other=other, number=number),
    lambda value, number: pair_of(value)[0] == number,
)
AS_MANY = (
    lambda other, number: Localized("a list of {other} ({number}) items", other=other, number=number),
    lambda value, number: len(value) == number,
)
_AUDIO, _TEXT = "audio_encoder_config.", "text_config."
RELATIONS = (
    Relation(
        MODEL_CONFIG,
        f"{_TEXT}hidden_size",
        f"{_TEXT}num_attention_heads",
        *MULTIPLE,
        unless=f"{_TEXT}head_dim",
    ),
    Relation(MODEL_CONFIG, f"{_TEXT}num_attention_heads", f"{_TEXT}num_key_value_heads", *MULTIPLE),
    Relation(MODEL_CONFIG, f"{_TEXT}layer_types", f"{_TEXT}num_hidden_layers", *AS_MANY),
    *(
        Relation(MODEL_CONFIG, key, f"{_TEXT}vocab_size", *BELOW)
        for key in ("audio_token_id", *(f"{_TEXT}{name}_token_id" for name in ("pad", "bos", "eos")))
    ),
    Relation(MODEL_CONFIG, f"{_AUDIO}embed_dim", f"{_AUDIO}num_heads", *MULTIPLE),
    Relation(MODEL_CONFIG, f"{_AUDIO}patch_size", f"{_AUDIO}n_mels", *PATCH_OF),
    Relation(MODEL_CONFIG, f"{_AUDIO}patch_stride", f"{_AUDIO}patch_size", *LIKE),
    Relation(MODEL_CONFIG, f"{_AUDIO}win_length", f"{_AUDIO}n_fft", *AT_MOST),
    Relation(MODEL_CONFIG, f"{_AUDIO}f_min", f"{_AUDIO}f_max", *BELOW),
    *(
        Relation(GENERATION_CONFIG, f"{name}_token_id", f"{_TEXT}vocab_size", *BELOW)
        for name in ("eos", "pad", "bos")
    ),
    Relation(PROCESSOR_CONFIG, "model_subsampling", "subsample_factor", *LIKE),
)


@dataclass(frozen=True)
class StoredSize:
    """Say what a key of `config.json` must be beside a stored tensor.

    Attributes:
        key: the way to it.
        factors: names of numbers (`sizes_of`) whose product is the size of a dimension.
        tensor: the tensor's name (`plain_name`).
        dimension: the one that has this size.
    """

    key: str
    factors: tuple[str, ...]
    tensor: str
    dimension: int


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all numbers of a `config.json` by their last name, and what follows from them."""
    audio, text = config.get("audio_encoder_config", {}), config.get("text_config", {})
    sizes = {**audio, **text, **config}
    if {"hidden_size", "num_attention_heads"} <= sizes.keys() and not sizes.get("head_dim"):
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    if sizes.get("num_key_value_heads", 0) is None:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads")
    if {"patch_stride", "target_length"} <= sizes.keys():
        sizes["frames"] = pair_of(sizes["patch_stride"])[1]
        sizes["chunk"] = sizes["target_length"] // sizes["frames"]
    return sizes


def plain_name(tensor: str, config: Mapping[str, Any]) -> str:
    """Return the name that a tensor of the encoder has in a model without an acoustic branch."""
    audio = config.get("audio_encoder_config", {})
    within = f"audio_encoder.{audio.get('semantic_module', SEMANTIC_MODULE)}."
    has_branch = audio.get("n_mels_patch") and tensor.startswith(within)
    return f"audio_encoder.{tensor.removeprefix(within)}" if has_branch else tensor


_LAYER, _BLOCK = "decoder.model.layers.0.", "audio_encoder.blocks.0."
_PATCHES, _EMBEDDING = "audio_encoder.patch_embed.proj.weight", "decoder.model.embed_tokens.weight"
_Q, _K = (f"{_LAYER}self_attn.{side}_proj.weight" for side in "qk")
STORED_SIZES = (
    StoredSize(f"{_TEXT}vocab_size", ("vocab_size",), _EMBEDDING, 0),
    StoredSize(f"{_TEXT}hidden_size", ("hidden_size",), _EMBEDDING, 1),
    StoredSize(f"{_TEXT}num_attention_heads", ("num_attention_heads", "head_dim"), _Q, 0),
    StoredSize(f"{_TEXT}num_key_value_heads", ("num_key_value_heads", "head_dim"), _K, 0),
    StoredSize(f"{_TEXT}intermediate_size", ("intermediate_size",), f"{_LAYER}mlp.gate_proj.weight", 0),
    StoredSize(f"{_AUDIO}embed_dim", ("embed_dim",), _PATCHES, 0),
    StoredSize(f"{_AUDIO}n_mels", ("n_mels",), _PATCHES, 2),
    StoredSize(f"{_AUDIO}patch_stride", ("frames",), _PATCHES, 3),
    StoredSize(f"{_AUDIO}target_length", ("chunk",), "audio_encoder.time_pos_embed", 3),
    StoredSize(f"{_AUDIO}mlp_ratio", ("embed_dim", "mlp_ratio"), f"{_BLOCK}mlp.fc1.weight", 0),
    StoredSize("subsample_factor", ("embed_dim", "subsample_factor"), "audio_projector.net.0.weight", 1),
    StoredSize(f"{_TEXT}hidden_size", ("hidden_size",), "audio_projector.net.2.weight", 0),
)
# Keys that count layers, with the beginning of the names of the layers' tensors.
LAYER_COUNTS = {
    f"{_TEXT}num_hidden_layers": "decoder.model.layers.",
    f"{_AUDIO}depth": "audio_encoder.blocks.",
}
