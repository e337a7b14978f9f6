"""What a run tells while it trains: a line of JSON for each step, a bar with the loss, and trackers.

Only the first process speaks and writes.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.data.warnings import LossWatch
from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.training.sampler import BatchSampler, Indices
from mdl_toolkit.training.trackers import Trackers
from mdl_toolkit.utils.console import PLAIN_INTERVAL, Progress, clock, is_first_process, say, warn
from mdl_toolkit.utils.files import report_write_errors, write_text
from mdl_toolkit.utils.run_folder import LOG, SmoothedLoss, read_log

FORECAST_STEPS, FORECAST_SECONDS = 3, 20.0  # whichever comes first, then it is said how long all will take


@dataclass(frozen=True)
class Pace:
    """How fast a run was, from its beginning or its resumption on.

    Attributes:
        rows: learnt from, each as often as it came.
        audio: seconds of audio in these.
        seconds: that it took, evaluations and checkpoints included.
        waited: of these, seconds spent waiting for data.
    """

    rows: int
    audio: float
    seconds: float
    waited: float


class Forecast:
    """How long a run will take, by the time that a decoder position has taken so far.

    The first step, which warms everything up, counts only when it is all there is.

    Args:
        sampler: the order of the rows.
        total: steps of the run.
    """

    def __init__(self, sampler: BatchSampler, total: int) -> None:
        self._lengths, self._total = sampler.lengths, total
        self._mean = float(sampler.lengths.sum()) / sampler.steps_per_epoch  # positions of a step
        self._steps: list[tuple[float, int]] = []  # seconds and positions
        self._is_told = False

    def step(self, step: int, rows: Indices, seconds: float, elapsed: float) -> float | None:
        """Take a step in; once, when it can be told, the seconds that the steps left will take."""
        if self._is_told:
            return None
        self._steps.append((seconds, int(self._lengths[rows].sum())))
        if len(self._steps) < FORECAST_STEPS and elapsed < FORECAST_SECONDS:
            return None
        self._is_told = True
        taken, positions = np.sum(self._steps[1:] or self._steps, axis=0).tolist()
        return float(taken / max(positions, 1) * self._mean * (self._total - step))


class RunLog:
    """The log of one run.

    Args:
        output: the run's folder, in which `log.jsonl` is written.
        shown: the bar.
        trackers: where else the figures go.
        sampler: the order of the rows.
        seconds: of audio in every row, `[rows]`.
        watch: looks at the losses.
    """

    def __init__(
        self, output: Path, shown: Progress, trackers: Trackers, sampler: BatchSampler,
        seconds: NDArray[np.float64], watch: LossWatch,
    ) -> None:  # fmt: skip
        self._file, self._shown, self._trackers = output / LOG, shown, trackers
        self._seconds, self._epoch = seconds, sampler.steps_per_epoch
        self._watch, self._forecast = watch, Forecast(sampler, watch.total)
        self._smooth, self._end_of_a_cut_line = SmoothedLoss(), ""
        self._rows, self._audio, self._waited, self._has_warned = 0, 0.0, 0.0, False
        self._began = self._mark = time.monotonic()

    def begin(self, step: int) -> None:
        """Go on after a step; what was logged of later ones, and lost with them, is dropped."""
        self._shown.begin(step)
        if is_first_process() and self._file.exists():
            kept = [line for line in read_log(self._file) if line["step"] <= step]
            with report_write_errors(str(self._file), InputError):
                write_text(self._file, "".join(map(_line, kept)))
            self._watch.losses[:] = [line["loss"] for line in kept if "loss" in line]
        self._began = self._mark = time.monotonic()

    def step(self, step: int, *, loss: float, norm: float, rate: float, rows: Indices, waited: float) -> None:
        """Log an optimizer step; `waited` are all seconds so far that were spent waiting for data."""
        smooth = self._smooth.add(loss)
        self._rows, self._audio = self._rows + len(rows), self._audio + float(self._seconds[rows].sum())
        self._waited, now = waited, time.monotonic()
        elapsed = max(now - self._began, 1e-9)
        values = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": step / self._epoch}
        self._write(
            step,
            {**values, "rows": len(rows), "elapsed": round(elapsed, 3), "waited": round(waited / elapsed, 5)},
        )
        self._trackers.log(step, values)
        speed, times = f"{self._rows / elapsed:.2g}", f"{self._audio / elapsed:.3g}x"
        note = Localized(
            "loss {smooth:.4f}, lr {rate:.2g}, {speed} samples/s, {times}",
            smooth=smooth,
            rate=rate,
            speed=speed,
            times=times,
        )
        self._shown.advance(1, str(note))
        self._watch.see(step, loss)
        self._say_forecast(elapsed, self._forecast.step(step, rows, now - self._mark, elapsed))
        self._mark = time.monotonic()

    def _say_forecast(self, elapsed: float, left: float | None) -> None:
        if left is not None and left >= PLAIN_INTERVAL:
            total, left_clock = clock(elapsed + left), clock(left)
            say(
                "time: about {total}, of which {left} are left; evaluations still to come not counted",
                total=total,
                left=left_clock,
            )

    def evaluation(self, step: int, loss: float, tokens: int, scores: dict[str, float]) -> None:
        """Log an evaluation, in place of an earlier one of its step; `scores` are other metrics by name."""
        values = {"eval_loss": loss, "eval_tokens": tokens, **scores, "epoch": step / self._epoch}
        self._write(step, values)
        self._trackers.log(step, values)
        parts = [
            Localized(
                "evaluation at step {step}: loss {loss:.4f} over {tokens} tokens",
                step=step,
                loss=loss,
                tokens=tokens,
            )
        ]
        for name, value in scores.items():
            parts.append(Localized("{metric} {value:.4f}", metric=name.removeprefix("eval_"), value=value))
        say(join_messages(parts, "{left}, {right}"))
        self._mark = time.monotonic()

    @property
    def pace(self) -> Pace:
        """How fast it was until now."""
        return Pace(self._rows, self._audio, time.monotonic() - self._began, self._waited)

    def close(self) -> None:
        """The run is over."""
        self._trackers.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if not is_first_process():
            return
        try:
            if "eval_loss" in values and (others := self._without_evaluation(step)) is not None:
                write_text(self._file, "".join(map(_line, [*others, {"step": step, **values}])))
            else:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(f"{self._end_of_a_cut_line}{_line({'step': step, **values})}")
            self._end_of_a_cut_line = ""
        except OSError as problem:
            self._end_of_a_cut_line = "\n"
            self._warn_once(problem.strerror or str(problem))

    def _without_evaluation(self, step: int) -> list[dict[str, Any]] | None:
        """The lines without evaluations of a step; None if there are none of these."""
        lines = read_log(self._file) if self._file.exists() else []
        others = [line for line in lines if line["step"] != step or "eval_loss" not in line]
        return others if len(others) < len(lines) else None

    def _warn_once(self, reason: str) -> None:
        if not self._has_warned:
            warn("{log} cannot be written: {reason}; training goes on", log=LOG, reason=reason)
        self._has_warned = True


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
