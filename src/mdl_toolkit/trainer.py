"""The training loop: steps whose loss is the mean over their supervised tokens, however they are computed.

A step is a sum over rows. Batches, accumulation, processes and a lack of memory only decide how that sum is
computed; so does an interruption: order, learning rate and dropout follow from the seed and the number of
the step, and all else that matters is in the checkpoint.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdl_toolkit.batching import Batch, Collator
from mdl_toolkit.checkpoints import Checkpoint, delete_oldest, due_steps, save
from mdl_toolkit.console import warn
from mdl_toolkit.distributed import World
from mdl_toolkit.errors import ToolkitError
from mdl_toolkit.legacy import AnyDataset
from mdl_toolkit.loader import Loader
from mdl_toolkit.options import TrainOptions
from mdl_toolkit.runlog import RunLog
from mdl_toolkit.sampling import Rows, Sampling
from mdl_toolkit.settings import to_yaml
from mdl_toolkit.stopping import StopRequest
from mdl_toolkit.tokens import IGNORE_INDEX

MAX_NORM = 1.0  # of the gradient, as in the HF Trainer
MOST_ROWS_NAMED = 20
GPU_THREADS = 4  # that decode ahead; on a CPU one will do, as decoding is nothing beside a step


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a run.

    Attributes:
        per_epoch: in a whole epoch; partial batches and windows count.
        total: of the run; at least 1.
        warmup: over which the learning rate rises.
        saving: after which a checkpoint is due.
        evaluating: after which an evaluation is due.
    """

    per_epoch: int
    total: int
    warmup: int
    saving: frozenset[int]
    evaluating: frozenset[int]

    @staticmethod
    def of(per_epoch: int, options: TrainOptions) -> "Schedule":
        """Plan a run with so many steps per epoch."""
        total = max(1, math.ceil(options.num_epochs * per_epoch - 1e-9))
        evaluating = due_steps(options.eval_steps, per_epoch, total) if options.eval_dataset else frozenset()
        saving = due_steps(options.save_steps, per_epoch, total)
        return Schedule(per_epoch, total, options.warmup_steps, saving, evaluating)

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step, from 0: up over the warm-up, then down to 0 at the end."""
        if step < self.warmup:
            return step / self.warmup
        return max(0.0, (self.total - step) / max(1, self.total - self.warmup))


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        steps: optimizer steps made, those before a resumption included.
        loss: mean over the steps of this process's life.
        eval_loss: the last evaluation's; None if there was none.
        waited: share of the time that was spent waiting for data.
    """

    steps: int
    loss: float
    eval_loss: float | None
    waited: float


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
        collator: rows to batches.
        world: the processes.
        log: what is said and written while it runs.
        device: where the model is.
        dtype: of the base weights.
    """

    model: Any
    options: TrainOptions
    schedule: Schedule
    sampling: Sampling
    train_set: AnyDataset
    eval_set: AnyDataset | None
    collator: Collator
    world: World
    log: RunLog
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.output = Path(self.options.output)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.options.lr, weight_decay=0.0, fused=self.device.type == "cuda"
        )
        if self.options.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.step, self.first_step = 0, 0
        self.most_rows = self.options.batch_size  # computed at once; less after a lack of memory
        self.request, self.must_stop = StopRequest(), False
        self.eval_loss: float | None = None
        self.evaluated: int | None = None  # the step of the last evaluation
        self.resumed: Path | None = None
        self.best: Path | None = None
        threads = GPU_THREADS if self.device.type == "cuda" else 1
        self.loader = Loader(lambda rows: self._make(self.train_set, rows), threads)

    # --- the run ---

    def run(self) -> Outcome:
        """Train to the end of the schedule.

        Raises:
            KeyboardInterrupt: the run was asked to stop, and has saved a checkpoint.
            ToolkitError: the loss is not finite any more, or the last checkpoint cannot be saved.
        """
        self.first_step, losses = self.step, 0.0
        wanted = (
            rows
            for step in range(self.step, self.schedule.total)
            for rows in self.sampling.batches(step, self.world.rank)
        )
        batches = self.loader.batches(wanted)
        self.model.train()
        with self.request:
            if self._owes_evaluation():
                self.evaluate()
            while self.step < self.schedule.total and not self.must_stop:
                losses += self._make_step(batches)
                self._do_what_is_due()
            if self.must_stop:
                self.world.wait()  # all end together, when all is saved: a launcher ends whom one leaves behind
                raise KeyboardInterrupt
        steps = self.step - self.first_step
        return Outcome(self.step, losses / max(steps, 1), self.eval_loss, self.log.share(self.loader.waited))

    def _do_what_is_due(self) -> None:
        if self.step in self.schedule.evaluating and not self.must_stop:
            self.evaluate()
        if self.step in self.schedule.saving or self.must_stop:
            self.save(is_needed=self.must_stop or self.step == self.schedule.total)

    def _owes_evaluation(self) -> bool:
        """Tell whether the run was stopped before an evaluation that was due."""
        due, total = self.schedule.evaluating, self.schedule.total
        return (self.step in due or (bool(due) and self.step > total)) and self.evaluated != self.step

    # --- one step ---

    def _make_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step; its loss. Whether any process was asked to stop is known afterwards."""
        rows = self.sampling.rows(self.step)
        loss = self._accumulate(batches)
        self.world.sum_gradients([*self.trained.values()])
        totals = self.world.sum(torch.tensor([float(loss), self.request.is_made], dtype=torch.float64))
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), MAX_NORM)
        self._check_finite(float(totals[0]), float(norm))
        rate = self.options.lr * self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.log.step(
            self.step, loss=float(totals[0]), norm=float(norm), rate=rate, rows=rows,
            waited=self.loader.waited,
        )  # fmt: skip
        self.must_stop = bool(totals[1])
        return float(totals[0])

    def _accumulate(self, batches: Iterator[Batch]) -> Tensor:
        """Gradients of this process's batches, and the sum of their losses; again if memory does not do."""
        wanted = self.sampling.batches(self.step, self.world.rank)
        made: Iterable[Batch] = (next(batches) for _ in wanted)
        while True:
            try:
                return self._add_up(made)
            except torch.OutOfMemoryError:
                if self.most_rows == 1:
                    raise
                self._halve()
            # Gradients may be half added up: the whole step is computed again, from its rows.
            for _ in made:  # what was made ahead for this step
                pass
            made = [self.loader.make(rows) for rows in wanted]

    def _add_up(self, made: Iterable[Batch]) -> Tensor:
        tokens, total = max(1, self.sampling.tokens(self.step)), torch.zeros((), device=self.device)
        for number, batch in enumerate(made):
            torch.manual_seed(self._seed(number))
            for part in _parts(batch, self.most_rows):
                loss = self._loss(self._on_device(part), tokens)
                loss.backward()
                total += loss.detach()
        return total

    def _loss(self, batch: dict[str, Tensor], tokens: int) -> Tensor:
        with self._precision():
            loss: Tensor = self.model(**batch, num_items_in_batch=tokens).loss
        return loss

    def _seed(self, number: int) -> int:
        """Of dropout in a batch: the same for the same rows, however many processes share the step."""
        name = f"{self.options.seed} {self.step} {number * self.world.size + self.world.rank}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")

    def _halve(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.most_rows = math.ceil(self.most_rows / 2)
        warn(
            f"the GPU ran out of memory: {self.most_rows} rows at once from now on, the same effective batch",
            f"显存不足：此后每次计算 {self.most_rows} 行；有效批次大小不变",
        )

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        rows = ", ".join(str(row + 1) for row in sorted(self.sampling.rows(self.step))[:MOST_ROWS_NAMED])
        raise ToolkitError(
            f"step {self.step + 1}: the loss or its gradient is not finite; try a smaller --lr, or look at "
            f"rows {rows} of the training data",
            f"第 {self.step + 1} 步：损失或梯度不是有限值；请减小 --lr，或检查训练数据的第 {rows} 行",
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
            inputs = self._on_device(batch)
            count = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
            pending += torch.stack([self._loss(inputs, 1).double(), count.double()])
            if every is not None and number % every == 0:
                sums, pending = sums + pending.cpu(), torch.zeros_like(pending)
        self.model.train()
        asked = torch.tensor([self.request.is_made], dtype=torch.float64)
        loss, tokens, stops = self.world.sum(torch.cat([sums + pending.cpu(), asked])).tolist()
        self.must_stop = bool(stops)
        if not self.must_stop:
            self.eval_loss, self.evaluated = loss / max(tokens, 1), self.step
            self.log.evaluation(self.step, self.eval_loss, int(tokens))

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
            "sampling": self._identity(), "eval_loss": self.eval_loss, "evaluated": self.evaluated
        }  # fmt: skip
        try:
            save(
                self.output, self.step, adapter=self._save_adapter, optimizer=self._optimizer_state(),
                state=state, settings=to_yaml(self.options),
            )  # fmt: skip
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
        keep = frozenset(path for path in (self.resumed, self.best) if path is not None)
        delete_oldest(self.output, self.options.save_total_limit, keep)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same effective batch.

        Raises:
            ToolkitError: its steps had another number of rows.
        """
        theirs = checkpoint.state.get("sampling", {})
        ours = self._identity()
        if theirs.get("effective") != ours["effective"]:
            raise ToolkitError(
                f"{checkpoint.folder}: its steps had {theirs.get('effective')} rows, now it would be "
                f"{ours['effective']}; --batch-size x --gradient-accumulation-steps x processes "
                f"({self.world.size}) must be what it was",
                f"{checkpoint.folder}：原来每步 {theirs.get('effective')} 行，现在为 {ours['effective']} 行；"
                f"--batch-size、--gradient-accumulation-steps 与进程数（{self.world.size}）之积须保持不变",
            )
        if theirs != ours:
            warn(
                "the training data or the seed are not the interrupted run's: the rows come in another order",
                "训练数据或随机种子与被中断的训练不同：数据顺序将有所不同",
            )
        self._load_adapter(checkpoint.adapter())
        self._load_optimizer(checkpoint.optimizer())
        self.step, self.resumed = checkpoint.step, checkpoint.folder
        self.eval_loss, self.evaluated = (checkpoint.state.get(name) for name in ("eval_loss", "evaluated"))

    def _identity(self) -> dict[str, Any]:
        """What the order of the rows comes from."""
        digest = hashlib.sha256(self.sampling.lengths.tobytes() + self.sampling.supervised.tobytes())
        return {
            "rows": len(self.sampling.lengths), "lengths": digest.hexdigest()[:16],
            "effective": self.sampling.effective, "seed": self.options.seed,
        }  # fmt: skip

    def _save_adapter(self, folder: Path) -> None:
        # Left to itself, PEFT asks the hub whether the vocabulary was changed.
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, not filled in

    def _load_adapter(self, tensors: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        found = set_peft_model_state_dict(self.model, tensors)
        assert not found.unexpected_keys, found.unexpected_keys

    def _optimizer_state(self) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in self.trained.items()}
        return {
            f"{names[id(parameter)]}/{key}": value.detach().cpu().contiguous()
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("/")
            self.optimizer.state[self.trained[name]][key] = tensor.to(self.device)

    # --- batches ---

    def _make(self, dataset: AnyDataset | None, rows: Rows) -> Batch:
        assert dataset is not None
        batch = self.collator([dataset[int(row)] for row in rows])
        return _pinned(batch) if self.device.type == "cuda" else batch

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in _items(batch)}

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def _items(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    yield from batch.items()  # type: ignore[misc]


def _pinned(batch: Batch) -> Batch:
    return Batch(**{name: tensor.pin_memory() for name, tensor in _items(batch)})  # type: ignore[typeddict-item]


def _parts(batch: Batch, most: int) -> Iterator[Batch]:
    """A batch in parts of at most so many rows, without the padding that a part does not need."""
    rows = len(batch["input_ids"])
    if rows <= most:
        yield batch
        return
    for start in range(0, rows, most):
        part = {name: tensor[start : start + most] for name, tensor in _items(batch)}
        width, longest = int(part["attention_mask"].sum(1).max()), int(part["audio_length"].max())
        for name in ("input_ids", "attention_mask", "labels"):
            part[name] = part[name][:, -width:]
        part["input_values"] = part["input_values"][:, :longest]
        yield Batch(**part)  # type: ignore[typeddict-item]
