"""Report to the trackers of `--report-to`, each through its integration in transformers.

Every name that transformers knows is accepted. For that this module, and no other, leans on inner parts of
transformers, which a new version may move:

    integrations.get_reporting_integration_callbacks    the callback classes of some names
    integrations.integration_utils                      INTEGRATION_TO_CALLBACK, which has all names, and
                                                        get_available_reporting_integrations
    trainer_callback.CallbackHandler                    calls on_train_begin, on_log and on_train_end

Whoever breaks them breaks `--report-to` alone: they are imported when it is given, and only then.
"""

from pathlib import Path
from typing import Any

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.errors import ToolkitError, UsageError
from mdl_toolkit.training.optimization.optimizer import learning_rates
from mdl_toolkit.utils.console import is_first_process, warn


class Trackers:
    """Report figures to the trackers that were asked for, in the first process only.

    Raises:
        ToolkitError: a tracker cannot begin.
    """

    def __init__(self, options: TrainOptions, total: int) -> None:
        self._handler: Any = None
        if not options.report_to or options.report_to == ("none",) or not is_first_process():
            return
        from transformers import TrainerControl, TrainerState
        from transformers.integrations import get_reporting_integration_callbacks
        from transformers.trainer_callback import CallbackHandler

        names = "all" if options.report_to == ("all",) else list(options.report_to)
        self._arguments, self._control = _arguments(options, total), TrainerControl()
        self._state = TrainerState(max_steps=total)
        try:
            callbacks = [make() for make in get_reporting_integration_callbacks(names)]
            self._handler = CallbackHandler(callbacks, None, None, None, None)
            self._handler.on_train_begin(self._arguments, self._state, self._control)
        except Exception as problem:
            raise ToolkitError(
                "--report-to {name}: {reason}; log in, choose its offline mode, or leave it out",
                name=", ".join(options.report_to),
                reason=problem,
            ) from problem

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Report the figures of a step."""
        if self._handler is not None:
            self._state.global_step, self._state.epoch = step, values.get("epoch")
            self._tell("on_log", dict(values))

    def close(self) -> None:
        """Tell the trackers that the run is over."""
        if self._handler is not None:
            self._tell("on_train_end")

    def _tell(self, event: str, *values: Any) -> None:
        """Pass an event on; a tracker that fails, with no network for one, is left out from then on."""
        try:
            getattr(self._handler, event)(self._arguments, self._state, self._control, *values)
        except Exception as problem:  # noqa: BLE001 - whatever a tracker's library raises
            self._handler = None
            warn("--report-to: {reason}; nothing more is reported, training goes on", reason=problem)


def _arguments(options: TrainOptions, total: int) -> Any:
    """Return the settings in the form that the integrations record."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(Path(options.output)),
        learning_rate=max(learning_rates(options).values()),
        max_steps=total,
        num_train_epochs=options.num_epochs,
        warmup_steps=options.warmup_steps or options.warmup_ratio,
        lr_scheduler_type=options.lr_scheduler,
        optim={"adamw": "adamw_torch_fused"}.get(options.optimizer, options.optimizer),
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.max_grad_norm,
        label_smoothing_factor=options.label_smoothing,
        seed=options.seed,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        report_to="none",
        use_cpu=True,
    )


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that transformers does not know or that are not installed.

    Raises:
        UsageError: a name is unknown, or `all` or `none` do not stand alone.
        ToolkitError: a tracker's package is missing.
    """
    if not names:
        return
    from transformers.integrations import integration_utils

    known = {*integration_utils.INTEGRATION_TO_CALLBACK, "all", "none"}
    if unknown := ", ".join(name for name in names if name not in known):
        listed = ", ".join(sorted(known))
        raise UsageError("--report-to {name}: unknown tracker (known: {known})", name=unknown, known=listed)
    if len(names) > 1 and {"all", "none"} & set(names):
        raise UsageError("--report-to: all and none stand alone")
    missing = set(names) - {"all", "none"} - set(integration_utils.get_available_reporting_integrations())
    if missing:
        listed = ", ".join(sorted(missing))
        raise ToolkitError(
            "--report-to {listed}: not installed; pip install it, or leave it out", listed=listed
        )
