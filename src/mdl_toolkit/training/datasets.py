"""Open the training and evaluation sets, one or several of each, before any weight is loaded."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.config.options import spec_of
from mdl_toolkit.config.train import EVALUATION, TrainOptions
from mdl_toolkit.config.types import weighted_paths
from mdl_toolkit.data.concat import ConcatDataset, join_datasets
from mdl_toolkit.data.convert.run import convert_rows
from mdl_toolkit.data.dataset import ROUNDED_FORMAT, ConvertedDataset
from mdl_toolkit.data.listing import rows_file
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import DatasetError, InputError, RowsError, ToolkitError
from mdl_toolkit.i18n import join_messages
from mdl_toolkit.training.sampler import Mixture
from mdl_toolkit.utils.console import is_first_process, say, warn
from mdl_toolkit.utils.distributed import PeerLostError
from mdl_toolkit.utils.machine import describe_oom
from mdl_toolkit.weights.resolve import check_trainable, find_model
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles, read_tokenizer_files

# In the output folder, until a run has come to its end: what its CSVs were converted to, and features of it.
PRIVATE, FEATURES = ".dataset", "features"


def mixture_of(options: TrainOptions, train_set: ConvertedDataset) -> Mixture | None:
    """Return how an epoch is shared among the training sets; None without weights, where rows come once."""
    weights = tuple(filter(None, weighted_paths(options.train_dataset).values()))
    if not weights or not isinstance(train_set, ConcatDataset):
        return None
    return Mixture(tuple(map(len, train_set.parts.values())), weights)


def open_data(
    options: TrainOptions, private: Path
) -> tuple[TokenizerFiles, ConvertedDataset, ConvertedDataset | None]:
    """Open the base's tokenizer files and both datasets, and check all that can be without weights.

    Args:
        options: the run's.
        private: folder that a CSV is converted into, by the first process.

    Returns:
        The tokenizer files, the training set, and the evaluation set if there is one.

    Raises:
        ToolkitError: a bad row, a dataset of another model, a model that cannot be trained so.
    """
    # Of a local folder everything is here to be checked at once; of a hub's, weights wait for the data.
    is_local = Path(options.model_name).is_dir()
    folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=is_local)
    check_trainable(folder, quantization=options.quantization, merge=options.merge_lora)
    files = read_tokenizer_files(folder)
    warn_of_ignored(options)
    given = {"eval": weighted_paths(options.eval_dataset), "train": weighted_paths(options.train_dataset)}
    paths = {
        f"{kind}-{number}" if len(of_kind) > 1 else kind: path
        for kind, of_kind in given.items()
        for number, path in enumerate(of_kind, 1)
    }
    sets = open_sets(paths, options, files, private)
    if empty := next((path for name, path in paths.items() if name != "eval" and not len(sets[name])), None):
        raise DatasetError("{dataset}: no rows", dataset=empty)
    eval_sets, train_sets = (
        {path: sets[name] for name, path in paths.items() if name.startswith(kind)} for kind in given
    )
    return files, join_datasets(train_sets), join_datasets(eval_sets) if eval_sets else None


def open_sets(
    paths: Mapping[str, str], options: ConversionOptions, files: TokenizerFiles, private: Path
) -> dict[str, ConvertedDataset]:
    """Open converted datasets, and convert CSVs, in the first process; bad rows of all are told together.

    Args:
        paths: by name; those whose bad rows are soon known come first.
        options: of the conversion.
        files: the base's tokenizer files.
        private: folder in which each CSV is converted to a folder of its name.

    Raises:
        ToolkitError: bad rows, or a dataset of another model.
    """
    manifests = {
        name: read_manifest(path, options, needs_prediction=True)
        for name, path in paths.items()
        if is_first_process() and not rows_file(path).is_dir()
    }
    sets: dict[str, ConvertedDataset] = {}
    refusals: list[RowsError] = []
    for name, path in paths.items():
        try:
            if name in manifests:
                tokenizer = ChatTokenizer(files)
                convert_rows(manifests[name], private / name, tokenizer, options, reuse=True)
            sets[name] = _open_set(path, files, private / name)
        except RowsError as refusal:
            refusals.append(refusal)
            if name != next(reversed(manifests)):
                warn(
                    "{path}: {count} {count:row|rows} cannot be used; looking at the training rows too, to "
                    "report all at once",
                    path=path,
                    count=refusal.count,
                )
    if refusals:
        message = join_messages([refusal.message for refusal in refusals], "{left}\n{right}")
        raise refusals[0] if len(refusals) == 1 else InputError(message)
    return sets


def _open_set(path: str, files: TokenizerFiles, private: Path) -> ConvertedDataset:
    """Open a converted dataset, or what a CSV was converted to."""
    if rows_file(path).is_dir():
        dataset = ConvertedDataset(Path(path))
        dataset.check_model(files)
        if dataset.record.format == ROUNDED_FORMAT:
            warn(
                "{path}: converted by an earlier version, which rounded recordings to 16 bits at 16 kHz; "
                "unless they all were so already, convert again, so that the model learns from what it will "
                "hear",
                path=path,
            )
        return dataset
    return ConvertedDataset(private)


def warn_of_ignored(options: TrainOptions) -> None:
    """Warn of options that were given and have no effect, as a set is converted or nothing is evaluated."""
    train_paths = weighted_paths(options.train_dataset)
    if len(train_paths) == 1 and any(train_paths.values()):
        warn(
            "{path}: its weight is ignored, as there is no other --train-dataset",
            path=next(iter(train_paths)),
        )
    paths = [*train_paths, *weighted_paths(options.eval_dataset)]
    converted = [path for path in paths if rows_file(path).is_dir()]
    converting = {field.name for field in dataclasses.fields(ConversionOptions)} - {"from_modelscope"}
    if len(converted) < len(paths):
        # Options of speed, which have their effect on the other set.
        converting -= {"num_workers", "tokenizing_batch_size"}
    names = ", ".join(options.given(converting))
    if names and converted == paths:
        warn("the data are converted already: {names} ignored", names=names)
    elif names and converted:
        for path in converted:
            warn("{path} is converted already: {names} ignored for it", path=path, names=names)
    evaluating = {field.name for field in dataclasses.fields(options) if spec_of(field).group == EVALUATION}
    names = ", ".join(options.given(evaluating - {"report_to"}))
    if names and options.eval_dataset is None:
        warn("there is no --eval-dataset: {names} ignored", names=names)


class Converted:
    """Keep what a run's CSVs are converted to when it ends early, for the next run with its output.

    A refusal removes only what this run has converted.

    Args:
        private: the folder.

    Attributes:
        is_wanted: whether the next run needs it, whatever ends this one: there are steps to go on from.
    """

    def __init__(self, private: Path) -> None:
        self._private, self.is_wanted = private, False
        self._before = {*private.glob("*")}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Run in this context; after a good end nothing is kept."""
        private = self._private
        try:
            yield
        except BaseException as problem:
            shutil.rmtree(private / FEATURES, ignore_errors=True)
            # After a stop, a crash or a lack of memory the same data will be needed again.
            is_refusal = isinstance(problem, ToolkitError) and not isinstance(problem, PeerLostError)
            cause = problem.__cause__
            is_oom = cause is not None and describe_oom(cause) is not None
            if is_refusal and not is_oom and not self.is_wanted:
                for folder in {*private.glob("*")} - self._before:
                    shutil.rmtree(folder, ignore_errors=True)
                # It may not be there, or something may stay in it.
                with suppress(OSError):
                    private.rmdir()
            if any(private.glob("*/state.json")):
                say(
                    "what was converted stays in {folder}, for the next run with this --output",
                    folder=private,
                )
            raise
        shutil.rmtree(private, ignore_errors=True)
