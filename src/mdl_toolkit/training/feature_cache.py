"""Audio features on disk: what a frozen encoder and projector make of each row, computed once for a run.

They lie in flat files that are read through a memory map, and are computed anew whenever a run starts or goes
on: nothing that a killed run left is ever used. Of several processes each computes its share of the rows into
a file of its own and reads all files, so that they must share the output folder.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.collate import Batch, Collator, PrecomputedSample
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.prefetch import Prefetcher
from mdl_toolkit.errors import DatasetError, InputError, UsageError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.model import MiDashengLMConfig
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training.memory.oom import MicroBatcher
from mdl_toolkit.training.memory.plan import size
from mdl_toolkit.training.sampler import Rows
from mdl_toolkit.utils.console import progress, say
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.utils.files import report_write_errors
from mdl_toolkit.utils.signals import raise_if_interrupted
from mdl_toolkit.weights.loading import best_device, choose_dtype

FROZEN = ("encoder", "projector")


def check_frozen(options: TrainOptions) -> None:
    """Refuse to keep what changes while it is trained.

    Raises:
        UsageError: encoder or projector is a target.
    """
    trained = [target for target in options.train_target if target in FROZEN]
    if options.cache_audio_features and trained:
        names = ", ".join(trained)
        raise UsageError(
            "--cache-audio-features: what {names} gives changes while it is trained; leave the option "
            "out, or take {names} out of --train-target",
            names=names,
        )


# --- reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PrecomputedDataset:
    """A dataset's rows with their features in place of waveforms.

    Attributes:
        dataset: the rows.
        parts: of each process's file, `[audio tokens, hidden_size]`.
        part: which of these holds a row, `[rows]`.
        starts: where in it a row begins, `[rows]`.
        counts: audio tokens of a row, `[rows]`.
        samples: of a row's waveform, `[rows]`.
    """

    dataset: ConvertedDataset
    parts: list[Tensor]
    part: Rows
    starts: Rows
    counts: Rows
    samples: Rows

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Positions of every row in the decoder, `[rows]`."""
        return self.dataset.token_counts

    def __getitem__(self, index: int) -> PrecomputedSample:
        tokens, start = self.dataset.tokens(index), self.starts[index]
        features = self.parts[self.part[index]][start : start + self.counts[index]]
        return PrecomputedSample(tokens.input_ids, tokens.labels, features, int(self.samples[index]))


# --- computing -----------------------------------------------------------------------------------------


