"""A dry run over CSVs: decode every recording, render every conversation, and report the findings.

No weights are loaded and no GPU is used. Memory grows by some 90 bytes with each row.
"""

import dataclasses
import json
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdl_toolkit import __version__
from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.config.data import CheckOptions, ConversionOptions
from mdl_toolkit.config.yaml import from_mapping, read_settings
from mdl_toolkit.data.chat_template import messages_of
from mdl_toolkit.data.check.findings import Figures, Findings
from mdl_toolkit.data.check.fixed import cut_facts, write_fixed
from mdl_toolkit.data.check.rows import Facts, Inspection
from mdl_toolkit.data.check.text import report_lines
from mdl_toolkit.data.convert.plan import TOGETHER_BYTES, expected_bytes
from mdl_toolkit.data.convert.run import FEW_ROWS
from mdl_toolkit.data.manifest import Manifest, Row, read_manifest
from mdl_toolkit.data.open_audio import Recordings
from mdl_toolkit.data.tokenization import ChatTokenizer, prefix_sample
from mdl_toolkit.errors import InputError, ModelError, UsageError
from mdl_toolkit.i18n import Localized, Verbatim, join_messages
from mdl_toolkit.utils.console import progress, warn
from mdl_toolkit.utils.files import check_apart, check_file, replace_file, report_write_errors
from mdl_toolkit.utils.machine import default_workers
from mdl_toolkit.utils.worker_pool import end_unguarded_script, work_through
from mdl_toolkit.weights.resolve import find_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

if TYPE_CHECKING:
    from mdl_toolkit.config.train import TrainOptions

# Rows that a worker is given at once: rows of segments, and those of one recording, are not torn apart.
JOB_ROWS, SEGMENT_ROWS = 32, 1024
# The value of `--json` without a path.
STANDARD_OUTPUT = True
# Predicts a training from the model's folder, its options, the rows' facts and their shared prefix's length.
Forecast = Callable[[Path, "TrainOptions", Facts, int], Figures | None]


def check(options: CheckOptions, forecast: Forecast | None = None) -> Figures:
    """Inspect all rows of all files and report on standard output.

    Args:
        options: the files to inspect, and where to write the findings.
        forecast: predicts the needs of a training on the first file; None leaves them out.

    Returns:
        The figures of the report, as the JSON has them.

    Raises:
        InputError: something would stop a training; or a CSV or a file to write cannot be used.
        ModelError: the model's folder is here, and broken.
    """
    end_unguarded_script()
    outputs = _outputs(options)
    training = None if options.for_inference else _training_options(options)
    if training is not None:
        model, from_modelscope = training.model_name, training.from_modelscope
        options = dataclasses.replace(options, model_name=model, from_modelscope=from_modelscope)
    manifests = [
        read_manifest(path, options, needs_prediction=not options.for_inference) for path in options.input
    ]
    for name, output in outputs.items():
        check_file(output, [file for manifest in manifests for file in manifest.file.files], name)
    folder, tokenizer = _find_tokenizer(options)
    # Recordings fetched from addresses are kept while all files are inspected.
    with tempfile.TemporaryDirectory(prefix="mdl-toolkit-check-") as temporary:
        cache = Path(options.download_cache or temporary).expanduser()
        downloads = Downloads(cache, options.max_download_mb, secrets.token_hex(8))
        recordings = Recordings(downloads, options.allow_truncated, options.max_audio_hours)
        findings = [
            _inspect_file(manifest, number, recordings, tokenizer, options)
            for number, manifest in enumerate(manifests)
        ]
    figures = _figures(findings, manifests[0], tokenizer, options)
    if folder is not None and tokenizer is not None and training is not None and forecast is not None:
        chosen = {*prefix_sample(findings[0].rows)}
        usable = enumerate(_usable_rows(manifests[0], findings[0]))
        prefix_length = tokenizer.shared_prefix_length(
            tokenizer.encode_row(row, 1, with_answer=True).input_ids
            for number, row in usable
            if number in chosen
        )
        figures["training"] = forecast(
            folder, training, cut_facts(findings[0].facts(), options), prefix_length
        )
    _report(figures, manifests[0], findings[0], options)
    return figures


def _outputs(options: CheckOptions) -> dict[str, Path]:
    """Return the files that are to be written, by option.

    Raises:
        UsageError: `--cut` has nothing to act on.
        InputError: one of them must not be written.
    """
    if options.cut is not None and (options.write_fixed is None or options.for_inference):
        raise UsageError(
            "--cut is for rows to train on, and acts on what --write-fixed writes; long recordings are "
            "answered by `inference --window`"
        )
    named = (("--write-fixed", options.write_fixed), ("--json", options.json))
    outputs = {name: Path(path) for name, path in named if isinstance(path, str)}
    for name, output in outputs.items():
        check_file(output, options.input, name)
    if len(outputs) == 2:
        check_apart(outputs["--write-fixed"], outputs["--json"], "--write-fixed", "--json")
    return outputs


