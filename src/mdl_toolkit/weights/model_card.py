"""Render the model card of a result, README.md: front matter for the hub, and a page in Markdown.

Texts of users stand in YAML that a library writes, or in code blocks that they cannot end.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.weights.provenance import Prompts, Provenance
from mdl_toolkit.weights.resolve import read_json

# Keys of the base's front matter that hold for the result too.
_INHERITED = ("license", "license_name", "license_link", "language")
_SETTINGS = (
    "train_target", "lora_rank", "lora_alpha", "lora_dropout", "lr", "warmup_steps", "num_epochs",
    "batch_size", "gradient_accumulation_steps", "bf16", "quantization", "seed",
)  # fmt: skip
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?\n)---\s*(?:\n|\Z)", re.DOTALL)
# Prefixes of the decoder types that vLLM serves.
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
    name = provenance.base.name if provenance.base else base.resolve().name
    # Others can read a name on the hub, but only the last part of a local path.
    if name.count("/") != 1 or name.startswith("/"):
        name = re.split(r"[/\\]", name)[-1]
    paragraphs = [
        f"---\n{_yaml(_front_matter(name, base, is_adapter=is_adapter))}---",
        "# MiDashengLM, fine-tuned / 微调",
        _ADAPTER_OF if is_adapter else _FINE_TUNED_FROM,
        _code_block(name),
    ]
    if options is not None:
        settings = {option: getattr(options, option) for option in _SETTINGS}
        settings["train_target"] = list(options.train_target)
        paragraphs += ["## Training / 训练", _code_block(_yaml(settings), "yaml")]
    paragraphs += [
        *_table("Data / 数据", provenance.data),
        *_prompts(provenance.prompts),
        *_table("Metrics / 指标", provenance.metrics),
        *_usage(name, base, provenance.prompts.user, is_adapter=is_adapter),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _front_matter(name: str, base: Path, *, is_adapter: bool) -> dict[str, Any]:
    """Return the front matter, with keys of the base's card where there is one that can be read."""
    try:
        match = _FRONT_MATTER.match((base / "README.md").read_text(encoding="utf-8"))
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


# --- the page --------------------------------------------------------------------------------------------


def _prompts(prompts: Prompts) -> list[str]:
    paragraphs = []
    for kind, kind_zh, text, differs in (
        ("System prompt", "系统提示词", prompts.system, prompts.system_differs),
        ("User prompt", "用户提示词", prompts.user, prompts.user_differs),
    ):
        if text is not None:
            paragraphs += [f"{kind} of all training rows / 所有训练行的{kind_zh}：", _code_block(text)]
        elif differs:
            paragraphs.append(f"{kind}: not the same in all rows / {kind_zh}：各行不同")
    return ["## Prompts / 提示词", *paragraphs] if paragraphs else []


def _table(heading: str, values: Mapping[str, float]) -> list[str]:
    if not values:
        return []
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:,.5g} |" for name, value in values.items())
    return [f"## {heading}", f"| | |\n| --- | --- |\n{rows}"]


def _usage(name: str, base: Path, prompt: str | None, *, is_adapter: bool) -> list[str]:
    config = read_json(base / "config.json")
    paragraphs = [
        "## Use / 使用",
        "With mdl-toolkit / 使用 mdl-toolkit：",
        _code_block(
            "mdl-toolkit inference recordings.csv --output predictions.csv --model-name FOLDER", "bash"
        ),
    ]
    if is_adapter:
        return [
            *paragraphs,
            "With peft / 使用 peft：",
            _code_block(_PEFT.format(name=name), "python"),
            "To one model, which other engines serve / 合并为一个模型，供其他推理引擎使用：",
            _code_block("mdl-toolkit merge FOLDER --output MERGED", "bash"),
        ]
    paragraphs += [
        "With transformers and mdl-toolkit's model classes / 使用 transformers 与 mdl-toolkit 的模型类：",
        _code_block(_TRANSFORMERS.format(prompt=prompt or "Describe the audio."), "python"),
    ]
    if "auto_map" in config:
        paragraphs += [
            "With the base model's own code, which is in the folder / 使用目录中基础模型自带的代码：",
            _code_block(_OWN_CODE, "python"),
        ]
    if str((config.get("text_config") or {}).get("model_type")).startswith(_SERVED):
        paragraphs += [
            "With vLLM, as the base model (not tried by mdl-toolkit) / 与基础模型一样使用 vLLM（未经测试）：",
            _code_block("vllm serve FOLDER --trust-remote-code", "bash"),
        ]
    return paragraphs


_ADAPTER_OF = (
    "A LoRA adapter for the audio-language model below, with mdl-toolkit. / "
    "适用于以下音频语言模型的 LoRA 适配器（使用 mdl-toolkit）。"
)

_FINE_TUNED_FROM = (
    "Fine-tuned from the audio-language model below, with mdl-toolkit. / "
    "由以下音频语言模型微调而来（使用 mdl-toolkit）。"
)

_TRANSFORMERS = """\
import mdl_toolkit.model.registration
from mdl_toolkit.audio.loading import load
from transformers import AutoModelForCausalLM, AutoProcessor

processor = AutoProcessor.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto").eval()
question = [{{"type": "audio", "audio": ""}}, {{"type": "text", "text": {prompt!r}}}]
text = processor.apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True, tokenize=False
)
inputs = processor(text=text, audio=load("recording.wav").samples, sampling_rate=16_000)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.tokenizer.decode(answer[0], skip_special_tokens=True))"""

_OWN_CODE = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", trust_remote_code=True).eval()"""

_PEFT = """\
import mdl_toolkit.model.registration
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({name!r}, dtype="auto")
model = PeftModel.from_pretrained(base, "FOLDER").eval()"""


# --- writing ---------------------------------------------------------------------------------------------


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False, width=10**6))


def _code_block(text: str, language: str = "") -> str:
    """Put a text in a code block, with a fence longer than any run of backticks in it."""
    fence = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
