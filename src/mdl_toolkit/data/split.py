"""Split a CSV into training, evaluation and test rows, so that nothing is on two sides.

Rows that share a recording, the bytes of one, or a cell of `--group-by` hang together, also by way of others,
and go to one side. Whole groups are dealt out, those of the rarest answer first, each to the side that lacks
most of it (iterative stratification, Sechidis et al. 2011); rows that stand alone by largest remainders.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mdl_toolkit.audio.embedded import open_recording, split_reference
from mdl_toolkit.audio.urls import is_url
from mdl_toolkit.config.data import ConvertOptions, SplitOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.data.column_names import find_column
from mdl_toolkit.data.csv_reader import write_csv
from mdl_toolkit.data.manifest import Manifest, Row, read_manifest
from mdl_toolkit.errors import InputError, Problems, RowProblem, UsageError
from mdl_toolkit.utils.console import progress, say, warn
from mdl_toolkit.utils.files import check_apart, claim_folder, replace_files, report_write_errors
from mdl_toolkit.utils.ownership import check_output_files

PARTS = TRAIN, EVAL, TEST = "train", "eval", "test"
# Answers that are named at most.
MOST_NAMED = 10
# What shares such as 1 - 0.1 - 0.1 are inexact by, times the rows.
TINY = 1e-6


def split_dataset(options: SplitOptions) -> dict[str, Path]:
    """Write the rows of a CSV to `train.csv`, `eval.csv` and `test.csv` in a folder, as they are.

    Returns:
        The file of each part, by name.

    Raises:
        UsageError: the shares leave nothing to train on, or nothing to split off.
        InputError: bad rows, a column that is not there, or too few groups for the parts.

    Example:
        ```python
        from mdl_toolkit import SplitOptions, split_dataset

        files = split_dataset(
            SplitOptions(
                input="train.csv", output="parts", eval=0.2, stratify="prediction", base_dir="recordings"
            )
        )
        print(files["eval"].read_text())
        ```
    """
    shares, output = part_shares(options), Path(options.output)
    check_output_files(output, [*map(file_name, shares), SETTINGS_FILE], options.COMMAND)
    for part in PARTS:
        check_apart(output / file_name(part), Path(options.input))
    reading = ConvertOptions(input=options.input, output=options.output, base_dir=options.base_dir)
    used = [*options.group_by, *filter(None, [options.stratify])]
    manifest = read_manifest(options.input, reading, needs_prediction=False, also=used)
    rows = _usable_rows(manifest)
    groups = group_rows(rows, [_cells(manifest, rows, name) for name in options.group_by])
    labels = [""] * len(rows) if options.stratify is None else _cells(manifest, rows, options.stratify)
    parts = deal(groups, labels, shares, options.seed)
    if missing := [part for part in shares if part not in parts]:
        raise InputError(
            "{input}: its rows hang together in {groups} {groups:group|groups}, too few for {parts}; give "
            "larger shares, or fewer --group-by",
            input=options.input,
            groups=len({*groups}),
            parts=", ".join(map(file_name, missing)),
        )
    rows_of = {part: [row for row, its in zip(rows, parts, strict=True) if its == part] for part in shares}
    write_parts(options, manifest, rows_of)
    files = {part: output / file_name(part) for part in shares}
    say_sizes(files, groups, parts)
    if options.stratify is not None:
        warn_of_unseen(labels, parts, options.stratify)
    return files


def part_shares(options: SplitOptions) -> dict[str, float]:
    """Return the share of the rows that each part is to have, by name.

    Raises:
        UsageError: nothing is left to train on, or nothing is split off.
    """
    shares = {TRAIN: 1 - options.eval - options.test, EVAL: options.eval, TEST: options.test}
    shares = {part: share for part, share in shares.items() if share}
    if len(shares) == 1 or shares.get(TRAIN, 0) < 1e-9:
        raise UsageError("--eval and --test: give at least one, and less than 100 % in all")
    return shares


def file_name(part: str) -> str:
    """Return the name of the file of a part."""
    return f"{part}.csv"


def write_parts(options: SplitOptions, manifest: Manifest, parts: Mapping[str, Sequence[Row]]) -> None:
    """Write the rows of each part to its file in the output folder, in place of an earlier split.

    Raises:
        InputError: the folder cannot be written, or another process writes into it.
    """
    output, names = Path(options.output), [*map(file_name, PARTS), SETTINGS_FILE]
    with (
        claim_folder(output),
        report_write_errors(f"--output {output}", InputError),
        replace_files(output, names, options.COMMAND) as work,
    ):
        for part, rows in parts.items():
            with (
                (work / file_name(part)).open("wb") as file,
                write_csv(file, manifest.file.format) as writer,
            ):
                writer.writerow(manifest.file.columns)
                writer.writerows(row.cells for row in rows)
        (work / SETTINGS_FILE).write_text(to_yaml(options), encoding="utf-8")


def say_sizes(files: Mapping[str, Path], groups: Sequence[int], parts: Sequence[str]) -> None:
    """Say how many rows and groups the file of each part holds."""
    for part, file in files.items():
        own = [group for group, its in zip(groups, parts, strict=True) if its == part]
        say(
            "{file}: {rows:,} {rows:row|rows} ({share:.1%}) in {groups:,} {groups:group|groups}",
            file=file,
            rows=len(own),
            share=len(own) / len(parts),
            groups=len({*own}),
        )


def warn_of_unseen(labels: Sequence[str], parts: Sequence[str], column: str) -> None:
    """Warn of labels that no training row has."""
    trained = {label for label, part in zip(labels, parts, strict=True) if part == TRAIN}
    if unseen := sorted({*labels} - trained):
        warn(
            "{count} {count:value|values} of {column} {count:is|are} in no training row: {named}",
            count=len(unseen),
            column=column,
            named=", ".join(map(repr, unseen[:MOST_NAMED])),
        )


def _usable_rows(manifest: Manifest) -> list[Row]:
    """Read all rows; raise RowsError if one cannot be used, and InputError if there is none."""
    rows, problems = [], Problems()
    for item in manifest:
        if isinstance(item, RowProblem):
            problems.add(item)
        else:
            rows.append(item)
    manifest.check(problems)
    if not rows:
        raise manifest.no_rows()
    return rows


def _cells(manifest: Manifest, rows: Sequence[Row], column: str) -> list[str]:
    """Return the cells of a column, by the name in the file, in any case, or the one that is understood."""
    for names in (manifest.file.columns, manifest.columns):
        if (name := find_column(column, names)) in names:
            return [row.cells[[*names].index(name)].strip() for row in rows]
    raise InputError(
        "{input}: no column {column!r}; there are {columns}",
        input=manifest.source,
        column=column,
        columns=", ".join(manifest.file.columns),
    )


def group_rows(rows: Sequence[Row], columns: Iterable[Sequence[str]]) -> list[int]:
    """Number the groups of rows that hang together.

    Args:
        rows: all rows.
        columns: cells of every row, column by column; an empty cell joins nothing.

    Returns:
        The number of each row's group.
    """
    audio = [row.audio if is_url(row.audio) else os.path.realpath(row.audio) for row in rows]
    keys: list[Sequence[Hashable]] = [audio, copied_content(audio), *columns]
    above = [*range(len(rows))]

    def top(number: int) -> int:
        while above[number] != number:
            above[number] = number = above[above[number]]
        return number

    for cells in keys:
        first: dict[Hashable, int] = {}
        for number, cell in enumerate(cells):
            if cell:
                above[top(number)] = top(first.setdefault(cell, number))
    return [top(number) for number in range(len(rows))]


def copied_content(paths: Sequence[str]) -> list[str]:
    """Return a digest of each file that may be a copy of another one, as it has its size; else nothing."""
    # Recordings in a Parquet file may all have one size, and are read fast in their order.
    sizes = {
        path: -1 if split_reference(path) else Path(path).stat().st_size
        for path in dict.fromkeys(paths)
        if not is_url(path)
    }
    counts = Counter(sizes.values())
    alike = [path for path, size in sizes.items() if counts[size] > 1]
    digests: dict[str, str] = {}
    with progress(len(alike), "comparing files of one size") as bar:
        for path in alike:
            with open_recording(path) as file:
                digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
            bar.advance()
    return [digests.get(path, "") for path in paths]


def deal(groups: Sequence[int], labels: Sequence[str], shares: Mapping[str, float], seed: int) -> list[str]:
    """Deal out groups of rows to parts.

    Args:
        groups: of each row.
        labels: of each row, whose shares the parts are to have alike.
        shares: of all rows that each part is to have, by name; together 1.
        seed: decides what is a tie.

    Returns:
        The part of each row.
    """
    members: dict[int, Counter[str]] = defaultdict(Counter)
    for group, label in zip(groups, labels, strict=True):
        members[group][label] += 1
    totals, left = Counter(labels), Counter(labels)
    lack = {part: {label: share * count for label, count in totals.items()} for part, share in shares.items()}
    # What parts lack in all, and of labels that are all dealt: labels that come once or twice add up.
    whole = {part: share * len(labels) for part, share in shares.items()}
    debt = dict.fromkeys(shares, 0.0)
    random = np.random.default_rng(seed)
    drawn = [[*members][number] for number in random.permutation(len(members))]
    rarest = {
        group: min(counts, key=lambda label: (totals[label], label)) for group, counts in members.items()
    }
    largest: Counter[str] = Counter()
    for group, label in rarest.items():
        largest[label] = max(largest[label], members[group].total())
    # Label by label, the rarest first, then the largest group; `sorted` keeps the drawn order of the rest.
    places = {
        group: (totals[label], -largest[label], label, -members[group].total())
        for group, label in rarest.items()
    }
    chosen: dict[int, str] = {}
    for group in sorted(drawn, key=lambda group: places[group]):
        label, is_one = rarest[group], members[group].total() == 1
        # A row alone goes where a whole row is lacking, then to the largest remainder, debts included.
        scores = {
            part: (is_one and lacked > 1 - TINY, is_one and lacked > TINY, lacked + debt[part], whole[part])
            for part, lacked in ((part, lack[part][label]) for part in shares)
        }
        part = chosen[group] = max(scores, key=lambda each: scores[each])
        whole[part] -= members[group].total()
        for label, count in members[group].items():
            lack[part][label] -= count
            left[label] -= count
            if not left[label]:
                for each in shares:
                    debt[each] += lack[each].pop(label)
    return [chosen[group] for group in groups]
