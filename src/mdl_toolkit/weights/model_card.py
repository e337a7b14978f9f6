"""Render the model card of a result, README.md: front matter for the hub, and a page in Markdown.

Texts of users stand in YAML that a library writes, or in code blocks that they cannot end.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.provenance import Provenance
from mdl_toolkit.weights.schemas import MODEL_CONFIG

CARD = "README.md"
# Keys of the base's front matter that hold for the result too.
_INHERITED = ("license", "license_name", "license_link", "language")
_SETTINGS = (
    "train_target", "lora_rank", "lora_alpha", "lora_dropout", "lr", "warmup_steps", "num_epochs",
    "batch_size", "gradient_accumulation_steps", "bf16", "quantization", "seed",
)  # fmt: skip
# Settings that are named where they are not the defaults.
_RECIPE = (
    "max_steps", "warmup_ratio", "lr_scheduler", "optimizer", "weight_decay", "adam_beta2", "max_grad_norm",
    "label_smoothing", "lora_plus_ratio", "lora_variant",
)  # fmt: skip
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?\n)---\s*(?:\n|\Z)", re.DOTALL)
# Prefixes of the decoder types that vLLM serves by itself.
_SERVED = ("qwen2",)


@dataclass(frozen=True)
class ResultMetadata:
    """Hold the metadata that a result's folder records.

    Attributes:
        provenance: its base, prompts, data and metrics.
        training: the options it was trained with, if they are known.
        settings: the content of its `mdl-toolkit.yaml`.
    """

    provenance: Provenance
    training: TrainOptions | None
    settings: str


def render_card(metadata: ResultMetadata, base: Path, *, is_adapter: bool) -> str:
    """Render the model card of a result.

    Args:
        metadata: the result's.
        base: folder of the base model.
        is_adapter: whether it is an adapter, not a whole model.
    """
    provenance, options = metadata.provenance, metadata.training
    name = shown_name(provenance.base.name) if provenance.base else base.resolve().name
    settings = {} if options is None else {option: getattr(options, option) for option in _SETTINGS}
    if options is not None:
        settings = {
            name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
        }
        chosen = {option: getattr(options, option) for option in _RECIPE}
        settings |= {name: value for name, value in chosen.items() if value != getattr(TrainOptions, name)}
    config = read_json(base / MODEL_CONFIG)
    text = (resources.files("mdl_toolkit.weights") / "model_card.md.jinja").read_text(encoding="utf-8")
    template = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True)
    return str(
        template.render(
            front_matter=_front_matter(name, base, is_adapter=is_adapter),
            name=name,
            start=shown_name(provenance.adapter.name) if provenance.adapter else "",
            is_adapter=is_adapter,
            settings=settings,
            data=provenance.data,
            prompts=provenance.prompts,
            metrics=provenance.metrics,
            has_own_code="auto_map" in config,
            is_served=str((config.get("text_config") or {}).get("model_type")).startswith(_SERVED),
            yaml=_yaml,
            block=code_block,
            repr=repr,
        )
    )


def shown_name(name: str) -> str:
    """Return the part of a model's name that others can read: of a local path, only its last part."""
    return name if name.count("/") == 1 and not name.startswith("/") else re.split(r"[/\\]", name)[-1]


def _front_matter(name: str, base: Path, *, is_adapter: bool) -> dict[str, Any]:
    """Return the front matter, with keys of the base's card where there is one that can be read."""
    try:
        match = _FRONT_MATTER.match((base / CARD).read_text(encoding="utf-8"))
        values = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    inherited = values if isinstance(values, dict) else {}
    return {
        "base_model": name,
        **({"base_model_relation": "adapter"} if is_adapter else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["midashenglm", "audio", "mdl-toolkit", *(["lora"] if is_adapter else [])],
        **{key: inherited[key] for key in _INHERITED if inherited.get(key)},
    }


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False, width=10**6))


def code_block(text: str, language: str = "") -> str:
    """Put a text in a code block, with a fence longer than any run of backticks in it."""
    fence = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
