"""Define the options of `serve` and `push`."""

from dataclasses import dataclass

from mdl_toolkit.config.data import COMMON, DYNAMIC_BF16, HubOptions
from mdl_toolkit.config.options import REQUIRED, Options, option
from mdl_toolkit.config.types import (
    ADAPTERS,
    BOOLEAN,
    COUNT,
    NAME,
    PATH,
    PORT,
    POSITIVE,
    SECRET,
    TEXT,
    choice,
)
from mdl_toolkit.i18n import Localized

SERVING = Localized("Serving options")
PUSHING = Localized("Publishing options")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(HubOptions):
    """Hold the options of `serve`."""

    COMMAND = "serve"
    SUMMARY = Localized("Serve a model over HTTP, with a page to try it and the interface of OpenAI.")
    GROUPS = (SERVING, COMMON)

    model_name: str = option(
        NAME,
        REQUIRED,
        SERVING,
        "The model: a name on the hub, a local folder, or an adapter folder written by train.",
        positional=True,
    )
    adapter: tuple[str, ...] = option(
        ADAPTERS,
        (),
        SERVING,
        "An adapter of the model that is served beside it under a name of its own; may be given several "
        "times.",
    )
    engine: str = option(
        choice("native", "vllm"),
        "native",
        SERVING,
        "What serves: this toolkit (needs the extra `serve`), or vLLM, which is started with the right "
        "arguments.",
    )
    host: str = option(
        TEXT, "127.0.0.1", SERVING, "Address to listen at; 0.0.0.0 lets other machines in, so give --token."
    )
    port: int = option(PORT, 8000, SERVING, "Port to listen at.")
    token: str | None = option(
        SECRET,
        None,
        SERVING,
        "What a request has to send as `Authorization: Bearer TOKEN`; MDL_TOKEN in the environment does too.",
    )
    batch_size: int = option(COUNT, 32, SERVING, "Most requests that are answered at once.")
    bf16: bool | None = option(BOOLEAN, None, SERVING, "Load the weights in bfloat16.", dynamic=DYNAMIC_BF16)
    quantization: str | None = option(
        choice("8bit", "4bit"),
        None,
        SERVING,
        "Quantise the decoder's weights, where memory is short (needs the extra `quantization`).",
    )
    max_new_tokens: int = option(
        COUNT, 256, SERVING, "Most tokens of an answer; a request may ask for fewer."
    )
    max_request_mb: float = option(POSITIVE, 32.0, SERVING, "Largest request, in megabytes.")
    max_audio_seconds: float = option(POSITIVE, 600.0, SERVING, "Longest recording, in seconds.")


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Hold the options of `push`."""

    COMMAND = "push"
    SUMMARY = Localized("Publish a model or adapter folder, with its card, on Hugging Face or ModelScope.")
    GROUPS = (PUSHING,)

    folder: str = option(PATH, REQUIRED, PUSHING, "The folder: a result of train or merge.", positional=True)
    repo: str = option(
        NAME, REQUIRED, PUSHING, "The repository, OWNER/NAME; it is made if it is not there.", positional=True
    )
    to: str = option(
        choice("huggingface", "modelscope"),
        "huggingface",
        PUSHING,
        "The hub (ModelScope needs the extra `modelscope`).",
    )
    private: bool = option(BOOLEAN, False, PUSHING, "Make a new repository private.")
