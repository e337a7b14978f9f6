"""CSV to predictions: every row is checked first, then answered greedily, then written in one go.

Answers do not depend on the batch: every clip is computed as if alone, and each row has its own budget of
new tokens. That holds in float32; in bfloat16 rounding can turn a word that is a near tie.
"""

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.answering import answer
from mdl_toolkit.batching import Collator
from mdl_toolkit.console import progress, say
from mdl_toolkit.conversion import convert_rows, read_rows
from mdl_toolkit.dataset import ConvertedDataset
from mdl_toolkit.errors import InputError, RowProblem, RowsError
from mdl_toolkit.folders import ADAPTER_CONFIG, find_model
from mdl_toolkit.language import Text
from mdl_toolkit.loading import base_of, explaining_memory, load_for_inference
from mdl_toolkit.manifest import Manifest
from mdl_toolkit.outputs import removing_empty, replacing_file
from mdl_toolkit.result_options import InferenceOptions
from mdl_toolkit.settings import SETTINGS_FILE, to_yaml
from mdl_toolkit.text_files import read_text_files
from mdl_toolkit.tokens import Encoder

MEMORY_REMEDY = Text("lower --batch-size", "请减小 --batch-size")


def infer(options: InferenceOptions) -> list[str]:
    """Answer every row of a CSV and write the CSV with the answers in the column `prediction`.

    Returns:
        The predictions, in the order of the rows.

    Raises:
        ToolkitError: bad rows, rows that are too long (all of them in one message), no model.
    """
    output = Path(options.output)
    _check_output(output)
    manifest = read_rows(options.input, options, needs_prediction=False)
    with removing_empty(output.parent):
        predictions = _answer_and_write(manifest, output, options)
    say(f"{output}: {len(predictions)} predictions", f"{output}：{len(predictions)} 条预测")
    return predictions


def _answer_and_write(manifest: Manifest, output: Path, options: InferenceOptions) -> list[str]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.work-") as place:
        predictions = _answer_all(manifest, Path(place), options) if any(True for _ in manifest) else []
    _write(output, manifest, predictions)
    settings = output.with_name(f"{output.name}.{SETTINGS_FILE}")
    settings.write_text(to_yaml(options), encoding="utf-8")
    return predictions


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise InputError(
            f"--output {output}: a folder is there; give the name of a CSV file",
            f"--output {output}：该位置是目录；请指定 CSV 文件名",
        )


def _answer_all(manifest: Manifest, place: Path, options: InferenceOptions) -> list[str]:
    # Of a local folder everything is here to be checked at once; of a hub's, weights wait for the rows.
    is_local = Path(options.model_name).is_dir()
    folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=is_local)
    if is_local and (folder / ADAPTER_CONFIG).is_file():
        base_of(folder, from_modelscope=options.from_modelscope)
    encoder = Encoder(read_text_files(folder))
    convert_rows(manifest, place / "dataset", encoder, options, with_answer=False)
    dataset = ConvertedDataset(place / "dataset")
    _check_lengths(manifest, dataset, options.max_length)
    predictions: list[str] = []
    with explaining_memory(MEMORY_REMEDY), progress("answering", "推理中", len(dataset)) as shown:
        model = load_for_inference(options.model_name, from_modelscope=options.from_modelscope)
        for answers in _batches(model, encoder, dataset, options):
            predictions += answers
            shown.advance(len(answers))
    return predictions


def _check_lengths(manifest: Manifest, dataset: ConvertedDataset, max_length: int) -> None:
    """Report all rows whose prompt leaves no room for an answer (rule 37).

    Raises:
        RowsError: with the length that each of them needs.
    """
    problems = [
        RowProblem(row.line, "audio", row.shown, _too_long(int(length), max_length))
        for row, length in zip(manifest.rows_unseen(), dataset.positions, strict=True)
        if length >= max_length
    ]
    if problems:
        raise RowsError(str(manifest.path), problems)


def _too_long(length: int, max_length: int) -> Text:
    return Text(
        f"the prompt alone takes {length} tokens; --max-length {max_length} must be at least {length + 1}",
        f"仅提示就有 {length} 个词元；--max-length {max_length} 至少应为 {length + 1}",
    )


def _batches(
    model: Any, encoder: Encoder, dataset: ConvertedDataset, options: InferenceOptions
) -> Iterator[list[str]]:
    collate = Collator(encoder.pad_id)
    for start in range(0, len(dataset), options.batch_size):
        indices = range(start, min(start + options.batch_size, len(dataset)))
        budgets = [options.max_length - int(dataset.positions[index]) for index in indices]
        batch: dict[str, Any] = {**collate([dataset[index] for index in indices])}
        del batch["labels"]
        with torch.inference_mode():
            answers = answer(model, encoder, batch, budgets)
        yield answers


def _write(output: Path, manifest: Manifest, predictions: list[str]) -> None:
    """Write the input's columns with the predictions, whole or not at all (rule 39)."""
    columns = list(manifest.columns)
    place = columns.index("prediction") if "prediction" in columns else len(columns)
    columns[place:] = ["prediction", *columns[place + 1 :]]
    with replacing_file(output) as work, work.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row, prediction in zip(manifest.rows_unseen(), predictions, strict=True):
            writer.writerow([*row.cells[:place], prediction, *row.cells[place + 1 :]])
