"""Several converted datasets as one, one after another."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.data.dataset import ConvertedDataset, Sample
from mdl_toolkit.weights.provenance import Prompts


class ConcatDataset(ConvertedDataset):
    """Read several datasets as one, one after another.

    Args:
        parts: the datasets, by the names that messages call them by; none is empty.

    Attributes:
        parts: the same.
        indices: those of each one's examples, `[examples of it]`, by name.
    """

    def __init__(self, parts: Mapping[str, ConvertedDataset]) -> None:
        self.parts = dict(parts)
        datasets = [*parts.values()]
        ends = np.cumsum([*map(len, datasets)])
        self._first = {
            name: int(end) - len(part) for (name, part), end in zip(parts.items(), ends, strict=True)
        }
        self.indices: dict[str, NDArray[np.int64]] = {
            name: np.arange(first, first + len(parts[name])) for name, first in self._first.items()
        }
        self.folder = datasets[0].folder
        prompts = join_prompts(dataset.record.prompts for dataset in datasets)
        self.record = replace(datasets[0].record, prompts=prompts, rows=int(ends[-1]))
        self._batches = [batch for dataset in datasets for batch in dataset._batches]
        self._starts = [0, *np.cumsum([len(batch) for batch in self._batches]).tolist()]

    def __getitem__(self, index: int) -> Sample:
        name, own = self._own(index)
        return self.parts[name][own]

    def __reduce__(self) -> tuple[Any, ...]:
        return ConcatDataset, (self.parts,)

    def where(self, index: int) -> str:
        """Return the dataset and the line of the CSV that an example comes from."""
        name, own = self._own(index)
        return f"{name}:{self.parts[name].line(own)}"

    def _own(self, index: int) -> tuple[str, int]:
        """Return the dataset that an example is in, and its index there."""
        name = [name for name, first in self._first.items() if first <= index][-1]
        return name, index - self._first[name]


def join_datasets(datasets: Mapping[str, ConvertedDataset]) -> ConvertedDataset:
    """Return datasets as one; one alone as it is.

    Args:
        datasets: by their paths.
    """
    if len(datasets) == 1:
        return next(iter(datasets.values()))
    parts: dict[str, ConvertedDataset] = {}
    for path, dataset in datasets.items():
        place = Path(path).absolute()
        # What follows a point in the name of a folder is no suffix.
        own = place.name if place.is_dir() else place.stem
        names = (own if number == 1 else f"{own}-{number}" for number in count(1))
        parts[next(name for name in names if name not in parts)] = dataset
    return ConcatDataset(parts)


def join_prompts(prompts: Iterable[Prompts]) -> Prompts:
    """Return the prompts of several datasets together."""
    all_prompts = [*prompts]
    system, user = ({each.system for each in all_prompts}, {each.user for each in all_prompts})
    system_differs = len(system) > 1 or any(each.system_differs for each in all_prompts)
    user_differs = len(user) > 1 or any(each.user_differs for each in all_prompts)
    first = all_prompts[0]
    return Prompts(
        None if system_differs else first.system,
        None if user_differs else first.user,
        system_differs,
        user_differs,
    )
