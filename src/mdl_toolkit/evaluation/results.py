"""Values of an evaluation, and their JSON and CSV."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.errors import InputError, shorten
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import removing_empty, replace_file, report_write_errors


@dataclass(frozen=True)
class Comparison:
    """Compare a metric of two prediction files.

    Attributes:
        other: value of the file of `--compare`; None if undefined.
        difference: value of the first file minus that of the other; None if undefined.
        difference_low: lower bound of its 95 % interval, by the paired bootstrap; None without one.
        difference_high: upper bound, likewise.
        p_value: p-value of the paired permutation test; None without one.
        mcnemar_p_value: that of McNemar's exact test; None for a metric that is no share of right rows.
    """

    other: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    p_value: float | None
    mcnemar_p_value: float | None


@dataclass(frozen=True)
class MetricValue:
    """Hold the value of a metric over some rows.

    Attributes:
        metric: name of the metric.
        value: a share, or for bleu and chrf a number up to 100; None if undefined.
        low: lower bound of the 95 % interval; None without one.
        high: upper bound of the 95 % interval; None without one.
        comparison: with the file of `--compare`; None without one.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Group:
    """Hold the metrics of the rows with one value in a column.

    Attributes:
        column: the column, with its unit if groups are ranges of numbers.
        name: the value in the column.
        rows: number of rows.
        metrics: one value for each metric.
    """

    column: str
    name: str
    rows: int
    metrics: tuple[MetricValue, ...]


@dataclass(frozen=True)
class Confusion:
    """Count how often each label was answered with each label.

    Attributes:
        labels: labels of the references, sorted.
        counts: `[labels, labels + 1]`, references first; the last column counts all other predictions.
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RowResult:
    """Hold the results of one row.

    Attributes:
        line: line of the predictions' file on which the row starts.
        cells: cells of both files by column.
        reference: the reference as written.
        prediction: the prediction as written; empty if the row failed.
        failed: the row has an error instead of a prediction.
        is_right: the prediction is right by the criterion `right_by` of `Evaluation.settings`.
        errors: edits between reference and prediction, in the unit `errors_in` of `Evaluation.settings`.
        length: length of the reference in this unit.
        groups: the row's group by column of `--group-by`.
    """

    line: int
    cells: Mapping[str, str]
    reference: str
    prediction: str
    failed: bool
    is_right: bool
    errors: int
    length: int
    groups: Mapping[str, str]


@dataclass(frozen=True)
class Evaluation:
    """Hold the results of `evaluate`.

    Attributes:
        rows: results of each row, in the order of the predictions' file.
        metrics: one value for each metric, over all rows.
        groups: groups of rows, column by column.
        confusion: counts of confused labels; None if the references are no labels.
        most_frequent: the most frequent reference, and the accuracy of always answering it; None without
            `accuracy` among the metrics.
        settings: normalisation, units, seed and versions of the libraries by which metrics were computed.
        notes: messages on the files and on the settings.
    """

    rows: tuple[RowResult, ...]
    metrics: tuple[MetricValue, ...]
    groups: tuple[Group, ...]
    confusion: Confusion | None
    most_frequent: tuple[str, float] | None
    settings: Mapping[str, Any]
    notes: tuple[Localized, ...]

    @property
    def baseline(self) -> Localized | None:
        """Say what always giving the most frequent answer would be worth."""
        if self.most_frequent is None:
            return None
        answer, share = self.most_frequent
        return Localized(
            "always answering {answer!r}, the most frequent reference, has an accuracy of {share:.2%}",
            answer=shorten(answer),
            share=share,
        )

    def value(self, metric: str) -> float | None:
        """Return the value of one of the metrics over all rows."""
        return next(each.value for each in self.metrics if each.metric == metric)


def as_json(evaluation: Evaluation) -> str:
    """Return everything but the rows' cells as JSON."""

    def figures(part: Evaluation | Group) -> dict[str, Any]:
        metrics, comparisons = {}, {}
        for each in part.metrics:
            metrics[each.metric] = {"value": each.value, "low": each.low, "high": each.high}
            if pair := each.comparison:
                bounds = {"low": pair.difference_low, "high": pair.difference_high}
                comparisons[each.metric] = {
                    "other": pair.other,
                    "difference": {"value": pair.difference, **bounds},
                    "p_value": pair.p_value,
                    "mcnemar_p_value": pair.mcnemar_p_value,
                }
        return {"metrics": metrics, "comparison": comparisons}

    most_frequent = evaluation.most_frequent
    content = {
        "settings": evaluation.settings,
        "notes": [note.en for note in evaluation.notes],
        **figures(evaluation),
        "most_frequent": most_frequent and {"reference": most_frequent[0], "share": most_frequent[1]},
        "groups": [
            {"column": group.column, "group": group.name, "rows": group.rows, **figures(group)}
            for group in evaluation.groups
        ],
        "confusion": asdict(evaluation.confusion) if evaluation.confusion else None,
        "rows": [
            {name: value for name, value in vars(row).items() if name != "cells"} for row in evaluation.rows
        ],
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def as_csv(evaluation: Evaluation) -> str:
    """Return a CSV with a line for each metric over all rows and over each group, settings in every line."""
    settings = {name: evaluation.settings[name] for name in ("normalize", "bootstrap", "seed")}
    settings["normalize"] = str(settings["normalize"]).lower()
    versions = evaluation.settings["versions"].items()
    settings["versions"] = " ".join(f"{library}={version}" for library, version in versions)
    compared = [field.name for field in fields(Comparison)]
    names = ["column", "group", "rows", "metric", "value", "low", "high", *compared, *settings]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore")
    writer.writeheader()
    for part in (Group("", "", len(evaluation.rows), evaluation.metrics), *evaluation.groups):
        of_part = {"column": part.column, "group": part.name, "rows": part.rows}
        for each in part.metrics:
            pair = vars(each.comparison) if each.comparison else {}
            writer.writerow({**of_part, **vars(each), **pair, **settings})
    return text.getvalue()


def write_results(path: Path, evaluation: Evaluation, options: EvaluateOptions) -> None:
    """Write an evaluation as JSON or CSV, by the file's extension, and its options next to it.

    Each file is written whole or not at all.

    Raises:
        InputError: a file cannot be written.
    """
    text = as_json(evaluation) if path.suffix.lower() == ".json" else as_csv(evaluation)
    options_file = path.with_name(f"{path.name}.{SETTINGS_FILE}")
    with removing_empty(path.parent):
        for file, content in ((path, text), (options_file, to_yaml(options))):
            with (
                report_write_errors(f"--output {file}", InputError),
                replace_file(file, "evaluation") as work,
            ):
                # The names of files in it need not be text.
                work.write_text(content, encoding="utf-8", errors="backslashreplace", newline="")
