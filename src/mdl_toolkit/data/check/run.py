"""A dry run over CSVs: decode every recording, render every conversation, and say what was found.

No weights are loaded and no GPU is used. Memory grows by some 60 bytes with each row.
"""

import itertools
import json
import secrets
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mdl_toolkit import __version__
from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.config.data import CheckOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, from_mapping, read_settings, to_yaml
from mdl_toolkit.data.chat_template import messages_of
from mdl_toolkit.data.check.findings import Figures, Findings
from mdl_toolkit.data.check.rows import Facts, Inspection
from mdl_toolkit.data.check.text import report_lines
from mdl_toolkit.data.convert.rank import FEW_ROWS
from mdl_toolkit.data.convert.run import read_rows
from mdl_toolkit.data.manifest import Manifest
from mdl_toolkit.data.open_audio import Recordings
from mdl_toolkit.data.tokenization import ChatTokenizer, prefix_sample
from mdl_toolkit.errors import InputError, ModelError
from mdl_toolkit.i18n import Localized, Verbatim, join_messages
from mdl_toolkit.utils.console import progress, warn
from mdl_toolkit.utils.files import check_apart, replace_file, report_write_errors
from mdl_toolkit.utils.machine import default_workers
from mdl_toolkit.utils.worker_pool import work_through
from mdl_toolkit.weights.resolve import find_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

if TYPE_CHECKING:
    from mdl_toolkit.config.train import TrainOptions

JOB_ROWS = 32  # that a worker is given at once
STANDARD_OUTPUT = True  # what `--json` alone means
# From a model's folder, options, the rows' lengths and how many tokens all of them begin with, figures.
Forecast = Callable[[Path, "TrainOptions", Facts, int], Figures | None]


def check(options: CheckOptions, forecast: Forecast | None = None) -> Figures:
    """Look at all rows of all files and report on standard output.

    Args:
        options: what to look at, and where to write what is found.
        forecast: what a training on the first file would need, if that is to be said.

    Returns:
        What was found, as the JSON has it.

    Raises:
        InputError: something would stop a training; or a CSV or a file to write cannot be used.
        ModelError: the model's folder is here, and broken.
    """
    _check_places(options)
    training = None if options.for_inference else _train_options(options)
    manifests = [
        read_rows(path, options, needs_prediction=not options.for_inference) for path in options.input
    ]
    folder, tokenizer = _text_side(options)
    found = _look(manifests, tokenizer, options)
    figures = _figures(found, tokenizer, options)
    if tokenizer is not None:
        figures["sample"] = _sample(manifests[0], tokenizer, set(found[0].bad_lines), options)
    if folder is not None and training is not None and forecast is not None:
        beginning = 0 if tokenizer is None else _beginning(manifests[0], tokenizer, found[0])
        figures["training"] = forecast(folder, training, found[0].facts(), beginning)
    if options.write_fixed is not None:
        figures["fixed"] = _write_fixed(Path(options.write_fixed), manifests[0], found[0], options)
    _tell(figures, options.json)
    _judge(figures)
    return figures


def _check_places(options: CheckOptions) -> None:
    """Refuse to write over an input, or two things to one place."""
    named = (("--write-fixed", options.write_fixed), ("--json", options.json))
    places = [(name, Path(place)) for name, place in named if isinstance(place, str)]
    for name, place in places:
        for path in options.input:
            check_apart(place, Path(path), name)
    if len(places) == 2:
        check_apart(places[0][1], places[1][1], "--write-fixed", "--json")


def _train_options(options: CheckOptions) -> "TrainOptions":
    """Return the options of the training that is predicted, with the files and the model of the check."""
    from mdl_toolkit.config.train import TrainOptions

    config = options.train_config
    given = {} if config is None else read_settings(config, TrainOptions, "--train-config")
    ours = {"train_dataset": options.input[0], "output": ".", "model_name": options.model_name}
    return from_mapping(TrainOptions, {**given, **ours})


def _text_side(options: CheckOptions) -> tuple[Path | None, ChatTokenizer | None]:
    """Return the model's folder and its tokenizer; nothing if the model cannot be had."""
    try:
        folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=False)
    except ModelError as problem:
        if Path(options.model_name).expanduser().is_dir():
            raise
        warn(
            "counting characters in place of tokens, with no look at --max-length and no forecast of "
            "memory: {reason}",
            reason=problem.message,
        )
        return None, None
    return folder, ChatTokenizer(read_tokenizer_files(folder))


# --- all rows ------------------------------------------------------------------------------------------


def _look(
    manifests: list[Manifest], tokenizer: ChatTokenizer | None, options: CheckOptions
) -> list[Findings]:
    """Inspect each file; recordings fetched from addresses are kept as long as that takes."""
    with tempfile.TemporaryDirectory(prefix="mdl-toolkit-check-") as place:
        cache = Path(options.download_cache or place).expanduser()
        downloads = Downloads(cache, options.max_download_mb, secrets.token_hex(8))
        task = Inspection(
            Recordings(downloads, options.allow_truncated), tokenizer, not options.for_inference,
            options.max_length if options.for_inference and tokenizer is not None else None,
            options.tokenizing_batch_size,
        )  # fmt: skip
        return [_look_at(manifest, number, task, options) for number, manifest in enumerate(manifests)]


