"""Load models with dtype, device and quantisation, and adapters on their base."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdl_toolkit.errors import ModelError, ToolkitError, is_error
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import say, size
from mdl_toolkit.utils.machine import OOM_ERRORS, describe_oom
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.hub import NotFoundError
from mdl_toolkit.weights.provenance import Base, read_provenance
from mdl_toolkit.weights.resolve import BASE_NAME, find_model, quantized_by
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch

    from mdl_toolkit.model import MiDashengLMModel

# Modules that bitsandbytes leaves alone: it quantises the decoder's linear layers only.
NOT_QUANTIZED = ("audio_encoder", "audio_projector", "embed_tokens", "lm_head")
# The end of the name of BatchNorm's count of batches, an integer.
COUNTER = "num_batches_tracked"


def choose_dtype(bf16: bool | None) -> "torch.dtype":
    """Choose the dtype of base weights: bfloat16 if asked for, or by default on a GPU that has it natively.

    Args:
        bf16: the user's choice; None for the default.
    """
    import torch

    if bf16 is None:
        from mdl_toolkit.utils.device import best_device, has_bfloat16

        bf16 = has_bfloat16(best_device())
    return torch.bfloat16 if bf16 else torch.float32


def load_model(
    folder: Path,
    *,
    dtype: "torch.dtype",
    device: "torch.device",
    quantization: str | None = None,
) -> "MiDashengLMModel":
    """Load a full model.

    Args:
        folder: that of the model.
        dtype: the dtype of weights that are not quantised.
        device: where it is put.
        quantization: `8bit` or `4bit`; None for the weights as they are stored.

    Raises:
        ModelError: the checkpoint does not fit the architecture or cannot be read.
    """
    from mdl_toolkit.model import MiDashengLMModel

    quiet_libraries()
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    is_quantized = quantization is not None or quantized_by(folder) is not None
    # Weights go to their device tensor by tensor, in their final dtype: the host never holds them all.
    if is_quantized or device.type != "cpu":
        options["device_map"] = {"": device}
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes_config(quantization, dtype)
    try:
        if not is_quantized:
            check_types(folder)
        model = MiDashengLMModel.from_pretrained(folder, **options)
    except ToolkitError:
        raise
    # The libraries raise a dozen kinds of errors; each means that the checkpoint does not fit.
    except BaseException as problem:
        if not is_error(problem) or describe_oom(problem) is not None:
            raise
        reason = " ".join(str(problem).split())
        raise ModelError("{folder}: cannot be loaded: {reason}", folder=folder, reason=reason) from problem
    if not is_quantized:
        check_numbers(model, folder)
        return model  # type: ignore[no-any-return]
    # bitsandbytes 0.50 repacks 4-bit weights at the first evaluation, in bfloat16 and for good, on CPUs with
    # AVX512-BF16. It does so while training goes on, and fails where a width is no multiple of 64.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model  # type: ignore[no-any-return]


def check_types(folder: Path) -> None:
    """Raise ModelError for weights that are stored as integers, which would be cast without a word."""
    from mdl_toolkit.weights.safetensors_stream import weight_files

    for file in weight_files(folder):
        for entry in file.entries:
            if entry.dtype[0] in "IUB" and entry.dtype != "BF16" and not entry.name.endswith(COUNTER):
                raise ModelError(
                    "{path}: the tensor {name} is of type {dtype}, not floating point; fetch the model again",
                    path=file.path,
                    name=entry.name,
                    dtype=entry.dtype,
                )


def check_numbers(model: "torch.nn.Module", folder: Path) -> None:
    """Raise ModelError for a weight that holds NaN or infinity."""
    import torch

    for name, tensor in model.state_dict().items():
        # Any of these makes the sum one. Only float16 would overflow; with a dtype the others are copied.
        dtype = torch.float32 if tensor.dtype == torch.float16 else None
        if tensor.is_floating_point() and not tensor.sum(dtype=dtype).isfinite():
            raise ModelError(
                "{folder}: the tensor {name} holds NaN or infinity; fetch the model again, or go back to an "
                "earlier checkpoint",
                folder=folder,
                name=name,
            )


def say_loading(folder: Path) -> None:
    """Say how large the weights are that are being loaded, which may take minutes."""
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    say("loading weights: {size} from {folder}", size=size(total), folder=folder)


def _bitsandbytes_config(quantization: str, dtype: "torch.dtype") -> Any:
    from transformers import BitsAndBytesConfig

    skip = list(NOT_QUANTIZED)
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


@contextmanager
def explaining_memory(remedy: Localized) -> Iterator[None]:
    """Turn an out-of-memory error in the context into one with advice for the user.

    Args:
        remedy: the advice.

    Raises:
        ModelError: the device does not have enough memory.
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
    """Silence warnings of PEFT that users can do nothing about, while it wraps a model in the context."""
    with warnings.catch_warnings():
        # PEFT 0.21 still uses a name of transformers that its version 6 removes.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # PEFT replaces the base's name by the folder that it was loaded from, and says so.
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path", category=UserWarning)
        yield


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers, and messages of libraries that are not for users."""
    from transformers.utils import logging

    # It logs every cast.
    getLogger("bitsandbytes").setLevel("ERROR")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_for_inference(
    folder: Path, base: Path | None, *, bf16: bool | None = None, quantization: str | None = None
) -> Any:
    """Load a model in evaluation mode: a full one, or an adapter on its base.

    The adapter is merged into the loaded weights, which are then those of the merged model. On a quantised
    base, and where it is of a kind that cannot be merged here, PEFT computes it beside the base.

    Args:
        folder: that of the model or adapter.
        base: that of an adapter's base.
        bf16: the dtype of the weights; None for the default.
        quantization: `8bit` or `4bit`; None for the weights as they are stored.

    Raises:
        ModelError: the model cannot be loaded, or the adapter does not fit.
    """
    from mdl_toolkit.utils.device import best_device
    from mdl_toolkit.weights.adapter import AdapterDelta, NotMergeableError

    source, delta = base or folder, None
    if base is not None and quantized_by(base) is None:
        # What does not fit is told before the base is loaded.
        with suppress(NotMergeableError):
            delta = AdapterDelta.read(folder, base)
    say_loading(source)
    model = load_model(source, dtype=choose_dtype(bf16), device=best_device(), quantization=quantization)
    if base is None:
        return model.eval()
    if delta is None or quantization is not None:
        return with_adapter(model, folder).eval()
    delta.merge_into(model, base)
    return model.eval()


def with_adapter(model: "MiDashengLMModel", folder: Path) -> Any:
    """Wrap a base model with an adapter, by PEFT.

    Raises:
        ModelError: the adapter does not fit.
    """
    from peft import PeftModel

    try:
        with quiet_peft():
            # An adapter whose weights have other names would be left as it was initialised.
            warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
            # Read on the host, from where it is copied: not every device is known to safetensors.
            return PeftModel.from_pretrained(model, folder, torch_device="cpu", use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning) as problem:
        if describe_oom(problem) is not None:
            raise
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(
            "{folder}: the adapter does not fit its base: {reason}", folder=folder, reason=reason
        ) from problem


def find_with_base(name: str, *, from_modelscope: bool, weights: bool) -> tuple[Path, Path | None]:
    """Find the folder of a model or adapter, and for an adapter that of its base.

    Args:
        name: a local folder, or a name on the hub.
        from_modelscope: look names up on ModelScope.
        weights: download everything; otherwise only the small text files.

    Raises:
        ModelError: one of them cannot be found, or they do not belong together.
    """
    folder = find_model(name, from_modelscope=from_modelscope, weights=weights)
    if not (folder / ADAPTER_CONFIG).is_file():
        return folder, None
    return folder, base_of(folder, from_modelscope=from_modelscope, weights=weights)


def base_of(adapter: Path, *, from_modelscope: bool, name: str | None = None, weights: bool = True) -> Path:
    """Find the folder of an adapter's base model, and check that the adapter was trained on it.

    Args:
        adapter: the adapter's folder.
        from_modelscope: look names up on ModelScope.
        name: a name or path to use in place of the one that the adapter records.
        weights: download everything, and compare the weights; otherwise only the small text files.

    Raises:
        ModelError: the adapter names no base, it cannot be found, or it has other weights.
    """
    provenance, named = read_provenance(adapter), name or recorded_base(adapter)
    recorded = None if provenance is None else provenance.base
    revision = recorded.revision if recorded is not None and named == recorded.name else None
    try:
        folder = find_model(named, from_modelscope=from_modelscope, weights=weights, revision=revision)
    except ModelError as problem:
        if name is not None:
            raise
        raise ModelError(
            "{adapter}: the adapter's base model cannot be used ({reason}); `mdl-toolkit merge {adapter} "
            "--model-name FOLDER` merges it into a copy of the base in another place",
            adapter=adapter,
            reason=problem.reason if isinstance(problem, NotFoundError) else problem.message,
        ) from problem
    if not weights:
        return folder
    if recorded is not None and recorded.fingerprint != (base := Base.of(folder, named)).fingerprint:
        if name is None:
            raise ModelError(
                "{adapter}: it was trained on {base}, and {other} has other weights; `mdl-toolkit merge "
                "{adapter} --model-name FOLDER` takes its own base from another place",
                adapter=adapter,
                base=recorded,
                other=base,
            )
        raise ModelError(
            "{adapter}: it was trained on {base}, and {other} has other weights; give its own base "
            "with --model-name",
            adapter=adapter,
            base=recorded,
            other=base,
        )
    return folder


def recorded_base(adapter: Path) -> str:
    """Return the name of an adapter's base model, from its record or from PEFT's configuration.

    Raises:
        ModelError: the adapter names none.
    """
    provenance = read_provenance(adapter)
    if provenance is not None and provenance.base is not None:
        return provenance.base.name
    named = read_json(adapter / ADAPTER_CONFIG).get(BASE_NAME)
    if not isinstance(named, str):
        raise ModelError("{adapter}: the adapter does not name its base model", adapter=adapter)
    return named
