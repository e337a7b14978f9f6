"""A model from its folder, with a dtype, a device and quantisation; adapters on their base."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdl_toolkit.errors import ModelError, ToolkitError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.machine import OOM_ERRORS, describe_oom
from mdl_toolkit.weights.provenance import Base, read_provenance
from mdl_toolkit.weights.resolve import ADAPTER_CONFIG, BASE_NAME, find_model, quantized_by, read_json

if TYPE_CHECKING:
    import torch

    from mdl_toolkit.model import MiDashengLMModel

# Quantised by bitsandbytes: the decoder's linear layers only (rule 33).
NOT_QUANTIZED = ("audio_encoder", "audio_projector", "embed_tokens", "lm_head")


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
    is_placed = quantization is not None or quantized_by(folder) is not None
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
        raise ModelError("{folder}: cannot be loaded: {reason}", folder=folder, reason=reason) from problem
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
    """The GPU of this process, or the CPU.

    Also of launchers that do not say which process of its machine it is, or show each its own GPU alone.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or "0"
    return torch.device("cuda", int(number) % torch.cuda.device_count())


@contextmanager
def explaining_memory(remedy: Localized) -> Iterator[None]:
    """Turn an out-of-memory error into one for the user.

    Args:
        remedy: what to do.

    Raises:
        ModelError: the device has not enough memory.
    """
    try:
        yield
    except OOM_ERRORS as problem:
        lack = describe_oom(problem)
        if lack is None:
            raise
        raise ModelError("{lack}; {remedy}", lack=lack, remedy=remedy) from problem


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


def load_for_inference(name: str, *, from_modelscope: bool) -> Any:
    """A model ready to answer: a full one, or an adapter on the base that it names (rule 40).

    Raises:
        ModelError: the model, or the adapter's base, is not to be had.
    """
    folder = find_model(name, from_modelscope=from_modelscope, weights=True)
    dtype, device = choose_dtype(None), best_device()
    if not (folder / ADAPTER_CONFIG).is_file():
        return load_model(folder, dtype=dtype, device=device).eval()
    base = base_of(folder, from_modelscope=from_modelscope)
    return with_adapter(load_model(base, dtype=dtype, device=device), folder).eval()


def with_adapter(model: "MiDashengLMModel", folder: Path) -> Any:
    """A base model with an adapter on it, as PEFT loads it.

    Raises:
        ModelError: the adapter does not fit.
    """
    from peft import PeftModel

    try:
        with quiet_peft():
            return PeftModel.from_pretrained(
                model, folder, torch_device=str(model.device), use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(
            "{folder}: the adapter does not fit its base: {reason}", folder=folder, reason=reason
        ) from problem


def base_of(adapter: Path, *, from_modelscope: bool, name: str | None = None) -> Path:
    """The folder of an adapter's base model, which is the one that the adapter was trained on.

    Args:
        adapter: its folder.
        from_modelscope: look names up on ModelScope.
        name: of the base, where it is not the one that the adapter names.

    Raises:
        ModelError: the adapter names none, it is not to be had, or it is another one.
    """
    known = read_provenance(adapter)
    recorded = None if known is None else known.base
    named = name or (recorded.name if recorded else read_json(adapter / ADAPTER_CONFIG).get(BASE_NAME))
    if not isinstance(named, str):
        raise ModelError("{adapter}: the adapter does not name its base model", adapter=adapter)
    revision = recorded.revision if recorded is not None and named == recorded.name else None
    folder = find_model(named, from_modelscope=from_modelscope, weights=True, revision=revision)
    if known is not None:
        known.check_base(Base.of(folder, named), adapter)
    return folder