def _look_at(manifest: Manifest, number: int, task: Inspection, options: CheckOptions) -> Findings:
    """Inspect one file.

    Raises:
        InputError: there is no row in it, or it is no CSV from some line on.
    """
    role = "inference" if options.for_inference else "evaluation" if number else "training"
    found, rows = Findings(str(manifest.path), role), sum(1 for _ in manifest.rows_unchecked())
    workers = options.num_workers or default_workers() if rows >= FEW_ROWS else 1
    with progress(rows, "checking") as shown:
        readable = found.readable_rows(manifest)
        jobs = iter(lambda: list(itertools.islice(readable, JOB_ROWS)), [])
        with closing(work_through(jobs, task, min(workers, -(-rows // JOB_ROWS) or 1))) as messages:
            for message in messages:
                found.add(message)
                shown.advance(message.rows)
    if not found.rows and not found.bad_lines and not options.for_inference:
        raise manifest.no_rows()
    return found


# --- what follows from it ------------------------------------------------------------------------------


def _figures(found: list[Findings], tokenizer: ChatTokenizer | None, options: CheckOptions) -> Figures:
    warn_above = None if options.for_inference or tokenizer is None else options.max_length
    learnt = found[0].facts() if found[0].role == "training" else None
    return {
        "toolkit": __version__,
        "model": options.model_name,
        "counted": "characters" if tokenizer is None else "tokens",
        "max_length": options.max_length,
        "files": [each.figures(learnt if each.role == "evaluation" else None, warn_above) for each in found],
        "sample": None,
        "training": None,
        "fixed": None,
    }


def _sample(
    manifest: Manifest, tokenizer: ChatTokenizer, bad: set[int], options: CheckOptions
) -> Figures | None:
    """Return the first usable row, as the model sees it."""
    row = next((row for row in manifest.rows() if row.line not in bad), None)
    if row is None:
        return None
    segments = tokenizer.template.segments(messages_of(row, with_answer=not options.for_inference))
    return {"line": row.line, "segments": [{"kind": each.kind, "text": each.text} for each in segments]}


def _beginning(manifest: Manifest, tokenizer: ChatTokenizer, found: Findings) -> int:
    """Count the tokens before the audio that all usable rows share."""
    bad, chosen = {*found.bad_lines}, {*prefix_sample(found.rows)}
    usable = (row for row in manifest.rows() if row.line not in bad)
    rows = (row for number, row in enumerate(usable) if number in chosen)
    return tokenizer.shared_prefix_length(
        tokenizer.encode_row(row, 1, with_answer=True).input_ids for row in rows
    )


def _write_fixed(output: Path, manifest: Manifest, found: Findings, options: CheckOptions) -> Figures:
    """Write a CSV without the rows that cannot be used, if any is left.

    Raises:
        InputError: it cannot be written.
    """
    lines = set(found.bad_lines)
    if found.rows:
        with report_write_errors(f"--write-fixed {output}", InputError):
            with replace_file(output) as work, work.open("wb") as file:
                manifest.copy_without(lines, file)
            with replace_file(output.with_name(f"{output.name}.{SETTINGS_FILE}")) as work:
                work.write_text(to_yaml(options), encoding="utf-8")
    return {"path": str(output), "rows": found.rows, "left_out": len(lines)}


# --- the report ----------------------------------------------------------------------------------------


def _tell(figures: Figures, place: bool | str | None) -> None:
    """Write the report to standard output, as text or JSON, and the JSON to its file."""
    if place is STANDARD_OUTPUT:
        _write_json(figures, sys.stdout)
        return
    if isinstance(place, str):
        with (
            report_write_errors(f"--json {place}", InputError),
            replace_file(Path(place)) as work,
            work.open("w", encoding="utf-8") as file,
        ):
            _write_json(figures, file)
    for line in report_lines(figures, coloured=sys.stdout.isatty()):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _write_json(figures: Figures, file: TextIO) -> None:
    json.dump(figures, file, ensure_ascii=False, indent=2, allow_nan=False)
    file.write("\n")


def _judge(figures: Figures) -> None:
    """Raise InputError if something would stop a training or inference."""
    bad = [(file["path"], file["bad"]["rows"]) for file in figures["files"] if file["bad"]["rows"]]
    reasons = [Localized("{path}: {rows} rows cannot be used", path=path, rows=rows) for path, rows in bad]
    problem = (figures["training"] or {}).get("problem")
    if problem:
        reasons.append(Verbatim(**problem))
    if reasons:
        raise InputError(join_messages(reasons, "{left}; {right}"))
