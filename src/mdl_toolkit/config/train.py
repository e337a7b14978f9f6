"""The options of `train`."""

from dataclasses import dataclass

from mdl_toolkit.config.data import COMMON, DATASET, DEFAULT_MODEL, MODEL_HELP, VERIFY_HELP, ConversionOptions
from mdl_toolkit.config.options import REQUIRED, option
from mdl_toolkit.config.types import (
    BOOLEAN,
    CADENCE,
    COUNT,
    DROPOUT,
    NAME,
    PATH,
    POSITIVE,
    RESUME,
    SEED,
    TARGETS,
    WHOLE,
    WORDS,
    choice,
)  # fmt: skip
from mdl_toolkit.i18n import Text

TRAINING = Text("Training options", "训练选项")
MEMORY = Text("Memory options", "内存与显存选项")
EVALUATION = Text("Evaluation options", "评估选项")
CHECKPOINTS = Text("Checkpoint and output options", "检查点与输出选项")

DYNAMIC_BF16 = Text("true where CUDA supports bfloat16", "CUDA 支持 bfloat16 时为 true")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ConversionOptions):
    """Options of `train`.

    Example:
        ```python
        from mdl_toolkit import TrainOptions

        options = TrainOptions(
            train_dataset="train.csv", output="run", lora_rank=16, num_epochs=2, batch_size=4
        )
        ```
    """

    COMMAND = "train"
    SUMMARY = Text(
        "Fine-tune the model on a CSV or a converted dataset.",
        "使用 CSV 或转换后的数据集对模型进行微调。",
    )
    GROUPS = (TRAINING, MEMORY, EVALUATION, CHECKPOINTS, COMMON, DATASET)

    model_name: str = option(NAME, DEFAULT_MODEL, COMMON, *MODEL_HELP)
    train_dataset: str = option(
        PATH, REQUIRED, TRAINING,
        "The training data: a CSV file or a folder written by convert-dataset.",
        "训练数据集的路径：CSV 文件，或 convert-dataset 输出的目录。",
    )  # fmt: skip
    lr: float = option(POSITIVE, 1e-4, TRAINING, "Learning rate.", "学习率，控制优化器更新参数的速率。")
    lora_rank: int = option(
        COUNT, 32, TRAINING,
        "Rank of the LoRA adapters; 8 to 16 for simple tasks, 32 or more for hard ones.",
        "LoRA 的秩。简单任务建议 8~16；复杂任务可用 32 或更高，一般不超过 128。",
    )  # fmt: skip
    lora_alpha: float = option(
        POSITIVE, 32.0, TRAINING,
        "LoRA's alpha: the adapters are scaled by alpha / rank.",
        "LoRA 的 alpha 参数：适配器按 alpha / rank 缩放。",
    )  # fmt: skip
    lora_dropout: float = option(
        DROPOUT, 0.0, TRAINING, "Dropout rate of the LoRA adapters.", "LoRA 适配器的 dropout 率。"
    )
    train_target: tuple[str, ...] = option(
        TARGETS, ("encoder", "projector", "decoder"), TRAINING,
        "What is trained: audio encoder, projector and text decoder by LoRA, word embeddings and output head "
        "in full. May be given several times; replaces the default.",
        "训练的目标模块，可多次指定：encoder、projector、decoder 使用 LoRA 训练，"
        "embed_tokens 与 lm_head 完整训练。指定后将取代默认值。",
    )  # fmt: skip
    num_epochs: float = option(
        POSITIVE, 1.0, TRAINING,
        "Passes over the training data; may be a fraction.",
        "训练的总轮数，可以为浮点数以进行部分 epoch 训练。",
    )  # fmt: skip
    warmup_steps: int = option(
        WHOLE, 0, TRAINING,
        "Optimizer steps over which the learning rate rises from 0.",
        "学习率预热的步数。",
    )  # fmt: skip
    seed: int = option(
        SEED, 42, TRAINING,
        "Seed of the data order, dropout and new adapter weights.",
        "随机种子：数据顺序、dropout 与适配器初始值。",
    )  # fmt: skip
    batch_size: int = option(
        COUNT, 8, MEMORY,
        "Rows per device and step. Effective batch: batch_size * gradient_accumulation_steps * devices.",
        "每个设备每步处理的样本数量。有效批次大小为 batch_size * gradient_accumulation_steps * 设备数。",
    )  # fmt: skip
    gradient_accumulation_steps: int = option(
        COUNT, 1, MEMORY,
        "Steps whose gradients are added up before the weights are updated.",
        "梯度累积的步数。",
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        BOOLEAN, True, MEMORY,
        "Compute activations again in the backward pass: much less memory, some more time.",
        "是否启用梯度检查点：大幅节省显存或内存，增加少量计算。",
    )  # fmt: skip
    cache_audio_features: bool = option(
        BOOLEAN, False, MEMORY,
        "Compute the audio encoder and projector once per row and keep what they give on disk while the run "
        "lasts (36 KB per second of audio at 7B in bfloat16); only where neither is a train target.",
        "每行音频只经过一次音频编码器与投影层，其输出在训练期间保存在磁盘上"
        "（7B 模型、bfloat16 时每秒音频 36 KB）；"
        "仅当二者都不是训练目标时可用。",
    )  # fmt: skip
    bf16: bool | None = option(
        BOOLEAN, None, MEMORY,
        "Load the base weights in bfloat16; adapters and full copies train in float32.",
        "是否使用 bfloat16 加载模型权重；适配器与完整训练的权重仍为 float32。",
        nullable=True, dynamic=DYNAMIC_BF16,
    )  # fmt: skip
    quantization: str | None = option(
        choice("8bit", "4bit"), None, MEMORY,
        "Quantise the decoder's base weights (needs the extra `quantization`).",
        "对解码器的基础权重进行量化（需要可选功能 quantization）。",
        nullable=True,
    )  # fmt: skip
    eval_dataset: str | None = option(
        PATH, None, EVALUATION,
        "Data to evaluate on: a CSV file or a converted folder. Without it the other evaluation options are "
        "ignored.",
        "评估数据集的路径：CSV 文件或转换后的目录。未指定时忽略其他评估选项。",
        nullable=True,
    )  # fmt: skip
    eval_steps: int | float = option(
        CADENCE, 500, EVALUATION,
        "Evaluate every so many steps, or so often per epoch (0.5: twice an epoch), and always at the end; "
        "0: only there.",
        "每隔多少步进行一次评估；(0, 1) 间的浮点数表示 epoch 的比例；结束时总会评估，0 表示仅在结束时评估。",
    )  # fmt: skip
    eval_batch_size: int | None = option(
        COUNT, None, EVALUATION,
        "Rows per device in evaluation; as in training if not given.",
        "评估时每个设备处理的样本数量；未指定时使用训练批量大小。",
        nullable=True,
    )  # fmt: skip
    eval_accumulation_steps: int | None = option(
        COUNT, None, EVALUATION,
        "Move evaluation results to the CPU every so many steps.",
        "评估时每隔多少步将结果移至 CPU；未指定时不累积。",
        nullable=True,
    )  # fmt: skip
    eval_metric: str | None = option(
        choice("accuracy", "wer", "cer"), None, EVALUATION,
        "Also let the model answer evaluation rows, and compare: share of equal answers, or error rate of "
        "words or characters.",
        "评估时同时让模型生成回答并与参考比较：完全一致的比例、词错误率或字错误率。",
        nullable=True,
    )  # fmt: skip
    eval_samples: int = option(
        COUNT, 200, EVALUATION,
        "Most rows that are answered for --eval-metric; always the same ones.",
        "计算 --eval-metric 时最多回答多少行；每次都是相同的行。",
    )  # fmt: skip
    keep_best: bool = option(
        BOOLEAN, False, EVALUATION,
        "Take the checkpoint with the best --eval-metric, or evaluation loss, as the result, not the last.",
        "以 --eval-metric（未指定时为评估损失）最好的检查点作为结果，而不是最后一个。",
    )  # fmt: skip
    early_stopping_patience: int | None = option(
        COUNT, None, EVALUATION,
        "Stop after so many evaluations in a row without a better one.",
        "连续多少次评估没有改进时提前停止训练。",
        nullable=True,
    )  # fmt: skip
    report_to: tuple[str, ...] = option(
        WORDS, (), EVALUATION,
        "Trackers to report to (tensorboard, wandb, swanlab ...). May be given several times.",
        "将指标报告到哪些平台（tensorboard、wandb、swanlab 等），可多次指定。",
    )  # fmt: skip
    output: str = option(
        PATH, REQUIRED, CHECKPOINTS,
        "Folder for checkpoints and, in `final/`, the result.",
        "输出目录：保存检查点，训练结果保存在其中的 final/。",
    )  # fmt: skip
    resume_from_checkpoint: bool | str | None = option(
        RESUME, None, CHECKPOINTS,
        "true: go on from the newest checkpoint in the output folder; a path: from that one.",
        "true 表示从输出目录中最新的检查点恢复；路径表示从该检查点恢复；null 或 false 表示从头开始。",
        nullable=True,
    )  # fmt: skip
    save_steps: int | float = option(
        CADENCE, 500, CHECKPOINTS,
        "Save a checkpoint every so many steps, or so often per epoch (0.5: twice an epoch); 0: only at the "
        "end.",
        "每隔多少步保存一次检查点；(0, 1) 间的浮点数表示 epoch 的比例；0 表示仅在结束时保存。",
    )  # fmt: skip
    save_total_limit: int | None = option(
        COUNT, None, CHECKPOINTS,
        "Keep only the newest so many checkpoints.",
        "最多保存多少个检查点，超过时删除最旧的；null 表示不限制。",
        nullable=True,
    )  # fmt: skip
    merge_lora: bool = option(
        BOOLEAN, True, CHECKPOINTS,
        "Write a full model in the base model's format; false: only the adapter and fully trained weights.",
        "是否合并 LoRA 并输出与原始模型格式相同的完整模型；false 时只输出适配器和被完整训练的权重。",
    )  # fmt: skip
    verify: bool = option(BOOLEAN, True, CHECKPOINTS, *VERIFY_HELP)
