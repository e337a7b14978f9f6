"""What several commands share, and the options of the small ones: name, kind, default, help, group.

The command line, `--config` files, `--help`, the reference pages and Python callers are all read from
these tables.
"""

from dataclasses import dataclass

from mdl_toolkit.config.options import REQUIRED, Options, option
from mdl_toolkit.config.types import (
    BOOLEAN,
    COUNT,
    JSON,
    NAME,
    PATH,
    PATHS,
    POSITIVE,
    SEED,
    TEXT,
    choice,
)  # fmt: skip
from mdl_toolkit.i18n import Text

COMMON = Text("Common options", "通用选项")
DATASET = Text("Dataset options", "数据集选项")
FILES = Text("Input and output", "输入和输出")
CHECKING = Text("Checking options", "检查选项")
DEMO = Text("Demo options", "演示选项")
COMPLETION = Text("Arguments", "参数")

DYNAMIC_WORKERS = Text("half the available CPUs, at most 32", "可用 CPU 核心数的一半，最大 32")
DEFAULT_MODEL = "mispeech/midashenglm-7b"


@dataclass(frozen=True, kw_only=True)
class HubOptions(Options):
    """Where models are looked up by name."""

    from_modelscope: bool = option(
        BOOLEAN, False, COMMON,
        "Load the model from ModelScope instead of Hugging Face (needs the extra `modelscope`).",
        "是否从 ModelScope 加载模型；为 true 时从 ModelScope 加载（需要可选功能 modelscope），"
        "否则从 Huggingface 加载。",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(HubOptions):
    """How a CSV becomes samples; shared by all three commands."""

    tokenizing_batch_size: int = option(
        COUNT, 8, COMMON,
        "Rows that are tokenised together.",
        "分词时使用的批量大小。",
    )  # fmt: skip
    num_workers: int | None = option(
        COUNT, None, COMMON,
        "Processes that decode and convert audio.",
        "处理数据时使用的工作进程数量。",
        nullable=True, dynamic=DYNAMIC_WORKERS,
    )  # fmt: skip
    system_prompt: str | None = option(
        TEXT, None, DATASET,
        "System prompt for rows without one in the column `system_prompt`.",
        "默认系统提示词；数据集 system_prompt 列的非空值将覆盖它。",
        nullable=True,
    )  # fmt: skip
    user_prompt: str | None = option(
        TEXT, None, DATASET,
        "User prompt for rows without one in the column `user_prompt`.",
        "默认用户提示词；数据集 user_prompt 列的非空值将覆盖它。",
        nullable=True,
    )  # fmt: skip
    base_dir: str | None = option(
        PATH, None, DATASET,
        "Folder that relative audio paths start from; the current directory if not given.",
        "数据集的根目录；相对路径相对于该目录解析，未指定时相对于当前工作目录解析。",
        nullable=True,
    )  # fmt: skip
    allow_empty_prediction: bool = option(
        BOOLEAN, False, DATASET,
        "Accept rows whose prediction is empty: the model learns to answer nothing.",
        "接受 prediction 为空的行：模型将学习不输出任何内容。",
    )  # fmt: skip
    allow_truncated: bool = option(
        BOOLEAN, False, DATASET,
        "Accept recordings that are shorter than their header or size promises, with a warning.",
        "接受实际长度短于文件头或文件大小所声明长度的音频，并给出警告。",
    )  # fmt: skip
    max_download_mb: float = option(
        POSITIVE, 512.0, DATASET,
        "Largest recording, in megabytes, that is fetched from a URL.",
        "从 URL 下载的单个音频的大小上限（MB）。",
    )  # fmt: skip
    download_cache: str | None = option(
        PATH, None, DATASET,
        "Folder that keeps recordings fetched from URLs for other runs, which ask only whether they changed. "
        "Without it they are kept until the conversion is complete.",
        "保存从 URL 下载的音频的目录，供以后的运行使用（届时只询问是否有更新）；未指定时保留至转换完成。",
        nullable=True,
    )  # fmt: skip


MODEL_HELP = (
    "The model: a name on the hub, or a local folder.",
    "模型的 Huggingface 名称或本地路径。",
)
VERIFY_HELP = (
    "Ask the merged model the same few rows as base and adapter before it is put in place (both are loaded).",
    "在写入结果前，比较合并后的模型与“基础模型加适配器”对相同几行的回答（依次加载两者）。",
)
INPUT_HELP = ("The CSV file.", "输入数据集的 CSV 文件路径。")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(ConversionOptions):
    """Options of `convert-dataset`.

    Example:
        ```python
        from mdl_toolkit import ConvertOptions

        options = ConvertOptions(
            input="train.csv", output="train-dataset", base_dir="recordings",
            user_prompt="Which language is spoken?",
        )
        ```
    """

    COMMAND = "convert-dataset"
    SUMMARY = Text(
        "Convert a CSV of recordings into a dataset ready for training.",
        "将 CSV 格式的数据集转换为可直接用于训练的数据集。",
    )
    GROUPS = (COMMON, DATASET, FILES)

    model_name: str = option(NAME, DEFAULT_MODEL, COMMON, *MODEL_HELP)
    input: str = option(PATH, REQUIRED, FILES, *INPUT_HELP, positional=True)
    output: str = option(
        PATH, REQUIRED, FILES,
        "Where the converted dataset goes; a dataset that is there already is replaced.",
        "输出数据集的保存路径；现有的数据集将被覆盖。",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ConversionOptions):
    """Options of `check`.

    Example:
        ```python
        from mdl_toolkit import CheckOptions

        options = CheckOptions(input=("train.csv", "test.csv"), base_dir="recordings")
        ```
    """

    COMMAND = "check"
    SUMMARY = Text(
        "See whether CSVs of recordings are fit to train on, without weights or a GPU.",
        "在不加载模型权重、不使用 GPU 的情况下检查 CSV 数据集能否用于训练。",
    )
    GROUPS = (CHECKING, COMMON, DATASET)

    model_name: str = option(NAME, DEFAULT_MODEL, COMMON, *MODEL_HELP)
    input: tuple[str, ...] = option(
        PATHS, REQUIRED, CHECKING,
        "The CSV files: the first one is to be trained on, the others to be evaluated on.",
        "CSV 文件：第一个用于训练，其余用于评估。",
        positional=True,
    )  # fmt: skip
    max_length: int | None = option(
        COUNT, None, CHECKING,
        "Name the rows that take more tokens: prompt, audio, answer and special tokens together.",
        "找出词元数超过该值的行（包括提示、音频、回答和所有特殊标记）。",
        nullable=True,
    )  # fmt: skip
    for_inference: bool = option(
        BOOLEAN, False, CHECKING,
        "Check the files as input of `inference`: no column `prediction` is needed, and a row whose prompt "
        "reaches --max-length cannot be used.",
        "按 inference 的输入检查：不需要 prediction 列；提示词达到 --max-length 的行无法使用。",
    )  # fmt: skip
    train_config: str | None = option(
        PATH, None, CHECKING,
        "A YAML file of the options of `train` for which memory and steps are predicted; its defaults "
        "without it.",
        "train 选项的 YAML 文件，据此预测内存占用和训练步数；未指定时使用 train 的默认值。",
        nullable=True,
    )  # fmt: skip
    write_fixed: str | None = option(
        PATH, None, CHECKING,
        "Write the first CSV to this file without the rows that cannot be used, otherwise byte for byte.",
        "将第一个 CSV 中可用的行逐字节写入该文件，去掉无法使用的行。",
        nullable=True,
    )  # fmt: skip
    json: bool | str | None = option(
        JSON, None, CHECKING,
        "Write what was found as JSON: true, or --json alone, to standard output in place of the text; a "
        "path (--json=PATH, or --json NAME.json) to that file.",
        "以 JSON 输出检查结果：true（或单独的 --json）表示代替文本写到标准输出；"
        "路径（--json=PATH 或 --json NAME.json）表示写入该文件。",
        nullable=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Options of `demo`."""

    COMMAND = "demo"
    SUMMARY = Text(
        "See the whole road on real recordings, offline, with a tiny model.",
        "用极小的模型和真实录音离线演示完整流程。",
    )
    GROUPS = (DEMO,)

    output: str = option(PATH, "demo-output", DEMO, "Folder for all that is made.", "所有产物的目录。")
    seed: int = option(SEED, 42, DEMO, "Seed of the tiny model and its training.", "随机种子。")


@dataclass(frozen=True, kw_only=True)
class CompletionOptions(Options):
    """Options of `completion`."""

    COMMAND = "completion"
    SUMMARY = Text(
        "Print the script that lets a shell complete commands and options.",
        "输出 shell 自动补全脚本。",
    )
    GROUPS = (COMPLETION,)

    shell: str = option(
        choice("bash", "zsh", "fish"), REQUIRED, COMPLETION,
        'bash, zsh or fish. In bash: eval "$(mdl-toolkit completion bash)".',
        'bash、zsh 或 fish。在 bash 中：eval "$(mdl-toolkit completion bash)"。',
        positional=True,
    )  # fmt: skip
