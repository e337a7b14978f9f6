"""Batches ahead of time: threads read, decode and collate what comes next.

Threads, not processes: FLAC decoding and numpy's copies let other threads run meanwhile, nothing has to be
sent between processes, and a forked child of a process that has used torch's own threads may hang.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

T = TypeVar("T")

# Threads that decode ahead; on a CPU one will do, as decoding takes 1.5 % of a step there.
GPU_THREADS = 4


@dataclass
class Prefetcher(Generic[T]):
    """Make batches ahead of their use.

    Attributes:
        make: makes a batch of the examples with some numbers; called in threads.
        threads: how many; one batch more than there are threads is kept ready.
        waited: seconds that the user of the batches has waited for them, the first one not counted.
    """

    make: Callable[[NDArray[np.int64]], T]
    threads: int
    waited: float = 0.0

    @staticmethod
    def for_device(device: torch.device, make: Callable[[NDArray[np.int64]], T]) -> "Prefetcher[T]":
        """Return a prefetcher with as many threads as a device needs that computes meanwhile."""
        return Prefetcher(make, 1 if device.type == "cpu" else GPU_THREADS)

    def batches(self, wanted: Iterable[NDArray[np.int64]]) -> Generator[T, None, None]:
        """Yield the batches in order, each of some examples by their numbers; closing it ends the threads."""
        pool = ThreadPoolExecutor(self.threads, "batches")
        source, ahead = iter(wanted), deque[Future[T]]()
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
