"""The options of the commands that use a trained model and what it answers."""

from dataclasses import dataclass

from mdl_toolkit.kinds import BOOLEAN, COUNT, NAME, PATH, choice
from mdl_toolkit.language import Text
from mdl_toolkit.option import REQUIRED, option
from mdl_toolkit.options import COMMON, DATASET, INPUT_HELP, VERIFY_HELP, ConversionOptions, HubOptions

INFERENCE = Text("Inference options", "推理选项")
MERGE = Text("Merge options", "合并选项")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(ConversionOptions):
    """Options of `inference`."""

    COMMAND = "inference"
    SUMMARY = Text(
        "Run the model over a CSV of recordings and write its predictions.",
        "使用模型对 CSV 中的音频进行推理并输出预测。",
    )
    GROUPS = (INFERENCE, COMMON, DATASET)

    input: str = option(PATH, REQUIRED, INFERENCE, *INPUT_HELP, positional=True)
    output: str = option(
        PATH, REQUIRED, INFERENCE,
        "The CSV file to write; an existing file is replaced.",
        "输出 CSV 文件的路径；现有的文件将被覆盖。",
    )  # fmt: skip
    model_name: str = option(
        NAME, REQUIRED, INFERENCE,
        "The model: a name on the hub, a local folder, or an adapter folder written by train.",
        "模型的 Huggingface 名称、本地路径，或 train 输出的适配器目录。",
    )  # fmt: skip
    batch_size: int = option(
        COUNT, 32, INFERENCE, "Rows per device and step.", "每个推理步骤中每个设备处理的样本数量。"
    )
    max_length: int = option(
        COUNT, 128, INFERENCE,
        "Most tokens of one row: prompt, audio, answer and special tokens together.",
        "单行序列的最大长度，包括输入、音频、输出和所有特殊标记。",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MergeOptions(HubOptions):
    """Options of `merge`."""

    COMMAND = "merge"
    SUMMARY = Text(
        "Merge an adapter into its base model: one model in the base model's format.",
        "将适配器合并到基础模型中，输出与基础模型格式相同的完整模型。",
    )
    GROUPS = (MERGE, COMMON)

    adapter: str = option(
        NAME, REQUIRED, MERGE,
        "The adapter: a folder written by train, a checkpoint of a run, or any LoRA of PEFT for this model.",
        "适配器：train 输出的适配器目录、训练的检查点，或任何适用于该模型的 PEFT LoRA。",
        positional=True,
    )  # fmt: skip
    output: str = option(
        PATH, REQUIRED, MERGE,
        "Folder for the merged model; an earlier merged model is replaced.",
        "合并后模型的输出目录；现有的合并结果将被覆盖。",
    )  # fmt: skip
    model_name: str | None = option(
        NAME, None, MERGE,
        "The base model, where the adapter's record does not find it: a name on the hub, or a local folder.",
        "基础模型的 Huggingface 名称或本地路径；未指定时使用适配器中记录的基础模型。",
        nullable=True,
    )  # fmt: skip
    dtype: str | None = option(
        choice("bfloat16", "float16", "float32"), None, MERGE,
        "Numbers of the merged weights; the base model's if not given.",
        "合并后权重的数据类型；未指定时与基础模型相同。",
        nullable=True,
    )  # fmt: skip
    verify: bool = option(BOOLEAN, True, MERGE, *VERIFY_HELP)
