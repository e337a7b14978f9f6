"""Measure the memory that torch holds."""

from collections.abc import Callable

import numpy as np
from torch.autograd.profiler import profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that torch held at once during `work`, beyond those that it held before."""
    with profile(profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())
