"""Serve models: find and load them, then listen; or start vLLM's server in place of this process."""

import os
import shlex
import socket
from functools import partial
from pathlib import Path

from mdl_toolkit.config.serving import ServeOptions
from mdl_toolkit.config.types import SECRET, VLLM
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, ModelError, UsageError
from mdl_toolkit.inference.generate import Answerer, base_model
from mdl_toolkit.inference.run import MEMORY_REMEDY
from mdl_toolkit.model.kernels.matmul import prepack
from mdl_toolkit.serving.command import check_vllm_options, vllm_command
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.weights.loading import base_of, explaining_memory, find_with_base, load_for_inference
from mdl_toolkit.weights.provenance import Prompts, read_provenance
from mdl_toolkit.weights.resolve import BITSANDBYTES, find_model, require_package
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

# The variable in which a token is looked for where --token is not given.
TOKEN = "MDL_TOKEN"
LOCAL = ("127.0.0.1", "localhost", "::1")
# Packages of the extra, by the names that are imported.
PACKAGES = ("fastapi", "uvicorn", "python_multipart")


def serve(options: ServeOptions) -> None:
    """Serve a model and adapters of it until the process is stopped.

    Raises:
        ToolkitError: a model cannot be found or loaded, a package is missing, or the port is taken.
    """
    token = read_token(options)
    if options.engine == VLLM:
        check_vllm_options(options)
    else:
        for package in PACKAGES:
            require_package(package, "serve", "serve")
        if options.quantization is not None:
            require_package(BITSANDBYTES, "quantization", "--quantization")
    if options.host not in LOCAL and token is None:
        warn("--host {host}: others can ask without a token; give --token", host=options.host)
    places = find_places(options)
    if options.engine == VLLM:
        command = vllm_command(options, places)
        say("$ {command}", command=shlex.join(command))
        environment = {**os.environ, **({} if token is None else {"VLLM_API_KEY": token})}
        os.execvpe(command[0], command, environment)
    listener = listen(options.host, options.port)
    with listener, explaining_memory(MEMORY_REMEDY):
        run_server(options, token, places, listener)


def read_token(options: ServeOptions) -> str | None:
    """Return what requests have to send, from the option or the environment; None for nothing.

    Raises:
        UsageError: the environment has one that cannot be sent; an empty one would let everybody in.
    """
    given = os.environ.get(TOKEN)
    if options.token is not None or given is None:
        return options.token
    try:
        return str(SECRET.parse(given))
    except ValueError as problem:
        raise UsageError(
            "{variable} in the environment: {accepted}", variable=TOKEN, accepted=problem.args[0]
        ) from None


def find_places(options: ServeOptions) -> dict[str, tuple[Path, Path | None]]:
    """Find the folders of the models, each with that of its base if it is an adapter, by their names.

    Raises:
        ModelError: one cannot be found, an adapter is not one of the model, or two have one name.
    """
    from_modelscope = options.from_modelscope
    places = {
        options.model_name: find_with_base(options.model_name, from_modelscope=from_modelscope, weights=True)
    }
    if options.adapter and places[options.model_name][1] is not None:
        raise ModelError(
            "{model}: an adapter; with --adapter, MODEL_NAME is the base of all of them",
            model=options.model_name,
        )
    for item in options.adapter:
        name, _, given = item.partition("=")
        folder = find_model(given, from_modelscope=from_modelscope, weights=True)
        if not (folder / ADAPTER_CONFIG).is_file():
            raise ModelError("--adapter {item}: no adapter, it has no {file}", item=item, file=ADAPTER_CONFIG)
        if name in places:
            raise ModelError("--adapter {item}: MODEL_NAME has that name; give another", item=item)
        base = base_of(folder, from_modelscope=from_modelscope, name=options.model_name)
        places[name] = (folder, base)
    return places


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 takes one that is free.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as problem:
        raise InputError(
            "--host {host} --port {port}: cannot listen there: {reason}; give another --port",
            host=host,
            port=port,
            reason=problem.strerror or problem,
        ) from problem


def run_server(
    options: ServeOptions,
    token: str | None,
    places: dict[str, tuple[Path, Path | None]],
    listener: socket.socket,
) -> None:
    """Load the models and answer at a socket until the process is stopped."""
    import uvicorn

    from mdl_toolkit.serving.app import Limits, Service, create_app
    from mdl_toolkit.serving.engine import ContinuousBatch, ServedModel, render_template

    models = {}
    for name, (folder, base) in places.items():
        tokenizer, origin = ChatTokenizer(read_tokenizer_files(folder, base)), read_provenance(folder)
        render_template(tokenizer)
        model = load_for_inference(folder, base, bf16=options.bf16, quantization=options.quantization)
        # PEFT's layers read the weights that would be laid out anew.
        if model.device.type == "cpu" and base_model(model) is model:
            prepack(model)
        answerer = partial(Answerer, model, tokenizer, options.batch_size)
        models[name] = ServedModel(
            name=name,
            parent=None if name == options.model_name else options.model_name,
            tokenizer=tokenizer,
            prompts=Prompts() if origin is None else origin.prompts,
            context=base_model(model).config.text_config.max_position_embeddings,
            batch=ContinuousBatch(answerer, options.batch_size),
        )
    limits = Limits(options.max_request_mb, options.max_audio_seconds, options.max_new_tokens)
    app = create_app(Service(models, limits), token, options.host)
    host, port = listener.getsockname()[:2]
    say(
        "{models}: served at http://{host}:{port} (Ctrl-C stops it)",
        models=", ".join(models),
        host=f"[{host}]" if ":" in host else host,
        port=port,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])
