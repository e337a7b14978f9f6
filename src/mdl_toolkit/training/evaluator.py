"""Evaluate while a run trains: the loss over the evaluation set, a metric of answers, the best evaluation.

An evaluation that is given up, as the run is asked to stop, is owed: it comes first when the run goes on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.collate import Batch, SampleSource, split
from mdl_toolkit.data.prefetch import Prefetcher
from mdl_toolkit.data.tokenization import IGNORE_INDEX
from mdl_toolkit.evaluation.text_metrics import LOSS, Best
from mdl_toolkit.i18n import Localized
from mdl_toolkit.inference.generate import not_finite
from mdl_toolkit.training.answer_eval import AnswerEvaluator
from mdl_toolkit.training.checkpoints import Checkpoint
from mdl_toolkit.training.log import RunLog
from mdl_toolkit.training.memory.oom import MicroBatcher
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.resume import is_judged_alike, judged_by, still_best
from mdl_toolkit.training.sampler import Indices
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.device import summing_dtype
from mdl_toolkit.utils.distributed import World


@dataclass
class Evaluator:
    """Make a run's evaluations, and remember the last and the best one.

    Attributes:
        options: the run's.
        schedule: says when an evaluation is due.
        forward: computes losses.
        dataset: the evaluation examples, if any.
        answers: generates answers to some of them and compares these, if asked for.
        world: the processes.
        log: takes the evaluations.
        parts: indices of the examples of each dataset, by its name, if there are several.
    """

    options: TrainOptions
    schedule: Schedule
    forward: ForwardPass
    dataset: SampleSource | None
    answers: AnswerEvaluator | None
    world: World
    log: RunLog
    parts: Mapping[str, Indices] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Loss of the last evaluation, and the step after which it was made.
        self.loss: float | None = None
        self.step: int | None = None
        self.best = Best()
        # The last three losses; half the intervals of the last and the best score, 0 where nothing is known.
        self.recent: list[float] = []
        self.margin = self.best_margin = 0.0
        self.score: float | None = None
        self._has_warned = False
        self._judged_by = judged_by(self.dataset, self.answers)
        self._batch_size = self.options.eval_batch_size or self.options.batch_size
        device, is_fixed = self.forward.device, self.world.is_sharding
        purpose = Localized("when evaluating")
        self._loss_batcher = MicroBatcher(self._batch_size, device, purpose, is_fixed=is_fixed)
        self._answer_batcher = MicroBatcher(self._batch_size, device, Localized("when answering"))

    def is_due(self, step: int) -> bool:
        """Tell whether there is to be an evaluation after a step."""
        return step in self.schedule.evaluating

    def is_owed(self, step: int) -> bool:
        """Tell whether the run was stopped before an evaluation that was due after this step."""
        is_beyond = bool(self.schedule.evaluating) and step > self.schedule.total
        return (self.is_due(step) or is_beyond) and self.step != step

    @property
    def is_enough(self) -> bool:
        """Tell whether there were too many evaluations in a row without a better one."""
        patience = self.options.early_stopping_patience
        return patience is not None and self.best.worse >= patience

    def state(self) -> dict[str, Any]:
        """Return the evaluations so far, as a checkpoint keeps them."""
        return {
            "judged": self._judged_by,
            "eval_loss": self.loss,
            "evaluated": self.step,
            "best": asdict(self.best),
            "recent": self.recent,
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, as far as evaluations are made as they were then."""
        if is_judged_alike(checkpoint, self._judged_by):
            self.loss, self.step = (checkpoint.state.get(name) for name in ("eval_loss", "evaluated"))
            self.recent = checkpoint.state.get("recent", [])
        self.best = still_best(checkpoint, self.options, self._judged_by)

    @torch.no_grad()
    def evaluate(self, step: int, is_stopped: Callable[[], bool]) -> bool:
        """Evaluate the model; memory does not grow with the evaluation set.

        Args:
            step: optimizer steps made.
            is_stopped: tells whether this process is asked to stop; if weights are sharded, whether any is.

        Returns:
            Whether any process was: then the evaluation is given up.
        """
        model, answers = self.forward.model, self.answers
        model.eval()
        assert self.dataset is not None
        parts = self.parts or {"": np.arange(len(self.dataset.token_counts))}
        losses_and_tokens = [self.sum_losses(self.dataset, part, is_stopped) for part in parts.values()]
        score: Sequence[float] = (0.0,) * 5
        if answers is not None and not is_stopped():
            with self.forward.precision():
                score = self._answer_batcher.run(
                    len(answers.share), lambda most: answers.count(model, most, is_stopped)
                )
        model.train()
        others = torch.tensor([*score, is_stopped()], dtype=torch.float64)
        sums = self.world.sum(torch.cat([*losses_and_tokens, others])).tolist()
        *score, stops = sums[2 * len(parts) :]
        if not stops:
            self.margin = half_interval(*score)
            losses, tokens = sums[: 2 * len(parts) : 2], sums[1 : 2 * len(parts) : 2]
            means = [loss / max(count, 1) for loss, count in zip(losses, tokens, strict=True)]
            loss = sum(losses) / max(sum(tokens), 1)
            by_part = dict(zip(self.parts, means, strict=False))
            self.record(step, loss, score[0] / max(score[1], 1), int(sum(tokens)), by_part)
        return bool(stops)

    def sum_losses(self, dataset: SampleSource, examples: Indices, is_stopped: Callable[[], bool]) -> Tensor:
        """Return the sum of losses and the number of supervised tokens of this process's examples, `[2]`.

        A stop ends it early, with the examples so far.
        """
        device, every = self.forward.device, self.options.eval_accumulation_steps
        # Batches of similar length.
        order = examples[(-dataset.token_counts[examples]).argsort(kind="stable")]
        world, size = self.world, self._batch_size
        shares = (order[rank :: world.size] for rank in (world.rank, 0))
        batches, most = (
            [share[start : start + size] for start in range(0, len(share), size)] for share in shares
        )
        own = len(batches)
        if world.is_sharding:
            # As many as the first process has; what is not counted is the shortest example.
            batches += [order[-1:]] * (len(most) - own)
        sums = torch.zeros(2, dtype=torch.float64)
        pending = torch.zeros(2, dtype=summing_dtype(device), device=device)
        loader = Prefetcher.for_device(device, partial(self.forward.batch, dataset, is_training=False))
        for number, batch in enumerate(loader.batches(batches), 1):
            if is_stopped():
                break
            loss = self._loss_batcher.run(len(batch["input_ids"]), partial(self._sum_of_parts, batch))
            tokens = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            if number > own:
                continue
            pending += torch.stack([loss, tokens.to(device, pending.dtype)])
            if every is not None and number % every == 0:
                sums, pending = sums + pending.cpu(), torch.zeros_like(pending)
        return sums + pending.cpu()

    def _sum_of_parts(self, batch: Batch, most: int) -> Tensor:
        """Return the sum of a batch's losses, computed in micro-batches of at most `most` examples."""
        losses = torch.stack([self.forward.loss(part, 1) for part in split(batch, most)])
        return losses.to(summing_dtype(losses.device)).sum()

    def record(self, step: int, loss: float, score: float, tokens: int, by_part: Mapping[str, float]) -> None:
        """Remember and log an evaluation, and whether it is the best so far.

        Args:
            step: optimizer steps made.
            loss: mean over the supervised tokens.
            score: the metric of the answers; without answers, anything.
            tokens: number of supervised tokens.
            by_part: the loss on each dataset, if there are several.
        """
        scores = {f"eval_loss_{name}": each for name, each in by_part.items()}
        self.step, self.loss = step, loss
        if not math.isfinite(loss):
            reason = not_finite(self.forward.dtype)
            warn(
                "the evaluation loss after step {step} is {loss}: {reason}",
                step=step,
                loss=loss,
                reason=reason,
            )
        self.recent = [*self.recent, loss][-3:]
        if self.answers is None:
            self.best = self.best.after(LOSS, step, loss, loss)
            self.log.evaluation(step, loss, tokens, scores)
        else:
            metric = self.answers.metric
            self.best = self.best.after(metric, step, score, loss)
            self.log.evaluation(step, loss, tokens, {**scores, f"eval_{metric.name}": score})
            self.score = score
        if self.best.step == step:
            self.best_margin = self.margin
        is_rising = len(self.recent) == 3 and self.recent[0] < self.recent[1] < self.recent[2]
        if is_rising and not self.options.keep_best and not self._has_warned:
            self._has_warned = True
            warn(
                "the evaluation loss has risen twice in a row: {losses}; the run may be learning its rows by "
                "heart; --keep-best takes the best checkpoint as the result, not the last",
                losses=" < ".join(f"{each:.4f}" for each in self.recent),
            )

    def warn_of_chance(self) -> None:
        """Warn if `--keep-best` takes a checkpoint that is better by less than so few rows can tell."""
        best, answers = self.best, self.answers
        if not self.options.keep_best or answers is None or best.value is None or best.step == self.step:
            return
        margin = max(self.margin, self.best_margin)
        if self.score is not None and abs(best.value - self.score) < margin:
            warn(
                "--keep-best: {metric} {best:.4f} after step {step} against {last:.4f} at last, but {rows} "
                "{rows:row tells|rows tell} it to +-{margin:.2g} only: chance may have chosen; evaluate on "
                "more rows",
                metric=answers.metric.name,
                best=best.value,
                step=best.step,
                last=self.score,
                rows=len(answers.drawn),
                margin=margin,
            )


def half_interval(part: float, whole: float, part2: float, both: float, whole2: float) -> float:
    """Return half the 95 % interval of a ratio of two sums over rows, by the linearised variance.

    Args:
        part: sum of the rows' numerators.
        whole: sum of their denominators.
        part2: sum of squares of the numerators.
        both: sum of products of numerator and denominator.
        whole2: sum of squares of the denominators.
    """
    ratio = part / max(whole, 1)
    return 1.96 * math.sqrt(max(part2 - 2 * ratio * both + ratio**2 * whole2, 0)) / max(whole, 1)
