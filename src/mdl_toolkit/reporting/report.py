"""Write the HTML page of a training, of predictions or of both, and pictures for a paper."""

import dataclasses
from pathlib import Path
from typing import Any

from mdl_toolkit.config.evaluation import EvaluateOptions, ReportOptions, ScoringOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.column_names import PREDICTION
from mdl_toolkit.data.listing import is_listing
from mdl_toolkit.errors import InputError, UsageError
from mdl_toolkit.evaluation.csv_table import REFERENCE, Table, read_table
from mdl_toolkit.evaluation.evaluate import evaluate
from mdl_toolkit.evaluation.results import Evaluation
from mdl_toolkit.reporting.audio_links import folder_of
from mdl_toolkit.reporting.evaluation_section import evaluation_values, table_values
from mdl_toolkit.reporting.html import write_page
from mdl_toolkit.reporting.plots import draw_confusion, draw_run
from mdl_toolkit.reporting.run_section import run_values
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.utils.files import check_file, report_write_errors
from mdl_toolkit.utils.run_folder import PLOT, REPORT

CONFUSION = "confusion.png"
NO_PREDICTIONS: dict[str, Any] = {"evaluation": None, "rows": None}


def report(options: ReportOptions) -> Path:
    """Write the HTML page of a training, of predictions or of both, and with `png` the pictures.

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
    predictions = _predictions_file(options, folder)
    default = source / REPORT if source.is_dir() else source.with_name(f"{source.stem}.{REPORT}")
    page = default if options.output is None else Path(options.output)
    inputs = [path for path in (predictions, options.reference, options.compare) if path is not None]
    check_file(page, inputs)
    values = {"run": None if folder is None else run_values(folder), **NO_PREDICTIONS}
    if predictions is not None:
        values |= _predictions_section(predictions, page, options)
    write_page(page, source.resolve().name, values)
    say("report: {page}", page=page)
    if options.png is not None:
        pictures, confusion = Path(options.png), values["evaluation"] and values["evaluation"]["confusion"]
        with report_write_errors(f"--png {pictures}", InputError):
            drawn = [draw_run(folder, pictures / PLOT)] if folder is not None else []
            if confusion:
                drawn.append(draw_confusion(confusion["labels"], confusion["counts"], pictures / CONFUSION))
        for path in filter(None, drawn):
            say("picture: {path}", path=path)
    return page


def _predictions_file(options: ReportOptions, folder: Path | None) -> Path | None:
    """Return the CSV of predictions: INPUT itself, or with a training's folder that of `--predictions`."""
    if folder is None and options.predictions is None:
        return Path(options.input)
    if folder is None:
        raise UsageError(
            "{input}: with --predictions, give the output folder of a training here", input=options.input
        )
    if options.predictions is None and (options.reference or options.compare):
        raise UsageError("--reference and --compare need --predictions beside a training's folder")
    return None if options.predictions is None else Path(options.predictions)


def _predictions_section(predictions: Path, page: Path, options: ReportOptions) -> dict[str, Any]:
    """Return the parts about predictions, scored where there are references."""
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(ScoringOptions)}
    scoring = EvaluateOptions(input=str(predictions), **shared)
    is_named = options.reference is not None or options.reference_column is not None
    if is_named or REFERENCE in read_table(predictions).columns:
        return _page_values(evaluate(scoring), page, scoring)
    say("no references: what is right cannot be shown; --reference names a file that has them")
    table = read_table(predictions, [PREDICTION])
    for note in table.notes:
        say(note)
    return _page_values(table, page, scoring)


def _page_values(source: Evaluation | Table, page: Path, options: EvaluateOptions) -> dict[str, Any]:
    """Return the parts of a page of predictions; links to recordings start from the page's folder."""
    base_dir = folder_of(Path(options.input), options.base_dir)
    more: dict[str, Any] = {"score_column": options.score_column, "embedded": options.embed_audio}
    if isinstance(source, Evaluation):
        return evaluation_values(source, base_dir, page, **more)
    return table_values(source, base_dir, page, **more)


def report_training(output: Path) -> None:
    """Write `report.html` into a run's folder; a failure is only warned of."""
    try:
        write_page(output / REPORT, output.resolve().name, {"run": run_values(output), **NO_PREDICTIONS})
    # Whatever goes wrong with its page, no run ends of it.
    except Exception as problem:  # noqa: BLE001
        warn("{report} cannot be written: {reason}", report=REPORT, reason=problem)


def report_evaluation(evaluation: Evaluation, options: EvaluateOptions) -> None:
    """Write the page that `--report` of `evaluate` names, if it names one.

    Raises:
        InputError: it cannot be written.
    """
    if options.report is not None:
        page = Path(options.report)
        write_page(page, Path(options.input).name, _page_values(evaluation, page, options), "--report")
        say("report: {page}", page=page)


def report_answers(options: InferenceOptions) -> None:
    """Write the page that `--report` of `inference` names, with the references its input has, if any.

    Raises:
        InputError: it cannot be written.
    """
    source, reference = Path(options.input), None
    # The column `prediction` of the input says what the answers should be, unless the output replaced it.
    if not is_listing(options.input) and source.resolve() != Path(options.output).resolve():
        table = read_table(source)
        has_predictions = PREDICTION in table.columns and any(map(str.strip, table.column(PREDICTION)))
        is_by_window = options.window is not None and options.join == "list"
        if has_predictions and REFERENCE not in table.columns and not is_by_window:
            reference = options.input
    report(ReportOptions(input=options.output, output=options.report, reference=reference))
