"""Predictions against references: which metrics, how sure they are, for which rows, and against which others.

`evaluate` gives the report and the demonstration what the command shows. No model, no torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.errors import InputError, RowProblem, RowsError, UsageError
from mdl_toolkit.evaluation.align import SCORE, Grouping, Pairs, grouped, read_pairs
from mdl_toolkit.evaluation.bootstrap import (
    Interval,
    Statistic,
    bootstrap_distribution,
    mcnemar_test,
    percentile_interval,
    permutation_test,
    value_of,
    wilson_interval,
)
from mdl_toolkit.evaluation.metrics import (
    CORPUS_METRICS,
    Answers,
    Manner,
    are_chinese,
    confusion,
    is_exact,
    is_match,
    is_same_set,
    listed_labels,
    stacked,
    versions,
)  # fmt: skip
from mdl_toolkit.evaluation.results import (
    Comparison,
    Confusion,
    Evaluation,
    Group,
    MetricValue,
    RowResult,
    as_csv,
    as_json,
)  # fmt: skip
from mdl_toolkit.evaluation.text_metrics import CHARACTER, WORD
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import check_apart, check_file, removing_empty, replace_file, report_write_errors

MOST_LABELS = 50  # distinct references beyond which they are texts, unless a metric for labels is asked for
MOST_CONFUSED = 200  # labels beyond which there is no confusion table
ON_LABELS = ("accuracy", "macro-f1")
WILSON, PERCENTILE = "Wilson score", "expanded percentile bootstrap"


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Compare predictions with references, and write what `--output` names.

    Raises:
        UsageError: `map` without `--label-separator`.
        InputError: files that cannot be read, joined or written; a column that is not there.
    """
    _check(options)
    pairs = read_pairs(options)
    manner = Manner(options.normalize, are_chinese(pairs.answers.references), options.label_separator or None)
    names = options.metric or _chosen(pairs.answers.references, manner)
    if "map" in names:
        _check_scores(pairs, options, manner)
    evaluation = _computed(pairs, manner, names, options)
    for note in evaluation.notes:
        say(note)
    for output in options.output:
        _write(Path(output), evaluation, options)
    return evaluation


def _check(options: EvaluateOptions) -> None:
    if "map" in options.metric and not options.label_separator:
        raise UsageError(
            "--metric map needs --label-separator: what separates the labels of a row, such as ';'"
        )
    inputs = [path for path in (options.input, options.reference, options.compare) if path is not None]
    for output in options.output:
        check_file(Path(output), inputs)
    if options.report is not None:
        check_file(Path(options.report), inputs, "--report")
        for output in options.output:
            check_apart(Path(options.report), Path(output), "--report", "--output")


def _chosen(references: Sequence[str], manner: Manner) -> tuple[str, ...]:
    """The metrics that suit the references."""
    if manner.separator:
        return ("map",)
    labels = len({reference.strip() for reference in references})
    if labels <= MOST_LABELS and 2 * labels <= len(references):
        return ON_LABELS
    return ("cer",) if manner.is_chinese else ("wer", "cer")


def _check_scores(pairs: Pairs, options: EvaluateOptions, manner: Manner) -> None:
    """Report all rows of the predictions' file whose scores do not belong to their labels."""
    for path, answers in ((options.input, pairs.answers), (options.compare, pairs.other)):
        if answers is None or answers.scores is None:
            continue
        name, separator = options.score_column or SCORE, manner.separator
        reason = Localized(
            "expected a number for each label, separated by {separator!r}; correct it", separator=separator
        )
        problems = [
            RowProblem(answers.lines[row], name, answers.scores[row], reason)
            for row in range(len(answers.lines))
            if listed_labels(answers, row, manner) is None
        ]
        if problems:
            raise RowsError(str(path), problems)


# --- figures -------------------------------------------------------------------------------------------


