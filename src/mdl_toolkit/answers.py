"""Answers as they come, kept in a journal, and the CSV that they become (rule 39).

Beside the output lies `.NAME.partial` while it is made:

    lock            held by the process that is at work
    run.json        fingerprint of everything that the answers come from
    input.csv       the recordings, where a folder or a pattern was given
    dataset/        the rows, converted
    answers-R.jsonl the answers of process R, one line each, written as soon as it is complete

A killed run's answers are taken over by the next one with the same fingerprint.
"""

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mdl_toolkit.errors import InputError
from mdl_toolkit.files import replace_file, writing
from mdl_toolkit.locks import held
from mdl_toolkit.manifest import Row


class Journal:
    """The work folder of one output."""

    def __init__(self, output: Path) -> None:
        target = output.resolve()
        self.output, self.path = output, target.with_name(f".{target.name}.partial")
        self.listing, self.dataset = self.path / "input.csv", self.path / "dataset"
        self._run = self.path / "run.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, for as long as the context lasts, against other runs.

        Raises:
            InputError: another run is at work on the same output, or the folder cannot be made.
        """
        with writing(f"--output {self.output}", InputError):
            self.path.mkdir(parents=True, exist_ok=True)
        busy = InputError(
            f"--output {self.output}: another inference is writing it; wait for its end",
            f"--output {self.output}：另一个推理正在写入该文件；请等待其结束",
        )
        with held(self.path / "lock", busy):
            yield

    # --- what is known already ---

    @property
    def is_converting(self) -> bool:
        """Tell whether a conversion has kept a part of its work, from which it goes on."""
        return self.dataset.with_name(f".{self.dataset.name}.partial").exists()

    def begin(self, fingerprint: str) -> int:
        """Forget the answers of another run; how many there are of this one."""
        with suppress(OSError, ValueError):
            if json.loads(self._run.read_text(encoding="utf-8")) == fingerprint:
                return len(self.answers())
        for file in self._files():
            file.unlink()
        with writing(f"--output {self.output}", InputError):
            self._run.write_text(json.dumps(fingerprint), encoding="utf-8")
        return 0

    def answers(self) -> dict[int, list[str]]:
        """The cells of every row that is answered, by its number in the dataset."""
        found: dict[int, list[str]] = {}
        for file in self._files():
            for line in file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError):  # the line at which a run was killed
                    row, cells = json.loads(line)
                    found[row] = cells
        return found

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("answers-*.jsonl"))

    # --- more answers ---

    @contextmanager
    def writer(self, rank: int) -> Iterator["Pen"]:
        """What writes the answers of one process down."""
        with (self.path / f"answers-{rank}.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            file.write("\n")  # ends a line that a killed run has not finished
            yield Pen(file)

    # --- the end ---

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)


class Pen:
    """Writes answers down, each at once: what is handed to the system survives the process."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def add(self, row: int, cells: Sequence[str]) -> None:
        """Write down a row's cells; a NUL, which a model may say and no CSV can hold, becomes U+FFFD.

        Raises:
            InputError: the disk is full.
        """
        held = [cell.replace("\0", "\N{REPLACEMENT CHARACTER}") for cell in cells]
        with writing(self._file.name, InputError):
            self._file.write(json.dumps([row, held]) + "\n")
            self._file.flush()


def write_table(
    output: Path, columns: Sequence[str], new: Sequence[str], rows: Iterable[tuple[Row, Sequence[str]]]
) -> None:
    """Write the input's columns and cells as they are, with new ones in place or behind, whole or not at all.

    Args:
        output: the CSV file; an existing one is replaced.
        columns: the input's.
        new: names of the new columns; one that is among the input's is replaced.
        rows: each with its new cells.

    Raises:
        InputError: it cannot be written.
    """
    names = [*columns, *(name for name in new if name not in columns)]
    places = [names.index(name) for name in new]
    with (
        writing(f"--output {output}", InputError),
        replace_file(output) as work,
        work.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(names)
        for row, cells in rows:
            line = [*row.cells, *[""] * (len(names) - len(columns))]
            for place, cell in zip(places, cells, strict=True):
                line[place] = cell
            writer.writerow(line)
