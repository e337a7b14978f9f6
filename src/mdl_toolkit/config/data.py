"""Define the options that several commands share, and those of the small commands.

The command line, `--config` files, `--help`, the reference pages and Python callers are all read from
these tables: name, type, default, group, help.
"""

from dataclasses import dataclass

from mdl_toolkit.config.options import REQUIRED, Options, option
from mdl_toolkit.config.types import (
    BOOLEAN,
    COUNT,
    JSON,
    NAME,
    OUTPUT,
    PATH,
    PATHS,
    PORTION,
    POSITIVE,
    SEED,
    TEXT,
    WORDS,
    choice,
)
from mdl_toolkit.i18n import Localized

COMMON = Localized("Common options")
DATASET = Localized("Dataset options")
FILES = Localized("Input and output")
CHECKING = Localized("Checking options")
SPLITTING = Localized("Splitting options")
DEMO = Localized("Demo options")
COMPLETION = Localized("Arguments")

DYNAMIC_WORKERS = Localized("half the available CPUs, at most 32")
DEFAULT_HOURS = 10.0
DEFAULT_MODEL = "mispeech/midashenglm-7b"


@dataclass(frozen=True, kw_only=True)
class HubOptions(Options):
    """Say on which hub models are looked up by name."""

    from_modelscope: bool = option(
        BOOLEAN,
        False,
        COMMON,
        "Load the model from ModelScope instead of Hugging Face (needs the extra `modelscope`).",
    )


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(HubOptions):
    """Say how the rows of a CSV become samples; shared by all commands that read recordings."""

    tokenizing_batch_size: int = option(COUNT, 8, COMMON, "Rows that are tokenised together.")
    num_workers: int | None = option(
        COUNT, None, COMMON, "Processes that decode and convert audio.", dynamic=DYNAMIC_WORKERS
    )
    system_prompt: str | None = option(
        TEXT, None, DATASET, "System prompt for rows without one in the column `system_prompt`."
    )
    user_prompt: str | None = option(
        TEXT, None, DATASET, "User prompt for rows without one in the column `user_prompt`."
    )
    base_dir: str | None = option(
        PATH,
        None,
        DATASET,
        "Folder that relative audio paths start from; the current directory if not given.",
    )
    allow_empty_prediction: bool = option(
        BOOLEAN, False, DATASET, "Accept rows whose prediction is empty: the model learns to answer nothing."
    )
    allow_truncated: bool = option(
        BOOLEAN,
        False,
        DATASET,
        "Accept recordings that are shorter than their header or size promises, with a warning.",
    )
    max_audio_hours: float = option(
        POSITIVE,
        DEFAULT_HOURS,
        DATASET,
        "Longest recording that is accepted, in hours; 10 hours take 2.3 GB.",
    )
    max_download_mb: float = option(
        POSITIVE, 512.0, DATASET, "Largest recording, in megabytes, that is fetched from a URL."
    )
    download_cache: str | None = option(
        PATH,
        None,
        DATASET,
        "Folder that keeps recordings fetched from URLs for other runs, which ask only whether they "
        "changed. Without it they are kept until the conversion is complete.",
    )


