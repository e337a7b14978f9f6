"""The training loop: steps whose loss is the mean over their supervised tokens, however they are computed.

A step is a sum over rows. Batches, accumulation, processes and a lack of memory only decide how that sum is
computed; so does an interruption: order, learning rate and dropout follow from the seed and the number of
the step, and all else that matters is in the checkpoint.
"""

import errno
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdl_toolkit.answering import Questions
from mdl_toolkit.batching import Batch, Collator, Readable, items_of, pinned, split
from mdl_toolkit.checkpoints import Checkpoint, delete_oldest, save
from mdl_toolkit.console import say, warn
from mdl_toolkit.distributed import World
from mdl_toolkit.errors import ModelError, ToolkitError
from mdl_toolkit.loader import GPU_THREADS, Loader
from mdl_toolkit.loading import lacks_memory
from mdl_toolkit.metrics import LOSS, Best, Metric
from mdl_toolkit.recomputing import NONE, Kept, recompute
from mdl_toolkit.resumption import check_together, identity_of, is_judged_alike, judged_by, still_best
from mdl_toolkit.runlog import RunLog
from mdl_toolkit.sampling import Rows, Sampling
from mdl_toolkit.schedule import Schedule
from mdl_toolkit.settings import to_yaml
from mdl_toolkit.stopping import StopRequest
from mdl_toolkit.tokens import IGNORE_INDEX
from mdl_toolkit.trained import Trained
from mdl_toolkit.training_options import TrainOptions

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
        model: a `PeftModel`; exactly its trainable parameters train.
        options: the run's.
        schedule: when what is due.
        sampling: which rows when.
        train_set: the rows to learn.
        eval_set: the rows to evaluate on, if any.
        questions: of these, what is answered and compared, if anything is.
        collator: rows to batches.
        world: the processes.
        log: what is said and written while it runs.
        device: where the model is.
        dtype: of the base weights.
        kept: blocks that gradient checkpointing, if it is on, leaves alone.
    """

    model: Any
    options: TrainOptions
    schedule: Schedule
    sampling: Sampling
    train_set: Readable
    eval_set: Readable | None
    questions: Questions | None
    collator: Collator
    world: World
    log: RunLog
    device: torch.device
    dtype: torch.dtype
    kept: Kept = NONE

    def __post_init__(self) -> None:
        self.output = Path(self.options.output)
        self.trained = Trained(self.model, self.device)
        if self.options.gradient_checkpointing:
            recompute(self.model, self.kept)
        self.step = 0
        self.losses, self.since = 0.0, 0  # the sum of all steps' losses, and the step after which it began
        # Computed at once; less after a lack of memory.
        self.most_rows = self.options.batch_size
        self.most_eval_rows = self.options.eval_batch_size or self.options.batch_size
        self.request, self.must_stop = StopRequest(), False
        self.eval_loss: float | None = None
        self.evaluated: int | None = None  # the step of the last evaluation
        self.resumed: Path | None = None
        self.best = Best()
        threads = GPU_THREADS if self.device.type == "cuda" else 1
        self.loader = Loader(lambda rows: self._make(self.train_set, rows), threads)

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
            for rows in self.sampling.batches(step, self.world.rank)
        )
        check_together(self.world, self.step, identity_of(self.sampling), self.schedule.total)
        self.model.train()
        first = self.step
        if self.resumed is not None and self.world.is_first:
            self._delete_oldest()
        with self.request, closing(self.loader.batches(wanted)) as batches:
            if self._owes_evaluation():
                self.evaluate()
            while self.step < self.schedule.total and not self.must_stop and not self._is_enough():
                self.losses += self._make_step(batches)
                self._do_what_is_due()
            if self.must_stop:
                self.world.wait()  # all end together, when all is saved: a launcher ends those left behind
                raise KeyboardInterrupt
        if first < self.step < self.schedule.total:
            say(
                f"stopped early after step {self.step}: {self.best.worse} evaluations in a row no better",
                f"第 {self.step} 步后提前停止：连续 {self.best.worse} 次评估没有改善",
            )
        return Outcome(self.step, self.losses / max(self.step - self.since, 1), self.eval_loss, self.best)

    def _do_what_is_due(self) -> None:
        if self.step in self.schedule.evaluating | self.schedule.saving or self.must_stop:
            self._check_weights()
        if self.step in self.schedule.evaluating and not self.must_stop:
            with self._leaving_a_checkpoint():
                self.evaluate()
        is_last = self.step == self.schedule.total or self.must_stop or self._is_enough()
        is_kept = self.options.keep_best and self.best.step == self.step
        if self.step in self.schedule.saving or is_last or is_kept:
            self.save(is_needed=is_last or is_kept)

    def _is_enough(self) -> bool:
        """Tell whether there were too many evaluations in a row without a better one."""
        patience = self.options.early_stopping_patience
        return patience is not None and self.best.worse >= patience

    def _owes_evaluation(self) -> bool:
        """Tell whether the run was stopped before an evaluation that was due."""
        due, total = self.schedule.evaluating, self.schedule.total
        return (self.step in due or (bool(due) and self.step > total)) and self.evaluated != self.step

    # --- one step ---

    def _make_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step; its loss. Whether any process was asked to stop is known afterwards."""
        rows = self.sampling.rows(self.step)
        with self._leaving_a_checkpoint():
            loss = self._accumulate(batches)
            # First, as this is where a process that has gone is noticed on GPUs too.
            totals = self.world.sum(torch.tensor([float(loss), self.request.is_made], dtype=torch.float64))
            self.world.sum_gradients(self.trained.parameters)
            norm = self.trained.clip(MAX_NORM)
            self._check_finite(float(totals[0]), norm)
        rate = self.options.lr * self.schedule.rate(self.step)
        self.trained.update(rate)
        self.step += 1
        self.log.step(
            self.step, loss=float(totals[0]), norm=norm, rate=rate, rows=rows,
            waited=self.loader.waited,
        )  # fmt: skip
        self.must_stop = bool(totals[1])
        return float(totals[0])

    @contextmanager
    def _leaving_a_checkpoint(self) -> Iterator[None]:
        """What fails here has not touched the weights: the steps since the last checkpoint are not lost."""
        try:
            yield
        except Exception:
            if self.step > 0 and not (self.output / f"checkpoint-{self.step}").exists():
                with suppress(Exception):  # what went wrong first is what is to be told
                    self.save(is_needed=False)
            raise

    def _accumulate(self, batches: Iterator[Batch]) -> Tensor:
        """Gradients of this process's batches, and the sum of their losses; again if memory does not do."""
        wanted = self.sampling.batches(self.step, self.world.rank)
        made: Iterable[Batch] = (next(batches) for _ in wanted)
        while True:
            try:
                return self._add_up(made)
            except RuntimeError as problem:
                if self.most_rows == 1 or not lacks_memory(problem):
                    raise
            # Here, where what had been computed is let go of.
            self._halve()
            # Gradients may be half added up: the whole step is computed again, from its rows.
            for _ in made:  # what was made ahead for this step
                pass
            made = [self.loader.make(rows) for rows in wanted]

    def _add_up(self, made: Iterable[Batch]) -> Tensor:
        tokens, total = max(1, self.sampling.tokens(self.step)), torch.zeros((), device=self.device)
        for number, batch in enumerate(made):
            torch.manual_seed(self.sampling.dropout_seed(self.step, number, self.world.rank))
            for part in split(batch, self.most_rows):
                loss = self._loss(self._on_device(part), tokens)
                loss.backward()
                total += loss.detach()
        return total

    def _loss(self, batch: dict[str, Tensor], tokens: int) -> Tensor:
        with self._precision():
            loss: Tensor = self.model(**batch, num_items_in_batch=tokens).loss
        return loss

    def _halve(self) -> None:
        self.trained.forget()
        if self.options.gradient_checkpointing:
            recompute(self.model)
        self.most_rows = self._fewer(self.most_rows)

    def _fewer(self, rows: int) -> int:
        """Half as many, as so many at once were too many."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        fewer = math.ceil(rows / 2)
        warn(
            f"the GPU ran out of memory: {fewer} rows at once from now on, the same effective batch",
            f"显存不足：此后每次计算 {fewer} 行；有效批次大小不变",
        )
        return fewer

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        rows = ", ".join(str(row + 1) for row in sorted(self.sampling.rows(self.step))[:MOST_ROWS_NAMED])
        raise ToolkitError(
            f"step {self.step + 1}: the loss or its gradient is not finite; try a smaller --lr, or look at "
            f"rows {rows} of the training data",
            f"第 {self.step + 1} 步：损失或梯度不是有限值；请减小 --lr，或检查训练数据的第 {rows} 行",
        )

    def _check_weights(self) -> None:
        if not self.trained.is_finite:
            raise ToolkitError(
                f"step {self.step}: the trained weights are not finite any more; try a smaller --lr",
                f"第 {self.step} 步：训练后的权重不再是有限值；请减小 --lr",
            )

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self) -> None:
        """The loss over all supervised tokens of the evaluation set; memory does not grow with the set.

        If any process is asked to stop meanwhile it is given up, and owed when the run goes on.
        """
        assert self.eval_set is not None
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        pending = torch.zeros(2, dtype=torch.float64, device=self.device)
        every = self.options.eval_accumulation_steps
        loader = Loader(lambda rows: self._make(self.eval_set, rows), self.loader.threads)
        for number, batch in enumerate(loader.batches(self._eval_rows()), 1):
            if self.request.is_made:
                break
            count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum().double()
            pending += torch.stack([self._eval_loss(batch), count.to(self.device)])
            if every is not None and number % every == 0:
                sums, pending = sums + pending.cpu(), torch.zeros_like(pending)
        answered = self._answer()
        self.model.train()
        more = torch.tensor([*answered, self.request.is_made], dtype=torch.float64)
        loss, tokens, *scores, stops = self.world.sum(torch.cat([sums + pending.cpu(), more])).tolist()
        self.must_stop = bool(stops)
        if not self.must_stop:
            self.eval_loss, self.evaluated = loss / max(tokens, 1), self.step
            self._judge(scores[0] / max(scores[1], 1), int(tokens))

    def _eval_loss(self, batch: Batch) -> Tensor:
        """Sum over a batch, in smaller parts if memory does not do."""
        while True:
            try:
                parts = [self._loss(self._on_device(part), 1) for part in split(batch, self.most_eval_rows)]
                return torch.stack(parts).double().sum()
            except RuntimeError as problem:
                if self.most_eval_rows == 1 or not lacks_memory(problem):
                    raise
            self.most_eval_rows = self._fewer(min(self.most_eval_rows, len(batch["input_ids"])))

    def _answer(self) -> tuple[float, float]:
        """The process's part of the metric's numerator and denominator."""
        if self.questions is None or self.request.is_made:
            return 0.0, 0.0
        with self._precision():
            return self.questions.count(self.model, lambda: self.request.is_made)

    def _judge(self, score: float, tokens: int) -> None:
        """Say what was found, and whether it is the best so far."""
        assert self.eval_loss is not None
        metric = self._metric
        value = self.eval_loss if self.questions is None else score
        self.best = self.best.after(metric, self.step, value, self.eval_loss)
        scores = {} if self.questions is None else {f"eval_{metric.name}": score}
        self.log.evaluation(self.step, self.eval_loss, tokens, scores)

    def _eval_rows(self) -> Iterator[Rows]:
        """The process's share of the evaluation rows, in batches of similar length."""
        assert self.eval_set is not None
        order = (-self.eval_set.positions).argsort(kind="stable")[self.world.rank :: self.world.size]
        size = self.options.eval_batch_size or self.options.batch_size
        return (order[start : start + size] for start in range(0, len(order), size))

    # --- checkpoints ---

    def save(self, *, is_needed: bool) -> None:
        """Leave a checkpoint of this step; if it is one of many, a full disk is only warned of.

        Raises:
            ToolkitError: it is needed, and the disk does not take it.
        """
        if not self.world.is_first:
            return
        state = {
            "sampling": identity_of(self.sampling), "judged": judged_by(self.eval_set, self.questions),
            "eval_loss": self.eval_loss, "evaluated": self.evaluated, "best": asdict(self.best),
            "losses": self.losses, "since": self.since, "most_rows": self.most_rows,
        }  # fmt: skip
        try:
            self._save_with_room(partial(
                save, self.output, self.step, adapter=self.trained.save,
                optimizer=self.trained.optimizer_state(), state=state, settings=to_yaml(self.options),
            ))  # fmt: skip
        except OSError as problem:
            reason = problem.strerror or str(problem)
            en, zh = (
                f"checkpoint-{self.step} cannot be saved: {reason}",
                f"无法保存 checkpoint-{self.step}：{reason}",
            )
            if is_needed:
                raise ToolkitError(en, zh) from problem
            warn(f"{en}; training goes on", f"{zh}；训练继续")
            return
        self._delete_oldest()

    def _save_with_room(self, attempt: Callable[[], Path]) -> None:
        """On a full disk, with one less of the checkpoints that may be deleted."""
        try:
            attempt()
        except OSError as problem:
            if problem.errno not in FULL or not self._delete_oldest(spared=1):
                raise
            attempt()

    def _delete_oldest(self, spared: int = 0) -> int:
        """How many went; `spared` more than `--save-total-limit` asks for, but never the last."""
        kept, limit = [self.resumed] if self.resumed else [], self.options.save_total_limit
        if self.options.keep_best and self.best.step is not None:
            kept.append(self.output / f"checkpoint-{self.best.step}")
        return 0 if limit is None else delete_oldest(self.output, limit - spared, frozenset(kept))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            ModelError: it is of another model.
        """
        theirs, ours = checkpoint.state.get("sampling", {}), identity_of(self.sampling)
        if theirs != ours:
            warn(
                "the training data or the seed are not the interrupted run's: the rows come in another order",
                "训练数据或随机种子与被中断的训练不同：数据顺序将有所不同",
            )
        try:
            self.trained.load(checkpoint)
        except KeyError as problem:
            raise ModelError(
                f"{checkpoint.folder}: it does not fit {self.options.model_name}; resume with the same model",
                f"{checkpoint.folder}：与 {self.options.model_name} 不匹配；请使用原来的模型恢复训练",
            ) from problem
        self.step, self.resumed = checkpoint.step, checkpoint.folder
        judged = judged_by(self.eval_set, self.questions)
        if is_judged_alike(checkpoint, judged):
            self.eval_loss, self.evaluated = (
                checkpoint.state.get(name) for name in ("eval_loss", "evaluated")
            )
        self.best = still_best(checkpoint, self.options, judged)
        # Older ones do not have them.
        before = {"losses": 0.0, "since": checkpoint.step, "most_rows": self.most_rows, **checkpoint.state}
        self.losses, self.since = before["losses"], before["since"]
        self.most_rows = min(self.most_rows, before["most_rows"])

    @property
    def _metric(self) -> Metric:
        return LOSS if self.questions is None else self.questions.metric

    # --- batches ---

    def _make(self, dataset: Readable | None, rows: Rows) -> Batch:
        assert dataset is not None
        batch = self.collator([dataset[int(row)] for row in rows])
        return pinned(batch) if self.device.type == "cuda" else batch

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in items_of(batch)}

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
