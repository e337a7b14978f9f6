"""Write the command line that starts vLLM's server with a model and adapters of it."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from mdl_toolkit.config.serving import ServeOptions
from mdl_toolkit.errors import ModelError, UsageError
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG

# The ranks that vLLM has room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
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
        ModelError: vLLM is not installed, or an adapter's rank is higher than vLLM takes.
    """
    folder, base = places[options.model_name]
    adapters = {name: place for name, (place, its_base) in places.items() if its_base is not None}
    whole = str(base or folder)
    names = [options.model_name] if base is None else [f"{options.model_name}-base"]
    words = [
        *server_program(),
        whole,
        *("--served-model-name", *names, "--host", options.host, "--port", str(options.port)),
        *("--max-num-seqs", str(options.batch_size), "--limit-mm-per-prompt", json.dumps({"audio": 1})),
        *("--override-generation-config", json.dumps({"max_new_tokens": options.max_new_tokens})),
    ]
    if options.bf16 is not None:
        words += ["--dtype", "bfloat16" if options.bf16 else "float32"]
    if adapters:
        rank = max(map(rank_of, adapters.values()))
        if rank > RANKS[-1]:
            raise ModelError(
                "{adapters}: rank {rank}, and vLLM takes at most {most}; merge it with `mdl-toolkit merge`",
                adapters=", ".join(adapters),
                rank=rank,
                most=RANKS[-1],
            )
        most = next(each for each in RANKS if each >= rank)
        modules = [f"{name}={place}" for name, place in adapters.items()]
        # Without it the parts of an adapter for encoder and projector are refused.
        words += [
            "--enable-tower-connector-lora",
            "--enable-lora",
            "--max-loras",
            str(len(adapters)),
            "--max-lora-rank",
            str(most),
        ]
        words += ["--lora-modules", *modules]
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


def rank_of(adapter: Path) -> int:
    """Return the highest rank in an adapter."""
    config = read_json(adapter / ADAPTER_CONFIG)
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
