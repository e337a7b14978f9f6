"""Rows to shards, before any recording is opened: where each begins and ends, and what would change it.

The plan depends on the rows and the sizes of their files alone, so that the shards are the same whoever
writes them, in however many processes. A shard's fingerprint covers everything that its bytes come from.
"""

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mdl_toolkit.audio.urls import is_url
from mdl_toolkit.data.manifest import Manifest, Row
from mdl_toolkit.errors import MOST_ROWS_SHOWN, InputError, Problems, RowProblem
from mdl_toolkit.model.constants import SAMPLE_RATE

MEBIBYTE = 2**20
# A shard is made of whole chunks, each of at most so many rows, and ending when its files have so many bytes.
CHUNK_ROWS = 64
CHUNK_BYTES = 4 * MEBIBYTE
# A shard's files together have this share of all bytes, but within these limits.
SHARDS_WANTED = 64
FEWEST_BYTES = MEBIBYTE
MOST_BYTES = 256 * MEBIBYTE
# A shard's rows are in memory at once.
MOST_ROWS = 4096
# Rows of one recording that follow one another stay together up to so many rows and bytes, since a shard
# decodes each of its recordings once; a shard of segments holds as much, as all of it may be in memory.
TOGETHER_ROWS, TOGETHER_BYTES = 1024, 64 * MEBIBYTE
# Bytes of a second of a segment, in 16 bits at 16 kHz.
SECOND_BYTES = 2 * SAMPLE_RATE
# Taken for a recording whose size is not known yet: some seconds.
URL_BYTES = 2**17


@dataclass(frozen=True)
class Shard:
    """Name consecutive rows that go into one file.

    Attributes:
        number: its index, from 0.
        rows: how many.
        fingerprint: of the rows, their recordings' sizes and times, and how they are converted.
    """

    number: int
    rows: int
    fingerprint: str


@dataclass(frozen=True)
class Plan:
    """Hold all shards, and the problems that are known already.

    Attributes:
        shards: in order.
        problems: rows that cannot be used; they are in no shard.
        identity: what else the shards' bytes come from.
        fingerprint: of all shards.
    """

    shards: tuple[Shard, ...]
    problems: Problems
    identity: str
    fingerprint: str

    @property
    def rows(self) -> int:
        """Return the rows of all shards."""
        return sum(shard.rows for shard in self.shards)


@dataclass
class _Chunk:
    """Count some consecutive rows, which are not kept, and digest all that samples and messages come from."""

    rows: int = 0
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    has_segments: bool = False
    audio: str | None = None

    def add(self, row: Row) -> None:
        self.rows += 1
        self.bytes += expected_bytes(row)
        audio = row.audio
        if not is_url(audio):
            # The path from the root with all links to folders followed, however it is spelt.
            folder, name = os.path.split(os.path.join(os.getcwd(), audio))  # noqa: PTH109, PTH118 - faster
            audio = os.path.join(_real_folder(folder), name)  # noqa: PTH118
        part = (row.segment.start, row.segment.end, row.segment.channel)
        values = (row.line, audio, row.stamp, *part, row.system_prompt, row.user_prompt, row.prediction)
        self.digest.update(json.dumps(values).encode())
        self.has_segments |= not row.segment.is_whole
        self.audio = row.audio

    def has_room(self, row: Row) -> bool:
        if row.audio == self.audio:
            return self.rows < TOGETHER_ROWS and self.bytes < TOGETHER_BYTES
        return self.rows < CHUNK_ROWS and self.bytes < CHUNK_BYTES


def expected_bytes(row: Row) -> int:
    """Return the bytes that a row's recording, or the part that it names, is taken for before it is read."""
    whole = URL_BYTES if is_url(row.audio) else row.stamp[0]
    start, end = row.segment.start, row.segment.end
    return whole if end is None else int((end - start) * SECOND_BYTES)


def make_plan(
    manifest: Manifest, identity: str, check: Callable[[Row], None], most: int | None = MOST_ROWS_SHOWN
) -> Plan:
    """Read all rows once and plan the shards; memory hardly grows with their number.

    Args:
        manifest: the rows.
        identity: what else the shards' bytes come from: tokenizer, options, versions.
        check: is called with every usable row, and may raise.
        most: problems that are kept; None for all.

    Raises:
        InputError: the CSV is damaged, or there is no row.
    """
    problems = Problems(most=most)

    def usable() -> Iterator[Row]:
        for item in manifest:
            if isinstance(item, RowProblem):
                problems.add(item)
            else:
                check(item)
                yield item

    chunks = _chunks(usable())
    if not chunks[0].rows and not problems.count:
        raise manifest.no_rows()
    shards = tuple(_shards(chunks, identity)) if chunks[0].rows else ()
    bad_lines = [str(problem.line) for problem in problems.first]
    fingerprint = _fingerprint_of(identity, *(shard.fingerprint for shard in shards), *bad_lines)
    return Plan(shards, problems, identity, fingerprint)


def read_shards(
    manifest: Manifest, plan: Plan, is_wanted: Callable[[Shard], bool]
) -> Iterator[tuple[Shard, list[Row]]]:
    """Yield the shards that are wanted, each with its rows; asked and read one by one.

    Raises:
        InputError: the CSV or a recording is not any more what the plan was made of.
    """
    rows = manifest.rows()
    for shard in plan.shards:
        mine = itertools.islice(rows, shard.rows)
        if not is_wanted(shard):
            deque(mine, maxlen=0)
            continue
        kept = list(mine)
        if _shard_fingerprint(plan.identity, _chunks(kept)) != shard.fingerprint:
            raise InputError(
                "{source}: recordings were changed while it was being read; start again",
                source=manifest.source,
            )
        yield shard, kept


def _chunks(rows: Iterable[Row]) -> list[_Chunk]:
    chunks = [_Chunk()]
    for row in rows:
        if not chunks[-1].has_room(row):
            chunks.append(_Chunk())
        chunks[-1].add(row)
    return chunks


def _shard_fingerprint(identity: str, chunks: list[_Chunk]) -> str:
    return _fingerprint_of(identity, *(chunk.digest.hexdigest() for chunk in chunks))


def _shards(chunks: list[_Chunk], identity: str) -> Iterator[Shard]:
    """Join chunks to shards."""
    wanted = min(max(sum(chunk.bytes for chunk in chunks) // SHARDS_WANTED, FEWEST_BYTES), MOST_BYTES)
    if any(chunk.has_segments for chunk in chunks):
        wanted = TOGETHER_BYTES
    number, start = 0, 0
    for end in range(1, len(chunks) + 1):
        mine = chunks[start:end]
        rows = sum(chunk.rows for chunk in mine)
        is_full = sum(chunk.bytes for chunk in mine) >= wanted or rows + CHUNK_ROWS > MOST_ROWS
        if is_full or end == len(chunks):
            yield Shard(number, rows, _shard_fingerprint(identity, mine))
            number, start = number + 1, end


@lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _fingerprint_of(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
