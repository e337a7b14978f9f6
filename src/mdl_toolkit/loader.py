"""Batches ahead of time: threads read, decode and collate what comes next, and what has come before is kept.

Threads, not processes: FLAC decoding and numpy's copies let other threads run meanwhile, nothing has to be
sent between processes, and a forked child of a process that has used torch's own threads may hang.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mdl_toolkit.dataset import ConvertedDataset, Sample
from mdl_toolkit.free_memory import free_memory
from mdl_toolkit.sampling import Rows

Made = TypeVar("Made")

SHARE = 16  # of free memory, for decoded rows: one part of so many
GPU_THREADS = 4  # that decode ahead; on a CPU one will do, as decoding is nothing beside a step


class Remembered:
    """Rows of a dataset, decoded once: they stay in memory as long as there is room for more of them.

    On a CPU decoding takes its time from computing: 1.5 % of a step (`benchmarks/HISTORY.md`).

    Args:
        rows: the dataset.
        room: bytes for samples.
    """

    def __init__(self, rows: ConvertedDataset, room: int) -> None:
        self._rows, self._room, self._kept = rows, room, dict[int, Sample]()
        self._lock = Lock()

    @staticmethod
    def of(rows: ConvertedDataset) -> "Remembered":
        """In a small part of the memory that is free now."""
        return Remembered(rows, (free_memory(torch.device("cpu")) or 0) // SHARE)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions of every row in the decoder, `[rows]`."""
        return self._rows.positions

    def __getitem__(self, index: int, /) -> Sample:
        """One row."""
        found = self._kept.get(index)
        if found is None:
            found = self._rows[index]
            size = found.waveform.nbytes + found.input_ids.nbytes + found.labels.nbytes
            with self._lock:
                if size <= self._room and index not in self._kept:
                    self._kept[index], self._room = found, self._room - size
        return found


@dataclass
class Loader(Generic[Made]):
    """Make batches of rows, some ahead of their use.

    Attributes:
        make: rows to a batch; called in threads.
        threads: how many; one batch more than there are threads is kept ready.
        waited: seconds that the user of the batches has waited for them, the first one not counted.
    """

    make: Callable[[Rows], Made]
    threads: int
    waited: float = 0.0

    @staticmethod
    def beside(device: torch.device, make: Callable[[Rows], Made]) -> "Loader[Made]":
        """As many threads as a device needs that computes meanwhile."""
        return Loader(make, GPU_THREADS if device.type == "cuda" else 1)

    def batches(self, wanted: Iterable[Rows]) -> Generator[Made, None, None]:
        """The batches, in order; closing it ends the threads."""
        pool = ThreadPoolExecutor(self.threads, "batches")
        source, ahead = iter(wanted), deque[Future[Made]]()
        try:
            for rows in islice(source, self.threads + 1):
                ahead.append(pool.submit(self.make, rows))
            is_first = True
            while ahead:
                started = time.perf_counter()
                batch = ahead.popleft().result()
                self.waited += 0.0 if is_first else time.perf_counter() - started
                is_first = False
                ahead.extend(pool.submit(self.make, rows) for rows in islice(source, 1))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
