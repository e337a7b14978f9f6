"""Define the options of `inference`."""

from dataclasses import dataclass

from mdl_toolkit.config.data import COMMON, DATASET, DYNAMIC_BF16, ConversionOptions
from mdl_toolkit.config.options import REQUIRED, option
from mdl_toolkit.config.types import (
    BOOLEAN,
    COUNT,
    ENGINE,
    NAME,
    NOT_NEGATIVE,
    OUTPUT,
    PATH,
    POSITIVE,
    PROBABILITY,
    SEED,
    WHOLE,
    choice,
)
from mdl_toolkit.i18n import Localized

INFERENCE = Localized("Inference options")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(ConversionOptions):
    """Hold the options of `inference`.

    Example:
        ```python
        from mdl_toolkit import InferenceOptions

        options = InferenceOptions(
            input="test.csv", output="predictions.csv", model_name="run/final", max_new_tokens=64
        )
        ```
    """

    COMMAND = "inference"
    SUMMARY = Localized("Run the model over a CSV of recordings and write its predictions.")
    GROUPS = (INFERENCE, COMMON, DATASET)

    input: str = option(
        PATH,
        REQUIRED,
        INFERENCE,
        "The CSV file; or a recording, a folder of them, or a pattern such as 'clips/*.wav'.",
        positional=True,
    )
    output: str = option(
        OUTPUT,
        REQUIRED,
        INFERENCE,
        "The file to write: a CSV; a workbook where its name ends in .xlsx, subtitles of one recording where "
        "it ends in .srt or .vtt. An existing file is replaced.",
    )
    report: str | None = option(
        OUTPUT, None, INFERENCE, "An HTML file to write too, with all answers to look at and listen to."
    )
    model_name: str = option(
        NAME,
        REQUIRED,
        INFERENCE,
        "The model: a name on the hub, a local folder, or an adapter folder written by train.",
    )
    batch_size: int = option(COUNT, 32, INFERENCE, "Most rows per device at once.")
    bf16: bool | None = option(
        BOOLEAN, None, INFERENCE, "Load the weights in bfloat16.", dynamic=DYNAMIC_BF16
    )
    quantization: str | None = option(
        choice("8bit", "4bit"),
        None,
        INFERENCE,
        "Quantise the decoder's weights, where memory is short (needs the extra `quantization`).",
    )
    max_length: int = option(
        COUNT, 128, INFERENCE, "Most tokens of one row: prompt, audio, answer and special tokens together."
    )
    max_new_tokens: int | None = option(
        COUNT,
        None,
        INFERENCE,
        "Most tokens of an answer, however long its prompt; takes the place of --max-length.",
    )
    temperature: float = option(
        NOT_NEGATIVE,
        0.0,
        INFERENCE,
        "0 always takes the most likely token; above 0 it is drawn, the more freely the higher.",
    )
    top_p: float = option(
        PROBABILITY, 1.0, INFERENCE, "Draw among the most likely tokens that together have this probability."
    )
    seed: int = option(SEED, 42, INFERENCE, "Seed of what is drawn.")
    repetition_penalty: float = option(
        POSITIVE,
        1.0,
        INFERENCE,
        "Above 1, tokens that an answer already has become less likely, as in transformers; 1.1 is a little.",
    )
    no_repeat_ngram_size: int = option(
        WHOLE, 0, INFERENCE, "No sequence of so many tokens comes twice in an answer; 0: as it comes."
    )
    num_beams: int = option(COUNT, 1, INFERENCE, "Beams of a beam search; 1 is greedy.")
    choices: str | None = option(
        PATH,
        None,
        INFERENCE,
        "A text file with one choice on each line: the answer is the most likely of them, with its score.",
    )
    top_k: int = option(COUNT, 1, INFERENCE, "With --choices: how many of the best are given.")
    normalize_scores: bool = option(
        BOOLEAN, False, INFERENCE, "With --choices: divide each score by the choice's number of tokens."
    )
    window: float | None = option(
        POSITIVE,
        None,
        INFERENCE,
        "Answer recordings that are longer than so many seconds in windows of that length, such as 30.",
    )
    overlap: float = option(
        NOT_NEGATIVE, 2.0, INFERENCE, "Seconds that neighbouring windows share; at most half of --window."
    )
    join: str = option(
        choice("transcript", "list"),
        "transcript",
        INFERENCE,
        "transcript: windows make one text, in which words that were heard twice stand once; list: a row for "
        "each window, with its `start` and `end`.",
    )
    keep_reference: bool = option(
        BOOLEAN,
        False,
        INFERENCE,
        "Keep the input's `prediction` in a column `reference` behind the answers, where evaluate looks for "
        "it.",
    )
    on_error: str = option(
        choice("stop", "keep"),
        "stop",
        INFERENCE,
        "stop: check all recordings first, and do nothing if one cannot be used; keep: leave such rows "
        "empty, and say why in the column `error`.",
    )
    engine: str = option(
        ENGINE,
        "torch",
        INFERENCE,
        "What computes the answers: this toolkit; vLLM (needs the extra `vllm`); or a running server such as "
        "`vllm serve`, by its address, http://HOST:PORT.",
    )
