"""Keep answers in a journal as they come, and write the CSV that they become.

Beside the output lies `.NAME.partial` while it is made:

    lock            held by the process that is at work
    run.json        fingerprint of everything that the answers come from
    input.csv       the recordings, where a folder or a pattern was given
    dataset/        the rows, converted
    answers-R.jsonl the answers of process R, one line each, written as soon as it is complete

A killed run's answers are taken over by the next one with the same fingerprint. Those of other work are set
aside in `NAME.previous-N`, with their fingerprint, and taken over from there when it is asked for again.
"""

import csv
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import InputError
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import replace_file, report_write_errors
from mdl_toolkit.utils.locks import hold_lock

RUN = "run.json"


class AnswerJournal:
    """Keep the work folder of one output."""

    def __init__(self, output: Path) -> None:
        self._target = output.resolve()
        self.output, self.path = output, self._target.with_name(f".{self._target.name}.partial")
        self.listing, self.dataset = self.path / "input.csv", self.path / "dataset"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, for as long as the context lasts, against other runs.

        Raises:
            InputError: another run is at work on the same output, or the folder cannot be made.
        """
        with report_write_errors(f"--output {self.output}", InputError):
            self.path.mkdir(parents=True, exist_ok=True)
        busy = InputError(
            "--output {output}: another inference is writing it; wait for its end", output=self.output
        )
        with hold_lock(self.path / "lock", busy):
            yield

    # --- what is known already ---

    @property
    def is_converting(self) -> bool:
        """Tell whether a conversion has kept a part of its work, from which it goes on."""
        return self.dataset.with_name(f".{self.dataset.name}.partial").exists()

    def begin(self, fingerprint: str) -> int:
        """Set the answers of other work aside, take up those of this one, and return how many there are."""
        if _fingerprint_in(self.path) != fingerprint:
            with report_write_errors(f"--output {self.output}", InputError):
                self._set_aside()
                for place in self._previous().values():
                    if _fingerprint_in(place) == fingerprint:
                        _move_answers(place, self.path)
                        break
                (self.path / RUN).write_text(json.dumps(fingerprint), encoding="utf-8")
        return len(self.answers())

    def _set_aside(self) -> None:
        """Move the answers that are here to a folder beside the output, if there are any, and say so."""
        if answered := len(self.answers()):
            number = max(self._previous(), default=0) + 1
            place = self._target.with_name(f"{self._target.name}.previous-{number}")
            place.mkdir()
            _move_answers(self.path, place)
            say(
                "{answered} answers here are of other work (another input, model, options or version): "
                "they are set aside in {place}, and used when that is asked for again",
                answered=answered,
                place=place,
            )

    def _previous(self) -> dict[int, Path]:
        """Return the folders of what was set aside, by number."""
        name = re.compile(re.escape(self._target.name) + r"\.previous-(\d+)")
        found = ((name.fullmatch(path.name), path) for path in sorted(self._target.parent.iterdir()))
        return {int(match[1]): path for match, path in found if match}

    def answers(self) -> dict[int, list[str]]:
        """Read the cells of every row that is answered, by its number in the dataset."""
        found: dict[int, list[str]] = {}
        for file in _answers_in(self.path):
            for line in file.read_text(encoding="utf-8").splitlines():
                # The last line is broken where a run was killed.
                with suppress(ValueError, TypeError):
                    row, cells = json.loads(line)
                    found[row] = cells
        return found

    # --- more answers ---

    @contextmanager
    def writer(self, rank: int) -> Iterator["AnswerWriter"]:
        """Open what writes the answers of one process down."""
        with (self.path / f"answers-{rank}.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            # End a line that a killed run has not finished.
            file.write("\n")
            yield AnswerWriter(file)

    # --- the end ---

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _answers_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers-*.jsonl"))


def _move_answers(source: Path, target: Path) -> None:
    """Move answers and their fingerprint to another folder; an emptied one goes."""
    for file in (*_answers_in(source), source / RUN):
        with suppress(FileNotFoundError):
            file.replace(target / file.name)
    with suppress(OSError):
        source.rmdir()


def _fingerprint_in(folder: Path) -> str | None:
    with suppress(OSError, ValueError):
        return str(json.loads((folder / RUN).read_text(encoding="utf-8")))
    return None


class AnswerWriter:
    """Write answers down, each at once: what is handed to the system survives the process."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def add(self, row: int, cells: Sequence[str]) -> None:
        """Write down a row's cells; a NUL, which a model may say and no CSV can hold, becomes U+FFFD.

        Raises:
            InputError: the disk is full.
        """
        held = [cell.replace("\0", "\N{REPLACEMENT CHARACTER}") for cell in cells]
        with report_write_errors(self._file.name, InputError):
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
        report_write_errors(f"--output {output}", InputError),
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
