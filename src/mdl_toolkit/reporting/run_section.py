"""The values that the page shows of a training: settings, data, curves, evaluations, outcome."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdl_toolkit.config.options import fields_in_order, spec_of, spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, read_settings, word_of
from mdl_toolkit.errors import InputError, ModelError
from mdl_toolkit.evaluation.text_metrics import LOSS, TEXT_METRICS, Best
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import refuse_devices
from mdl_toolkit.utils.run_folder import LOG, SmoothedLoss, read_log, series
from mdl_toolkit.weights.provenance import read_provenance

# Of a curve with more points than this, neighbours become their mean.
MOST_POINTS = 2000
# Significant digits of a point.
POINT_DIGITS = 6
TRAINED, EVALUATED = Localized("training"), Localized("evaluation")
SYSTEM, USER = Localized("system prompt"), Localized("user prompt")
FIGURES = {
    "rows": Localized("rows"),
    "hours": Localized("hours of audio"),
    "shortest_seconds": Localized("shortest recording, seconds"),
    "longest_seconds": Localized("longest recording, seconds"),
    "median_tokens": Localized("tokens of a row, median"),
    "most_tokens": Localized("tokens of a row, most"),
}


def _provenance_values(folder: Path) -> dict[str, Any]:
    """Return base, prompts and data as the run recorded them; empty where the record is missing."""
    provenance = None
    with suppress(ModelError):
        provenance = read_provenance(folder)
    if provenance is None:
        return {"base": None, "prompts": [], "data": []}
    prompts = [(SYSTEM, provenance.prompts.system), (USER, provenance.prompts.user)]
    data = []
    for title, prefix in ((TRAINED, ""), (EVALUATED, "evaluation_")):
        figures = [
            {"title": label.to_json(), "value": provenance.data[prefix + name]}
            for name, label in FIGURES.items()
            if prefix + name in provenance.data
        ]
        if figures:
            data.append({"title": title.to_json(), "figures": figures})
    return {
        "base": provenance.base and provenance.base.name,
        "prompts": [{"title": title.to_json(), "text": text} for title, text in prompts if text],
        "data": data,
    }


def run_values(folder: Path) -> dict[str, Any]:
    """Return the part `run` of a page.

    Raises:
        InputError: the folder is no training's output.
    """
    refuse_devices(folder, InputError)
    if not any((folder / name).is_file() for name in (LOG, SETTINGS_FILE)):
        raise InputError(
            "{folder}: neither {log} nor {file} is in it; give the --output of a training",
            folder=folder,
            log=LOG,
            file=SETTINGS_FILE,
        )
    lines = read_log(folder / LOG) if (folder / LOG).is_file() else []
    evaluated = [line for line in lines if "eval_loss" in line]
    metrics = [name for name in TEXT_METRICS if any(f"eval_{name}" in line for line in evaluated)]
    steps, losses = series(lines, "loss")
    smooth = SmoothedLoss()
    smoothed = [smooth.add(loss) for loss in losses]
    curves = {
        "loss": _points(steps, losses),
        "smoothed": _points(steps, smoothed),
        "eval_loss": _points(*series(lines, "eval_loss")),
        "learning_rate": _points(*series(lines, "learning_rate")),
        "metrics": {name: _points(*series(lines, f"eval_{name}")) for name in metrics},
    }
    # The page's names of the logged values.
    keys = {"step": "step", "epoch": "epoch", "evalLoss": "eval_loss"}
    keys |= {name: f"eval_{name}" for name in metrics}
    # Of several evaluation sets.
    keys |= {
        name.removeprefix("eval_"): name
        for line in evaluated
        for name in line
        if name.startswith("eval_loss_")
    }
    return {
        "settings": _option_values(folder),
        **_provenance_values(folder),
        "curves": curves if lines else None,
        "evaluations": [
            {name: line[key] for name, key in keys.items() if key in line and math.isfinite(line[key])}
            for line in evaluated
        ],
        "outcome": _outcome(evaluated, metrics, steps[-1], smoothed[-1]) if steps else [],
    }


def _option_values(folder: Path) -> list[dict[str, Any]]:
    """Return every option in the order of the reference; those that are not the default are marked."""
    try:
        values = read_settings(folder / SETTINGS_FILE, TrainOptions)
    except InputError:
        # They are of a version with other options.
        return []
    return [
        {
            "name": spelling(field.name),
            "value": ", ".join(map(word_of, value)) if isinstance(value, tuple) else word_of(value),
            "is_changed": value != field.default,
            "help": spec_of(field).help.to_json(),
        }
        for field in fields_in_order(TrainOptions)
        if field.name in values
        for value in (values[field.name],)
    ]


def _points(steps: Sequence[int], values: Sequence[float]) -> dict[str, list[float]]:
    """Return a curve with at most `MOST_POINTS` points; values that are not finite are left out."""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    size = math.ceil(len(known) / MOST_POINTS) or 1
    groups = [known[start : start + size] for start in range(0, len(known), size)]
    means = [sum(value for _, value in group) / len(group) for group in groups]
    return {
        "x": [group[-1][0] for group in groups],
        "y": [float(f"{mean:.{POINT_DIGITS}g}") for mean in means],
    }


def _outcome(
    evaluated: Sequence[dict[str, Any]], metrics: Sequence[str], steps: int, smoothed: float
) -> list[dict[str, Any]]:
    """Return the last values of the run, and the best ones of its evaluations."""
    outcome: list[dict[str, Any]] = [
        {"title": Localized("steps").to_json(), "value": steps},
        {"title": Localized("training loss, smoothed").to_json(), "value": smoothed},
    ]
    for metric in (LOSS, *(TEXT_METRICS[name] for name in metrics)):
        name, best = f"eval_{metric.name}", Best()
        measured = [line for line in evaluated if name in line]
        for line in measured:
            if math.isfinite(line[name]):
                best = best.after(metric, line["step"], line[name], line["eval_loss"])
        if best.step is not None:
            title = Localized("evaluation {metric}", metric=metric.title).to_json()
            best_value = {"value": best.value, "step": best.step}
            outcome.append({"title": title, "value": measured[-1][name], "best": best_value})
    return [each for each in outcome if math.isfinite(each["value"])]
