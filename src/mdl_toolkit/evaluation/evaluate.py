"""Evaluation of predictions: metrics, intervals, groups of rows, and the comparison of two systems.

No model, no torch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.errors import UsageError
from mdl_toolkit.evaluation.align import AlignedAnswers, align_answers, group_rows
from mdl_toolkit.evaluation.answers import Answers, ScoringRules, concatenate, correct_rows
from mdl_toolkit.evaluation.bootstrap import (
    Interval,
    bootstrap_distribution,
    mcnemar_test,
    percentile_interval,
    permutation_test,
    point_estimate,
    wilson_interval,
)
from mdl_toolkit.evaluation.csv_table import SCORE
from mdl_toolkit.evaluation.label_metrics import check_scores, confusion_counts
from mdl_toolkit.evaluation.metrics import CORPUS_METRICS, library_versions
from mdl_toolkit.evaluation.results import (
    Comparison,
    Confusion,
    Evaluation,
    Group,
    MetricValue,
    RowResult,
    write_results,
)
from mdl_toolkit.evaluation.text_metrics import CHARACTER, WORD, WORDLESS
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import check_apart, check_file

# Distinct references beyond which they are texts, unless a metric of labels is asked for.
MOST_LABELS = 50
# Labels beyond which there is no confusion table.
MOST_CONFUSED = 200
LABEL_METRICS = {"accuracy", "macro-f1"}
WILSON, PERCENTILE = "Wilson score", "expanded percentile bootstrap"


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Compare predictions with references, and write the files of `--output`.

    Raises:
        UsageError: `map` without `--label-separator`.
        InputError: files that cannot be read, joined or written; a column that is not there.
    """
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
    aligned = align_answers(options)
    references = aligned.answers.references
    rules = ScoringRules.of(references, options)
    names = options.metric or _suitable_metrics(references, rules)
    if "map" in names:
        for path, answers in ((options.input, aligned.answers), (options.compare, aligned.other)):
            if path is not None and answers is not None:
                check_scores(path, options.score_column or SCORE, answers, rules)
    evaluation = _compute(aligned, rules, names, options)
    for note in evaluation.notes:
        say(note)
    for output in options.output:
        write_results(Path(output), evaluation, options)
        say("written: {output}", output=output)
    return evaluation


def _suitable_metrics(references: Sequence[str], rules: ScoringRules) -> tuple[str, ...]:
    """Choose metrics: of labels where references repeat, else of texts."""
    if rules.label_separator:
        return ("map",)
    labels = len({reference.strip() for reference in references})
    if labels <= MOST_LABELS and 2 * labels <= len(references):
        return "accuracy", "macro-f1"
    return ("cer",) if rules.is_spaceless else ("wer", "cer")


def _compute(
    aligned: AlignedAnswers, rules: ScoringRules, names: Sequence[str], options: EvaluateOptions
) -> Evaluation:
    """Compute the metrics of all rows and of groups, and the results of each row."""
    answers, rows = aligned.answers, len(aligned.table)
    both = answers if aligned.other is None else concatenate(answers, aligned.other)
    statistics = {name: CORPUS_METRICS[name].build(both, rules) for name in names}
    values = _score(statistics, np.arange(rows), rows, options)
    groups: list[Group] = []
    groups_of_row: list[dict[str, str]] = [{} for _ in range(rows)]
    for title, groups_by_name in (group_rows(aligned, name) for name in options.group_by):
        for name, members in groups_by_name.items():
            groups.append(Group(title, name, len(members), _score(statistics, members, rows, options)))
            for row in members:
                groups_of_row[row][title] = name
    are_labels = not LABEL_METRICS.isdisjoint(names)
    right_by = "same labels" if rules.label_separator else "accuracy" if are_labels else "exact-match"
    unit = WORD if "wer" in names else CHARACTER if "cer" in names else rules.unit
    error_rate = "wer" if unit == WORD else "cer"
    errors = statistics.get(error_rate) or CORPUS_METRICS[error_rate].build(answers, rules)
    confusion = None
    if are_labels and len({reference.strip() for reference in answers.references}) <= MOST_CONFUSED:
        labels, counts = confusion_counts(answers)
        confusion = Confusion(tuple(labels), tuple(map(tuple, counts.tolist())))
    is_right = correct_rows(answers, rules, right_by)
    ((most_frequent, count),) = Counter(map(str.strip, answers.references)).most_common(1)
    return Evaluation(
        rows=_row_results(aligned, is_right, errors.statistics[:rows], groups_of_row),
        metrics=values,
        groups=tuple(groups),
        confusion=confusion,
        most_frequent=(most_frequent, count / rows) if "accuracy" in names else None,
        settings={**_settings(options, rules, names), "right_by": right_by, "errors_in": unit},
        notes=(*aligned.notes, *_notes(options, names, rules, both)),
    )


# --- values of metrics ---------------------------------------------------------------------------------


