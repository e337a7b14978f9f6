"""Write the command line that starts vLLM's server with a model and adapters of it."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from mdl_toolkit.config.serving import ServeOptions
from mdl_toolkit.errors import ModelError, UsageError
from mdl_toolkit.inference.server_engine import NEUTRAL
from mdl_toolkit.weights.loading import choose_dtype
from mdl_toolkit.weights.vllm_lora import read_vllm_lora

# Options that only our own server heeds.
NATIVE = ("quantization", "max_request_mb", "max_audio_seconds")


def check_vllm_options(options: ServeOptions) -> None:
    """Refuse options that vLLM's server does not heed.

    Raises:
        UsageError: naming the first of them.
    """
    for name in options.given(NATIVE):
        raise UsageError(
            "{one} and {other} do not go together; give one of them", one="--engine vllm", other=name
        )


def vllm_command(options: ServeOptions, places: Mapping[str, tuple[Path, Path | None]]) -> list[str]:
    """Return the words of the command line.

    An adapter is served on its base, without merging: beside the base, under its own name.

    Args:
        options: those of `serve`.
        places: the folders of model and adapters, each with its base if it is an adapter, by name.

    Raises:
        ModelError: vLLM is not installed, or cannot apply an adapter.
    """
    folder, base = places[options.model_name]
    adapters = {name: (place, its_base) for name, (place, its_base) in places.items() if its_base is not None}
    whole = str(base or folder)
    names = [options.model_name] if base is None else [f"{options.model_name}-base"]
    # Greedy if a request says nothing else, as our own server, whatever the model's configuration says.
    sampling = {"temperature": 0, "top_p": 1, **NEUTRAL, "max_new_tokens": options.max_new_tokens}
    words = [
        *server_program(),
        whole,
        *("--served-model-name", *names, "--host", options.host, "--port", str(options.port)),
        *("--max-num-seqs", str(options.batch_size), "--limit-mm-per-prompt", json.dumps({"audio": 1})),
        *("--override-generation-config", json.dumps(sampling)),
    ]
    # Left to itself, vLLM takes a 16-bit dtype for weights in float32 too.
    words += ["--dtype", str(choose_dtype(options.bf16)).removeprefix("torch.")]
    if adapters:
        read = [read_vllm_lora(*each) for each in adapters.values()]
        words += ["--enable-lora", "--max-loras", str(len(read)), "--max-lora-rank"]
        words.append(str(max(each.rank for each in read)))
        if any(each.in_towers for each in read):
            words.append("--enable-tower-connector-lora")
        words += ["--lora-modules", *(f"{name}={place}" for name, (place, _) in adapters.items())]
    return words


def server_program() -> list[str]:
    """Return the words that start vLLM's server, up to the model.

    Raises:
        ModelError: it is installed neither beside this toolkit nor as a program.
    """
    # A build for CPUs has another name in the package index, and its program does not start.
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    if (program := shutil.which("vllm")) is not None:
        return [program, "serve"]
    raise ModelError(
        '--engine vllm: vLLM is not installed; `pip install "mdl-toolkit[vllm]"`, or put its program on PATH'
    )
