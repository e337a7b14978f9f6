"""Resolve a name or path to a model's folder, and read its configuration.

Names are looked up on Hugging Face or ModelScope; local folders are used as they are. No code of a checkpoint
is run, no pickle is read.
"""

import importlib.util
from pathlib import Path

from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import refuse_devices
from mdl_toolkit.weights.config_files import check_files, check_tensors, read_json
from mdl_toolkit.weights.hub import NotFoundError, download
from mdl_toolkit.weights.provenance import read_provenance
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, MODEL_CONFIG

MODEL_TYPE = "midashenglm"
# The folder of the result in the output of a training.
FINAL = "final"
# A key of an adapter's configuration.
BASE_NAME = "base_model_name_or_path"
# The quantisation that can be trained on.
BITSANDBYTES = "bitsandbytes"


def find_model(name: str, *, from_modelscope: bool, weights: bool, revision: str | None = None) -> Path:
    """Find the folder of a model or adapter, and download it if it is not a local one.

    Args:
        name: a local folder, or a name on the hub.
        from_modelscope: look the name up on ModelScope.
        weights: download everything; otherwise only the small text files.
        revision: a commit on Hugging Face; the newest if not given.

    Raises:
        ModelError: it is neither a local folder nor on the hub, it is not a MiDashengLM, or a file of it does
            not hold what it must.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        refuse_devices(folder, ModelError)
        check_is_no_run(folder, MODEL_CONFIG, ADAPTER_CONFIG)
    elif folder.exists() or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise NotFoundError(name, Localized("there is no such folder"))
    else:
        if from_modelscope:
            require_package("modelscope", "modelscope", "--from-modelscope")
        folder = download(name, revision, from_modelscope=from_modelscope, weights=weights)
    if (
        not (folder / ADAPTER_CONFIG).is_file()
        and (kind := read_json(folder / MODEL_CONFIG, {}).get("model_type")) != MODEL_TYPE
    ):
        raise ModelError(
            "{folder}: not a MiDashengLM (config.json says model_type {kind!r}); give a MiDashengLM folder",
            folder=folder,
            kind=kind,
        )
    check_files(folder)
    read_provenance(folder)
    if weights:
        check_weights(folder)
    return folder


def check_weights(folder: Path) -> None:
    """Refuse a model's or adapter's folder whose weights are not all there and whole, or not as configured.

    Raises:
        ModelError: naming the files, or the key of the configuration.
    """
    # It imports torch, which a conversion does without.
    from mdl_toolkit.weights.safetensors_stream import WeightFile

    if (folder / ADAPTER_CONFIG).is_file():
        names = {ADAPTER_WEIGHTS}
    elif (folder / INDEX).is_file():
        names = {*read_json(folder / INDEX)["weight_map"].values()}
    else:
        names = {file.name for file in folder.glob("*.safetensors")} or {"*.safetensors"}
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ModelError(
            "{folder}: no weights ({names}); copy or download the whole folder",
            folder=folder,
            names=", ".join(missing),
        )
    files = [WeightFile.open(folder / name) for name in names]
    if (folder / MODEL_CONFIG).is_file():
        check_tensors(folder, files)


def check_is_no_run(folder: Path, *names: str) -> None:
    """Refuse the output of a training where its result, or its last checkpoint, is meant.

    Args:
        folder: the folder that the user gave.
        names: files; a folder of the wanted kind has at least one of them.

    Raises:
        ModelError: `final` or a checkpoint has one of the files, and the folder itself has none.
    """
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    here, *inside = (
        any((each / name).is_file() for name in names)
        for each in (folder, folder / FINAL, *reversed(checkpoints))
    )
    if any(inside) and not here:
        raise ModelError(
            "{folder}: the output of a training, and no model itself; did you mean {result}?",
            folder=folder,
            result=[folder / FINAL, *reversed(checkpoints)][inside.index(True)],
        )


def recorded_name(name: str, folder: Path) -> str:
    """Return the name that records use: a folder's absolute path, or the name on the hub."""
    return str(folder.resolve()) if Path(name).expanduser().is_dir() else name


def check_trainable(folder: Path, *, quantization: str | None, merge: bool) -> None:
    """Refuse a folder that cannot be the base of a training.

    Args:
        folder: the base.
        quantization: the value of `--quantization`.
        merge: whether the result is to be merged.

    Raises:
        ModelError: it is an adapter, or its weights are quantised in a way that these options cannot train.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            "{folder}: an adapter; train the base model, or go on from the adapter with --adapter {folder}",
            folder=folder,
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
    """Return the method by which a folder's weights are quantised, or None."""
    config = read_json(folder / MODEL_CONFIG).get("quantization_config")
    return None if config is None else str(config.get("quant_method"))


def require_package(package: str, extra: str, option: str) -> None:
    """Refuse an option whose optional package is not installed, before any work begins.

    Raises:
        ModelError: the package is not installed; the message names the extra to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            '{option} needs the package {package}: pip install "mdl-toolkit[{extra}]"',
            option=option,
            package=package,
            extra=extra,
        )
