"""The HF Trainer with our schedule, our evaluation and whole checkpoints.

The only room that knows `TrainingArguments`. It is handed a model and data, and decides nothing about them.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mdl_toolkit.batching import Collator
from mdl_toolkit.checkpoints import WORK, delete_oldest, due_steps, put_in_place
from mdl_toolkit.console import Progress, say, warn
from mdl_toolkit.legacy import AnyDataset
from mdl_toolkit.loading import choose_dtype
from mdl_toolkit.options import TrainOptions
from mdl_toolkit.tokens import IGNORE_INDEX

LOGGING_STEPS = 10
LOADER_WORKERS = 4  # on a GPU; on a CPU decoding a clip is nothing beside a step


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a run.

    Attributes:
        per_epoch: in a whole epoch; partial batches and windows count.
        total: of the run; at least 1.
        saving: after which a checkpoint is due.
        evaluating: after which an evaluation is due.
    """

    per_epoch: int
    total: int
    saving: frozenset[int]
    evaluating: frozenset[int]

    @staticmethod
    def of(rows: int, processes: int, options: TrainOptions) -> "Schedule":
        """Plan a run over `rows` samples."""
        batches = math.ceil(rows / (options.batch_size * processes))
        per_epoch = math.ceil(batches / options.gradient_accumulation_steps)
        total = max(1, math.ceil(options.num_epochs * per_epoch - 1e-9))
        evaluating = due_steps(options.eval_steps, per_epoch, total) if options.eval_dataset else frozenset()
        return Schedule(per_epoch, total, due_steps(options.save_steps, per_epoch, total), evaluating)


def _arguments(options: TrainOptions, schedule: Schedule) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(Path(options.output) / WORK),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size or options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        num_train_epochs=options.num_epochs,
        max_steps=schedule.total,
        learning_rate=options.lr,
        warmup_steps=options.warmup_steps,
        seed=options.seed,
        bf16=choose_dtype(options.bf16) == torch.bfloat16,
        use_cpu=not on_gpu,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=LOGGING_STEPS,
        logging_first_step=True,
        save_strategy="no",  # the schedule's callback says when
        eval_strategy="no",
        report_to=list(options.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_num_workers=LOADER_WORKERS if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:  # transformers would split batches among them by DataParallel, slowly and wrongly
        warn(
            f"{arguments.n_gpu} GPUs are here and one is used; to use all: "
            f"torchrun --nproc-per-node {arguments.n_gpu} --no-python mdl-toolkit train ...",
            f"检测到 {arguments.n_gpu} 个 GPU，仅使用其中一个；要全部使用请运行："
            f"torchrun --nproc-per-node {arguments.n_gpu} --no-python mdl-toolkit train ...",
        )
        arguments._n_gpu = 1
    return arguments


class ToolkitTrainer(Trainer):
    """The HF Trainer with our schedule, our evaluation and whole checkpoints."""

    def __init__(
        self,
        options: TrainOptions,
        schedule: Schedule,
        callback: "ScheduleCallback",
        model: Any,
        collator: Collator,
        train_set: AnyDataset,
        eval_set: AnyDataset | None,
        resume: Path | None,
    ) -> None:
        super().__init__(
            model=model, args=_arguments(options, schedule), data_collator=collator,
            train_dataset=train_set, eval_dataset=eval_set, callbacks=[callback],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self._options, self._resumed = options, resume
        self.control: Any
        self.last_eval_loss: float | None = None

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The loss over all supervised tokens of the evaluation set; memory does not grow with the set."""
        started = time.monotonic()
        loss, tokens = self._summed_eval_loss()
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(tokens, 1),
            f"{metric_key_prefix}_tokens": float(tokens),
            f"{metric_key_prefix}_runtime": round(time.monotonic() - started, 3),
        }
        self.last_eval_loss = metrics[f"{metric_key_prefix}_loss"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _summed_eval_loss(self) -> tuple[float, int]:
        """Sum of token losses and number of tokens, over all processes; each takes every n-th row."""
        rank, processes = self.args.process_index, self.args.world_size
        assert self.eval_dataset is not None
        mine = Subset(self.eval_dataset, range(rank, len(self.eval_dataset), processes))
        loader = DataLoader(mine, self.args.eval_batch_size, collate_fn=self.data_collator)
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        pending = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        every = self._options.eval_accumulation_steps
        for step, batch in enumerate(loader, 1):
            inputs = self._prepare_inputs(batch)
            loss = self.model(**inputs, num_items_in_batch=1).loss
            pending += torch.stack([loss.double(), (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().double()])
            if every is not None and step % every == 0:
                sums, pending = sums + pending.cpu(), torch.zeros_like(pending)
        self.model.train(was_training)
        total = self.accelerator.reduce(pending + sums.to(pending.device), reduction="sum").cpu()
        return float(total[0]), int(total[1])

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save what is trained, and no pickle of the arguments."""
        # Left to itself, PEFT asks the hub whether the vocabulary was changed.
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write beside, then rename; delete the oldest."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            output = Path(self._options.output)
            put_in_place(Path(self.args.output_dir), output)
            delete_oldest(output, self._options.save_total_limit, self._resumed)
        self.accelerator.wait_for_everyone()


class ScheduleCallback(TrainerCallback):
    """Says when to save and evaluate, and shows how far the run has come."""

    def __init__(self, schedule: Schedule, shown: Progress) -> None:
        self._schedule, self._shown = schedule, shown
        self._note = ""

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """A resumed run begins where it stopped."""
        self._shown.advance(state.global_step)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for what is due after this step."""
        self._shown.advance(1, self._note)
        control.should_evaluate = state.global_step in self._schedule.evaluating
        control.should_save = state.global_step in self._schedule.saving

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the loss for the bar, and say what an evaluation found."""
        if logs and "loss" in logs:
            self._note = f"loss {float(logs['loss']):.4f}"
        if logs and "eval_loss" in logs:
            loss, tokens = logs["eval_loss"], int(logs["eval_tokens"])
            say(
                f"evaluation at step {state.global_step}: loss {loss:.4f} over {tokens} tokens",
                f"第 {state.global_step} 步评估：{tokens} 个词元的损失为 {loss:.4f}",
            )