def _training_options(options: CheckOptions) -> "TrainOptions":
    """Return the options of the training that is predicted, with the files and the model of the check."""
    from mdl_toolkit.config.train import TrainOptions

    config = options.train_config
    given = {} if config is None else read_settings(config, TrainOptions, "--train-config")
    ours: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(ConversionOptions)
        if getattr(options, field.name) != field.default
    }
    if options.given(["model_name"]):
        ours["model_name"] = options.model_name
    if len(options.input) > 1:
        ours["eval_dataset"] = options.input[1:]
    ours["train_dataset"] = options.write_fixed or options.input[0]
    if isinstance(named := given.get("train_dataset"), tuple):
        warn(
            "--train-config {config}: the training is predicted on {input} alone, not on the {count} "
            "datasets of its train_dataset; to train on them, name them in the command instead",
            config=config,
            input=options.input[0],
            count=len(named),
        )
    return from_mapping(TrainOptions, {"output": "run", **given, **ours}, {*given, *ours})


def _find_tokenizer(options: CheckOptions) -> tuple[Path | None, ChatTokenizer | None]:
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


def _inspect_file(
    manifest: Manifest,
    number: int,
    recordings: Recordings,
    tokenizer: ChatTokenizer | None,
    options: CheckOptions,
) -> Findings:
    """Inspect the rows of one file in worker processes, and return the findings.

    Raises:
        InputError: there is no row in it, or it is no CSV from some line on.
    """
    role = "inference" if options.for_inference else "evaluation" if number else "training"
    inspection = Inspection(
        recordings,
        tokenizer,
        with_answer=not options.for_inference,
        limit=options.max_length if options.for_inference and tokenizer is not None else None,
        rows_per_step=options.tokenizing_batch_size,
    )
    findings, rows = Findings(str(manifest.file.path), role), manifest.file.rows
    workers = options.num_workers or default_workers() if rows >= FEW_ROWS else 1
    workers = min(workers, -(-rows // JOB_ROWS) or 1)
    readable = findings.readable_rows(manifest)
    jobs = _jobs(readable)
    with progress(rows, "checking") as bar, closing(work_through(jobs, inspection, workers)) as reports:
        for inspected in reports:
            findings.add(inspected)
            bar.advance(inspected.rows)
    if not findings.rows and not findings.bad_lines and not options.for_inference:
        raise manifest.no_rows()
    return findings


def _jobs(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Group rows for the workers, each of which decodes a recording of a group once."""
    job: list[Row] = []
    size = 0
    for row in rows:
        belongs = job and (not row.segment.is_whole or row.audio == job[-1].audio)
        if len(job) >= (SEGMENT_ROWS if belongs else JOB_ROWS) or size > TOGETHER_BYTES:
            yield job
            job, size = [], 0
        job.append(row)
        size += expected_bytes(row)
    if job:
        yield job


def _usable_rows(manifest: Manifest, findings: Findings) -> Iterator[Row]:
    """Yield the rows of a file in which no problem was found."""
    bad_lines = {*findings.bad_lines}
    return (row for row in manifest.rows() if row.line not in bad_lines)


def _figures(
    findings: list[Findings], first: Manifest, tokenizer: ChatTokenizer | None, options: CheckOptions
) -> Figures:
    """Return the figures of all files, with the first usable row as the model sees it."""
    warn_above = None if options.for_inference or tokenizer is None else options.max_length
    trained = findings[0].facts() if findings[0].role == "training" else None
    files = [file.figures(trained if file.role == "evaluation" else None, warn_above) for file in findings]
    sample = None
    if tokenizer is not None and (row := next(iter(_usable_rows(first, findings[0])), None)):
        messages = messages_of(row, with_answer=not options.for_inference)
        spans = tokenizer.template.spans(messages)
        shown = [{"kind": span.kind, "text": span.text} for span in spans]
        sample = {"line": row.line, "segments": shown}
    return {
        "toolkit": __version__,
        "model": options.model_name,
        "counted": "characters" if tokenizer is None else "tokens",
        "max_length": options.max_length,
        "files": files,
        "sample": sample,
        "training": None,
        "fixed": None,
    }


def _report(figures: Figures, manifest: Manifest, findings: Findings, options: CheckOptions) -> None:
    """Write the CSV without the unusable rows and the report, as text or JSON, as the options ask for.

    Raises:
        InputError: a file cannot be written; or something would stop a training or inference.
    """
    if options.write_fixed is not None:
        figures["fixed"] = write_fixed(Path(options.write_fixed), manifest, findings, options)
    if options.json is not None and options.json is not False:
        text = json.dumps(figures, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        # Names of files need not be text; JSON escapes such bytes as Python does.
        text = text.encode("utf-8", "backslashreplace").decode()
        if isinstance(options.json, str):
            with (
                report_write_errors(f"--json {options.json}", InputError),
                replace_file(Path(options.json), "findings") as work,
            ):
                work.write_text(text, encoding="utf-8")
    if options.json is STANDARD_OUTPUT:
        sys.stdout.write(text)
    else:
        for line in report_lines(figures, coloured=sys.stdout.isatty()):
            sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    bad = [(file["path"], file["bad"]["rows"]) for file in figures["files"] if file["bad"]["rows"]]
    reasons = [
        Localized("{path}: {rows} {rows:row|rows} cannot be used", path=path, rows=rows) for path, rows in bad
    ]
    if problem := (figures["training"] or {}).get("problem"):
        reasons.append(Verbatim(**problem))
    if (figures["fixed"] or {}).get("uncut"):
        reasons.append(
            Localized(
                "--cut: no row was cut, as most answers are different, like transcripts, whose words belong "
                "to their seconds; give each part its own row with `start` and `end`"
            )
        )
    if reasons:
        raise InputError(join_messages(reasons, "{left}; {right}"))
