"""A name or path to what can be used: files, the text side, a model with its dtype and quantisation.

Names are looked up on Hugging Face or ModelScope; a local folder stays local. No code from a checkpoint is
run, no pickle is read.
"""

import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdl_toolkit.errors import ModelError, ToolkitError
from mdl_toolkit.language import Text

if TYPE_CHECKING:
    import torch

    from mdl_toolkit.model import MiDashengLMModel

MODEL_TYPE = "midashenglm"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BITSANDBYTES = "bitsandbytes"  # the way of quantising that can be trained on
TEXT_FILES = ("*.json", "*.jinja", "*.txt")
USUAL_TOKENS = {
    "audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    "pad_token": "<|endoftext|>",
}  # fmt: skip
WEIGHT_FILES = ("*.safetensors",)
# What a checkpoint folder may hold beside weights: all of it travels along when a model is exported.
ALL_FILES = (*TEXT_FILES, *WEIGHT_FILES, "*.py", "*.md", "LICENSE*", "NOTICE*")
# Quantised by bitsandbytes: the decoder's linear layers only (rule 33).
NOT_QUANTIZED = ("audio_encoder", "audio_projector", "embed_tokens", "lm_head")


# --- folders ---------------------------------------------------------------------------------------


def find_model(name: str, *, from_modelscope: bool, weights: bool) -> Path:
    """The folder of a model: the given one, or a download.

    Args:
        name: a local folder, or a name on the hub.
        from_modelscope: look it up on ModelScope.
        weights: fetch everything; otherwise only the small text files.

    Raises:
        ModelError: it is neither here nor to be had, or it is not a MiDashengLM.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        folder = local
    elif local.exists() or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise _nowhere(name, "there is no such folder", "没有该目录")
    else:
        patterns = list(ALL_FILES if weights else TEXT_FILES)
        folder = _from_modelscope(name, patterns) if from_modelscope else _from_huggingface(name, patterns)
    if not (folder / ADAPTER_CONFIG).is_file():
        _check_folder(folder, weights=weights)
    elif weights and not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: an adapter without weights ({ADAPTER_WEIGHTS}); copy the whole folder",
            f"{folder}：适配器缺少权重（{ADAPTER_WEIGHTS}）；请复制整个目录",
        )
    return folder


def check_trainable(folder: Path, *, quantization: str | None, merge: bool) -> None:
    """Refuse what cannot be the base of a training.

    Args:
        folder: the base.
        quantization: what `--quantization` asks for.
        merge: whether the result is to be merged.

    Raises:
        ModelError: it is an adapter, or its weights are quantised already, and not in a way that can be
            trained on under these options.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{folder}: an adapter; train the base model, or train with --merge-lora true first",
            f"{folder}：这是适配器；请训练基础模型，或先以 --merge-lora true 得到完整模型",
        )
    method = _quantized_by(folder)
    if method is None:
        return
    if method != BITSANDBYTES:
        raise ModelError(
            f"{folder}: its weights are quantised already ({method}), and no gradients go through that; "
            "train the bfloat16 or float32 model, with --quantization if memory is short",
            f"{folder}：其权重已经量化（{method}），梯度无法通过；请训练 bfloat16 或 float32 模型，"
            "显存不足时使用 --quantization",
        )
    need(BITSANDBYTES, "quantization", f"{folder} ({BITSANDBYTES})")
    if quantization is not None or merge:
        raise ModelError(
            f"{folder}: its weights are quantised already ({method}); leave out --quantization, and give "
            "--merge-lora false, as there are no unquantised weights to merge into",
            f"{folder}：其权重已经量化（{method}）；请去掉 --quantization 并指定 --merge-lora false，"
            "因为没有未量化的权重可供合并",
        )


def _quantized_by(folder: Path) -> str | None:
    """The method by which a folder's weights are quantised, or None."""
    config = read_json(folder / "config.json").get("quantization_config")
    return None if config is None else str(config.get("quant_method") if isinstance(config, dict) else config)


