"""Cache audio features on disk: the output of a frozen encoder and projector, computed once for a run.

They lie in flat files that are read through a memory map, with checksums of the examples behind them, and are
computed anew whenever a run starts or goes on: nothing that a killed run left is ever used. Of several
processes each computes its share of the examples into a file of its own and reads all files, so that they
must share the output folder.
"""

import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.sampler import BatchSampler, Indices
from mdl_toolkit.utils.console import progress, say, size, warn
from mdl_toolkit.utils.device import best_device
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.utils.files import report_write_errors
from mdl_toolkit.utils.signals import raise_if_interrupted
from mdl_toolkit.weights.loading import choose_dtype

FROZEN = ("encoder", "projector")
CHECKSUM = np.dtype(np.uint32)


def check_frozen(options: TrainOptions) -> None:
    """Refuse to cache features that change while the model is trained.

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


def sets_to_cache(
    options: TrainOptions,
    schedule: Schedule,
    sampler: BatchSampler,
    train_set: ConvertedDataset,
    eval_set: ConvertedDataset | None,
) -> list[ConvertedDataset]:
    """Return the datasets whose features `--cache-audio-features` keeps: those read more than once."""
    if not options.cache_audio_features:
        return []
    is_repeated = schedule.total > schedule.per_epoch or sampler.mixture is not None
    repeated = [train_set] if is_repeated else []
    if eval_set is not None and len(schedule.evaluating) > 1:
        repeated.append(eval_set)
    if not repeated:
        warn("every row is computed only once: --cache-audio-features ignored")
    return repeated


@dataclass(frozen=True, eq=False)
class PrecomputedDataset:
    """Read a dataset's examples with their audio features in place of waveforms.

    Attributes:
        dataset: the examples.
        features: those in each process's file, `[audio tokens, hidden_size]`.
        files: number of the file that holds an example, `[examples]`.
        starts: audio token of that file at which an example begins, `[examples]`.
        counts: audio tokens of every example, `[examples]`.
        checksums: CRC-32 of every example's features, `[examples]`.
        verified: whether that was compared, `[examples]`.
    """

    dataset: ConvertedDataset
    features: list[Tensor]
    files: Indices
    starts: Indices
    counts: Indices
    checksums: NDArray[np.uint32]
    verified: NDArray[np.bool_]

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Return the decoder tokens of every example, `[examples]`."""
        return self.dataset.token_counts

    def where(self, index: int) -> str:
        """Return the line of the CSV that an example comes from, and of several CSVs, which."""
        return self.dataset.where(index)

    def __getitem__(self, index: int) -> PrecomputedSample:
        """Return an example.

        Raises:
            DatasetError: its features are not those that were written.
        """
        tokens, start = self.dataset.tokens(index), self.starts[index]
        features = self.features[self.files[index]][start : start + self.counts[index]]
        if not self.verified[index] and zlib.crc32(_bytes_of(features)) != self.checksums[index]:
            raise DatasetError(
                "audio features of line {line}: changed on the disk after they were written; start again "
                "with --resume-from-checkpoint true, and they are computed anew",
                line=self.dataset.where(index),
            )
        self.verified[index] = True
        samples = int(self.dataset.audio_lengths[index])
        return PrecomputedSample(tokens.input_ids, tokens.labels, features, samples)


