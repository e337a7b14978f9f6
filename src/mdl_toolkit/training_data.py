"""What a run learns from: CSVs or converted datasets, opened before any weight is loaded."""

import dataclasses
from pathlib import Path

from mdl_toolkit.console import is_first_process, warn
from mdl_toolkit.conversion import convert_rows, read_rows
from mdl_toolkit.dataset import ConvertedDataset
from mdl_toolkit.errors import DatasetError
from mdl_toolkit.folders import check_trainable, find_model
from mdl_toolkit.legacy import AnyDataset, LegacyDataset, is_legacy
from mdl_toolkit.option import setting_of, spelling
from mdl_toolkit.options import ConversionOptions
from mdl_toolkit.text_files import TextFiles, read_text_files
from mdl_toolkit.tokens import Encoder
from mdl_toolkit.training_options import EVALUATION, TrainOptions


def open_data(options: TrainOptions, private: Path) -> tuple[TextFiles, AnyDataset, AnyDataset | None]:
    """The model's text side and both datasets, all that can be checked before any weight is loaded.

    Args:
        options: the run's.
        private: folder that a CSV is converted into, by the first process.

    Raises:
        ToolkitError: a bad row, a dataset of another model, a model that cannot be trained so.
    """
    # Of a local folder everything is here to be checked at once; of a hub's, weights wait for the data.
    is_local = Path(options.model_name).is_dir()
    folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=is_local)
    check_trainable(folder, quantization=options.quantization, merge=options.merge_lora)
    files = read_text_files(folder)
    _warn_ignored(options)
    eval_set = None
    if options.eval_dataset is not None:  # first: it is the smaller one, and its bad rows are soon known
        eval_set = _open_set(options.eval_dataset, options, files, private / "eval")
    train_set = _open_set(options.train_dataset, options, files, private / "train")
    if not len(train_set):
        raise DatasetError(f"{options.train_dataset}: no rows", f"{options.train_dataset}：没有任何行")
    return files, train_set, eval_set


def _open_set(path: str, options: TrainOptions, files: TextFiles, private: Path) -> AnyDataset:
    if Path(path).is_dir():
        if is_legacy(Path(path)):
            return LegacyDataset(Path(path), Encoder(files))
        dataset = ConvertedDataset(Path(path))
        dataset.record.check_model(files, path)
        return dataset
    if is_first_process():
        manifest = read_rows(path, options, needs_prediction=True)
        convert_rows(manifest, private, Encoder(files), options, reuse=True)
    return ConvertedDataset(private)


def _warn_ignored(options: TrainOptions) -> None:
    """Name options that were given and have nothing to work on (rules 24, 28)."""
    paths = [path for path in (options.train_dataset, options.eval_dataset) if path is not None]
    converting = {field.name for field in dataclasses.fields(ConversionOptions)}
    names = _given(options, converting - {"from_modelscope", "num_workers"})
    if names and all(Path(path).is_dir() for path in paths):
        warn(f"the data are converted already: {names} ignored", f"数据已经转换：忽略 {names}")
    evaluating = {f.name for f in dataclasses.fields(options) if setting_of(f).group == EVALUATION}
    names = _given(options, evaluating - {"report_to"})
    if names and options.eval_dataset is None:
        warn(f"there is no --eval-dataset: {names} ignored", f"未指定 --eval-dataset：忽略 {names}")


def _given(options: TrainOptions, names: set[str]) -> str:
    """Those of some options that are not at their defaults, as they are typed."""
    fields = [field for field in dataclasses.fields(options) if field.name in names]
    return ", ".join(
        spelling(field.name) for field in fields if getattr(options, field.name) != field.default
    )