def _check_folder(folder: Path, *, weights: bool) -> None:
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != MODEL_TYPE:
        raise ModelError(
            f"{folder}: not a MiDashengLM (config.json says model_type {kind!r}); give a MiDashengLM folder",
            f"{folder}：不是 MiDashengLM 模型（config.json 的 model_type 为 {kind!r}）；请指定其目录",
        )
    if weights and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no weights (*.safetensors); download the whole model",
            f"{folder}：没有模型权重（*.safetensors）；请下载完整模型",
        )


def _from_huggingface(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return _download(name, "Hugging Face", lambda: snapshot_download(name, allow_patterns=patterns))


def _from_modelscope(name: str, patterns: list[str]) -> Path:
    need("modelscope", "modelscope", "--from-modelscope")
    from modelscope import snapshot_download

    return _download(name, "ModelScope", lambda: snapshot_download(name, allow_patterns=patterns))


def _download(name: str, hub: str, fetch: Callable[[], str]) -> Path:
    try:
        return Path(fetch())
    except Exception as problem:  # hubs raise a dozen kinds; each means: not to be had
        reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise _nowhere(name, f"{hub} did not give it ({reason})", f"{hub} 未能提供（{reason}）") from problem


def _nowhere(name: str, en: str, zh: str) -> ModelError:
    return ModelError(
        f"model {name}: not a folder here, and {en}. Give a local folder with --model-name, set HF_ENDPOINT "
        "to a mirror that can be reached, or use --from-modelscope true",
        f"模型 {name}：本地没有该目录，且{zh}。请用 --model-name 指定本地目录，"
        "或设置 HF_ENDPOINT 为可访问的镜像，或使用 --from-modelscope true",
    )


def need(package: str, extra: str, option: str) -> None:
    """Refuse an option whose optional package is not installed, before any work begins.

    Raises:
        ModelError: naming the extra to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f'{option} needs the package {package}: pip install "mdl-toolkit[{extra}]"',
            f'{option} 需要安装 {package}：pip install "mdl-toolkit[{extra}]"',
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(_read_text(path))
    except ValueError as problem:
        raise ModelError(f"{path}: {problem}", f"{path}：{problem}") from problem
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object", f"{path}：应为 JSON 对象")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent}: no {path.name} there, so it is not a model folder",
            f"{path.parent}：其中没有 {path.name}，不是模型目录",
        ) from None
    except (OSError, ValueError) as problem:
        raise ModelError(f"{path}: {problem}", f"{path}：{problem}") from problem


# --- the text side -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFiles:
    """What is needed to turn conversations into ids; small, and can be sent to worker processes.

    Attributes:
        tokenizer: the content of `tokenizer.json`.
        chat_template: Jinja text.
        specials: special tokens by name: `audio_token`, `audio_bos_token`, `audio_eos_token`, `pad_token`
            always, others where there are any.
    """

    tokenizer: str
    chat_template: str
    specials: tuple[tuple[str, str], ...]

    @property
    def tokenizer_fingerprint(self) -> str:
        """The same for the same tokenizer, whatever its file looks like."""
        canonical = json.dumps(json.loads(self.tokenizer), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def template_fingerprint(self) -> str:
        """The same for the same chat template."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()[:16]


def read_text_files(folder: Path) -> TextFiles:
    """The text side of a model folder.

    Raises:
        ModelError: the tokenizer or the chat template is missing or broken.
    """
    config = read_json(folder / "tokenizer_config.json")
    processor = folder / "processor_config.json"
    config = {**config, **(read_json(processor) if processor.is_file() else {})}
    named = {
        name: token for name, value in config.items() if name.endswith("_token") and (token := _token(value))
    }
    specials = {**USUAL_TOKENS, **named}
    return TextFiles(_tokenizer_json(folder), _chat_template(folder, config), tuple(sorted(specials.items())))


def _token(value: Any) -> str | None:
    """A token is written as a string or as an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _tokenizer_json(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        read_json(file)
        return _read_text(file)
    for older in ("vocab.json", "merges.txt"):
        if not (folder / older).is_file():  # transformers would make an empty tokenizer
            raise ModelError(
                f"{folder}: no tokenizer (neither tokenizer.json nor {older})",
                f"{folder}：没有分词器（既无 tokenizer.json，也无 {older}）",
            )
    from transformers import Qwen2Tokenizer

    try:
        return str(Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    except Exception as problem:  # whatever a broken file makes the library raise
        reason = " ".join(str(problem).split())
        raise ModelError(
            f"{folder}: no tokenizer ({reason})", f"{folder}：没有分词器（{reason}）"
        ) from problem


def _chat_template(folder: Path, config: dict[str, Any]) -> str:
    file, old = folder / "chat_template.jinja", folder / "chat_template.json"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template")
    if template is None and old.is_file():
        template = read_json(old).get("chat_template")
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        raise ModelError(f"{folder}: no chat template", f"{folder}：没有对话模板")
    return template


# --- models ------------------------------------------------------------------------------------------


def choose_dtype(bf16: bool | None) -> "torch.dtype":
    """The dtype of base weights (rule 32): bfloat16 if asked for, or if CUDA has it natively."""
    import torch

    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def load_model(
    folder: Path,
    *,
    dtype: "torch.dtype",
    device: "torch.device",
    quantization: str | None = None,
) -> "MiDashengLMModel":
    """Load a full model.

    Raises:
        ModelError: the checkpoint does not fit or cannot be read.
    """
    from mdl_toolkit.model import MiDashengLMModel

    quiet_libraries()
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    is_placed = quantization is not None or _quantized_by(folder) is not None
    if is_placed:  # quantised weights are put where they belong as they are loaded
        options["device_map"] = {"": device}
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes(quantization, dtype)
    try:
        model = MiDashengLMModel.from_pretrained(folder, **options)
    except ToolkitError:
        raise
    except Exception as problem:  # the libraries raise a dozen kinds; each means: it does not fit
        reason = " ".join(str(problem).split())
        raise ModelError(
            f"{folder}: cannot be loaded: {reason}", f"{folder}：无法加载：{reason}"
        ) from problem
    if not is_placed:
        return model.to(device)  # type: ignore[no-any-return]
    _keep_format(model)
    return model  # type: ignore[no-any-return]


def _keep_format(model: Any) -> None:
    """Keep bitsandbytes 0.50 from repacking 4-bit weights, in bfloat16 and for good, at the first evaluation.

    On CPUs with AVX512-BF16 it does so in `Linear4bit.forward`, whether or not training goes on, and fails
    where a matrix's width is no multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _bitsandbytes(quantization: str, dtype: "torch.dtype") -> Any:
    from transformers import BitsAndBytesConfig

    skip = list(NOT_QUANTIZED)
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skip,
    )  # fmt: skip


def best_device() -> "torch.device":
    """The GPU of this process, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def explaining_memory(remedy: Text) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one for the user.

    Args:
        remedy: what to do.

    Raises:
        ModelError: the GPU has not enough memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise ModelError(f"the GPU ran out of memory; {remedy.en}", f"显存不足；{remedy.zh}") from problem


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what PEFT says while it wraps a model and our users cannot change."""
    with warnings.catch_warnings():
        # PEFT 0.21 still asks transformers 5 by a name that goes in its version 6.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # PEFT puts the folder the base was loaded from in the place of the base's name, and says so.
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path", category=UserWarning)
        yield


def quiet_libraries() -> None:
    """Keep the libraries below from drawing their own bars and from advice that is not for our users."""
    from transformers.utils import logging

    getLogger("bitsandbytes").setLevel("ERROR")  # it tells of every cast
    logging.disable_progress_bar()
    logging.set_verbosity_error()
