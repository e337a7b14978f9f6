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

MEBIBYTE = 2**20
PIECE_ROWS = 64  # a shard is made of whole pieces, each of at most so many rows ...
PIECE_BYTES = 4 * MEBIBYTE  # ... and ending when its files have so many bytes
FEWEST_BYTES = MEBIBYTE  # a shard's files together: 1/64 of all, but within these limits
MOST_BYTES = 256 * MEBIBYTE
SHARE = 64
MOST_ROWS = 4096  # a shard's rows are in memory at once
URL_BYTES = 2**17  # taken for a recording whose size is not known yet: some seconds


@dataclass(frozen=True)
class Shard:
    """Consecutive rows that go into one file.

    Attributes:
        number: its place, from 0.
        rows: how many.
        fingerprint: of the rows, their recordings' sizes and times, and how they are converted.
    """

    number: int
    rows: int
    fingerprint: str


@dataclass(frozen=True)
class Plan:
    """All shards, and what is known to be wrong already.

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
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)


@dataclass
class _Piece:
    """Some consecutive rows, of which only a digest is kept."""

    rows: int = 0
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, row: Row) -> None:
        self.rows += 1
        self.bytes += URL_BYTES if is_url(row.audio) else row.stamp[0]
        self.digest.update(_identity(row))

    @property
    def is_full(self) -> bool:
        return self.rows == PIECE_ROWS or self.bytes >= PIECE_BYTES


def survey(
    manifest: Manifest, identity: str, look: Callable[[Row], None], most: int | None = MOST_ROWS_SHOWN
) -> Plan:
    """Go through all rows once and plan the shards; memory hardly grows with their number.

    Args:
        manifest: the rows.
        identity: what else the shards' bytes come from: tokenizer, options, versions.
        look: is shown every usable row, and may raise.
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
                look(item)
                yield item

    pieces = _pieces(usable())
    if not pieces[0].rows and not problems.count:
        raise manifest.no_rows()
    shards = tuple(_shards(pieces, identity)) if pieces[0].rows else ()
    known = [str(problem.line) for problem in problems.first]
    fingerprint = _digest(identity, *(shard.fingerprint for shard in shards), *known)
    return Plan(shards, problems, identity, fingerprint)


def rows_of(
    manifest: Manifest, plan: Plan, is_wanted: Callable[[Shard], bool]
) -> Iterator[tuple[Shard, list[Row]]]:
    """The shards that are wanted, each with its rows; asked and read one by one.

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
        if _fingerprint(plan.identity, _pieces(kept)) != shard.fingerprint:
            raise InputError(
                "{source}: recordings were changed while it was being read; start again",
                source=manifest.source,
            )
        yield shard, kept


def _pieces(rows: Iterable[Row]) -> list[_Piece]:
    pieces = [_Piece()]
    for row in rows:
        if pieces[-1].is_full:
            pieces.append(_Piece())
        pieces[-1].add(row)
    return pieces


def _fingerprint(identity: str, pieces: list[_Piece]) -> str:
    return _digest(identity, *(piece.digest.hexdigest() for piece in pieces))


def _shards(pieces: list[_Piece], identity: str) -> Iterator[Shard]:
    wanted = min(max(sum(piece.bytes for piece in pieces) // SHARE, FEWEST_BYTES), MOST_BYTES)
    number, start = 0, 0
    for end in range(1, len(pieces) + 1):
        mine = pieces[start:end]
        rows = sum(piece.rows for piece in mine)
        is_full = sum(piece.bytes for piece in mine) >= wanted or rows + PIECE_ROWS > MOST_ROWS
        if is_full or end == len(pieces):
            yield Shard(number, rows, _fingerprint(identity, mine))
            number, start = number + 1, end


def _identity(row: Row) -> bytes:
    """Everything of a row that its sample, or a message about it, comes from."""
    audio = row.audio if is_url(row.audio) else _location(row.audio)
    values = (row.line, audio, row.stamp, row.system_prompt, row.user_prompt, row.prediction)
    return json.dumps(values).encode()


def _location(audio: str) -> str:
    """Return a recording's path from the root with all links to folders followed, however it is spelt."""
    folder, name = os.path.split(os.path.join(os.getcwd(), audio))  # noqa: PTH109, PTH118 - faster
    return os.path.join(_real_folder(folder), name)  # noqa: PTH118


@lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