def _score(
    statistics: Mapping[str, Any], members: np.ndarray, rows: int, options: EvaluateOptions
) -> tuple[MetricValue, ...]:
    """Compute metrics over some rows of one system, or of two, which have `rows` rows each."""
    count, starts = len(members), [0] if options.compare is None else [0, rows]
    systems = [{name: each.subset(members + start) for name, each in statistics.items()} for start in starts]
    parts = [each for system in systems for each in system.values()]
    distributions = bootstrap_distribution(parts, count, options.bootstrap, options.seed)
    distributions = distributions.reshape(len(systems), len(statistics), -1)
    values = [
        tuple(_metric_value(name, each, count, drawn) for (name, each), drawn in zip(*pair, strict=True))
        for pair in zip([system.items() for system in systems], distributions, strict=True)
    ]
    if options.compare is None:
        return values[0]
    p_values = np.full(len(statistics), np.nan)
    if options.bootstrap:
        both = [each.subset(np.concatenate([members, members + rows])) for each in statistics.values()]
        p_values = permutation_test(both, count, options.bootstrap, options.seed)
    compared = []
    for value, other, drawn, p_value in zip(
        *values, distributions[0] - distributions[1], p_values, strict=True
    ):
        difference = None if value.value is None or other.value is None else value.value - other.value
        mcnemar = None
        if CORPUS_METRICS[value.metric].is_proportion:
            ours, theirs = (system[value.metric].statistics[:, 0] for system in systems)
            mcnemar = mcnemar_test(int((ours > theirs).sum()), int((ours < theirs).sum()))
        low, high = percentile_interval(drawn, count) or (None, None)
        pair = Comparison(other.value, difference, low, high, _finite(float(p_value)), mcnemar)
        compared.append(replace(value, comparison=pair))
    return tuple(compared)


def _metric_value(name: str, statistic: Any, rows: int, distribution: np.ndarray) -> MetricValue:
    """Compute a metric with its interval: Wilson's for a proportion, else the bootstrap's."""
    interval: Interval | None = percentile_interval(distribution, rows)
    if CORPUS_METRICS[name].is_proportion and len(distribution):
        interval = wilson_interval(int(statistic.statistics[:, 0].sum()), rows)
    return MetricValue(name, _finite(point_estimate(statistic, rows)), *(interval or (None, None)))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


# --- rows, settings, notes -----------------------------------------------------------------------------


def _row_results(
    aligned: AlignedAnswers, is_right: np.ndarray, errors: np.ndarray, groups: Sequence[Mapping[str, str]]
) -> tuple[RowResult, ...]:
    """Collect the results of each row: `errors` holds its edits and its reference's length, `[rows, 2]`."""
    answers, columns = aligned.answers, list(aligned.columns)
    cells = zip(*aligned.columns.values(), strict=True)
    return tuple(
        RowResult(
            line=aligned.table.lines[row],
            cells=dict(zip(columns, row_cells, strict=True)),
            reference=answers.references[row],
            prediction=answers.predictions[row],
            failed=bool(answers.failed[row]),
            is_right=bool(is_right[row]),
            errors=int(errors[row, 0]),
            length=int(errors[row, 1]),
            groups=groups[row],
        )
        for row, row_cells in enumerate(cells)
    )


def _settings(options: EvaluateOptions, rules: ScoringRules, names: Sequence[str]) -> dict[str, Any]:
    """Name the options, rules and libraries by which metrics are computed."""
    return {
        "input": options.input,
        "reference": options.reference,
        "compare": options.compare,
        "normalize": options.normalize,
        "bleu_tokenize": rules.bleu_tokenizer,
        "bootstrap": options.bootstrap,
        "seed": options.seed,
        "intervals": {name: WILSON if CORPUS_METRICS[name].is_proportion else PERCENTILE for name in names},
        "paired_test": "permutation",
        "versions": library_versions(),
    }


def _notes(
    options: EvaluateOptions, names: Sequence[str], rules: ScoringRules, answers: Answers
) -> list[Localized]:
    """Tell how metrics were chosen and texts compared."""
    notes = []
    if not options.metric:
        listed = ", ".join(names)
        notes.append(
            Localized("metrics chosen from the data: {listed}; --metric chooses others", listed=listed)
        )
    if {"wer", "cer", "exact-match"} & set(names):
        normalized = Localized(
            "compared after NFKC, case folding and removal of punctuation (--normalize false: as they are)"
        )
        notes.append(normalized if options.normalize else Localized("texts are compared as they are"))
    if "wer" in names and rules.is_spaceless:
        notes.append(Localized("warning: {message}", message=WORDLESS))
    if "bleu" in names:
        notes.append(Localized("BLEU tokenises by {tokenize}", tokenize=rules.bleu_tokenizer))
    if "map" in names and answers.scores is None:
        notes.append(
            Localized("map without a column of scores: every predicted label counts alike, so it is coarse")
        )
    return notes