DYNAMIC_BF16 = Localized("true where CUDA supports bfloat16")
MODEL_HELP = Localized("The model: a name on the hub, or a local folder.")
INPUT_HELP = Localized("The CSV file.")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(ConversionOptions):
    """Hold the options of `convert-dataset`.

    Example:
        ```python
        from mdl_toolkit import ConvertOptions

        options = ConvertOptions(
            input="train.csv", output="train-dataset", base_dir="recordings",
            user_prompt="Which language is spoken?",
        )
        ```
    """

    COMMAND = "convert-dataset"
    SUMMARY = Localized("Convert a CSV of recordings into a dataset ready for training.")
    GROUPS = (COMMON, DATASET, FILES)

    model_name: str = option(NAME, DEFAULT_MODEL, COMMON, MODEL_HELP)
    input: str = option(PATH, REQUIRED, FILES, INPUT_HELP, positional=True)
    output: str = option(
        OUTPUT,
        REQUIRED,
        FILES,
        "Where the converted dataset goes; a dataset that is there already is replaced.",
    )


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ConversionOptions):
    """Hold the options of `check`.

    Example:
        ```python
        from mdl_toolkit import CheckOptions

        options = CheckOptions(input=("train.csv", "test.csv"), base_dir="recordings")
        ```
    """

    COMMAND = "check"
    SUMMARY = Localized("See whether CSVs of recordings are fit to train on, without weights or a GPU.")
    GROUPS = (CHECKING, COMMON, DATASET)

    model_name: str = option(NAME, DEFAULT_MODEL, COMMON, MODEL_HELP)
    input: tuple[str, ...] = option(
        PATHS,
        REQUIRED,
        CHECKING,
        "The CSV files: the first one is to be trained on, the others to be evaluated on.",
        positional=True,
    )
    max_length: int | None = option(
        COUNT,
        None,
        CHECKING,
        "Name the rows that take more tokens: prompt, audio, answer and special tokens together.",
    )
    for_inference: bool = option(
        BOOLEAN,
        False,
        CHECKING,
        "Check the files as input of `inference`: no column `prediction` is needed, and a row whose "
        "prompt reaches --max-length cannot be used.",
    )
    train_config: str | None = option(
        PATH,
        None,
        CHECKING,
        "A YAML file of the options of `train` for which memory and steps are predicted; its defaults "
        "without it.",
    )
    write_fixed: str | None = option(
        OUTPUT,
        None,
        CHECKING,
        "Write the first CSV to this file without the rows that cannot be used, otherwise byte for byte.",
    )
    cut: float | None = option(
        POSITIVE,
        None,
        CHECKING,
        "With --write-fixed: put equal parts, by `start` and `end`, in the place of rows that are longer "
        "than so many seconds; for labels that hold for each part, never for transcripts.",
    )
    json: bool | str | None = option(
        JSON,
        None,
        CHECKING,
        "Write what was found as JSON: true, or --json alone, to standard output in place of the text; a "
        "path (--json=PATH, or --json NAME.json) to that file.",
    )


@dataclass(frozen=True, kw_only=True)
class SplitOptions(Options):
    """Hold the options of `split`.

    Example:
        ```python
        from mdl_toolkit import SplitOptions

        options = SplitOptions(
            input="all.csv", output="parts", eval="10%", test="10%", group_by=("speaker",),
            stratify="prediction",
        )
        ```
    """

    COMMAND = "split"
    SUMMARY = Localized("Split a CSV into training, evaluation and test rows; nothing is on two sides.")
    GROUPS = (FILES, SPLITTING)

    input: str = option(PATH, REQUIRED, FILES, INPUT_HELP, positional=True)
    output: str = option(
        OUTPUT, REQUIRED, FILES, "Folder for train.csv, eval.csv and test.csv; an earlier split is replaced."
    )
    base_dir: str | None = option(
        PATH, None, FILES, "Folder that relative audio paths start from; the current directory if not given."
    )
    eval: float = option(PORTION, 0.0, SPLITTING, "Share of the rows for evaluation while training, as 10%.")
    test: float = option(PORTION, 0.0, SPLITTING, "Share of the rows for the test after it, as 10%.")
    group_by: tuple[str, ...] = option(
        WORDS,
        (),
        SPLITTING,
        "Columns, such as speaker: rows with the same cell stay on one side. May be given several times.",
    )
    stratify: str | None = option(
        TEXT, None, SPLITTING, "A column, such as prediction, whose values all parts have in like shares."
    )
    seed: int = option(SEED, 42, SPLITTING, "Seed of what is drawn.")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Hold the options of `demo`."""

    COMMAND = "demo"
    SUMMARY = Localized("See the whole road on real recordings, offline, with a tiny model.")
    GROUPS = (DEMO,)

    output: str = option(OUTPUT, "demo-output", DEMO, "Folder for all that is made.")
    seed: int = option(SEED, 42, DEMO, "Seed of the tiny model and its training.")


@dataclass(frozen=True, kw_only=True)
class CompletionOptions(Options):
    """Hold the options of `completion`."""

    COMMAND = "completion"
    SUMMARY = Localized("Print the script that lets a shell complete commands and options.")
    GROUPS = (COMPLETION,)

    shell: str = option(
        choice("bash", "zsh", "fish"),
        REQUIRED,
        COMPLETION,
        'bash, zsh or fish. In bash: eval "$(mdl-toolkit completion bash)".',
        positional=True,
    )
