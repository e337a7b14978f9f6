"""A training, predictions or both to one HTML page to look at and listen to; and to pictures for a paper."""

import dataclasses
from pathlib import Path
from typing import Any

from mdl_toolkit.config.evaluation import EvaluateOptions, ReportOptions, ScoringOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.listing import is_listing
from mdl_toolkit.data.manifest import PREDICTION
from mdl_toolkit.errors import UsageError
from mdl_toolkit.evaluation.align import REFERENCE
from mdl_toolkit.evaluation.csv_table import read_table
from mdl_toolkit.evaluation.evaluate import evaluate
from mdl_toolkit.evaluation.results import Evaluation
from mdl_toolkit.reporting.audio_links import folder_of
from mdl_toolkit.reporting.evaluation_section import evaluation_values, table_values
from mdl_toolkit.reporting.html import write_page
from mdl_toolkit.reporting.plots import draw_confusion, draw_run
from mdl_toolkit.reporting.run_section import run_values
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.utils.files import check_file
from mdl_toolkit.utils.run_folder import PLOT, REPORT

CONFUSION = "confusion.png"
NOTHING: dict[str, Any] = {"evaluation": None, "rows": None}  # of predictions


def report(options: ReportOptions) -> Path:
    """Write the page, and with `--png` the pictures.

    Returns:
        The page.

    Raises:
        UsageError: references, but no predictions.
        InputError: there is nothing to show, or it cannot be read, joined or written.

    Example:
        ```python
        from mdl_toolkit import ReportOptions, report

        page = report(
            ReportOptions(
                input="run", predictions="predictions.csv", reference="test.csv", output="report.html"
            )
        )
        print(page)
        ```
    """
    source = Path(options.input)
    folder = source if source.is_dir() else None
    predictions = _predictions(options, folder)
    page = Path(options.output) if options.output is not None else _beside(source)
    inputs = [path for path in (predictions, options.reference, options.compare) if path is not None]
    check_file(page, inputs)
    values = {"run": None if folder is None else run_values(folder), **NOTHING}
    if predictions is not None:
        values |= _answers(predictions, page, options)
    write_page(page, source.resolve().name, values)
    say("report: {page}", page=page)
    if options.png is not None:
        _draw(Path(options.png), folder, values["evaluation"])
    return page


def _predictions(options: ReportOptions, folder: Path | None) -> Path | None:
    """The CSV: INPUT itself, or beside a training's folder what `--predictions` names, if anything."""
    if folder is None and options.predictions is None:
        return Path(options.input)
    if folder is None:
        raise UsageError(
            "{input}: with --predictions, give the output folder of a training here", input=options.input
        )
    if options.predictions is None and (options.reference or options.compare):
        raise UsageError("--reference and --compare need --predictions beside a training's folder")
    return None if options.predictions is None else Path(options.predictions)


def _beside(source: Path) -> Path:
    """Where the page goes unless it is said."""
    return source / REPORT if source.is_dir() else source.with_name(f"{source.stem}.{REPORT}")


def _answers(predictions: Path, page: Path, options: ReportOptions) -> dict[str, Any]:
    """The parts about predictions: scored where there are references."""
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(ScoringOptions)}
    if options.reference is not None or _has_references(predictions, options.reference_column):
        scoring = EvaluateOptions(input=str(predictions), **shared)
        return _page_values(evaluate(scoring), page, scoring)
    say("no references: what is right cannot be shown; --reference names a file that has them")
    return table_values(
        read_table(predictions, [PREDICTION]), folder_of(predictions, options.base_dir), page,
        score_column=options.score_column, embedded=options.embed_audio,
    )  # fmt: skip


def _page_values(evaluation: Evaluation, page: Path, options: EvaluateOptions) -> dict[str, Any]:
    """What `html_page` shows of an evaluation; links to recordings start from the page's folder."""
    return evaluation_values(
        evaluation, folder_of(Path(options.input), options.base_dir), page,
        score_column=options.score_column, embedded=options.embed_audio,
    )  # fmt: skip


def _has_references(predictions: Path, column: str | None) -> bool:
    return column is not None or REFERENCE in read_table(predictions).columns


def _draw(folder: Path, run: Path | None, evaluation: dict[str, Any] | None) -> None:
    """Write the pictures there is something for."""
    confusion = evaluation and evaluation["confusion"]
    made = [draw_run(run, folder / PLOT)] if run is not None else []
    made += (
        [draw_confusion(confusion["labels"], confusion["counts"], folder / CONFUSION)] if confusion else []
    )
    for path in made:
        if path is not None:
            say("picture: {path}", path=path)


# --- made by other commands ----------------------------------------------------------------------------


def report_training(output: Path) -> None:
    """Write `report.html` into a run's folder; why it cannot be written is only warned of."""
    try:
        write_page(output / REPORT, output.resolve().name, {"run": run_values(output), **NOTHING})
    except Exception as problem:  # noqa: BLE001 - a page ends no run, whatever goes wrong
        warn("{report} cannot be written: {reason}", report=REPORT, reason=problem)


def report_evaluation(evaluation: Evaluation, options: EvaluateOptions) -> None:
    """Write the page that `--report` of an evaluation names, if it names one.

    Raises:
        InputError: it cannot be written.
    """
    if options.report is not None:
        page = Path(options.report)
        write_page(page, Path(options.input).name, _page_values(evaluation, page, options), "--report")
        say("report: {page}", page=page)


def report_answers(options: InferenceOptions) -> None:
    """Write the page that `--report` of an inference asks for, beside the references its input has, if any.

    Raises:
        InputError: it cannot be written.
    """
    report(ReportOptions(input=options.output, output=options.report, reference=_references(options)))


def _references(options: InferenceOptions) -> str | None:
    """The input, if its column `prediction` says what the answers should be and there still is one."""
    source = Path(options.input)
    if is_listing(options.input) or source.resolve() == Path(options.output).resolve():
        return None
    table = read_table(source)
    if REFERENCE in table.columns or PREDICTION not in table.columns:
        return None
    return options.input if any(cell.strip() for cell in table.column(PREDICTION)) else None
