"""Define the options of `train` and `merge`."""

from dataclasses import dataclass

from mdl_toolkit.config.data import (
    COMMON,
    DATASET,
    DEFAULT_MODEL,
    DYNAMIC_BF16,
    MODEL_HELP,
    ConversionOptions,
    HubOptions,
)
from mdl_toolkit.config.options import REQUIRED, option
from mdl_toolkit.config.types import (
    BOOLEAN,
    CADENCE,
    COUNT,
    DATASETS,
    LEARNING_RATES,
    LORA_VARIANTS,
    LR_SCHEDULERS,
    NAME,
    NOT_NEGATIVE,
    OPTIMIZERS,
    OUTPUT,
    POSITIVE,
    RESUME,
    SEED,
    SHARE,
    TARGETS,
    WEIGHTED_DATASETS,
    WHOLE,
    WORDS,
    choice,
)
from mdl_toolkit.i18n import Localized

TRAINING = Localized("Training options")
MEMORY = Localized("Memory options")
EVALUATION = Localized("Evaluation options")
CHECKPOINTS = Localized("Checkpoint and output options")
MERGE = Localized("Merge options")

VERIFY_HELP = Localized(
    "Ask the merged model the same few rows as base and adapter before it is put in place (both are loaded)."
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ConversionOptions):
    """Hold the options of `train`.

    Example:
        ```python
        from mdl_toolkit import TrainOptions

        options = TrainOptions(
            train_dataset="train.csv", output="run", lora_rank=16, num_epochs=2, batch_size=4
        )
        ```
    """

    COMMAND = "train"
    SUMMARY = Localized("Fine-tune the model on a CSV or a converted dataset.")
    GROUPS = (TRAINING, MEMORY, EVALUATION, CHECKPOINTS, COMMON, DATASET)

    model_name: str = option(NAME, DEFAULT_MODEL, COMMON, MODEL_HELP)
    train_dataset: str | tuple[str, ...] = option(
        WEIGHTED_DATASETS,
        REQUIRED,
        TRAINING,
        "The training data: a CSV file or a folder written by convert-dataset. May be given several times, "
        "each with a weight (calls.csv=0.8): its share of the rows of an epoch; without weights, all rows "
        "come once.",
    )
    lr: float | tuple[str, ...] = option(
        LEARNING_RATES,
        1e-4,
        TRAINING,
        "Learning rate; or TARGET=X for one train target, given once for each: encoder=2e-5, decoder=1e-4. A "
        "number among these is for the other targets.",
    )
    adapter: str | None = option(
        NAME,
        None,
        TRAINING,
        "Go on from this adapter (a folder written by train, a checkpoint, or any LoRA of PEFT for this "
        "model): its weights are the start; rank, alpha, variant, targets and base are taken from it.",
    )
    lora_rank: int = option(
        COUNT, 32, TRAINING, "Rank of the LoRA adapters; 8 to 16 for simple tasks, 32 or more for hard ones."
    )
    lora_alpha: float = option(
        POSITIVE, 32.0, TRAINING, "LoRA's alpha: the adapters are scaled by alpha / rank."
    )
    lora_dropout: float = option(
        SHARE,
        0.0,
        TRAINING,
        "Dropout rate of the LoRA adapters; above 0, a step takes about 1.4 times as long, and more memory.",
    )
    lora_variant: str = option(
        choice(*LORA_VARIANTS),
        "lora",
        TRAINING,
        "LoRA or a relative, as in PEFT: rslora scales by alpha / sqrt(rank); dora also learns the length of "
        "each row of the weights, and takes more time and memory; pissa begins with the largest singular "
        "values of the weights, and writes adapters of twice the rank.",
    )
    lora_plus_ratio: float = option(
        POSITIVE, 1.0, TRAINING, "LoRA+: the matrices B learn so many times as fast as A; 16 is usual there."
    )
    train_target: tuple[str, ...] = option(
        TARGETS,
        ("encoder", "projector", "decoder"),
        TRAINING,
        "What is trained: audio encoder, projector and text decoder by LoRA, word embeddings and output "
        "head in full. May be given several times; replaces the default.",
    )
    num_epochs: float = option(POSITIVE, 1.0, TRAINING, "Passes over the training data; may be a fraction.")
    max_steps: int | None = option(
        COUNT, None, TRAINING, "Optimizer steps of the run, in place of those of --num-epochs."
    )
    warmup_steps: int = option(
        WHOLE, 0, TRAINING, "Optimizer steps over which the learning rate rises from 0."
    )
    warmup_ratio: float = option(
        SHARE, 0.0, TRAINING, "Share of all steps over which it rises; in place of --warmup-steps."
    )
    lr_scheduler: str = option(
        choice(*LR_SCHEDULERS),
        "linear",
        TRAINING,
        "How the learning rate goes on after the warm-up, as in transformers: linear and cosine fall to 0 at "
        "the end.",
    )
    optimizer: str = option(
        choice(*OPTIMIZERS),
        "adamw",
        TRAINING,
        "The optimizer; 8bit keeps its states in a quarter of the memory, paged in the CPU's where the GPU's "
        "is short (both need the extra `quantization`).",
    )
    weight_decay: float = option(
        NOT_NEGATIVE, 0.0, TRAINING, "Weight decay of everything that is trained, as in AdamW."
    )
    adam_beta2: float = option(SHARE, 0.999, TRAINING, "AdamW's beta2; beta1 is 0.9.")
    max_grad_norm: float = option(
        NOT_NEGATIVE, 1.0, TRAINING, "Norm that a step's gradients are scaled down to; 0: as they are."
    )
    label_smoothing: float = option(
        SHARE,
        0.0,
        TRAINING,
        "Share of a token's target that goes to all tokens alike; not in evaluation losses.",
    )
    seed: int = option(SEED, 42, TRAINING, "Seed of the data order, dropout and new adapter weights.")
    batch_size: int = option(
        COUNT,
        8,
        MEMORY,
        "Rows per device and step. Effective batch: batch_size * gradient_accumulation_steps * devices.",
    )
    gradient_accumulation_steps: int = option(
        COUNT, 1, MEMORY, "Steps whose gradients are added up before the weights are updated."
    )
    gradient_checkpointing: bool = option(
        BOOLEAN,
        True,
        MEMORY,
        "Compute activations again in the backward pass: much less memory, some more time.",
    )
    cache_audio_features: bool = option(
        BOOLEAN,
        False,
        MEMORY,
        "Compute the audio encoder and projector once per row and keep what they give on disk while the "
        "run lasts (36 KB per second of audio at 7B in bfloat16); only where neither is a train target.",
    )
    bf16: bool | None = option(
        BOOLEAN,
        None,
        MEMORY,
        "Load the base weights in bfloat16; adapters and full copies train in float32.",
        dynamic=DYNAMIC_BF16,
    )
    quantization: str | None = option(
        choice("8bit", "4bit"),
        None,
        MEMORY,
        "Quantise the decoder's base weights (needs the extra `quantization`).",
    )
    shard_weights: bool = option(
        BOOLEAN,
        False,
        MEMORY,
        "Divide the base's blocks among the processes of a run, which gather each while it is computed: less "
        "memory on each GPU, more traffic between them.",
    )
    eval_dataset: str | tuple[str, ...] | None = option(
        DATASETS,
        None,
        EVALUATION,
        "Data to evaluate on: a CSV file or a converted folder. Without it the other evaluation options "
        "are ignored. May be given several times: each has an evaluation loss of its own, too.",
    )
    eval_steps: int | float | str = option(
        CADENCE,
        500,
        EVALUATION,
        "Evaluate every so many steps (1.0 is 1, every step), or so often per epoch (0.5: twice; `epoch`: at "
        "the end of each), and always at the end; 0: only there.",
    )
    eval_batch_size: int | None = option(
        COUNT, None, EVALUATION, "Rows per device in evaluation; as in training if not given."
    )
    eval_accumulation_steps: int | None = option(
        COUNT, None, EVALUATION, "Move evaluation results to the CPU every so many steps."
    )
    eval_metric: str | None = option(
        choice("accuracy", "wer", "cer"),
        None,
        EVALUATION,
        "Also let the model answer evaluation rows, and compare: share of equal answers, or error rate of "
        "words or characters.",
    )
    eval_samples: int = option(
        COUNT, 200, EVALUATION, "Most rows that are answered for --eval-metric; always the same ones."
    )
    keep_best: bool = option(
        BOOLEAN,
        False,
        EVALUATION,
        "Take the checkpoint with the best --eval-metric, or evaluation loss, as the result, not the last.",
    )
    early_stopping_patience: int | None = option(
        COUNT, None, EVALUATION, "Stop after so many evaluations in a row without a better one."
    )
    report_to: tuple[str, ...] = option(
        WORDS,
        (),
        EVALUATION,
        "Trackers to report to (tensorboard, wandb, swanlab ...). May be given several times.",
        nullable=True,
    )
    output: str = option(
        OUTPUT, REQUIRED, CHECKPOINTS, "Folder for checkpoints and, in `final/`, the result."
    )
    resume_from_checkpoint: bool | str | None = option(
        RESUME,
        None,
        CHECKPOINTS,
        "true: go on from the newest checkpoint in the output folder; a path: from that one.",
    )
    save_steps: int | float | str = option(
        CADENCE,
        500,
        CHECKPOINTS,
        "Save a checkpoint every so many steps (1.0 is 1, every step), or so often per epoch (0.5: twice; "
        "`epoch`: at the end of each), and always at the end; 0: only there.",
    )
    save_total_limit: int | None = option(
        COUNT, None, CHECKPOINTS, "Keep only the newest so many checkpoints."
    )
    merge_lora: bool = option(
        BOOLEAN,
        True,
        CHECKPOINTS,
        "Write a full model in the base model's format; false: only the adapter and fully trained weights.",
    )
    verify: bool = option(BOOLEAN, True, CHECKPOINTS, VERIFY_HELP)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(HubOptions):
    """Hold the options of `merge`.

    Example:
        ```python
        from mdl_toolkit import MergeOptions

        options = MergeOptions(adapter="run/checkpoint-500", output="merged", dtype="bfloat16")
        ```
    """

    COMMAND = "merge"
    SUMMARY = Localized("Merge an adapter into its base model: one model in the base model's format.")
    GROUPS = (MERGE, COMMON)

    adapter: str = option(
        NAME,
        REQUIRED,
        MERGE,
        "The adapter: a folder written by train, a checkpoint of a run, or any LoRA of PEFT for this model.",
        positional=True,
    )
    output: str = option(
        OUTPUT, REQUIRED, MERGE, "Folder for the merged model; an earlier merged model is replaced."
    )
    model_name: str | None = option(
        NAME,
        None,
        MERGE,
        "The base model, where the adapter's record does not find it: a name on the hub, or a local folder.",
    )
    dtype: str | None = option(
        choice("bfloat16", "float16", "float32"),
        None,
        MERGE,
        "Numbers of the merged weights; the base model's if not given.",
    )
    verify: bool = option(BOOLEAN, True, MERGE, VERIFY_HELP)
