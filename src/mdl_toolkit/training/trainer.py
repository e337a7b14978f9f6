"""Train: make steps whose loss is the mean over their supervised tokens, however they are computed.

A step is a sum over examples. Batches, accumulation, processes and a lack of memory only decide how that sum
is computed; so does an interruption: order, learning rate and dropout follow from the seed and the number of
the step, and all else that matters is in the checkpoint.
"""

import errno
import math
import traceback
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
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
from mdl_toolkit.training.checkpoints import Checkpoint, checkpoint_of, delete_oldest, save, save_state
from mdl_toolkit.training.evaluator import Evaluator
from mdl_toolkit.training.gradient_checkpointing import NONE, KeptBlocks, checkpoint_gradients
from mdl_toolkit.training.log import RunLog
from mdl_toolkit.training.memory.oom import MicroBatcher
from mdl_toolkit.training.optimization.optimizer import OptimizerConfig
from mdl_toolkit.training.optimization.schedule import Schedule
from mdl_toolkit.training.resume import check_together, identity_of
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.step import ForwardPass, TrainableState
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.utils.device import total_memory
from mdl_toolkit.utils.distributed import World
from mdl_toolkit.utils.signals import StopRequest

MOST_ROWS_NAMED = 20
RESUMING = "--resume-from-checkpoint true"
# The disk is full, or the user's share of it.
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Outcome:
    """Hold what a run came to.

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
    """Train a model over a schedule of steps, evaluating and saving when it is due.

    Attributes:
        options: the run's.
        schedule: says when what is due.
        sampler: chooses the examples of each step.
        train_set: the examples to learn from.
        forward: computes losses; exactly the trainable parameters of its model train.
        evaluator: makes the run's evaluations.
        world: the processes.
        log: takes the steps.
        kept: blocks whose activations gradient checkpointing, if it is on, keeps.
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
        optimizer = OptimizerConfig.of(self.options)
        self.trainable = TrainableState(self.forward.model, self.forward.device, optimizer, self.world)
        if self.options.gradient_checkpointing:
            checkpoint_gradients(self.forward.model, self.kept)
        # Steps made, the sum of their losses, and the step after which that began.
        self.step, self.losses, self.since = 0, 0.0, 0
        purpose, is_fixed = Localized("the same effective batch"), self.world.is_sharding
        self.micro_batcher = MicroBatcher(
            self.options.batch_size, self.forward.device, purpose, is_fixed=is_fixed
        )
        self.batches = self.sampler.even_batches if is_fixed else self.sampler.batches
        self.request, self.must_stop = StopRequest(), False
        self.resumed: Checkpoint | None = None
        # Whether there is a checkpoint to go on from, and the step of the best one saved.
        self.is_saved = False
        self.best_saved: int | None = None
        self.loader = Prefetcher.for_device(
            self.forward.device, partial(self.forward.batch, self.train_set, is_training=True)
        )

    def run(self) -> Outcome:
        """Train to the end of the schedule.

        Raises:
            KeyboardInterrupt: the run was asked to stop, and has saved a checkpoint.
            ToolkitError: the loss is not finite any more, or the last checkpoint cannot be saved.
        """
        wanted = (
            indices
            for step in range(self.step, self.schedule.total)
            for indices in self.batches(step, self.world.rank)
        )
        identity = {**identity_of(self.sampler), **self.evaluator.state()}
        check_together(self.world, self.step, identity, self.schedule.total)
        self.forward.model.train()
        first = self.step
        if self.resumed is not None and self.world.is_first:
            self._delete_oldest()
        with self.request, self.world.gathering(), closing(self.loader.batches(wanted)) as batches:
            if self.evaluator.is_owed(self.step):
                self._make_owed_evaluation()
            while self.step < self.schedule.total and not self.must_stop and not self.evaluator.is_enough:
                self.losses += self.make_step(batches)
                self._evaluate_and_save()
            # All end together, when all is saved: a launcher ends those left behind.
            if float(self.world.sum(torch.tensor(float(self.request.is_made)))):
                if self.is_saved:
                    say(
                        "stopped after step {step:,} of {total:,}; to go on: {option}",
                        step=self.step,
                        total=self.schedule.total,
                        option=RESUMING,
                    )
                raise KeyboardInterrupt
        best = self.evaluator.best
        self.evaluator.warn_of_chance()
        if first < self.step < self.schedule.total:
            say(
                "stopped early after step {step}: {worse} {worse:evaluation|evaluations} in a row no better",
                step=self.step,
                worse=best.worse,
            )
        return Outcome(self.step, self.losses / max(self.step - self.since, 1), self.evaluator.loss, best)

    def _make_owed_evaluation(self) -> None:
        """Make the evaluation that the run was stopped before, and add it to the checkpoint of its step."""
        self._evaluate()
        if self.must_stop or self.resumed is None or not self.world.is_first:
            return
        try:
            save_state(self.output, self.resumed, self.evaluator.state())
        except OSError as problem:
            self._warn_unsaved(problem)

    def _evaluate_and_save(self) -> None:
        """Make the evaluation and the checkpoint that are due after this step, if they are."""
        is_to_evaluate, is_to_save = self.evaluator.is_due(self.step), self.step in self.schedule.saving
        if is_to_evaluate or is_to_save or self.must_stop:
            self._check_weights()
        if is_to_evaluate and not self.must_stop:
            with self._leaving_a_checkpoint():
                self._evaluate()
        is_last = self.step == self.schedule.total or self.must_stop or self.evaluator.is_enough
        is_best = self.options.keep_best and self.evaluator.best.step == self.step
        if is_to_save or is_last or is_best:
            self.save(is_needed=is_last or is_best)

    def _evaluate(self) -> None:
        """Evaluate, and note whether any process was asked to stop meanwhile."""
        self.must_stop = self.evaluator.evaluate(self.step, lambda: self.world.any(self.request.is_made))

    def make_step(self, batches: Iterator[Batch]) -> float:
        """Make an optimizer step, and note whether any process was asked to stop; return the loss."""
        indices = self.sampler.examples(self.step)
        with self._leaving_a_checkpoint():
            # GPUs that gather would wait for a process that has gone until their time is out.
            if self.world.is_sharding:
                self.world.wait()
            own_loss, must_stop = self._accumulate(batches), self.request.is_made
            if self.world.size > 1:
                # First, as this is where a process that has gone is noticed on GPUs too.
                sums = self.world.sum(torch.tensor([float(own_loss), must_stop], dtype=torch.float64))
                own_loss, must_stop = sums[0], bool(sums[1])
                self.world.sum_gradients(self.trainable.parameters)
            norms = self.trainable.clip(self.options.max_grad_norm or math.inf)
            # The one moment of a step at which the host waits for a GPU: for both at once where it can.
            if self.world.size == 1:
                loss, norm = torch.stack([own_loss, norms]).tolist()
            else:
                loss, norm = float(own_loss), float(norms)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                # Of the step before, if they are why.
                self._check_weights()
                lines = ", ".join(map(self.train_set.where, sorted(indices)[:MOST_ROWS_NAMED]))
                if self.forward.dtype == torch.bfloat16:
                    raise ToolkitError(
                        "step {next}: the loss or its gradient is not finite in bfloat16; try --bf16 false "
                        "or a smaller --lr, or look at lines {lines} of the training data",
                        next=self.step + 1,
                        lines=lines,
                    )
                raise ToolkitError(
                    "step {next}: the loss or its gradient is not finite; try a smaller --lr, or look at "
                    "lines {lines} of the training data",
                    next=self.step + 1,
                    lines=lines,
                )
        share = self.schedule.rate(self.step)
        self.trainable.update(share)
        self.step += 1
        rate, waited = self.trainable.rate * share, self.loader.waited
        self.log.step(self.step, loss=loss, norm=norm, rate=rate, examples=indices, waited=waited)
        self.must_stop = must_stop
        return loss

    @contextmanager
    def _leaving_a_checkpoint(self) -> Iterator[None]:
        """Save a checkpoint if this context fails, which has not touched the weights: no step is lost.

        Nothing is deleted for it: the trouble may have begun in these steps. Where processes hold shares of
        the optimizer's states, none can save alone, and the steps since the last checkpoint are lost.
        """
        try:
            yield
        except Exception as problem:
            is_there = self.step == 0 or checkpoint_of(self.output, self.step).exists()
            if self.world.is_first and not is_there and not self.trainable.is_divided:
                # The first error is the one to tell. What it holds of a device's memory is needed.
                with suppress(Exception):
                    traceback.clear_frames(problem.__traceback__)
                    self.trainable.drop_gradients()
                    if self.trainable.is_finite:
                        self._write(self.trainable.optimizer_state())
            raise

    def _accumulate(self, batches: Iterator[Batch]) -> Tensor:
        """Add up the gradients of this process's batches; return the sum of their losses, a scalar."""
        wanted = self.batches(self.step, self.world.rank)
        own = self.sampler.batches(self.step, self.world.rank)
        tokens = max(1, self.sampler.tokens(self.step))
        # Reading ahead has ended where memory ran out in it.
        made: Iterable[Batch] = (next(batches, None) or self.loader.make(indices) for indices in wanted)

        def compute(most: int) -> Tensor:
            total = torch.zeros((), device=self.forward.device)
            for number, batch in enumerate(made):
                torch.manual_seed(self.sampler.dropout_seed(self.step, number, self.world.rank))
                for part in split(batch, most):
                    loss = self.forward.loss(part, tokens)
                    # Computed for the others alone.
                    if number >= len(own):
                        loss = loss * 0
                    loss.backward()
                    total += loss.detach()
            return total

        def start_over() -> None:
            """Make the whole step's batches again, as gradients may be half added up."""
            nonlocal made
            self.release_memory()
            # Batches that were made ahead for this step.
            for _ in made:
                pass
            made = [self.loader.make(indices) for indices in wanted]

        most = max(map(len, wanted), default=0)
        return self.micro_batcher.run(most, compute, start_over, lambda: self.keeps_activations)

    @property
    def keeps_activations(self) -> bool:
        """Tell whether gradient checkpointing keeps activations that it could compute again."""
        return self.options.gradient_checkpointing and self.kept != NONE

    def release_memory(self) -> None:
        """Drop the gradients; from now on, compute all activations again that can be."""
        self.trainable.drop_gradients()
        if self.keeps_activations:
            self.kept = NONE
            checkpoint_gradients(self.forward.model)

    def _check_weights(self) -> None:
        """Refuse to go on with weights that are not finite."""
        if not self.trainable.is_finite:
            raise ToolkitError(
                "step {step}: the trained weights are not finite any more; try a smaller --lr", step=self.step
            )

    def save(self, *, is_needed: bool) -> None:
        """Save a checkpoint of this step; if it is one of many, a full disk is only warned of.

        Raises:
            ToolkitError: it is needed, and the disk does not take it.
        """
        optimizer: dict[str, Tensor] = {}
        if self.world.is_first or self.trainable.is_divided:
            optimizer = self.trainable.optimizer_state()
        if not self.world.is_first:
            return
        try:
            try:
                self._write(optimizer)
            except OSError as problem:
                # On a full disk, with one less of the checkpoints that may be deleted.
                if problem.errno not in FULL or not self._delete_oldest(spared=1):
                    raise
                self._write(optimizer)
        except OSError as problem:
            if not is_needed:
                self._warn_unsaved(problem)
                return
            remedy = Localized("make room, and start again")
            if self.is_saved:
                remedy = Localized("make room, and go on with {option}", option=RESUMING)
            raise ToolkitError("{what}; {remedy}", what=self._unsaved(problem), remedy=remedy) from problem
        self.best_saved = self.evaluator.best.step
        self._delete_oldest()

    def _write(self, optimizer: dict[str, Tensor]) -> None:
        """Write a checkpoint of this step, with the optimizer's states."""
        most = self.micro_batcher.most
        save(
            self.output,
            self.step,
            adapter=self.trainable.save,
            optimizer=optimizer,
            state={
                "sampling": identity_of(self.sampler),
                **self.evaluator.state(),
                "losses": self.losses,
                "since": self.since,
                **({"most_rows": most} if most < self.options.batch_size else {}),
                "memory": total_memory(self.forward.device),
            },
            settings=to_yaml(self.options),
        )
        self.is_saved = True

    def _unsaved(self, problem: OSError) -> Localized:
        """Say that this step's checkpoint cannot be saved, and why."""
        return Localized("checkpoint-{step} cannot be saved: {reason}", step=self.step, reason=problem)

    def _warn_unsaved(self, problem: OSError) -> None:
        """Warn that this step's checkpoint cannot be saved."""
        warn("{what}; training goes on", what=self._unsaved(problem))

    def _delete_oldest(self, spared: int = 0) -> int:
        """Delete checkpoints beyond `--save-total-limit`, and `spared` more, but never the last.

        Returns:
            The number of those deleted.
        """
        limit = self.options.save_total_limit
        if limit is None:
            return 0
        steps = {self.resumed.step if self.resumed else None}
        if self.options.keep_best:
            steps |= {self.best_saved, self.evaluator.best.step}
        return delete_oldest(self.output, limit - spared, steps)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            ModelError: the checkpoint is of another model.
        """
        state, batcher = checkpoint.state, self.micro_batcher
        if state.get("sampling", {}) != identity_of(self.sampler):
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
        self.step, self.resumed, self.is_saved = checkpoint.step, checkpoint, True
        self.evaluator.resume(checkpoint)
        self.best_saved = self.evaluator.best.step
        # Older checkpoints do not have these.
        self.losses, self.since = state.get("losses", 0.0), state.get("since", checkpoint.step)
        before, now = state.get("memory"), total_memory(self.forward.device)
        # A larger device may take the rows together that a smaller one did not.
        is_fixed = self.world.is_sharding
        if not is_fixed and (before is None or now is None or now <= before):
            batcher.most = min(batcher.most, state.get("most_rows", batcher.most))