def _computed(pairs: Pairs, manner: Manner, names: Sequence[str], options: EvaluateOptions) -> Evaluation:
    groupings = [grouped(pairs, name) for name in options.group_by]
    rows = len(pairs.table)
    comparisons: tuple[Comparison, ...] = ()
    if pairs.other is None:
        metrics = {name: CORPUS_METRICS[name].build(pairs.answers, manner) for name in names}
        figures = _figures(metrics, rows, options)
    else:
        both = stacked(pairs.answers, pairs.other, manner)
        of_both = {name: CORPUS_METRICS[name].build(both, manner) for name in names}
        metrics, others = (
            {name: metric.of(np.arange(start, start + rows)) for name, metric in of_both.items()}
            for start in (0, rows)
        )
        figures, comparisons = _compared(metrics, others, of_both, rows, options)
    kind, right = _right(pairs.answers, manner, names)
    unit, counts = _edits(pairs.answers, manner, metrics)
    return Evaluation(
        rows=_rows(pairs, right, counts, groupings),
        metrics=figures,
        comparisons=comparisons,
        groups=tuple(group for each in groupings for group in _groups(each, metrics, options)),
        confusion=_confusion(pairs.answers, names),
        settings=_settings(options, manner, kind, unit, names),
        notes=(*pairs.notes, *_notes(options, names, manner, pairs.answers)),
    )


def _figures(metrics: Mapping[str, Any], rows: int, options: EvaluateOptions) -> tuple[MetricValue, ...]:
    """Compute each metric with its confidence interval."""
    distributions = bootstrap_distribution([*metrics.values()], rows, options.bootstrap, options.seed)
    pairs = zip(metrics.items(), distributions, strict=True)
    return tuple(_figure(name, metric, rows, distribution) for (name, metric), distribution in pairs)


def _figure(name: str, metric: Any, rows: int, distribution: np.ndarray) -> MetricValue:
    """Give a metric's interval: Wilson's of a proportion, else the bootstrap's; none without resamples."""
    interval: Interval | None = percentile_interval(distribution, rows)
    if CORPUS_METRICS[name].is_proportion and len(distribution):
        interval = wilson_interval(int(metric.statistics[:, 0].sum()), rows)
    return MetricValue(name, _known(value_of(metric, rows)), *(interval or (None, None)))


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _compared(
    metrics: Mapping[str, Any],
    others: Mapping[str, Any],
    of_both: Mapping[str, Statistic],
    rows: int,
    options: EvaluateOptions,
) -> tuple[tuple[MetricValue, ...], tuple[Comparison, ...]]:
    """Compute each metric of two systems, and how they differ.

    Args:
        metrics: of the first system.
        others: the same of the second.
        of_both: the same over the rows of both, the first system's and then the second's.
        rows: of each system.
        options: how many resamples, and their seed.
    """
    systems = [*metrics.values(), *others.values()]
    distributions = bootstrap_distribution(systems, rows, options.bootstrap, options.seed)
    p_values = np.full(len(metrics), np.nan)
    if options.bootstrap:
        p_values = permutation_test([*of_both.values()], rows, options.bootstrap, options.seed)
    figures, comparisons = [], []
    for number, name in enumerate(metrics):
        ours, theirs = distributions[number], distributions[len(metrics) + number]
        figure = _figure(name, metrics[name], rows, ours)
        other = _figure(name, others[name], rows, theirs)
        value = None if figure.value is None or other.value is None else figure.value - other.value
        interval = percentile_interval(ours - theirs, rows)
        mcnemar = None
        if CORPUS_METRICS[name].is_proportion:
            is_right, is_other_right = (each[name].statistics[:, 0] > 0 for each in (metrics, others))
            mcnemar = mcnemar_test(
                int((is_right & ~is_other_right).sum()), int((is_other_right & ~is_right).sum())
            )
        difference = MetricValue(name, value, *(interval or (None, None)))
        figures.append(figure)
        comparisons.append(Comparison(other, difference, _known(float(p_values[number])), mcnemar))
    return tuple(figures), tuple(comparisons)


def _groups(grouping: Grouping, metrics: Mapping[str, Statistic], options: EvaluateOptions) -> list[Group]:
    groups = []
    for code, name in enumerate(grouping.names):
        rows = np.flatnonzero(grouping.codes == code)
        parts = {metric: statistic.of(rows) for metric, statistic in metrics.items()}
        groups.append(Group(grouping.title, name, len(rows), _figures(parts, len(rows), options)))
    return groups


