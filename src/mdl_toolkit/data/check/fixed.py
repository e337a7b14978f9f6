"""The CSV of `check --write-fixed`: without rows that cannot be used, and with long ones in parts."""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mdl_toolkit.config.data import CheckOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.data.check.findings import Figures, Findings, are_texts
from mdl_toolkit.data.check.rows import Facts
from mdl_toolkit.data.csv_reader import write_csv, write_rows
from mdl_toolkit.data.manifest import Manifest
from mdl_toolkit.data.segment_columns import TimeColumns
from mdl_toolkit.errors import InputError
from mdl_toolkit.utils.files import replace_file, report_write_errors

# Seconds by which a part may be longer than is asked for.
TOLERANCE = 0.001


def write_fixed(output: Path, manifest: Manifest, findings: Findings, options: CheckOptions) -> Figures:
    """Write a CSV without the rows that cannot be used, if any is left, and the options beside it.

    Returns:
        What was written; `uncut` if no row was cut as answers are texts.

    Raises:
        InputError: it cannot be written.
    """
    bad_lines, facts = {*findings.bad_lines}, findings.facts()
    parts, is_uncut = planned_parts(facts, options)
    if len(facts):
        with report_write_errors(f"--write-fixed {output}", InputError):
            with replace_file(output, "rows") as work, work.open("wb") as file:
                if parts:
                    copy_with_parts(file, manifest, bad_lines, parts)
                else:
                    manifest.file.copy_rows(file, lambda line: line not in bad_lines)
            with replace_file(output.with_name(f"{output.name}.{SETTINGS_FILE}"), "rows") as work:
                work.write_text(to_yaml(options), encoding="utf-8")
    rows = len(facts) + sum(len(each) - 1 for each in parts.values())
    figures: Figures = {"path": str(output), "rows": rows, "left_out": len(bad_lines)}
    return figures if options.cut is None else {**figures, "cut": len(parts), "uncut": is_uncut}


def planned_parts(facts: Facts, options: CheckOptions) -> tuple[dict[int, list[tuple[float, float]]], bool]:
    """Return the parts that `--cut` makes of rows, and whether it makes none as answers are texts."""
    parts = equal_parts(facts, options.cut or math.inf)
    is_uncut = bool(parts) and are_texts(facts)
    return ({} if is_uncut else parts), is_uncut


def cut_facts(facts: Facts, options: CheckOptions) -> Facts:
    """Return the facts of the rows that `--write-fixed` writes: of each part, its share of the samples."""
    parts, _ = planned_parts(facts, options)
    counts = [len(parts.get(line, [line])) for line in facts["line"].tolist()]
    cut = np.repeat(facts, counts)
    cut["samples"] = -(-cut["samples"] // np.repeat(counts, counts))
    return cut


def equal_parts(facts: Facts, longest: float) -> dict[int, list[tuple[float, float]]]:
    """Return the parts of every row that is too long, by its line: where each begins and ends, in seconds.

    Args:
        facts: of the rows.
        longest: seconds of a part.
    """
    parts = {}
    for line, start, end in facts[["line", "start", "end"]].tolist():
        # Times are rounded: a row that is a hair longer is not cut, nor has it a part more.
        if (count := math.ceil((end - start - TOLERANCE) / longest)) > 1:
            edges = np.linspace(start, end, count + 1).tolist()
            parts[line] = [*pairwise(edges)]
    return parts


def copy_with_parts(
    target: BinaryIO,
    manifest: Manifest,
    bad_lines: Container[int],
    parts: Mapping[int, Sequence[tuple[float, float]]],
) -> None:
    """Copy a CSV without the rows that cannot be used, and with parts, by line, in place of others."""
    columns = TimeColumns.of(manifest.file.columns, manifest.columns)

    def rows() -> Iterator[tuple[Sequence[str], Mapping[str, str]]]:
        for row in manifest.rows_unchecked():
            if row.line in parts:
                yield from ((row.cells, columns.cells(*part)) for part in parts[row.line])
            elif row.line not in bad_lines:
                yield row.cells, columns.whole

    with write_csv(target, manifest.file.format) as writer:
        write_rows(writer, manifest.file.columns, columns.names.values(), rows())