class FeatureCache:
    """The features of a run's datasets.

    Made before weights are loaded: what an earlier run left is removed, and room on the disk looked for.

    Args:
        folder: where they go; in the output folder.
        options: the run's.
        base: folder of the base model.
        world: the processes.
        datasets: those whose features are kept; without any, nothing is done.

    Raises:
        InputError: the disk has not enough room.
    """

    def __init__(
        self,
        folder: Path,
        options: TrainOptions,
        base: Path,
        world: World,
        datasets: Sequence[ConvertedDataset],
    ) -> None:
        self._folder, self._batch_size, self._world = folder, options.batch_size, world
        self._datasets, self._dtype, self._device = datasets, choose_dtype(options.bf16), best_device()
        what = Localized("for audio features")
        self._micro_batcher = MicroBatcher(options.batch_size, self._device, what)
        if not datasets:
            return
        self._hidden: int = MiDashengLMConfig.from_pretrained(base).parts[1].hidden_size
        if world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            with report_write_errors(str(folder), InputError):
                folder.mkdir(parents=True)
            self._check_room()
        world.wait()

    def _check_room(self) -> None:
        tokens = sum(int(_counts(dataset).sum()) for dataset in self._datasets)
        needed = tokens * self._hidden * self._dtype.itemsize
        free = shutil.disk_usage(self._folder).free
        message = Localized(
            "audio features: {needed} in {folder}, where {free} are free",
            needed=size(needed),
            folder=self._folder,
            free=size(free),
        )
        if needed > free:
            raise InputError("{message}; make room, or leave --cache-audio-features out", message=message)
        say(message)

    def featured(self, dataset: ConvertedDataset, model: Any) -> ConvertedDataset | PrecomputedDataset:
        """The dataset with its features, if they are to be kept; all processes together.

        Args:
            dataset: one of the run's.
            model: a `PeftModel` of MiDashengLM.

        Raises:
            DatasetError: a file cannot be written, or another process's is not here.
        """
        number = next((i for i, kept in enumerate(self._datasets) if kept is dataset), None)
        if number is None:
            return dataset
        order = (-dataset.audio_lengths).argsort(kind="stable")  # batches of similar length
        shares = [order[rank :: self._world.size] for rank in range(self._world.size)]
        files = [self._folder / f"{number}-{rank}" for rank in range(self._world.size)]
        with report_write_errors(str(self._folder), DatasetError):
            self._write(files[self._world.rank], dataset, shares[self._world.rank], model.get_base_model())
        self._world.wait()
        return self._opened(dataset, shares, files)

    def _opened(self, dataset: ConvertedDataset, shares: list[Rows], files: list[Path]) -> PrecomputedDataset:
        counts = _counts(dataset)
        part, starts = np.zeros_like(counts), np.zeros_like(counts)
        for rank, rows in enumerate(shares):
            part[rows], starts[rows] = rank, counts[rows].cumsum() - counts[rows]
        totals = [int(counts[rows].sum()) for rows in shares]
        parts = [self._mapped(file, total) for file, total in zip(files, totals, strict=True)]
        return PrecomputedDataset(dataset, parts, part, starts, counts, dataset.audio_lengths)

    def _mapped(self, file: Path, tokens: int) -> Tensor:
        numbers = tokens * self._hidden
        if not file.exists() or file.stat().st_size != numbers * self._dtype.itemsize:
            raise DatasetError(
                "{file}: not here as another process wrote it; all must share the output folder", file=file
            )
        if not tokens:
            return torch.empty(0, self._hidden, dtype=self._dtype)
        flat = torch.from_file(str(file), shared=False, size=numbers, dtype=self._dtype)
        return flat.view(tokens, self._hidden)

    def _write(self, file: Path, dataset: ConvertedDataset, rows: Rows, model: Any) -> None:
        batches = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        loader = Prefetcher.for_device(
            self._device, lambda wanted: Collator(0)([dataset[int(row)] for row in wanted])
        )
        with file.open("wb") as sink, progress(len(rows), "audio features") as shown:
            for wanted, batch in zip(batches, loader.batches(batches), strict=True):
                for features in self._computed(model, batch):
                    sink.write(features.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)
                shown.advance(len(wanted))
                raise_if_interrupted()

    @torch.no_grad()
    def _computed(self, model: Any, batch: Batch) -> Iterator[Tensor]:
        """`[audio tokens, hidden_size]`, all at once, or fewer rows at a time if memory does not do."""
        clips, lengths, start = batch["input_values"], batch["audio_length"], 0

        def compute(most: int) -> Tensor:
            now = slice(start, start + most)
            return self._features(model, clips[now, : int(lengths[now].max())], lengths[now])

        while start < len(clips):
            features = self._micro_batcher.run(len(clips) - start, compute)
            yield features
            start += self._micro_batcher.most

    def _features(self, model: Any, clips: Tensor, lengths: Tensor) -> Tensor:
        is_half = self._dtype == torch.bfloat16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_half):  # as in training
            features: Tensor = model.audio_features(clips.to(self._device), lengths)
        return features


def _counts(dataset: ConvertedDataset) -> Rows:
    """Audio tokens of every row, `[rows]`."""
    return np.array(
        [audio_token_count(samples) for samples in dataset.audio_lengths.tolist()], dtype=np.int64
    )
