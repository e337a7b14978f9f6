"""The options of the commands that use a trained model and what it answers."""

from dataclasses import dataclass

from mdl_toolkit.kinds import COUNT, NAME, PATH
from mdl_toolkit.language import Text
from mdl_toolkit.option import REQUIRED, option
from mdl_toolkit.options import COMMON, DATASET, INPUT_HELP, ConversionOptions

INFERENCE = Text("Inference options", "推理选项")


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
