"""The training loop: steps whose loss is the mean over their supervised tokens, however they are computed.

A step is a sum over rows. Batches, accumulation, processes and a lack of memory only decide how that sum is
computed; so does an interruption: order, learning rate and dropout follow from the seed and the number of
the step, and all else that matters is in the checkpoint.
"""

import errno
import math
import shlex
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import to_yaml
from mdl_toolkit.data.collate import Batch, SampleSource, split
from mdl_toolkit.data.prefetch import Prefetcher
from mdl_toolkit.errors import ModelError, ToolkitError
from mdl_toolkit.evaluation.text_metrics import Best
from mdl_toolkit.i18n import Localized
from mdl_toolkit.training.checkpoints import Checkpoint, delete_oldest, save, save_state
from mdl_toolkit.training.evaluator import Evaluator
from mdl_toolkit.training.gradient_checkpointing import NONE, KeptBlocks, checkpoint_gradients
from mdl_toolkit.training.log import RunLog
from mdl_toolkit.training.memory.oom import MicroBatcher
from mdl_toolkit.training.resume import check_together, identity_of
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.schedule import Schedule
from mdl_toolkit.training.step import ForwardPass, TrainableState
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.utils.signals import StopRequest

MAX_NORM = 1.0  # of the gradient, as in the HF Trainer
MOST_ROWS_NAMED = 20
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        steps: optimizer steps made, those before a resumption included.
        loss: mean over all steps; from an older checkpoint on, over those since.
        eval_loss: the last evaluation's; None if there was none.
        best: the best evaluation.
    """

    steps: int
    loss: float
    eval_loss: float | None
    best: Best


@dataclass
class Trainer:
    """Everything that a run works with.

    Attributes:
        options: the run's.
        schedule: when what is due.
        sampler: which rows when.
        train_set: the rows to learn.
        forward: what is computed with; exactly the trainable parameters of its model train.
        evaluator: the run's evaluations.
        world: the processes.
        log: what is said and written while it runs.
        kept: blocks that gradient checkpointing, if it is on, leaves alone.
    """

    options: TrainOptions
    schedule: Schedule
    sampler: BatchSampler
    train_set: SampleSource
    forward: ForwardPass
    evaluator: Evaluator
    world: World
    log: RunLog
    kept: KeptBlocks = NONE

    def __post_init__(self) -> None:
        self.output = Path(self.options.output)
        self.trainable = TrainableState(self.forward.model, self.forward.device)
        if self.options.gradient_checkpointing:
            checkpoint_gradients(self.forward.model, self.kept)
        self.step = 0
        self.losses, self.since = 0.0, 0  # the sum of all steps' losses, and the step after which it began
        what = Localized("the same effective batch")
        self.micro_batcher = MicroBatcher(self.options.batch_size, self.forward.device, what)
        self.request, self.must_stop = StopRequest(), False
        self.resumed: Checkpoint | None = None
        self.newest: Path | None = None  # checkpoint that was saved, or resumed from
        self.best_there: int | None = None  # its step, of those that are saved
        self.loader = Prefetcher.for_device(
            self.forward.device, lambda rows: self.forward.batch(self.train_set, rows)
        )

    # --- the run ---

    def run(self) -> Outcome:
        """Train to the end of the schedule.

        Raises:
            KeyboardInterrupt: the run was asked to stop, and has saved a checkpoint.
            ToolkitError: the loss is not finite any more, or the last checkpoint cannot be saved.
        """
        wanted = (
            rows
            for step in range(self.step, self.schedule.total)
            for rows in self.sampler.batches(step, self.world.rank)
        )
        identity = {**identity_of(self.sampler), **self.evaluator.state()}
        check_together(self.world, self.step, identity, self.schedule.total)
        self.forward.model.train()
        first = self.step
        if self.resumed is not None and self.world.is_first:
            self._delete_oldest()
        with self.request, closing(self.loader.batches(wanted)) as batches:
            if self.evaluator.is_owed(self.step):
                self._make_up_for_evaluation()
            while self.step < self.schedule.total and not self.must_stop and not self.evaluator.is_enough:
                self.losses += self._make_step(batches)
                self._do_what_is_due()
            # All end together, when all is saved: a launcher ends those left behind.
            if float(self.world.sum(torch.tensor(float(self.request.is_made)))):
                self._say_stopped()
                raise KeyboardInterrupt
        best = self.evaluator.best
        if first < self.step < self.schedule.total:
            say(
                "stopped early after step {step}: {worse} evaluations in a row no better",
                step=self.step,
                worse=best.worse,
            )
        return Outcome(self.step, self.losses / max(self.step - self.since, 1), self.evaluator.loss, best)

    def _say_stopped(self) -> None:
        if self.newest is not None:
            step, total, option = self.step, self.schedule.total, self._resuming(self.newest)
            say(
                "stopped after step {step:,} of {total:,}; to go on: {option}",
                step=step,
                total=total,
                option=option,
            )

    def _make_up_for_evaluation(self) -> None:
        """What the run was stopped before; the checkpoint that was left then has it from now on."""
        self._evaluate()
        if self.must_stop or self.resumed is None or not self.world.is_first:
            return
        try:
            save_state(self.output, self.resumed, self.evaluator.state())
        except OSError as problem:
            self._warn_unsaved(problem)

    def _do_what_is_due(self) -> None:
        is_to_evaluate, is_to_save = self.evaluator.is_due(self.step), self.step in self.schedule.saving
        if is_to_evaluate or is_to_save or self.must_stop:
            self._check_weights()
        if is_to_evaluate and not self.must_stop:
            with self._leaving_a_checkpoint():
                self._evaluate()
        is_last = self.step == self.schedule.total or self.must_stop or self.evaluator.is_enough
        is_kept = self.options.keep_best and self.evaluator.best.step == self.step
        if is_to_save or is_last or is_kept:
            self.save(is_needed=is_last or is_kept)

    def _evaluate(self) -> None:
        self.must_stop = self.evaluator.evaluate(self.step, lambda: self.request.is_made)

    # --- one step ---

    def _make_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step; its loss. Whether any process was asked to stop is known afterwards."""
        rows = self.sampler.examples(self.step)
        with self._leaving_a_checkpoint():
            loss = self._accumulate(batches)
            # First, as this is where a process that has gone is noticed on GPUs too.
            totals = self.world.sum(torch.tensor([float(loss), self.request.is_made], dtype=torch.float64))
            self.world.sum_gradients(self.trainable.parameters)
            norm = self.trainable.clip(MAX_NORM)
            self._check_finite(float(totals[0]), norm)
        rate = self.options.lr * self.schedule.rate(self.step)
        self.trainable.update(rate)
        self.step += 1
        self.log.step(
            self.step, loss=float(totals[0]), norm=norm, rate=rate, rows=rows,
            waited=self.loader.waited,
        )  # fmt: skip
        self.must_stop = bool(totals[1])
        return float(totals[0])

    @contextmanager
    def _leaving_a_checkpoint(self) -> Iterator[None]:
        """What fails here has not touched the weights: the steps since the last checkpoint are not lost.

        Nothing is deleted for it: the trouble may have begun in these steps.
        """
        try:
            yield
        except Exception:
            is_there = self.step == 0 or (self.output / f"checkpoint-{self.step}").exists()
            if self.world.is_first and not is_there and self.trainable.is_finite:
                with suppress(Exception):  # what went wrong first is what is to be told
                    self._write()
            raise

    def _accumulate(self, batches: Iterator[Batch]) -> Tensor:
        """Gradients of this process's batches, and the sum of their losses; again if memory does not do."""
        wanted = self.sampler.batches(self.step, self.world.rank)
        made: Iterable[Batch] = (next(batches) for _ in wanted)

        def make_again() -> None:
            """Gradients may be half added up: the whole step is computed again, from its rows."""
            nonlocal made
            self._let_go()
            for _ in made:  # what was made ahead for this step
                pass
            made = [self.loader.make(rows) for rows in wanted]

        return self.micro_batcher.run(
            max(map(len, wanted), default=0), lambda most: self._add_up(made, most), make_again
        )

    def _add_up(self, made: Iterable[Batch], most: int) -> Tensor:
        tokens = max(1, self.sampler.tokens(self.step))
        total = torch.zeros((), device=self.forward.device)
        for number, batch in enumerate(made):
            torch.manual_seed(self.sampler.dropout_seed(self.step, number, self.world.rank))
            for part in split(batch, most):
                loss = self.forward.loss(part, tokens)
                loss.backward()
                total += loss.detach()
        return total

    def _let_go(self) -> None:
        """Of gradients, and from now on of all activations that can be computed again."""
        self.trainable.drop_gradients()
        if self.options.gradient_checkpointing:
            checkpoint_gradients(self.forward.model)

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self._check_weights()  # of the step before, if they are why
        rows = ", ".join(str(row + 1) for row in sorted(self.sampler.examples(self.step))[:MOST_ROWS_NAMED])
        raise ToolkitError(
            "step {next}: the loss or its gradient is not finite; try a smaller --lr, or look at rows "
            "{rows} of the training data",
            next=self.step + 1,
            rows=rows,
        )

    def _check_weights(self) -> None:
        if not self.trainable.is_finite:
            raise ToolkitError(
                "step {step}: the trained weights are not finite any more; try a smaller --lr", step=self.step
            )

    # --- checkpoints ---

    def save(self, *, is_needed: bool) -> None:
        """Leave a checkpoint of this step; if it is one of many, a full disk is only warned of.

        Raises:
            ToolkitError: it is needed, and the disk does not take it.
        """
        if not self.world.is_first:
            return
        try:
            self._save_with_room()
        except OSError as problem:
            if is_needed:
                raise ToolkitError(
                    "{what}; {remedy}", what=self._unsaved(problem), remedy=self._remedy()
                ) from problem
            self._warn_unsaved(problem)
            return
        self.best_there = self.evaluator.best.step
        self._delete_oldest()

    def _write(self) -> None:
        state = {
            "sampling": identity_of(self.sampler), **self.evaluator.state(),
            "losses": self.losses, "since": self.since, "most_rows": self.micro_batcher.most,
        }  # fmt: skip
        save(
            self.output, self.step, adapter=self.trainable.save, optimizer=self.trainable.optimizer_state(),
            state=state, settings=to_yaml(self.options),
        )  # fmt: skip
        self.newest = self.output / f"checkpoint-{self.step}"

    def _unsaved(self, problem: OSError) -> Localized:
        reason = problem.strerror or str(problem)
        return Localized("checkpoint-{step} cannot be saved: {reason}", step=self.step, reason=reason)

    def _remedy(self) -> Localized:
        """What to do when no checkpoint can be saved any more."""
        if self.newest is None:
            return Localized("make room, and start again")
        option = self._resuming(self.newest)
        return Localized("make room, and go on with {option}", option=option)

    def _resuming(self, checkpoint: Path) -> str:
        """In the run's own folder the newest, whenever it is typed again."""
        is_own = checkpoint.resolve().parent == self.output.resolve()
        return f"--resume-from-checkpoint {'true' if is_own else shlex.quote(str(checkpoint))}"

    def _warn_unsaved(self, problem: OSError) -> None:
        warn("{what}; training goes on", what=self._unsaved(problem))

    def _save_with_room(self) -> None:
        """On a full disk, with one less of the checkpoints that may be deleted."""
        try:
            self._write()
        except OSError as problem:
            if problem.errno not in FULL or not self._delete_oldest(spared=1):
                raise
            self._write()

    def _delete_oldest(self, spared: int = 0) -> int:
        """How many went; `spared` more than `--save-total-limit` asks for, but never the last."""
        kept, limit = [self.resumed.folder] if self.resumed else [], self.options.save_total_limit
        if self.options.keep_best:
            kept += [
                self.output / f"checkpoint-{step}" for step in (self.best_there, self.evaluator.best.step)
            ]
        return 0 if limit is None else delete_oldest(self.output, limit - spared, frozenset(kept))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            ModelError: it is of another model.
        """
        theirs, ours = checkpoint.state.get("sampling", {}), identity_of(self.sampler)
        if theirs != ours:
            warn(
                "the training data or the seed are not the interrupted run's: the rows come in another order"
            )
        try:
            self.trainable.load(checkpoint)
        except KeyError as problem:
            raise ModelError(
                "{folder}: it does not fit {model}; resume with the same model",
                folder=checkpoint.folder,
                model=self.options.model_name,
            ) from problem
        self.step, self.resumed, self.newest = checkpoint.step, checkpoint, checkpoint.folder
        self.evaluator.resume(checkpoint)
        self.best_there = self.evaluator.best.step
        # Older checkpoints do not have these.
        state, batcher = checkpoint.state, self.micro_batcher
        self.losses, self.since = state.get("losses", 0.0), state.get("since", checkpoint.step)
        batcher.most = min(batcher.most, state.get("most_rows", batcher.most))
