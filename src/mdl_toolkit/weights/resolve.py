"""A name or path to a model's folder, and what its small files say.

Names are looked up on Hugging Face or ModelScope; a local folder stays local. No code from a checkpoint is
run, no pickle is read.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized

MODEL_TYPE = "midashenglm"
MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FINAL = "final"  # in the output of a training: its result
BASE_NAME = "base_model_name_or_path"  # in an adapter's configuration
BITSANDBYTES = "bitsandbytes"  # the way of quantising that can be trained on
TEXT_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHT_FILES = ("*.safetensors",)
# What a checkpoint folder may hold beside weights: all of it travels along when a model is exported.
ALL_FILES = (*TEXT_FILES, *WEIGHT_FILES, "*.py", "*.md", "LICENSE*", "NOTICE*")


def find_model(name: str, *, from_modelscope: bool, weights: bool, revision: str | None = None) -> Path:
    """The folder of a model: the given one, or a download.

    Args:
        name: a local folder, or a name on the hub.
        from_modelscope: look it up on ModelScope.
        weights: fetch everything; otherwise only the small text files.
        revision: a commit on Hugging Face; the newest if not given.

    Raises:
        ModelError: it is neither here nor to be had, or it is not a MiDashengLM.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        check_is_no_run(local, MODEL_CONFIG, ADAPTER_CONFIG)
        folder = local
    elif local.exists() or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise _nowhere(name, Localized("there is no such folder"))
    else:
        patterns = list(ALL_FILES if weights else TEXT_FILES)
        folder = (
            _from_modelscope(name, patterns)
            if from_modelscope
            else _from_huggingface(name, patterns, revision)
        )
    if not (folder / ADAPTER_CONFIG).is_file():
        _check_folder(folder, weights=weights)
    elif weights and not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            "{folder}: an adapter without weights ({weights}); copy the whole folder",
            folder=folder,
            weights=ADAPTER_WEIGHTS,
        )
    return folder


def check_is_no_run(folder: Path, *names: str) -> None:
    """Refuse the output of a training where its result is meant, which lies inside.

    Args:
        folder: what was given.
        names: of files; any of them says that a folder is what is wanted.

    Raises:
        ModelError: it is `final/` that has one of them.
    """
    here, inside = ([(each / name).is_file() for name in names] for each in (folder, folder / FINAL))
    if any(inside) and not any(here):
        raise ModelError(
            "{folder}: the output of a training, and no model itself; did you mean {result}?",
            folder=folder,
            result=folder / FINAL,
        )


def recorded_name(name: str, folder: Path) -> str:
    """How a record names a model: a folder by its absolute path, anything else by its name on the hub."""
    return str(folder.resolve()) if Path(name).expanduser().is_dir() else name


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
            "{folder}: an adapter; train the base model, or train with --merge-lora true first", folder=folder
        )
    method = quantized_by(folder)
    if method is None:
        return
    if method != BITSANDBYTES:
        raise ModelError(
            "{folder}: its weights are quantised already ({method}), and no gradients go through that; "
            "train the bfloat16 or float32 model, with --quantization if memory is short",
            folder=folder,
            method=method,
        )
    require_package(BITSANDBYTES, "quantization", f"{folder} ({BITSANDBYTES})")
    if quantization is not None or merge:
        raise ModelError(
            "{folder}: its weights are quantised already ({method}); leave out --quantization, and give "
            "--merge-lora false, as there are no unquantised weights to merge into",
            folder=folder,
            method=method,
        )


def quantized_by(folder: Path) -> str | None:
    """The method by which a folder's weights are quantised, or None."""
    config = read_json(folder / MODEL_CONFIG).get("quantization_config")
    return None if config is None else str(config.get("quant_method") if isinstance(config, dict) else config)


def _check_folder(folder: Path, *, weights: bool) -> None:
    config = read_json(folder / MODEL_CONFIG)
    kind = config.get("model_type")
    if kind != MODEL_TYPE:
        raise ModelError(
            "{folder}: not a MiDashengLM (config.json says model_type {kind!r}); give a MiDashengLM folder",
            folder=folder,
            kind=kind,
        )
    if weights and not list(folder.glob("*.safetensors")):
        raise ModelError("{folder}: no weights (*.safetensors); download the whole model", folder=folder)


def _from_huggingface(name: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return str(snapshot_download(name, revision=revision, allow_patterns=patterns))

    return _download(name, "Hugging Face", fetch)


def _from_modelscope(name: str, patterns: list[str]) -> Path:
    require_package("modelscope", "modelscope", "--from-modelscope")
    from modelscope import snapshot_download

    return _download(name, "ModelScope", lambda: snapshot_download(name, allow_patterns=patterns))


def _download(name: str, hub: str, fetch: Callable[[], str]) -> Path:
    try:
        return Path(fetch())
    except Exception as problem:  # hubs raise a dozen kinds; each means: not to be had
        reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise _nowhere(
            name, Localized("{hub} did not give it ({reason})", hub=hub, reason=reason)
        ) from problem


def _nowhere(name: str, message: Localized) -> ModelError:
    return ModelError(
        "model {name}: not a folder here, and {message}. Give a local folder with --model-name, set "
        "HF_ENDPOINT to a mirror that can be reached, or use --from-modelscope true",
        name=name,
        message=message,
    )


def require_package(package: str, extra: str, option: str) -> None:
    """Refuse an option whose optional package is not installed, before any work begins.

    Raises:
        ModelError: naming the extra to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            '{option} needs the package {package}: pip install "mdl-toolkit[{extra}]"',
            option=option,
            package=package,
            extra=extra,
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except ValueError as problem:
        raise ModelError("{path}: {reason}", path=path, reason=problem) from problem
    if not isinstance(value, dict):
        raise ModelError("{path}: expected a JSON object", path=path)
    return value


def read_text(path: Path) -> str:
    """A text file of a model folder.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            "{folder}: no {name} there, so it is not a model folder", folder=path.parent, name=path.name
        ) from None
    except (OSError, ValueError) as problem:
        raise ModelError("{path}: {reason}", path=path, reason=problem) from problem
