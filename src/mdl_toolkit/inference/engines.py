"""Choose the engine that computes answers: decoding, beam search, scored choices, vLLM, or a server."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.types import ENGINES, OURS, VLLM
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.data.warnings import warn_beyond_positions
from mdl_toolkit.errors import UsageError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.beam_search import beam_search
from mdl_toolkit.inference.choices import Chooser
from mdl_toolkit.inference.generate import (
    Answerer,
    Question,
    SamplingParams,
    ask,
    base_model,
)
from mdl_toolkit.inference.requests import Inputs
from mdl_toolkit.inference.server_engine import ServerAnswerer, find_served_model
from mdl_toolkit.inference.vllm_engine import VllmAnswerer
from mdl_toolkit.model.kernels.matmul import prepack
from mdl_toolkit.utils.launcher import Ranks
from mdl_toolkit.weights.loading import load_for_inference
from mdl_toolkit.weights.resolve import BITSANDBYTES, require_package

# Yields each question's key and the cells of its answer, in the order in which they are computed; in place of
# the cells None where a logit is NaN or infinite, or why a server refuses the row.
Engine = Callable[[Iterable[Question]], Iterator[tuple[int, list[str] | Localized | None]]]

# What to do with rows that are too long.
SHORTER = Localized("cut the recordings by `start` and `end`, or use --window")


def is_server(engine: str) -> bool:
    """Tell whether the value of `--engine` is the address of a server."""
    return engine not in ENGINES


def check_engine(options: InferenceOptions) -> None:
    """Refuse options that contradict each other or have no effect, and an engine that is not installed.

    Raises:
        UsageError: naming the two options.
        ModelError: vLLM is not installed, or a server does not answer or does not have the model.
    """
    engine, is_other = f"--engine {options.engine}", options.engine != OURS
    is_penalized, is_varied = options.repetition_penalty != 1, options.no_repeat_ngram_size > 0
    contradictions = [
        ("--num-beams", "--temperature", options.num_beams > 1 and options.temperature > 0),
        ("--choices", "--temperature", options.choices is not None and options.temperature > 0),
        ("--choices", "--num-beams", options.choices is not None and options.num_beams > 1),
        (engine, "--choices", is_other and options.choices is not None),
        (engine, "--num-beams", is_other and options.num_beams > 1),
        (engine, "--quantization", is_other and options.quantization is not None),
        (engine, "--bf16", is_server(options.engine) and options.bf16 is not None),
        ("--choices", "--repetition-penalty", options.choices is not None and is_penalized),
        ("--choices", "--no-repeat-ngram-size", options.choices is not None and is_varied),
        (engine, "--repetition-penalty", is_other and is_penalized),
        (engine, "--no-repeat-ngram-size", is_other and is_varied),
    ]
    for one, other, is_given in contradictions:
        if is_given:
            raise UsageError("{one} and {other} do not go together; give one of them", one=one, other=other)
    without_effect = [
        ("--top-k", "--choices", options.top_k > 1 and options.choices is None),
        ("--normalize-scores", "--choices", options.normalize_scores and options.choices is None),
        ("--top-p", "--temperature", options.top_p < 1 and not options.temperature),
    ]
    for one, other, is_given in without_effect:
        if is_given:
            raise UsageError(
                "{one} has no effect without {other}; give both, or neither", one=one, other=other
            )
    if options.engine == VLLM:
        require_package(VLLM, VLLM, engine)
        if Ranks.from_environment().count > 1:
            raise UsageError(
                "--engine vllm works in one process, on one GPU; start it without a launcher, or give "
                "--engine the address of a `vllm serve` that uses several"
            )
    if is_server(options.engine):
        # Before any work: is it there, and does it have the model?
        asyncio.run(find_served_model(options))
    if options.quantization is not None:
        require_package(BITSANDBYTES, "quantization", "--quantization")


def make_engine(
    options: InferenceOptions,
    folder: Path,
    base: Path | None,
    tokenizer: ChatTokenizer,
    choices: Sequence[str] | None,
    inputs: Inputs,
) -> Engine:
    """Load the model and make the engine that the options ask for.

    Args:
        options: the inference's.
        folder: that of the model or adapter.
        base: that of an adapter's base.
        tokenizer: the model's.
        choices: the texts to choose from, if that is asked for.
        inputs: the rows that will be answered.

    Raises:
        ModelError: the model cannot be loaded, or vLLM cannot use it, or a server does not answer.
    """
    warn_beyond_positions(base or folder, inputs.dataset, SHORTER)
    if is_server(options.engine):
        return ServerAnswerer(options, inputs).answers
    if options.engine == VLLM:
        return VllmAnswerer(options, folder, base, tokenizer, inputs.most_tokens).answers
    model = load_for_inference(folder, base, bf16=options.bf16, quantization=options.quantization)
    # PEFT's layers read the weights that would be laid out anew.
    if model.device.type == "cpu" and base_model(model) is model:
        prepack(model)
    sampling = SamplingParams(
        options.temperature,
        options.top_p,
        options.seed,
        options.repetition_penalty,
        options.no_repeat_ngram_size,
    )

    def engine(batch_size: int) -> Callable[[Iterable[Question]], Iterator[tuple[int, list[str] | None]]]:
        if choices is not None:
            sizes = (batch_size, options.top_k, options.normalize_scores)
            return Chooser(model, tokenizer, choices, *sizes).answers
        if options.num_beams > 1:
            return partial(beam_search, model, tokenizer, batch_size, options.num_beams, sampling)
        answerer = Answerer(model, tokenizer, batch_size, sampling)
        return lambda questions: (
            (key, None if text is None else [text]) for key, text in answerer.answers(questions)
        )

    return partial(ask, engine(options.batch_size), engine(1))
