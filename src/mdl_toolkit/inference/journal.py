"""Record answers on disk as they are computed, so that a killed run resumes.

While a run is at work, the folder `.NAME.partial` lies next to its output:

    lock             held by the process that is at work
    run.json         fingerprint of everything that the answers depend on
    input.csv        the recordings, where a folder or a pattern was given
    lengths.json     seconds of each recording, where windows are asked for
    downloads/       recordings that were fetched, likewise
    dataset/         the converted rows
    answers-R.jsonl  the answers of process R, one line each, written as soon as it is complete

The next run with the same fingerprint takes over the answers of a killed one. Those of another fingerprint
are moved to `NAME.previous-N`, and taken over from there when a run asks for them again.
"""

import glob
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized, Verbatim
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.distributed import PeerLostError
from mdl_toolkit.utils.files import parse_json, report_write_errors
from mdl_toolkit.utils.locks import hold_lock
from mdl_toolkit.utils.ownership import unused

RUN = "run.json"


class AnswerJournal:
    """Keep the answers of one output in its work folder.

    Attributes:
        output: the CSV to write.
        path: the work folder.
        listing: a CSV in it, for the recordings of a folder or pattern.
        lengths: a file in it, for the recordings' lengths.
        downloads: a folder in it, for recordings that are measured before they are converted.
        dataset: a folder in it, for the converted rows.
    """

    def __init__(self, output: Path) -> None:
        self._target = output.resolve()
        self.output, self.path = output, self._target.with_name(f".{self._target.name}.partial")
        self.listing, self.lengths = self.path / "input.csv", self.path / "lengths.json"
        self.downloads, self.dataset = self.path / "downloads", self.path / "dataset"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs for the context; keep its answers only if an error ends that.

        Without answers, an error keeps converted rows and what was measured or fetched if it is an
        interruption, and what an unfinished conversion has kept to resume from.

        Raises:
            InputError: another run is at work on the same output, or the folder cannot be made.
        """
        with report_write_errors(f"--output {self.output}", InputError):
            self.path.mkdir(parents=True, exist_ok=True)
        busy = InputError(
            "--output {output}: another inference is writing it; wait for its end", output=self.output
        )
        with hold_lock(self.path / "lock", busy):
            try:
                yield
            except BaseException as problem:
                unfinished = self.dataset.with_name(f".{self.dataset.name}.partial")
                was_stopped = isinstance(problem, (KeyboardInterrupt, PeerLostError))
                if answered := sum(isinstance(cells, list) for cells in self.answers().values()):
                    say(
                        "{answered} {answered:row is|rows are} answered (in {path}): the same command goes "
                        "on from there",
                        answered=answered,
                        path=self.path,
                    )
                elif was_stopped and self.dataset.exists():
                    say(
                        "all rows are converted (in {path}): the same command goes on from there",
                        path=self.path,
                    )
                elif unfinished.exists():
                    # The conversion has said what it keeps.
                    pass
                elif was_stopped and (self.lengths.exists() or self.downloads.exists()):
                    say(
                        "recordings that were measured or fetched are kept (in {path}): the same command "
                        "goes on from there",
                        path=self.path,
                    )
                else:
                    self._remove()
                raise
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    # --- resuming ---

    def begin(self, fingerprint: str) -> int:
        """Take over the answers with a fingerprint, move others away, and return how many are there.

        Raises:
            InputError: the disk does not take it.
        """
        if _fingerprint_in(self.path) == fingerprint:
            return len(self.answered())
        with report_write_errors(f"--output {self.output}", InputError):
            if answered := len(self.answers()):
                folder = unused(self._target.with_name(f"{self._target.name}.previous"))
                folder.mkdir()
                _move_answers(self.path, folder)
                say(
                    "{answered} {answered:answer here is|answers here are} of other work (another input, "
                    "model, options or version): {answered:it is|they are} set aside in {place}, and used "
                    "when that is asked for again",
                    answered=answered,
                    place=folder,
                )
            older = self._target.parent.glob(f"{glob.escape(self._target.name)}.previous-*")
            if previous := next((each for each in older if _fingerprint_in(each) == fingerprint), None):
                _move_answers(previous, self.path)
            (self.path / RUN).write_text(json.dumps(fingerprint), encoding="utf-8")
        return len(self.answered())

    def answered(self) -> set[int]:
        """Return the rows that need not be asked again: not those that a server refused, as it may change."""
        return {row for row, cells in self.answers().items() if not isinstance(cells, Localized)}

    def answers(self) -> dict[int, list[str] | Localized | None]:
        """Read the cells of every answer by the row's index: for a row that has none, why, or None.

        An answer wins over why there was none, whichever process recorded it.
        """
        answers: dict[int, list[str] | Localized | None] = {}
        for file in _answers_in(self.path):
            for line in file.read_text(encoding="utf-8").splitlines():
                # The last line is broken where a run was killed.
                with suppress(ValueError, TypeError):
                    row, cells = parse_json(line)
                    if isinstance(cells, list) or not isinstance(answers.get(row), list):
                        answers[row] = Verbatim(**cells) if isinstance(cells, dict) else cells
        return answers

    def unanswered(self, reason: Localized) -> dict[int, Localized]:
        """Return why rows have no answer, by their index: what is recorded, or else a reason."""
        return {row: cells or reason for row, cells in self.answers().items() if not isinstance(cells, list)}

    @contextmanager
    def appending(self, rank: int) -> Iterator[None]:
        """Open the file of one process's answers for the context."""
        with (self.path / f"answers-{rank}.jsonl").open("a", encoding="utf-8", newline="\n") as self._file:
            # End a line that a killed run has not finished.
            self._file.write("\n")
            yield

    def add(self, row: int, cells: Sequence[str] | Localized | None) -> None:
        """Append and flush the cells of a row's answer; a NUL, which no CSV can hold, becomes U+FFFD.

        Raises:
            InputError: the disk is full.
        """
        writable: Any = cells
        if isinstance(cells, Localized):
            writable = cells.to_json()
        elif cells:
            writable = [cell.replace("\0", "\N{REPLACEMENT CHARACTER}") for cell in cells]
        with report_write_errors(self._file.name, InputError):
            self._file.write(json.dumps([row, writable]) + "\n")
            self._file.flush()


def _answers_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers-*.jsonl"))


def _move_answers(source: Path, target: Path) -> None:
    """Move answers and their fingerprint to another folder, and remove an emptied one."""
    for file in (*_answers_in(source), source / RUN):
        with suppress(FileNotFoundError):
            file.replace(target / file.name)
    with suppress(OSError):
        source.rmdir()


def _fingerprint_in(folder: Path) -> str | None:
    with suppress(OSError, ValueError):
        return str(parse_json((folder / RUN).read_text(encoding="utf-8")))
    return None
