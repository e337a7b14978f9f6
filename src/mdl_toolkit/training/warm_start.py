"""Go on from an adapter: find it, take its shape and its base into the options, load its weights."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from mdl_toolkit.config.options import spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import TRAIN_TARGETS
from mdl_toolkit.config.yaml import from_mapping, word_of
from mdl_toolkit.errors import ModelError, UsageError
from mdl_toolkit.training.checkpoints import CHECKSUMS, damage
from mdl_toolkit.training.lora import FULL_TARGETS, LORA_TARGETS, load_adapter, saved_config, variant_of
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.machine import describe_oom
from mdl_toolkit.weights.adapter import AdapterDelta, adapter_entries
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.loading import base_of, recorded_base
from mdl_toolkit.weights.resolve import check_is_no_run, find_model, recorded_name
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def find_adapter(name: str, *, from_modelscope: bool) -> Path:
    """Find an adapter's folder, downloading it if need be.

    Args:
        name: a local folder, or a name on the hub.
        from_modelscope: look names up on ModelScope.

    Raises:
        ModelError: the adapter is not to be had, is no adapter, or is a damaged checkpoint.
    """
    local = Path(name).expanduser()
    if local.is_dir() and not (local / ADAPTER_CONFIG).is_file():
        check_is_no_run(local, ADAPTER_CONFIG)
        folder = local
    else:
        folder = find_model(name, from_modelscope=from_modelscope, weights=True)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            "{folder}: no adapter ({config}); give an adapter's folder, for example checkpoint-500",
            folder=folder,
            config=ADAPTER_CONFIG,
        )
    if (folder / CHECKSUMS).is_file() and (reason := damage(folder)):
        raise ModelError("{folder}: not a complete checkpoint ({reason})", folder=folder, reason=reason)
    return folder


def take_over(options: TrainOptions) -> tuple[TrainOptions, Path | None]:
    """Take rank, alpha, targets and base of the adapter that `--adapter` names into a run's options.

    Returns:
        The options, and the adapter's folder; None where training begins with a new adapter.

    Raises:
        UsageError: options say otherwise; all of them are named.
        ModelError: adapter or base are not to be had, are damaged, or cannot be trained here.
    """
    if options.adapter is None:
        return options, None
    folder = find_adapter(options.adapter, from_modelscope=options.from_modelscope)
    config = read_json(folder / ADAPTER_CONFIG)
    shape = {
        "lora_rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_variant": variant_of(config),
        "train_target": trained_targets(folder),
    }
    different = [name for name, value in shape.items() if not _is_same(getattr(options, name), value)]
    if given := options.given(different):
        words = {name: value if isinstance(value, tuple) else (value,) for name, value in shape.items()}
        theirs = [f"{spelling(name)} {word_of(word)}" for name in different for word in words[name]]
        raise UsageError(
            "{given}: not as in --adapter {adapter}, which has {theirs}; leave out {given}",
            given=", ".join(given),
            adapter=options.adapter,
            theirs=" ".join(theirs),
        )
    check_targeted(folder)
    base = find_base(options, folder)
    own = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    taken = {**shape, "model_name": base, "adapter": recorded_name(options.adapter, folder)}
    return from_mapping(TrainOptions, {**own, **taken}, options.typed), folder


def find_base(options: TrainOptions, adapter: Path) -> str:
    """Find the base of an adapter's folder, check its tensors where it is local, and return its name.

    Raises:
        ModelError: it is not to be had, or not the adapter's own.
    """
    is_given = bool(options.given({"model_name"}))
    base = options.model_name if is_given else recorded_base(adapter)
    is_here = Path(base).is_dir()
    try:
        folder = base_of(adapter, from_modelscope=options.from_modelscope, name=base, weights=is_here)
    except ModelError as problem:
        if is_given:
            raise
        raise ModelError(
            "--adapter {adapter}: its base model cannot be used ({reason}); say with --model-name where it "
            "is",
            adapter=options.adapter,
            reason=problem.message,
        ) from problem
    if is_here:
        AdapterDelta.read(adapter, folder)
    return base


def check_targeted(adapter: Path) -> None:
    """Refuse an adapter with weights for a module that its configuration does not target.

    Raises:
        ModelError: naming the module.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    config, (_, modules, _) = saved_config(adapter), adapter_entries(adapter)
    if others := [name for name in modules if not check_target_module_exists(config, name)]:
        raise ModelError(
            "{path}: target_modules fits no module {name}, for which the adapter holds weights; copy the "
            "adapter again",
            path=adapter / ADAPTER_CONFIG,
            name=others[0],
        )


def trained_targets(adapter: Path) -> tuple[str, ...]:
    """Return the words of `--train-target` that an adapter trains, wholly or in part.

    Raises:
        ModelError: it is damaged, or trains something that is none of them.
    """
    _, modules, full = adapter_entries(adapter)
    targets, others = set(), [*modules, *full]
    for target in TRAIN_TARGETS:
        names: Collection[str] = full if target in FULL_TARGETS else modules
        pattern = LORA_TARGETS.get(target) or rf"{re.escape(FULL_TARGETS[target])}\.weight"
        if matches := [name for name in names if re.fullmatch(pattern, name)]:
            targets.add(target)
            others = [name for name in others if name not in matches]
    if others:
        raise ModelError(
            "{adapter}: it also trains {name}, which --train-target has not; merge it (`mdl-toolkit merge`), "
            "and train the merged model",
            adapter=adapter,
            name=others[0],
        )
    return tuple(target for target in TRAIN_TARGETS if target in targets)


def _is_same(given: Any, value: Any) -> bool:
    """Tell whether two values mean the same; the order of targets does not matter."""
    return {*given} == {*value} if isinstance(value, tuple) else given == value


def load_start(model: nn.Module, adapter: Path) -> None:
    """Load the weights of an adapter's folder into the adapter of a `PeftModel`, as the start.

    Raises:
        ModelError: they do not fit.
    """
    try:
        load_adapter(model, load_file(adapter / ADAPTER_WEIGHTS))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as problem:
        if isinstance(problem, RuntimeError) and describe_oom(problem) is not None:
            raise
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(
            "{folder}: the adapter does not fit its base: {reason}", folder=adapter, reason=reason
        ) from problem


def say_start(options: TrainOptions) -> None:
    """Say which adapter a run goes on from, and what is taken from it."""
    say(
        "going on from the adapter {adapter}: rank {rank}, alpha {alpha:g}, targets {targets}; base {base}",
        adapter=options.adapter,
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        targets=", ".join(options.train_target),
        base=options.model_name,
    )
