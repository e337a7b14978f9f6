"""The options of the commands that use a trained model and what it answers."""

from dataclasses import dataclass

from mdl_toolkit.config.data import COMMON, DATASET, FILES, VERIFY_HELP, ConversionOptions, HubOptions
from mdl_toolkit.config.options import REQUIRED, Options, option
from mdl_toolkit.config.types import (
    BOOLEAN,
    COUNT,
    METRICS,
    NAME,
    NOT_NEGATIVE,
    PATH,
    RESULTS,
    SEED,
    SHARE,
    TEXT,
    WHOLE,
    WORDS,
    choice,
)  # fmt: skip
from mdl_toolkit.i18n import Text

INFERENCE = Text("Inference options", "推理选项")
MERGE = Text("Merge options", "合并选项")
SCORING = Text("Scoring options", "评分选项")
PAGE = Text("Report options", "报告选项")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(ConversionOptions):
    """Options of `inference`.

    Example:
        ```python
        from mdl_toolkit import InferenceOptions

        options = InferenceOptions(
            input="test.csv", output="predictions.csv", model_name="run/final", max_new_tokens=64
        )
        ```
    """

    COMMAND = "inference"
    SUMMARY = Text(
        "Run the model over a CSV of recordings and write its predictions.",
        "使用模型对 CSV 中的音频进行推理并输出预测。",
    )
    GROUPS = (INFERENCE, COMMON, DATASET)

    input: str = option(
        PATH, REQUIRED, INFERENCE,
        "The CSV file; or a folder, or a pattern such as 'clips/*.wav', of recordings.",
        "输入数据集的 CSV 文件路径；也可以是音频目录，或 'clips/*.wav' 这样的模式。",
        positional=True,
    )  # fmt: skip
    output: str = option(
        PATH, REQUIRED, INFERENCE,
        "The CSV file to write; an existing file is replaced.",
        "输出 CSV 文件的路径；现有的文件将被覆盖。",
    )  # fmt: skip
    report: str | None = option(
        PATH, None, INFERENCE,
        "An HTML file to write too, with all answers to look at and listen to.",
        "同时写出的 HTML 报告，可查看并试听每条回答。",
        nullable=True,
    )  # fmt: skip
    model_name: str = option(
        NAME, REQUIRED, INFERENCE,
        "The model: a name on the hub, a local folder, or an adapter folder written by train.",
        "模型的 Huggingface 名称、本地路径，或 train 输出的适配器目录。",
    )  # fmt: skip
    batch_size: int = option(
        COUNT, 32, INFERENCE, "Most rows per device at once.", "每个推理步骤中每个设备处理的样本数量。"
    )
    max_length: int = option(
        COUNT, 128, INFERENCE,
        "Most tokens of one row: prompt, audio, answer and special tokens together.",
        "单行序列的最大长度，包括输入、音频、输出和所有特殊标记。",
    )  # fmt: skip
    max_new_tokens: int | None = option(
        COUNT, None, INFERENCE,
        "Most tokens of an answer, however long its prompt; takes the place of --max-length.",
        "回答的最大词元数，与提示长度无关；指定后将取代 --max-length。",
        nullable=True,
    )  # fmt: skip
    temperature: float = option(
        NOT_NEGATIVE, 0.0, INFERENCE,
        "0 always takes the most likely token; above 0 it is drawn, the more freely the higher.",
        "0 表示总是选择概率最大的词元；大于 0 时随机抽取，数值越大越随机。",
    )  # fmt: skip
    top_p: float = option(
        SHARE, 1.0, INFERENCE,
        "Draw among the most likely tokens that together have this probability.",
        "只在累计概率达到该值的最可能的词元中抽取。",
    )  # fmt: skip
    seed: int = option(SEED, 42, INFERENCE, "Seed of what is drawn.", "随机抽取的种子。")
    num_beams: int = option(
        COUNT, 1, INFERENCE,
        "Beams of a beam search; 1 is greedy.",
        "束搜索的束数；1 表示贪心解码。",
    )  # fmt: skip
    choices: str | None = option(
        PATH, None, INFERENCE,
        "A text file with one choice on each line: the answer is the most likely of them, with its score.",
        "文本文件，每行一个选项：回答是其中最可能的一个，并给出得分。",
        nullable=True,
    )  # fmt: skip
    top_k: int = option(
        COUNT, 1, INFERENCE,
        "With --choices: how many of the best are given.",
        "与 --choices 一起使用：给出得分最高的多少个选项。",
    )  # fmt: skip
    normalize_scores: bool = option(
        BOOLEAN, False, INFERENCE,
        "With --choices: divide each score by the choice's number of tokens.",
        "与 --choices 一起使用：将每个选项的得分除以其词元数。",
    )  # fmt: skip
    on_error: str = option(
        choice("stop", "keep"), "stop", INFERENCE,
        "stop: check all recordings first, and do nothing if one cannot be used; keep: leave such rows "
        "empty, and say why in the column `error`.",
        "stop：先检查所有音频，只要有一个无法使用就不开始；keep：这样的行留空，并在 error 列中说明原因。",
    )  # fmt: skip
    engine: str = option(
        choice("torch", "vllm"), "torch", INFERENCE,
        "What computes the answers: this toolkit, or vLLM (a merged model; needs the extra `vllm`).",
        "由什么计算回答：本工具，或 vLLM（需要合并后的模型与可选功能 vllm）。",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MergeOptions(HubOptions):
    """Options of `merge`.

    Example:
        ```python
        from mdl_toolkit import MergeOptions

        options = MergeOptions(adapter="run/checkpoint-500", output="merged", dtype="bfloat16")
        ```
    """

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


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(Options):
    """How predictions are compared with references, and shown; shared by `evaluate` and `report`."""

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
    base_dir: str | None = option(
        PATH, None, PAGE,
        "Folder that relative audio paths start from, for the report's players; if not given, the one of the "
        "inference that wrote the predictions, or the current directory.",
        "报告播放录音时相对路径的起始目录；未指定时为输出该预测的 inference 所用目录，或当前工作目录。",
        nullable=True,
    )  # fmt: skip
    embed_audio: int = option(
        WHOLE, 0, PAGE,
        "Put so many recordings into the report itself, the worst rows' first; the others are linked.",
        "将多少条录音嵌入报告文件，最差的行优先；其余仅为链接。",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoringOptions):
    """Options of `evaluate`.

    Example:
        ```python
        from mdl_toolkit import EvaluateOptions

        options = EvaluateOptions(
            input="predictions.csv", reference="test.csv", metric=("accuracy", "macro-f1")
        )
        ```
    """

    COMMAND = "evaluate"
    SUMMARY = Text(
        "Compare predictions with references, or two models: metrics with confidence intervals.",
        "将预测与参考或另一模型比较：带置信区间的指标。",
    )
    GROUPS = (FILES, SCORING, PAGE)

    input: str = option(
        PATH, REQUIRED, FILES,
        "A CSV file with the column `prediction`, such as inference writes.",
        "含 prediction 列的 CSV 文件，例如 inference 的输出。",
        positional=True,
    )  # fmt: skip
    output: tuple[str, ...] = option(
        RESULTS, (), FILES,
        "A file to write, .json or .csv; may be given several times. An existing file is replaced.",
        "要写出的文件，.json 或 .csv；可多次指定。现有的文件将被覆盖。",
    )  # fmt: skip
    report: str | None = option(
        PATH, None, FILES,
        "An HTML file to write with all rows to look at and listen to; an existing one is replaced.",
        "要写出的 HTML 报告，可查看并试听每一行；现有的文件将被覆盖。",
        nullable=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportOptions(ScoringOptions):
    """Options of `report`.

    Example:
        ```python
        from mdl_toolkit import ReportOptions

        options = ReportOptions(
            input="run", predictions="predictions.csv", reference="test.csv", png="figures"
        )
        ```
    """

    COMMAND = "report"
    SUMMARY = Text(
        "Make one HTML page of a training, of predictions, or of both.",
        "将一次训练、一份预测或两者做成一个 HTML 页面。",
    )
    GROUPS = (FILES, SCORING, PAGE)

    input: str = option(
        PATH, REQUIRED, FILES,
        "The output folder of a training, or a CSV file with the column `prediction`.",
        "train 的输出目录，或含 prediction 列的 CSV 文件。",
        positional=True,
    )  # fmt: skip
    predictions: str | None = option(
        PATH, None, FILES,
        "With a training's folder: a CSV file with predictions that are shown too.",
        "与训练目录一起使用：同时展示的预测 CSV 文件。",
        nullable=True,
    )  # fmt: skip
    output: str | None = option(
        PATH, None, FILES,
        "The HTML file to write; an existing one is replaced. Beside NAME.csv it is NAME.report.html.",
        "要写出的 HTML 文件；现有的文件将被覆盖。NAME.csv 旁为 NAME.report.html。",
        nullable=True,
        dynamic=Text(
            "`report.html` in the folder, or beside the CSV", "目录中的 report.html，或位于 CSV 旁"
        ),
    )  # fmt: skip
    png: str | None = option(
        PATH, None, FILES,
        "A folder for pictures too, as for a paper: loss.png and confusion.png, where there is something to "
        "draw.",
        "同时输出图片（例如用于论文）的目录：有内容可画时写出 loss.png 和 confusion.png。",
        nullable=True,
    )  # fmt: skip
