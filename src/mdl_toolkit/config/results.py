"""The options of the commands that use a trained model and what it answers."""

from dataclasses import dataclass

from mdl_toolkit.config.data import COMMON, DATASET, FILES, VERIFY_HELP, ConversionOptions, HubOptions
from mdl_toolkit.config.options import REQUIRED, Options, option
from mdl_toolkit.config.types import (
    BOOLEAN,
    COUNT,
    METRICS,
    NAME,
    NOT_NEGATIVE,
    PATH,
    RESULTS,
    SEED,
    SHARE,
    TEXT,
    WHOLE,
    WORDS,
    choice,
)  # fmt: skip
from mdl_toolkit.i18n import Localized

INFERENCE = Localized("Inference options")
MERGE = Localized("Merge options")
SCORING = Localized("Scoring options")
PAGE = Localized("Report options")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(ConversionOptions):
    """Options of `inference`.

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
        PATH, REQUIRED, INFERENCE,
        "The CSV file; or a folder, or a pattern such as 'clips/*.wav', of recordings.",
        positional=True,
    )  # fmt: skip
    output: str = option(
        PATH, REQUIRED, INFERENCE,
        "The CSV file to write; an existing file is replaced.",
    )  # fmt: skip
    report: str | None = option(
        PATH, None, INFERENCE,
        "An HTML file to write too, with all answers to look at and listen to.",
        nullable=True,
    )  # fmt: skip
    model_name: str = option(
        NAME, REQUIRED, INFERENCE,
        "The model: a name on the hub, a local folder, or an adapter folder written by train.",
    )  # fmt: skip
    batch_size: int = option(COUNT, 32, INFERENCE, "Most rows per device at once.")
    max_length: int = option(
        COUNT, 128, INFERENCE,
        "Most tokens of one row: prompt, audio, answer and special tokens together.",
    )  # fmt: skip
    max_new_tokens: int | None = option(
        COUNT, None, INFERENCE,
        "Most tokens of an answer, however long its prompt; takes the place of --max-length.",
        nullable=True,
    )  # fmt: skip
    temperature: float = option(
        NOT_NEGATIVE, 0.0, INFERENCE,
        "0 always takes the most likely token; above 0 it is drawn, the more freely the higher.",
    )  # fmt: skip
    top_p: float = option(
        SHARE, 1.0, INFERENCE,
        "Draw among the most likely tokens that together have this probability.",
    )  # fmt: skip
    seed: int = option(SEED, 42, INFERENCE, "Seed of what is drawn.")
    num_beams: int = option(
        COUNT, 1, INFERENCE,
        "Beams of a beam search; 1 is greedy.",
    )  # fmt: skip
    choices: str | None = option(
        PATH, None, INFERENCE,
        "A text file with one choice on each line: the answer is the most likely of them, with its score.",
        nullable=True,
    )  # fmt: skip
    top_k: int = option(
        COUNT, 1, INFERENCE,
        "With --choices: how many of the best are given.",
    )  # fmt: skip
    normalize_scores: bool = option(
        BOOLEAN, False, INFERENCE,
        "With --choices: divide each score by the choice's number of tokens.",
    )  # fmt: skip
    on_error: str = option(
        choice("stop", "keep"), "stop", INFERENCE,
        "stop: check all recordings first, and do nothing if one cannot be used; keep: leave such rows "
"empty, and say why in the column `error`.",
    )  # fmt: skip
    engine: str = option(
        choice("torch", "vllm"), "torch", INFERENCE,
        "What computes the answers: this toolkit, or vLLM (a merged model; needs the extra `vllm`).",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MergeOptions(HubOptions):
    """Options of `merge`.

    Example:
        ```python
        from mdl_toolkit import MergeOptions

        options = MergeOptions(adapter="run/checkpoint-500", output="merged", dtype="bfloat16")
        ```
    """

    COMMAND = "merge"
    SUMMARY = Localized("Merge an adapter into its base model: one model in the base model's format.")
    GROUPS = (MERGE, COMMON)

    adapter: str = option(
        NAME, REQUIRED, MERGE,
        "The adapter: a folder written by train, a checkpoint of a run, or any LoRA of PEFT for this "
"model.",
        positional=True,
    )  # fmt: skip
    output: str = option(
        PATH, REQUIRED, MERGE,
        "Folder for the merged model; an earlier merged model is replaced.",
    )  # fmt: skip
    model_name: str | None = option(
        NAME, None, MERGE,
        "The base model, where the adapter's record does not find it: a name on the hub, or a local "
"folder.",
        nullable=True,
    )  # fmt: skip
    dtype: str | None = option(
        choice("bfloat16", "float16", "float32"), None, MERGE,
        "Numbers of the merged weights; the base model's if not given.",
        nullable=True,
    )  # fmt: skip
    verify: bool = option(BOOLEAN, True, MERGE, VERIFY_HELP)


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(Options):
    """How predictions are compared with references, and shown; shared by `evaluate` and `report`."""

    reference: str | None = option(
        PATH, None, FILES,
        "The CSV file with the references of the same rows; if not given, they are in the file itself.",
        nullable=True,
    )  # fmt: skip
    reference_column: str | None = option(
        TEXT, None, FILES,
        "The column with the references.",
        nullable=True,
        dynamic=Localized(
            "`reference`; of another file without it, `prediction`"),
    )  # fmt: skip
    compare: str | None = option(
        PATH, None, FILES,
        "Another CSV file with predictions for the same rows; differences are tested.",
        nullable=True,
    )  # fmt: skip
    metric: tuple[str, ...] = option(
        METRICS, (), SCORING,
        "What is computed; may be given several times.",
        dynamic=Localized("chosen from the data"),
    )  # fmt: skip
    normalize: bool = option(
        BOOLEAN, True, SCORING,
        "Before error rates and exact match: Unicode NFKC, case folded, punctuation removed, single "
"spaces.",
    )  # fmt: skip
    label_separator: str | None = option(
        TEXT, None, SCORING,
        "What separates the labels of a row that may have several; needed for map.",
        nullable=True,
    )  # fmt: skip
    score_column: str | None = option(
        TEXT, None, SCORING,
        "The column with the scores of predicted labels, separated like them, for map.",
        nullable=True,
        dynamic=Localized("`score`, if there is one"),
    )  # fmt: skip
    group_by: tuple[str, ...] = option(
        WORDS, (), SCORING,
        "A column of either file, or `length`: figures for each group too; may be given several times.",
    )  # fmt: skip
    bootstrap: int = option(
        WHOLE, 1000, SCORING,
        "Bootstrap samples for 95 % confidence intervals and paired tests; 0 for none.",
    )  # fmt: skip
    seed: int = option(SEED, 42, SCORING, "Seed of the bootstrap.")
    base_dir: str | None = option(
        PATH, None, PAGE,
        "Folder that relative audio paths start from, for the report's players; if not given, the one of "
"the inference that wrote the predictions, or the current directory.",
        nullable=True,
    )  # fmt: skip
    embed_audio: int = option(
        WHOLE, 0, PAGE,
        "Put so many recordings into the report itself, the worst rows' first; the others are linked.",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoringOptions):
    """Options of `evaluate`.

    Example:
        ```python
        from mdl_toolkit import EvaluateOptions

        options = EvaluateOptions(
            input="predictions.csv", reference="test.csv", metric=("accuracy", "macro-f1")
        )
        ```
    """

    COMMAND = "evaluate"
    SUMMARY = Localized(
        "Compare predictions with references, or two models: metrics with confidence intervals."
    )
    GROUPS = (FILES, SCORING, PAGE)

    input: str = option(
        PATH, REQUIRED, FILES,
        "A CSV file with the column `prediction`, such as inference writes.",
        positional=True,
    )  # fmt: skip
    output: tuple[str, ...] = option(
        RESULTS, (), FILES,
        "A file to write, .json or .csv; may be given several times. An existing file is replaced.",
    )  # fmt: skip
    report: str | None = option(
        PATH, None, FILES,
        "An HTML file to write with all rows to look at and listen to; an existing one is replaced.",
        nullable=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportOptions(ScoringOptions):
    """Options of `report`.

    Example:
        ```python
        from mdl_toolkit import ReportOptions

        options = ReportOptions(
            input="run", predictions="predictions.csv", reference="test.csv", png="figures"
        )
        ```
    """

    COMMAND = "report"
    SUMMARY = Localized("Make one HTML page of a training, of predictions, or of both.")
    GROUPS = (FILES, SCORING, PAGE)

    input: str = option(
        PATH, REQUIRED, FILES,
        "The output folder of a training, or a CSV file with the column `prediction`.",
        positional=True,
    )  # fmt: skip
    predictions: str | None = option(
        PATH, None, FILES,
        "With a training's folder: a CSV file with predictions that are shown too.",
        nullable=True,
    )  # fmt: skip
    output: str | None = option(
        PATH, None, FILES,
        "The HTML file to write; an existing one is replaced. Beside NAME.csv it is NAME.report.html.",
        nullable=True,
        dynamic=Localized(
            "`report.html` in the folder, or beside the CSV"
        ),
    )  # fmt: skip
    png: str | None = option(
        PATH, None, FILES,
        "A folder for pictures too, as for a paper: loss.png and confusion.png, where there is something "
"to draw.",
        nullable=True,
    )  # fmt: skip
