"""What a run tells while it trains: a line of JSON for each step, a bar with the loss, and trackers.

Only the first process speaks and writes.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.checkpoints import LOG
from mdl_toolkit.console import Progress, is_first_process, say, warn
from mdl_toolkit.errors import InputError
from mdl_toolkit.outputs import writing
from mdl_toolkit.sampling import Rows
from mdl_toolkit.trackers import Trackers

SMOOTHING = 0.9  # weight of the past in the loss that is shown


class RunLog:
    """The log of one run.

    Args:
        output: the run's folder, in which `log.jsonl` is written.
        shown: the bar.
        trackers: where else the figures go.
        seconds: of audio in every row, `[rows]`.
        epoch: steps in an epoch.
    """

    def __init__(
        self, output: Path, shown: Progress, trackers: Trackers, seconds: NDArray[np.float64], epoch: int
    ) -> None:
        self._file, self._shown, self._trackers = output / LOG, shown, trackers
        self._seconds, self._epoch = seconds, epoch
        self._smooth: float | None = None
        self._rows, self._audio, self._has_warned = 0, 0.0, False
        self._began = time.monotonic()

    def begin(self, step: int) -> None:
        """Go on after a step; what was logged of later ones, and lost with them, is dropped."""
        self._shown.advance(step)
        if is_first_process() and self._file.exists():
            kept = [line for line in read_log(self._file) if line["step"] <= step]
            work = self._file.with_suffix(".partial")
            with writing(str(self._file), InputError):
                work.write_text("".join(map(_line, kept)), encoding="utf-8")
                work.replace(self._file)
        self._began = time.monotonic()

    def step(self, step: int, *, loss: float, norm: float, rate: float, rows: Rows, waited: float) -> None:
        """Log an optimizer step; `waited` are all seconds so far that were spent waiting for data."""
        self._smooth = loss if self._smooth is None else SMOOTHING * self._smooth + (1 - SMOOTHING) * loss
        self._rows, self._audio = self._rows + len(rows), self._audio + float(self._seconds[rows].sum())
        elapsed = max(time.monotonic() - self._began, 1e-9)
        values = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": step / self._epoch}
        self._write(
            step,
            {**values, "rows": len(rows), "elapsed": round(elapsed, 3), "waited": round(waited / elapsed, 5)},
        )
        self._trackers.log(step, values)
        self._shown.advance(
            1,
            f"loss {self._smooth:.4f}, lr {rate:.2g}, {self._rows / elapsed:.2g} samples/s, "
            f"{self._audio / elapsed:.3g}x",
        )

    def evaluation(self, step: int, loss: float, tokens: int, scores: dict[str, float]) -> None:
        """Log an evaluation; `scores` are other metrics by name."""
        values = {"eval_loss": loss, "eval_tokens": tokens, **scores, "epoch": step / self._epoch}
        self._write(step, values)
        self._trackers.log(step, values)
        more = "".join(f", {name.removeprefix('eval_')} {value:.4f}" for name, value in scores.items())
        say(
            f"evaluation at step {step}: loss {loss:.4f} over {tokens} tokens{more}",
            f"第 {step} 步评估：{tokens} 个词元的损失为 {loss:.4f}{more}",
        )

    def share(self, seconds: float) -> float:
        """How much of the run's time some seconds are."""
        return seconds / max(time.monotonic() - self._began, 1e-9)

    def close(self) -> None:
        """The run is over."""
        self._trackers.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if not is_first_process():
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(_line({"step": step, **values}))
        except OSError as problem:
            self._warn_once(problem.strerror or str(problem))

    def _warn_once(self, reason: str) -> None:
        if not self._has_warned:
            warn(
                f"{LOG} cannot be written: {reason}; training goes on", f"无法写入 {LOG}：{reason}；训练继续"
            )
        self._has_warned = True


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut off, by a kill or a full disk, is left out."""
    whole, _, _ = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    return [line for line in map(_parsed, whole.splitlines()) if line is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and "step" in values else None


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
