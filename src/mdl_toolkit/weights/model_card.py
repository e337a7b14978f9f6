"""The model card, README.md, of a result: front matter for the hub, and a page for people.

Users' texts stand in YAML that a library writes, or in code blocks that they cannot end.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.weights.provenance import Provenance
from mdl_toolkit.weights.resolve import read_json

# Of the base's card, what is true of the result as well.
_INHERITED = ("license", "license_name", "license_link", "language")
_SETTINGS = (
    "train_target", "lora_rank", "lora_alpha", "lora_dropout", "lr", "warmup_steps", "num_epochs",
    "batch_size", "gradient_accumulation_steps", "bf16", "quantization", "seed",
)  # fmt: skip
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?\n)---\s*(?:\n|\Z)", re.DOTALL)
_SERVED = ("qwen2",)  # beginnings of the decoder types that vLLM serves


@dataclass(frozen=True)
class ResultMetadata:
    """What a result says of itself.

    Attributes:
        provenance: where it comes from.
        training: the options it was trained with, if they are known.
        settings: the content of its `mdl-toolkit.yaml`.
    """

    provenance: Provenance
    training: TrainOptions | None
    settings: str


def card(about: ResultMetadata, base: Path, *, is_adapter: bool) -> str:
    """The page.

    Args:
        about: what is known of the result.
        base: folder of the base model.
        is_adapter: it is an adapter, not a whole model.
    """
    name = _public_name(about.provenance, base)
    parts = [
        f"---\n{_yaml(_front_matter(name, base, is_adapter=is_adapter))}---",
        *_introduction(name, is_adapter=is_adapter),
        *_training(about.training),
        *_figures("Data / 数据", about.provenance.data),
        *_prompts(about.provenance),
        *_figures("Metrics / 指标", about.provenance.metrics),
        *_usage(name, base, about.provenance.prompts.user, is_adapter=is_adapter),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(name: str, base: Path, *, is_adapter: bool) -> dict[str, Any]:
    inherited = _front_matter_of(base / "README.md")
    return {
        "base_model": name,
        **({"base_model_relation": "adapter"} if is_adapter else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["midashenglm", "audio", "mdl-toolkit", *(["lora"] if is_adapter else [])],
        **{key: inherited[key] for key in _INHERITED if inherited.get(key)},
    }


def _public_name(provenance: Provenance, base: Path) -> str:
    """The base's name for others to read: of a local folder, the last part of its path."""
    name = provenance.base.name if provenance.base else base.resolve().name
    return name if name.count("/") == 1 and not name.startswith("/") else re.split(r"[/\\]", name)[-1]


def _front_matter_of(file: Path) -> Mapping[str, Any]:
    """What another card says of itself; nothing where there is no card, or none that can be read."""
    try:
        found = _FRONT_MATTER.match(file.read_text(encoding="utf-8"))
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


# --- the page --------------------------------------------------------------------------------------------


def _introduction(name: str, *, is_adapter: bool) -> list[str]:
    if is_adapter:
        line = (
            "A LoRA adapter for the audio-language model below, with mdl-toolkit. / "
            "适用于以下音频语言模型的 LoRA 适配器（使用 mdl-toolkit）。"
        )
    else:
        line = (
            "Fine-tuned from the audio-language model below, with mdl-toolkit. / "
            "由以下音频语言模型微调而来（使用 mdl-toolkit）。"
        )
    return ["# MiDashengLM, fine-tuned / 微调", line, _block(name)]


def _training(options: TrainOptions | None) -> list[str]:
    if options is None:
        return []
    values = {name: getattr(options, name) for name in _SETTINGS}
    values["train_target"] = list(options.train_target)
    return ["## Training / 训练", _block(_yaml(values), "yaml")]


def _prompts(provenance: Provenance) -> list[str]:
    prompts, found = provenance.prompts, []
    for kind, kind_zh, text, differs in (
        ("System prompt", "系统提示词", prompts.system, prompts.system_differs),
        ("User prompt", "用户提示词", prompts.user, prompts.user_differs),
    ):
        if text is not None:
            found += [f"{kind} of all training rows / 所有训练行的{kind_zh}：", _block(text)]
        elif differs:
            found.append(f"{kind}: not the same in all rows / {kind_zh}：各行不同")
    return ["## Prompts / 提示词", *found] if found else []


def _figures(heading: str, values: Mapping[str, float]) -> list[str]:
    if not values:
        return []
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:,.5g} |" for name, value in values.items())
    return [f"## {heading}", f"| | |\n| --- | --- |\n{rows}"]


def _usage(name: str, base: Path, prompt: str | None, *, is_adapter: bool) -> list[str]:
    config = read_json(base / "config.json")
    parts = [
        "## Use / 使用",
        "With mdl-toolkit / 使用 mdl-toolkit：",
        _block("mdl-toolkit inference recordings.csv --output predictions.csv --model-name FOLDER", "bash"),
    ]
    if is_adapter:
        return [
            *parts,
            "With peft / 使用 peft：",
            _block(_PEFT.format(name=name), "python"),
            "To one model, which other engines serve / 合并为一个模型，供其他推理引擎使用：",
            _block("mdl-toolkit merge FOLDER --output MERGED", "bash"),
        ]
    parts += [
        "With transformers and mdl-toolkit's model classes / 使用 transformers 与 mdl-toolkit 的模型类：",
        _block(_TRANSFORMERS.format(prompt=prompt or "Describe the audio."), "python"),
    ]
    if "auto_map" in config:
        parts += [
            "With the base model's own code, which is in the folder / 使用目录中基础模型自带的代码：",
            _block(_OWN_CODE, "python"),
        ]
    if str((config.get("text_config") or {}).get("model_type")).startswith(_SERVED):
        parts += [
            "With vLLM, as the base model (not tried by mdl-toolkit) / 与基础模型一样使用 vLLM（未经测试）：",
            _block("vllm serve FOLDER --trust-remote-code", "bash"),
        ]
    return parts


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


def _block(text: str, language: str = "") -> str:
    """A code block; its fence is longer than any row of backticks in the text."""
    fence = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
