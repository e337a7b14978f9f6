"""Evaluations while a run trains: the loss of the evaluation rows, a metric of answers, which one was best.

An evaluation that is given up, as the run is asked to stop, is owed: it comes first when the run goes on.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.collate import Batch, SampleSource, split
from mdl_toolkit.data.prefetch import Prefetcher
from mdl_toolkit.data.tokenization import IGNORE_INDEX
from mdl_toolkit.evaluation.text_metrics import LOSS, Best
from mdl_toolkit.i18n import Localized
from mdl_toolkit.training.answer_eval import AnswerEvaluator
from mdl_toolkit.training.checkpoints import Checkpoint
from mdl_toolkit.training.log import RunLog
from mdl_toolkit.training.memory.oom import MicroBatcher
from mdl_toolkit.training.resume import is_judged_alike, judged_by, still_best
from mdl_toolkit.training.sampler import Rows
from mdl_toolkit.training.schedule import Schedule
from mdl_toolkit.training.step import ForwardPass
from mdl_toolkit.utils.distributed import World


@dataclass
class Evaluator:
    """A run's evaluations, and what they have come to so far.

    Attributes:
        options: the run's.
        schedule: when one is due.
        forward: what is computed with.
        dataset: the rows to evaluate on, if any.
        answers: generates answers to some of them and compares these, if asked for.
        world: the processes.
        log: where an evaluation is written.
    """

    options: TrainOptions
    schedule: Schedule
    forward: ForwardPass
    dataset: SampleSource | None
    answers: AnswerEvaluator | None
    world: World
    log: RunLog

    def __post_init__(self) -> None:
        self.loss: float | None = None  # of the last evaluation
        self.step: int | None = None  # after which it was
        self.best = Best()
        self._judged_by = judged_by(self.dataset, self.answers)
        self._size = self.options.eval_batch_size or self.options.batch_size
        device = self.forward.device
        self._micro_batcher = MicroBatcher(self._size, device, Localized("when evaluating"))
        self._answer_batcher = MicroBatcher(self._size, device, Localized("when answering"))

    # --- when ---

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

    # --- to a checkpoint and back ---

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "judged": self._judged_by, "eval_loss": self.loss, "evaluated": self.step,
            "best": asdict(self.best),
        }  # fmt: skip

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, as far as evaluations are made as they were then."""
        if is_judged_alike(checkpoint, self._judged_by):
            self.loss, self.step = (checkpoint.state.get(name) for name in ("eval_loss", "evaluated"))
        self.best = still_best(checkpoint, self.options, self._judged_by)

    # --- how ---

    @torch.no_grad()
    def evaluate(self, step: int, is_stopped: Callable[[], bool]) -> bool:
        """The loss over all supervised tokens of the rows; memory does not grow with the set.

        Args:
            step: optimizer steps made.
            is_stopped: tells whether this process is asked to stop.

        Returns:
            Whether any process was: then the evaluation is given up.
        """
        self.forward.model.eval()
        sums = self._sums(is_stopped)
        answered = self._score(is_stopped)
        self.forward.model.train()
        more = torch.tensor([*answered, is_stopped()], dtype=torch.float64)
        loss, tokens, *scores, stops = self.world.sum(torch.cat([sums, more])).tolist()
        if not stops:
            self.record(step, loss / max(tokens, 1), scores[0] / max(scores[1], 1), int(tokens))
        return bool(stops)

    def _sums(self, is_stopped: Callable[[], bool]) -> Tensor:
        """Losses and supervised tokens of this process's rows, or of those before a stop."""
        assert self.dataset is not None
        dataset, device, every = self.dataset, self.forward.device, self.options.eval_accumulation_steps
        sums = torch.zeros(2, dtype=torch.float64)
        pending = torch.zeros(2, dtype=torch.float64, device=device)
        loader = Prefetcher.for_device(device, lambda rows: self.forward.batch(dataset, rows))
        for number, batch in enumerate(loader.batches(self._rows()), 1):
            if is_stopped():
                break
            count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum().double()
            pending += torch.stack([self._loss(batch), count.to(device)])
            if every is not None and number % every == 0:
                sums, pending = sums + pending.cpu(), torch.zeros_like(pending)
        return sums + pending.cpu()

    def _rows(self) -> Iterator[Rows]:
        """The process's share of the rows, in batches of similar length."""
        assert self.dataset is not None
        order = (-self.dataset.token_counts).argsort(kind="stable")[self.world.rank :: self.world.size]
        return (order[start : start + self._size] for start in range(0, len(order), self._size))

    def _loss(self, batch: Batch) -> Tensor:
        """Sum over a batch."""

        def compute(most: int) -> Tensor:
            parts = [self.forward.loss(part, 1) for part in split(batch, most)]
            return torch.stack(parts).double().sum()

        return self._micro_batcher.run(len(batch["input_ids"]), compute)

    def _score(self, is_stopped: Callable[[], bool]) -> tuple[float, float]:
        """The process's part of the metric's numerator and denominator."""
        if self.answers is None or is_stopped():
            return 0.0, 0.0
        answers, model = self.answers, self.forward.model
        with self.forward.precision():
            return self._answer_batcher.run(
                len(answers.share), lambda most: answers.count(model, most, is_stopped)
            )

    def record(self, step: int, loss: float, score: float, tokens: int) -> None:
        """Remember and say what was found, and whether it is the best so far."""
        self.step, self.loss = step, loss
        metric = LOSS if self.answers is None else self.answers.metric
        value = loss if self.answers is None else score
        self.best = self.best.after(metric, step, value, loss)
        scores = {} if self.answers is None else {f"eval_{metric.name}": score}
        self.log.evaluation(step, loss, tokens, scores)
