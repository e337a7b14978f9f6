"""Compare what the processes of a run were given, before its first step: all must train the same way.

Another learning rate in one process would go unnoticed, another rank of the adapters end all by a signal.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import torch

from mdl_toolkit import __version__
from mdl_toolkit.config.options import spec_of, spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import NAME, PATH, RESUME
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import prefix_sample
from mdl_toolkit.errors import ToolkitError
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.weights.provenance import Provenance

# Options that only the first process uses, or that change nothing but speed. Paths may differ from machine to
# machine: what they hold is compared, and the step that is gone on from.
ANY_PROCESS = frozenset(
    {
        "num_workers", "tokenizing_batch_size", "max_download_mb", "from_modelscope", "report_to", "verify",
    }
)  # fmt: skip


def check_options(world: World, options: TrainOptions) -> None:
    """Refuse to train where processes have other options or other versions.

    Raises:
        ToolkitError: naming all that differs.
    """
    _refuse_differences(world, {"mdl-toolkit (version)": __version__, "torch (version)": torch.__version__})
    values = {
        spelling(field.name): repr(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in ANY_PROCESS and spec_of(field).type not in (PATH, NAME, RESUME)
    }
    _refuse_differences(world, values)


def check_data(
    world: World,
    origin: Provenance,
    dtype: torch.dtype,
    train_set: ConvertedDataset,
    eval_set: ConvertedDataset | None,
) -> None:
    """Refuse to train where processes found another base model, other data or another precision.

    Args:
        world: the processes.
        origin: the base model.
        dtype: of the base's weights when they are loaded.
        train_set: the examples to learn from.
        eval_set: those to evaluate on, if any.

    Raises:
        ToolkitError: naming all that differs.
    """
    values = {
        "--model-name": "" if origin.base is None else origin.base.fingerprint,
        "--bf16": str(dtype),
        "--train-dataset": dataset_digest(train_set),
        "--eval-dataset": "" if eval_set is None else dataset_digest(eval_set),
    }
    _refuse_differences(world, values)


def dataset_digest(dataset: ConvertedDataset) -> str:
    """Return a hash of a dataset's record, of all lengths and of the tokens of some examples."""
    digest = hashlib.sha256(repr(dataset.record).encode())
    for lengths in (dataset.token_counts, dataset.supervised_counts, dataset.audio_lengths):
        digest.update(lengths.tobytes())
    for index in prefix_sample(len(dataset)):
        tokens = dataset.tokens(index)
        digest.update(tokens.input_ids.tobytes() + tokens.labels.tobytes())
    return digest.hexdigest()


def _refuse_differences(world: World, values: Mapping[str, str]) -> None:
    """Refuse values, by what users call them, that are not the same in all processes."""
    different = world.differences(values)
    if different:
        ranks = sorted({rank for ranks in different.values() for rank in ranks})
        raise ToolkitError(
            "{names}: not the same in process {ranks} as in process 0; all processes of a run need the same",
            names=", ".join(different),
            ranks=", ".join(map(str, ranks)),
        )
