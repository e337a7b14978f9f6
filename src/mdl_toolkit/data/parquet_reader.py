"""Parquet files as cells by column; recordings in them are named by file and row, and read in their turn.

Of a dataset in shards as Hugging Face names them, the first one stands for all of them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mdl_toolkit.audio.embedded import audio_column
from mdl_toolkit.data.csv_format import CsvFormat, csv_error
from mdl_toolkit.data.json_reader import cells_of
from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized

FIRST_SHARD = re.compile(r"(.*-)00000-of-([0-9]{5})\.parquet")
# Rows that are read at once.
BATCH_ROWS = 1024


def shards_beside(path: Path) -> tuple[Path, ...]:
    """Return the shards that follow a first one.

    Raises:
        InputError: some are missing.
    """
    match = FIRST_SHARD.fullmatch(path.name)
    if not match:
        return ()
    others = [
        path.with_name(f"{match[1]}{number:05}-of-{match[2]}.parquet") for number in range(1, int(match[2]))
    ]
    if missing := [each for each in others if not each.is_file()]:
        reason = Localized(
            "{count} of {all} shards {count:is|are} missing, the first is {name}; get them, or rename this",
            count=len(missing),
            all=len(others) + 1,
            name=missing[0].name,
        )
        raise csv_error(path, reason)
    return tuple(others)


def read_parquet_rows(path: Path, file: BinaryIO, _form: CsvFormat) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the cells of each row by column, with its number over all shards, counted from 1.

    Args:
        path: the file, or the first shard.
        file: the same, open.

    Raises:
        InputError: it is damaged, or recordings are in it under another name than `.parquet`.
    """
    number = 0
    try:
        for shard in (path, *shards_beside(path)):
            with pq.ParquetFile(file if shard == path else shard, pre_buffer=False) as parquet:
                for values in _rows_of(shard, parquet):
                    number += 1
                    try:
                        cells = cells_of(values)
                    except InputError as problem:
                        reason = Localized("line {number}: {reason}", number=number, reason=problem.message)
                        raise csv_error(path, reason) from problem
                    yield number, cells
    except (OSError, ValueError, pa.ArrowException) as problem:
        reason = Localized("cannot be read as Parquet ({reason}); get it again", reason=problem)
        raise csv_error(path, reason) from problem


def _rows_of(path: Path, parquet: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    """Yield the values of each row by column, with `audio` as a path or a reference."""
    audio = audio_column(parquet.schema_arrow)
    names = [
        field.name for field in parquet.schema_arrow if field.name != audio and not _is_media(field.type)
    ]
    if audio is not None and path.suffix != ".parquet":
        raise csv_error(path, Localized("a file with recordings in it is to be called .parquet; rename it"))
    first = 1
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        # Where no row of the group has bytes, their paths are those of files.
        has_paths = audio is not None and _nulls(group, f"{audio}.bytes") == group.num_rows
        columns = [*names, f"{audio}.path"] if has_paths else names
        batches = parquet.iter_batches(BATCH_ROWS, [number], columns) if columns else ()
        rows: Iterator[dict[str, Any]] = (row for batch in batches for row in batch.to_pylist())
        for index, row in enumerate(rows if columns else ({} for _ in range(group.num_rows)), first):
            path_in_file = (row.pop(audio) or {}).get("path") if has_paths and audio is not None else None
            named = {} if audio is None else {"audio": path_in_file or f"{path.absolute()}#{index}"}
            yield {name: _plain(value) for name, value in (named | row).items()}
        first += group.num_rows


def _nulls(group: Any, column: str) -> int:
    """Return how many rows of a group are known to have nothing in a column."""
    chunks = (group.column(index) for index in range(group.num_columns))
    found = [chunk.statistics for chunk in chunks if chunk.path_in_schema == column]
    return found[0].null_count if found and found[0] is not None and found[0].has_null_count else 0


def _is_media(kind: pa.DataType) -> bool:
    """Tell whether a column holds bytes, such as pictures, which no cell does."""
    kinds = [field.type for field in kind] if pa.types.is_struct(kind) else [kind]
    return any(pa.types.is_binary(each) or pa.types.is_large_binary(each) for each in kinds)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; days and the like are texts."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.loads(json.dumps(value, default=str)) if isinstance(value, list | dict) else str(value)