class FeatureCache:
    """Compute and keep the features of a run's datasets.

    Made before weights are loaded: what an earlier run left is removed, and the disk's free space is checked.

    Args:
        folder: of the features, in the output folder.
        options: the run's.
        base: folder of the base model.
        world: the processes.
        datasets: those whose features are kept; without any, nothing is done.

    Raises:
        InputError: the disk has not enough space.
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
        self._micro_batcher = MicroBatcher(options.batch_size, self._device, Localized("for audio features"))
        if not datasets:
            return
        self._hidden: int = MiDashengLMConfig.from_pretrained(base).parts[1].hidden_size
        if world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            with report_write_errors(str(folder), InputError):
                folder.mkdir(parents=True)
            tokens = sum(int(_audio_tokens(dataset).sum()) for dataset in datasets)
            needed = tokens * self._hidden * self._dtype.itemsize + CHECKSUM.itemsize * sum(
                map(len, datasets)
            )
            free = shutil.disk_usage(folder).free
            message = Localized(
                "audio features: {needed} in {folder}, where {free} are free",
                needed=size(needed),
                folder=folder,
                free=size(free),
            )
            if needed > free:
                raise InputError("{message}; make room, or leave --cache-audio-features out", message=message)
            say(message)
        world.wait()

    def precomputed(self, dataset: ConvertedDataset, model: Any) -> ConvertedDataset | PrecomputedDataset:
        """Return the dataset, with its features if they are to be kept; all processes call it together.

        Args:
            dataset: one of the run's.
            model: a `PeftModel` of MiDashengLM.

        Raises:
            DatasetError: a file cannot be written, or another process's is not here.
        """
        number = next((i for i, kept in enumerate(self._datasets) if kept is dataset), None)
        if number is None:
            return dataset
        # Batches of similar length.
        order = (-dataset.audio_lengths).argsort(kind="stable")
        shares = [order[rank :: self._world.size] for rank in range(self._world.size)]
        files = [self._folder / f"{number}-{rank}" for rank in range(self._world.size)]
        own, base, checksums = shares[self._world.rank], model.get_base_model(), []
        # Weights that are to be sharded are still on the host.
        base.audio_encoder.to(self._device)
        base.audio_projector.to(self._device)
        batches = [own[start : start + self._batch_size] for start in range(0, len(own), self._batch_size)]
        loader = Prefetcher.for_device(
            self._device, lambda batch: Collator(0)([dataset[int(index)] for index in batch])
        )
        with (
            report_write_errors(str(self._folder), DatasetError),
            files[self._world.rank].open("wb") as sink,
            progress(len(own), "audio features") as shown,
        ):
            for indices, batch in zip(batches, loader.batches(batches), strict=True):
                for features in self._micro_batcher.run(len(indices), partial(self._compute, base, batch)):
                    sink.write(_bytes_of(features))
                    checksums.append(zlib.crc32(_bytes_of(features)))
                shown.advance(len(indices))
                raise_if_interrupted()
            sink.write(np.array(checksums, CHECKSUM).data)
        self._world.wait()
        return self._open(dataset, shares, files)

    def _open(
        self, dataset: ConvertedDataset, shares: list[Indices], files: list[Path]
    ) -> PrecomputedDataset:
        """Open the files of all processes; `shares` are indices of each file's examples, in order."""
        counts = _audio_tokens(dataset)
        numbers, starts, features = np.zeros_like(counts), np.zeros_like(counts), []
        checksums = np.zeros(len(counts), CHECKSUM)
        for number, (indices, file) in enumerate(zip(shares, files, strict=True)):
            numbers[indices], starts[indices] = number, counts[indices].cumsum() - counts[indices]
            tokens = int(counts[indices].sum())
            elements = tokens * self._hidden
            end = elements * self._dtype.itemsize
            if not file.exists() or file.stat().st_size != end + len(indices) * CHECKSUM.itemsize:
                raise DatasetError(
                    "{file}: not here as another process wrote it; all must share the output folder",
                    file=file,
                )
            checksums[indices] = np.fromfile(file, CHECKSUM, offset=end)
            flat = torch.empty(0, dtype=self._dtype)
            if tokens:
                flat = torch.from_file(str(file), shared=False, size=elements, dtype=self._dtype)
            features.append(flat.view(tokens, self._hidden))
        verified = np.zeros(len(counts), bool)
        return PrecomputedDataset(dataset, features, numbers, starts, counts, checksums, verified)

    @torch.no_grad()
    def _compute(self, model: Any, batch: Batch, most: int) -> list[Tensor]:
        """Return the features of each clip, `[audio tokens, hidden_size]`; computes `most` at once."""
        features, is_half = [], self._dtype == torch.bfloat16
        for start in range(0, len(batch["audio_length"]), most):
            lengths = batch["audio_length"][start : start + most]
            clips = batch["input_values"][start : start + most, : int(lengths.max())]
            # As in training.
            with torch.autocast(self._device.type, torch.bfloat16, enabled=is_half):
                part = model.audio_features(clips.to(self._device), lengths)
            counts = [*map(audio_token_count, lengths.tolist())]
            features += part.to("cpu", self._dtype).contiguous().split(counts)
        return features


def _bytes_of(features: Tensor) -> memoryview:
    return features.view(torch.uint8).numpy().data


def _audio_tokens(dataset: ConvertedDataset) -> Indices:
    """Return the number of audio tokens of every example, `[examples]`."""
    return np.array(
        [audio_token_count(samples) for samples in dataset.audio_lengths.tolist()], dtype=np.int64
    )
