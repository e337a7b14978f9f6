"""Suggest an option for a name that is none: one spelled nearly so, or one that does the same elsewhere."""

from collections.abc import Iterable
from difflib import get_close_matches

# Our options, and what they are called in transformers, PEFT and programs that fine-tune with them.
ALSO_CALLED = {
    "lr": "learning-rate",
    "lr-scheduler": "scheduler lr-scheduler-type",
    "warmup-ratio": "warmup-fraction",
    "optimizer": "optim",
    "max-grad-norm": "grad-clip gradient-clip gradient-clip-val",
    "label-smoothing": "label-smoothing-factor",
    "weight-decay": "wd",
    "lora-plus-ratio": "loraplus-lr-ratio lorap-lr-ratio",
    "num-epochs": "epochs epoch num-train-epochs",
    "train-dataset": "dataset data train-data train-file train-path",
    "eval-dataset": "validation-file validation-dataset val-dataset val-file eval-file",
    "batch-size": "per-device-train-batch-size train-batch-size",
    "eval-batch-size": "per-device-eval-batch-size",
    "gradient-accumulation-steps": "grad-accum accumulate-grad-batches",
    "model-name": "model model-path model-name-or-path model-id base-model",
    "output": "output-dir out-dir save-dir output-file",
    "lora-rank": "lora-r rank",
    "lora-alpha": "alpha",
    "lora-variant": "use-rslora use-dora init-lora-weights",
    "train-target": "target-modules lora-target",
    "resume-from-checkpoint": "resume",
    "eval": "val-size eval-size eval-ratio validation-split",
    "test": "test-size test-ratio",
    "eval-steps": "eval-strategy evaluation-strategy",
    "save-steps": "save-strategy",
    "quantization": "load-in-4bit load-in-8bit",
    "shard-weights": "fsdp fully-shard shard-model",
    "keep-best": "load-best-model-at-end",
    "early-stopping-patience": "early-stopping",
    "user-prompt": "prompt instruction",
    "system-prompt": "system",
    "window": "chunk-length chunk-length-s chunk-size",
    "overlap": "stride-length-s",
    "num-beams": "beam-size",
    "max-new-tokens": "max-tokens",
    "adapter": "adapters adapter-path adapter-name-or-path resume-from-adapter lora-path",
    "metric": "metrics",
    "num-workers": "workers dataloader-num-workers preprocessing-num-workers",
    "base-dir": "audio-dir",
    "seed": "random-seed",
}
# What they have and we do not: another option would mislead.
NOT_HERE = (
    "deepspeed logging-steps fp16 adam-beta1 adam-epsilon group-by-length "
    "packing gpus num-gpus device use-cpu tf32 torch-compile "
    "logging-dir run-name do-train do-eval flash-attn attn-impl use-lora lora-bias "
    "trust-remote-code do-sample length-penalty language stage template cutoff-len"
)
OTHER_NAMES = {other: name for name, others in ALSO_CALLED.items() for other in others.split()}
OTHER_NAMES |= dict.fromkeys(NOT_HERE.split(), "")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is meant: "" if it is known that none is, None if nothing is near.

    Args:
        name: without the dashes at its beginning.
        known: the names that there are, without them too.
    """
    there, meant = [*known], OTHER_NAMES.get(name)
    if meant is not None:
        return meant if meant in there else ""
    return next(iter(get_close_matches(name, there, n=1)), None)
