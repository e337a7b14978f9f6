"""Define the options of `evaluate` and `report`: how predictions are scored and shown."""

from dataclasses import dataclass

from mdl_toolkit.config.data import FILES
from mdl_toolkit.config.options import REQUIRED, Options, option
from mdl_toolkit.config.types import (
    BOOLEAN,
    METRIC_LIST,
    OUTPUT,
    PATH,
    RESULT_FILES,
    SEED,
    TEXT,
    WHOLE,
    WORDS,
)
from mdl_toolkit.i18n import Localized

SCORING = Localized("Scoring options")
PAGE = Localized("Report options")


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(Options):
    """Say how predictions are compared with references and shown; shared by `evaluate` and `report`."""

    reference: str | None = option(
        PATH,
        None,
        FILES,
        "The CSV file with the references of the same rows; if not given, they are in the file itself.",
    )
    reference_column: str | None = option(
        TEXT,
        None,
        FILES,
        "The column with the references.",
        dynamic=Localized("`reference`; of another file without it, `prediction`"),
    )
    compare: str | None = option(
        PATH, None, FILES, "Another CSV file with predictions for the same rows; differences are tested."
    )
    metric: tuple[str, ...] = option(
        METRIC_LIST,
        (),
        SCORING,
        "What is computed; may be given several times.",
        dynamic=Localized("chosen from the data"),
    )
    normalize: bool = option(
        BOOLEAN,
        True,
        SCORING,
        "Before error rates and exact match: Unicode NFKC, case folded, punctuation removed, single spaces.",
    )
    label_separator: str | None = option(
        TEXT, None, SCORING, "What separates the labels of a row that may have several; needed for map."
    )
    score_column: str | None = option(
        TEXT,
        None,
        SCORING,
        "The column with the scores of predicted labels, separated like them, for map.",
        dynamic=Localized("`score`, if there is one"),
    )
    group_by: tuple[str, ...] = option(
        WORDS,
        (),
        SCORING,
        "A column of either file, or `length`: figures for each group too; may be given several times.",
    )
    bootstrap: int = option(
        WHOLE, 1000, SCORING, "Bootstrap samples for 95 % confidence intervals and paired tests; 0 for none."
    )
    seed: int = option(SEED, 42, SCORING, "Seed of the bootstrap.")
    base_dir: str | None = option(
        PATH,
        None,
        PAGE,
        "Folder that relative audio paths start from, for the report's players; if not given, the one of "
        "the inference that wrote the predictions, or the current directory.",
    )
    embed_audio: int = option(
        WHOLE,
        0,
        PAGE,
        "Put so many recordings into the report itself, the worst rows' first; the others are linked.",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoringOptions):
    """Hold the options of `evaluate`.

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
        PATH,
        REQUIRED,
        FILES,
        "A CSV file with the column `prediction`, such as inference writes.",
        positional=True,
    )
    output: tuple[str, ...] = option(
        RESULT_FILES,
        (),
        FILES,
        "A file to write, .json or .csv; may be given several times. An existing file is replaced.",
    )
    report: str | None = option(
        OUTPUT,
        None,
        FILES,
        "An HTML file to write with all rows to look at and listen to; an existing one is replaced.",
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(ScoringOptions):
    """Hold the options of `report`.

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
        PATH,
        REQUIRED,
        FILES,
        "The output folder of a training, or a CSV file with the column `prediction`.",
        positional=True,
    )
    predictions: str | None = option(
        PATH, None, FILES, "With a training's folder: a CSV file with predictions that are shown too."
    )
    output: str | None = option(
        OUTPUT,
        None,
        FILES,
        "The HTML file to write; an existing one is replaced. Beside NAME.csv it is NAME.report.html.",
        dynamic=Localized("`report.html` in the folder, or beside the CSV"),
    )
    png: str | None = option(
        OUTPUT,
        None,
        FILES,
        "A folder for pictures too, as for a paper: loss.png and confusion.png, where there is something "
        "to draw.",
    )
