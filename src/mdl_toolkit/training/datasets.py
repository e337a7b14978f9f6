"""Open the training and evaluation sets, CSVs or converted datasets, before any weight is loaded."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdl_toolkit.config.data import ConversionOptions
from mdl_toolkit.config.options import spec_of
from mdl_toolkit.config.train import EVALUATION, TrainOptions
from mdl_toolkit.data.convert.run import convert_rows
from mdl_toolkit.data.dataset import ROUNDED_FORMAT, ConvertedDataset
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import DatasetError, ToolkitError
from mdl_toolkit.utils.console import is_first_process, say, warn
from mdl_toolkit.utils.distributed import PeerLostError
from mdl_toolkit.utils.machine import describe_oom
from mdl_toolkit.weights.resolve import check_trainable, find_model
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles, read_tokenizer_files

# In the output folder, until a run has come to its end: what its CSVs were converted to, and features of it.
PRIVATE, FEATURES = ".dataset", "features"


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
    eval_set = None
    # First: it is the smaller one, and its bad rows are soon known.
    if options.eval_dataset is not None:
        eval_set = _open_set(options.eval_dataset, options, files, private / "eval")
    train_set = _open_set(options.train_dataset, options, files, private / "train")
    if not len(train_set):
        raise DatasetError("{dataset}: no rows", dataset=options.train_dataset)
    return files, train_set, eval_set


def _open_set(path: str, options: TrainOptions, files: TokenizerFiles, private: Path) -> ConvertedDataset:
    """Open a converted dataset; a CSV is converted first, by the first process."""
    if Path(path).is_dir():
        dataset = ConvertedDataset(Path(path))
        dataset.record.check_model(files, path)
        if dataset.record.format == ROUNDED_FORMAT:
            warn(
                "{path}: converted by an earlier version, which rounded recordings to 16 bits at 16 kHz; "
                "unless they all were so already, convert again, so that the model learns from what it will "
                "hear",
                path=path,
            )
        return dataset
    if is_first_process():
        manifest = read_manifest(path, options, needs_prediction=True)
        convert_rows(manifest, private, ChatTokenizer(files), options, reuse=True)
    return ConvertedDataset(private)


def warn_of_ignored(options: TrainOptions) -> None:
    """Warn of options that were given and have no effect, as a set is converted or nothing is evaluated."""
    paths = [path for path in (options.train_dataset, options.eval_dataset) if path is not None]
    converted = [path for path in paths if Path(path).is_dir()]
    converting = {field.name for field in dataclasses.fields(ConversionOptions)} - {"from_modelscope"}
    if len(converted) < len(paths):
        # Options of speed, which have their effect on the other set.
        converting -= {"num_workers", "tokenizing_batch_size"}
    names = ", ".join(options.given(converting))
    if names and converted == paths:
        warn("the data are converted already: {names} ignored", names=names)
    elif names and converted:
        warn("{path} is converted already: {names} ignored for it", path=converted[0], names=names)
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