def _confusion(answers: Answers, names: Sequence[str]) -> Confusion | None:
    few = len({reference.strip() for reference in answers.references}) <= MOST_CONFUSED
    if not few or not set(names) & set(ON_LABELS):
        return None
    labels, counts = confusion(answers)
    return Confusion(tuple(labels), tuple(tuple(row) for row in counts.tolist()))


# --- rows ----------------------------------------------------------------------------------------------


def _right(answers: Answers, manner: Manner, names: Sequence[str]) -> tuple[str, np.ndarray]:
    """By which rule a row is right, and which rows are, `[rows]`."""
    if manner.separator:
        return "same labels", is_same_set(answers, manner)
    if set(names) & set(ON_LABELS):
        return "accuracy", is_exact(answers, manner)
    return "exact-match", is_match(answers, manner)


def _edits(answers: Answers, manner: Manner, measures: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    """The unit of rows' errors, and `[rows, 2]`: errors and length of the reference."""
    unit = WORD if "wer" in measures else CHARACTER if "cer" in measures else manner.unit
    name = "wer" if unit == WORD else "cer"
    measure = measures[name] if name in measures else CORPUS_METRICS[name].build(answers, manner)
    return unit, measure.statistics


def _rows(
    pairs: Pairs, right: np.ndarray, counts: np.ndarray, groupings: Sequence[Grouping]
) -> tuple[RowResult, ...]:
    answers, columns = pairs.answers, list(pairs.columns)
    cells = zip(*pairs.columns.values(), strict=True)
    return tuple(
        RowResult(
            line=pairs.table.lines[row],
            cells=dict(zip(columns, row_cells, strict=True)),
            reference=answers.references[row],
            prediction=answers.predictions[row],
            failed=bool(answers.failed[row]),
            is_right=bool(right[row]),
            errors=int(counts[row, 0]),
            length=int(counts[row, 1]),
            groups={each.title: each.names[each.codes[row]] for each in groupings},
        )
        for row, row_cells in enumerate(cells)
    )


# --- what is told --------------------------------------------------------------------------------------


def _settings(
    options: EvaluateOptions, manner: Manner, right: str, unit: str, names: Sequence[str]
) -> dict[str, Any]:
    return {
        "input": options.input,
        "reference": options.reference,
        "compare": options.compare,
        "normalize": options.normalize,
        "bleu_tokenize": manner.tokenize,
        "right_by": right,
        "errors_in": unit,
        "bootstrap": options.bootstrap,
        "seed": options.seed,
        "intervals": {name: WILSON if CORPUS_METRICS[name].is_proportion else PERCENTILE for name in names},
        "paired_test": "permutation",
        "versions": versions(),
    }


def _notes(
    options: EvaluateOptions, names: Sequence[str], manner: Manner, answers: Answers
) -> list[Localized]:
    listed = ", ".join(names)
    notes = []
    if not options.metric:
        notes.append(
            Localized("metrics chosen from the data: {listed}; --metric chooses others", listed=listed)
        )
    if {"wer", "cer", "exact-match"} & set(names):
        notes.append(_about_normalisation(options.normalize))
    if "bleu" in names:
        notes.append(Localized("BLEU tokenises by {tokenize}", tokenize=manner.tokenize))
    if "map" in names and answers.scores is None:
        notes.append(
            Localized("map without a column of scores: every predicted label counts alike, so it is coarse")
        )
    return notes


def _about_normalisation(normalize: bool) -> Localized:
    if normalize:
        return Localized(
            "compared after NFKC, case folding and removal of punctuation (--normalize false: as they are)"
        )
    return Localized("texts are compared as they are")


def _write(output: Path, evaluation: Evaluation, options: EvaluateOptions) -> None:
    """Write the file, whole or not at all, and the options beside it."""
    text = as_json(evaluation) if output.suffix.lower() == ".json" else as_csv(evaluation)
    with removing_empty(output.parent):
        for path, content in (
            (output, text),
            (output.with_name(f"{output.name}.{SETTINGS_FILE}"), to_yaml(options)),
        ):
            with report_write_errors(f"--output {path}", InputError), replace_file(path) as work:
                work.write_text(content, encoding="utf-8", newline="")
    say("written: {output}", output=output)
