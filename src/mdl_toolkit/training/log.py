"""Log a run while it trains: a line of JSON for each step, a bar with the loss, and trackers.

Only the first process speaks and writes.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.data.warnings import LossWatch
from mdl_toolkit.errors import InputError
from mdl_toolkit.evaluation.text_metrics import TEXT_METRICS
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.training.sampler import BatchSampler, Indices
from mdl_toolkit.training.trackers import Trackers
from mdl_toolkit.utils.console import PLAIN_INTERVAL, Progress, clock, is_first_process, say, warn
from mdl_toolkit.utils.files import report_write_errors, write_text
from mdl_toolkit.utils.run_folder import LOG, SmoothedLoss, read_log

# Whichever comes first: then it is said how long all steps will take.
FORECAST_STEPS, FORECAST_SECONDS = 3, 20.0


@dataclass(frozen=True)
class Pace:
    """Measure how fast a run was, from its start or its resumption on.

    Attributes:
        examples: number learnt from, each as often as it came.
        audio: seconds of audio in these.
        seconds: that it took, evaluations and checkpoints included.
        waited: of these, seconds spent waiting for data.
        tokens: decoder tokens of these examples.
        operations: floating-point operations that learning from them takes.
    """

    examples: int
    audio: float
    seconds: float
    waited: float
    tokens: int = 0
    operations: float = 0.0


class TimeForecast:
    """Forecast how long a run will take, by the time that a decoder token has taken so far.

    The first step, which warms everything up, counts only when it is all there is.

    Args:
        sampler: chooses the examples of each step.
        total: steps of the run.
    """

    def __init__(self, sampler: BatchSampler, total: int) -> None:
        self._lengths, self._total = sampler.lengths, total
        # Tokens of a step.
        self._mean = float(sampler.lengths[sampler.epoch(0)].sum()) / sampler.steps_per_epoch
        # Seconds and tokens of each.
        self._steps: list[tuple[float, int]] = []
        self._is_told = False

    def step(self, step: int, examples: Indices, seconds: float, elapsed: float) -> float | None:
        """Take in a step; return once, as soon as it can be told, the seconds that the steps left will take.

        Args:
            step: optimizer steps made.
            examples: indices of the step's examples.
            seconds: that the step took.
            elapsed: seconds since the start or the resumption.
        """
        if self._is_told:
            return None
        self._steps.append((seconds, int(self._lengths[examples].sum())))
        if len(self._steps) < FORECAST_STEPS and elapsed < FORECAST_SECONDS:
            return None
        self._is_told = True
        taken, tokens = np.sum(self._steps[1:] or self._steps, axis=0).tolist()
        return float(taken / max(tokens, 1) * self._mean * (self._total - step))


class RunLog:
    """Write the log of a run, move its bar and feed its trackers.

    Args:
        output: the run's folder, in which `log.jsonl` is written.
        bar: shows the steps.
        begin_trackers: starts what takes the figures as well.
        sampler: chooses the examples of each step.
        seconds: of audio in every example, `[examples]`.
        watch: warns of losses that do not fall.
        operations: that learning from each example takes, `[examples]`.
    """

    def __init__(
        self,
        output: Path,
        bar: Progress,
        begin_trackers: Callable[[], Trackers],
        sampler: BatchSampler,
        seconds: NDArray[np.float64],
        watch: LossWatch,
        operations: NDArray[np.float64],
    ) -> None:
        self._file, self._bar, self._begin_trackers = output / LOG, bar, begin_trackers
        self._seconds, self._epoch = seconds, sampler.steps_per_epoch
        self._watch, self._forecast = watch, TimeForecast(sampler, watch.total)
        self._smooth, self._end_of_a_cut_line = SmoothedLoss(), ""
        self._examples, self._audio, self._waited, self._has_warned = 0, 0.0, 0.0, False
        self._lengths, self._operations = sampler.lengths, operations
        self._tokens, self._computed = 0, 0.0
        self._has_evaluated = False
        self._began = self._mark = time.monotonic()

    def begin(self, step: int) -> None:
        """Start logging after a step, and drop the lines of later steps, which were lost."""
        self._trackers = self._begin_trackers()
        self._bar.begin(step)
        if is_first_process() and self._file.exists():
            kept = [line for line in read_log(self._file) if line["step"] <= step]
            with report_write_errors(str(self._file), InputError):
                write_text(self._file, "".join(map(_line, kept)))
            self._watch.losses[:] = [line["loss"] for line in kept if "loss" in line]
        self._began = self._mark = time.monotonic()

    def step(
        self, step: int, *, loss: float, norm: float, rate: float, examples: Indices, waited: float
    ) -> None:
        """Log an optimizer step.

        Args:
            step: optimizer steps made.
            loss: of the step.
            norm: of the gradient.
            rate: the learning rate.
            examples: indices of the step's examples.
            waited: seconds spent waiting for data so far.
        """
        smooth = self._smooth.add(loss)
        self._examples += len(examples)
        self._audio += float(self._seconds[examples].sum())
        self._tokens += int(self._lengths[examples].sum())
        self._computed += float(self._operations[examples].sum())
        self._waited, now = waited, time.monotonic()
        elapsed = max(now - self._began, 1e-9)
        values = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": step / self._epoch}
        times = {"elapsed": round(elapsed, 3), "waited": round(waited / elapsed, 5)}
        self._write(step, {**values, "rows": len(examples), **times})
        self._trackers.log(step, values)
        note = Localized(
            "loss {smooth:.4f}, lr {rate:.2g}, {speed} samples/s, {times}",
            smooth=smooth,
            rate=rate,
            speed=f"{self._examples / elapsed:.2g}",
            times=f"{self._audio / elapsed:.3g}x",
        )
        self._bar.advance(1, str(note))
        self._watch.see(step, loss)
        left = self._forecast.step(step, examples, now - self._mark, elapsed)
        if left is not None and left >= PLAIN_INTERVAL:
            say(
                "time: about {total}, of which {left} are left; evaluations still to come not counted",
                total=clock(elapsed + left),
                left=clock(left),
            )
        self._mark = time.monotonic()

    def evaluation(self, step: int, loss: float, tokens: int, scores: dict[str, float]) -> None:
        """Log an evaluation, in place of an earlier one of its step.

        Args:
            step: optimizer steps made.
            loss: mean over the supervised tokens.
            tokens: number of supervised tokens.
            scores: other metrics by name, `eval_METRIC`, and losses of each dataset, `eval_loss_NAME`.
        """
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
            metric = TEXT_METRICS.get(name.removeprefix("eval_"))
            part = name.removeprefix("eval_loss_")
            title = Localized("loss of {name}", name=part) if metric is None else metric.title
            parts.append(Localized("{metric} {value:.4g}", metric=title, value=value))
        say(join_messages(parts, "{left}, {right}"))
        self._mark = time.monotonic()

    @property
    def pace(self) -> Pace:
        """Return the pace until now."""
        seconds = time.monotonic() - self._began
        return Pace(self._examples, self._audio, seconds, self._waited, self._tokens, self._computed)

    @contextmanager
    def telling_trackers(self) -> Iterator[None]:
        """Tell the trackers at the end of the context that the run is over, however it ends."""
        try:
            yield
        finally:
            self._trackers.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        """Write the line of a step or an evaluation; a disk that does not take it is warned of once."""
        if not is_first_process():
            return
        line = _line({"step": step, **values})
        try:
            # A run that goes on may make its first evaluation again.
            may_repeat = "eval_loss" in values and not self._has_evaluated and self._file.exists()
            self._has_evaluated |= "eval_loss" in values
            lines = read_log(self._file) if may_repeat else []
            others = [each for each in lines if each["step"] != step or "eval_loss" not in each]
            if len(others) < len(lines):
                write_text(self._file, "".join(map(_line, others)) + line)
            else:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(self._end_of_a_cut_line + line)
            self._end_of_a_cut_line = ""
        except (OSError, InputError) as problem:
            self._end_of_a_cut_line = "\n"
            if not self._has_warned:
                warn("{log} cannot be written: {reason}; training goes on", log=LOG, reason=problem)
            self._has_warned = True


def _line(values: dict[str, Any]) -> str:
    """Return a line of the log."""
    return json.dumps(values) + "\n"
