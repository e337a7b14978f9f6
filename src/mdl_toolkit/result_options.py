"""The options of the commands that use a trained model and what it answers."""

from dataclasses import dataclass

from mdl_toolkit.kinds import BOOLEAN, COUNT, METRICS, NAME, PATH, RESULTS, SEED, TEXT, WHOLE, WORDS
from mdl_toolkit.language import Text
from mdl_toolkit.option import REQUIRED, Options, option
from mdl_toolkit.options import COMMON, DATASET, FILES, INPUT_HELP, ConversionOptions

INFERENCE = Text("Inference options", "推理选项")
SCORING = Text("Scoring options", "评分选项")


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
class EvaluateOptions(Options):
    """Options of `evaluate`."""

    COMMAND = "evaluate"
    SUMMARY = Text(
        "Compare predictions with references, or two models: metrics with confidence intervals.",
        "将预测与参考或另一模型比较：带置信区间的指标。",
    )
    GROUPS = (FILES, SCORING)

    input: str = option(
        PATH, REQUIRED, FILES,
        "A CSV file with the column `prediction`, such as inference writes.",
        "含 prediction 列的 CSV 文件，例如 inference 的输出。",
        positional=True,
    )  # fmt: skip
    reference: str | None = option(
        PATH, None, FILES,
        "The CSV file with the references of the same rows; if not given, they are in the file itself.",
        "含同样各行参考文本的 CSV 文件；未指定时参考文本在预测文件中。",
        nullable=True,
    )  # fmt: skip
    reference_column: str | None = option(
        TEXT, None, FILES,
        "The column with the references.",
        "参考文本所在的列。",
        nullable=True,
        dynamic=Text(
            "`reference`; of another file without it, `prediction`",
            "reference；另一文件没有该列时为 prediction",
        ),
    )  # fmt: skip
    compare: str | None = option(
        PATH, None, FILES,
        "Another CSV file with predictions for the same rows; differences are tested.",
        "另一份对相同各行的预测 CSV；将对差异做检验。",
        nullable=True,
    )  # fmt: skip
    output: tuple[str, ...] = option(
        RESULTS, (), FILES,
        "A file to write, .json or .csv; may be given several times. An existing file is replaced.",
        "要写出的文件，.json 或 .csv；可多次指定。现有的文件将被覆盖。",
    )  # fmt: skip
    metric: tuple[str, ...] = option(
        METRICS, (), SCORING,
        "What is computed; may be given several times.",
        "要计算的指标；可多次指定。",
        dynamic=Text("chosen from the data", "根据数据选择"),
    )  # fmt: skip
    normalize: bool = option(
        BOOLEAN, True, SCORING,
        "Before error rates and exact match: Unicode NFKC, case folded, punctuation removed, single spaces.",
        "计算错误率和 exact-match 之前规范化文本：Unicode NFKC、统一大小写、去除标点、合并空白。",
    )  # fmt: skip
    label_separator: str | None = option(
        TEXT, None, SCORING,
        "What separates the labels of a row that may have several; needed for map.",
        "一行可有多个标签时的分隔符；map 需要此项。",
        nullable=True,
    )  # fmt: skip
    score_column: str | None = option(
        TEXT, None, SCORING,
        "The column with the scores of predicted labels, separated like them, for map.",
        "预测标签的得分所在的列，分隔方式与标签相同，用于 map。",
        nullable=True,
        dynamic=Text("`score`, if there is one", "score（如果有）"),
    )  # fmt: skip
    group_by: tuple[str, ...] = option(
        WORDS, (), SCORING,
        "A column of either file, or `length`: figures for each group too; may be given several times.",
        "任一文件中的列，或 length：另按其取值分组计算；可多次指定。",
    )  # fmt: skip
    bootstrap: int = option(
        WHOLE, 1000, SCORING,
        "Bootstrap samples for 95 % confidence intervals and paired tests; 0 for none.",
        "用于 95% 置信区间和配对检验的自助法抽样次数；0 表示不做。",
    )  # fmt: skip
    seed: int = option(SEED, 42, SCORING, "Seed of the bootstrap.", "自助法的随机种子。")
