"""`python -m benchmarks.memory_table [--write]`: tell what a training needs of a GPU, or write it to pages.

The gigabytes are those of the toolkit's planner for models of the true shapes: planned, not measured. A row
has one clip, 32 tokens around it and 16 of its answer; options that no table names have their defaults.
Where there is a GPU, it is hidden: with free memory in sight, gradient checkpointing keeps more. The clips a
second are what the roofline of a card allows (`benchmarks.roofline`).
"""

import json
import os
import re
import sys
import tempfile
from bisect import bisect_right
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mdl_toolkit.training.memory.plan import MemoryPlan

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in ("README.md", "docs/installation.en.md", "README.zh.md", "docs/installation.zh.md")
]
# The encoder of the 7B. That of the 0.6B is one of two, of which this is the larger.
ENCODER = {
    "embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": [64, 4], "patch_stride": [64, 4],
    "target_length": 1008,
}  # fmt: skip
DECODERS = {
    "7B": {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    },
    "0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
FORMS = {"bfloat16": None, "4bit": "4bit"}
SECONDS, SHOWN, BATCHES = (5, 10, 30), (1, 8, 32), (1, 2, 4, 8, 16, 32, 64)
PROMPT, ANSWER, RATE = 32, 16, 16_000
# Nominal sizes of GPUs with a card for each, and what must stay free for all that the planner does not count.
CARDS = {16: "RTX 4080", 24: "RTX 4090", 40: "A100", 80: "H100"}
SPARE, GB = 1.5, 1e9
NEEDS = {
    "en": "| model | weights | clips | {batches} |",
    "zh": "| 模型 | 权重 | 音频时长 | {batches} |",
}
ROWS = {"en": "batch {batch}", "zh": "批大小 {batch}"}
FITS = {"en": "| model | weights | clips | {cards} |", "zh": "| 模型 | 权重 | 音频时长 | {cards} |"}


@cache
def planned(model: str, form: str, batch: int, seconds: int, checkpointing: bool = True) -> "MemoryPlan":
    """The memory of a training, as the planner of `train` says before weights are loaded."""
    import torch

    from mdl_toolkit.config.train import TrainOptions
    from mdl_toolkit.training.memory.plan import plan_memory
    from mdl_toolkit.training.sampler import BatchSampler

    options = TrainOptions(
        train_dataset="data", output="run", batch_size=batch, quantization=FORMS[form],
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    every = np.ones(batch, np.int64)
    accumulation = options.gradient_accumulation_steps
    sampler = BatchSampler(every * _tokens(seconds), every * ANSWER, batch, accumulation, 1, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        _write_config(Path(folder), model)
        device, dtype = torch.device("cuda"), torch.bfloat16
        return plan_memory(Path(folder), options, sampler, every * seconds * RATE, 0, device, dtype)


def _tokens(seconds: int) -> int:
    from mdl_toolkit.model.lengths import audio_token_count

    return PROMPT + audio_token_count(seconds * RATE) + ANSWER


def _write_config(folder: Path, model: str) -> None:
    config = {"model_type": "midashenglm", "audio_encoder_config": ENCODER, "text_config": DECODERS[model]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def speed(model: str, form: str, card: int, batch: int, seconds: int, checkpointing: bool) -> float:
    """The clips a second that the roofline of a card allows."""
    from benchmarks.roofline import Work, matrix_bytes

    kept = planned(model, form, batch, seconds, False)
    clip, *parts = _operations(model, seconds)
    work = Work(batch * clip, *matrix_bytes(*parts, form), kept.activations, kept.trained)
    return float(batch / work.seconds(CARDS[card], float(checkpointing)))


@cache
def _operations(model: str, seconds: int) -> Any:
    """Operations of a clip, of a decoder's token and of a patch."""
    from mdl_toolkit.training.memory.plan import meta_model
    from mdl_toolkit.training.summary import PATCHES_PER_TOKEN, operations_of

    with tempfile.TemporaryDirectory() as folder:
        _write_config(Path(folder), model)
        made = meta_model(Path(folder)).requires_grad_(False)
    tokens, samples = np.array([_tokens(seconds), 1, 0]), np.array([seconds * RATE, 0, RATE])
    clip, token, second = operations_of(made, tokens, samples)
    return clip, token, second / PATCHES_PER_TOKEN / (_tokens(1) - _tokens(0))


def needs(language: str) -> str:
    """The table of gigabytes by model, weights, length of clips and batch."""
    batches = " | ".join(ROWS[language].format(batch=batch) for batch in SHOWN)
    lines = [NEEDS[language].format(batches=batches), "| --- " * (3 + len(SHOWN)) + "|"]
    return "\n".join(lines + [needs_line(*each) for each in product(DECODERS, FORMS, SECONDS)])


def needs_line(model: str, form: str, seconds: int) -> str:
    """A line of that table."""
    figures = " | ".join(f"{planned(model, form, batch, seconds).total / GB:.1f} GB" for batch in SHOWN)
    return f"| {model} | {form} | {seconds} s | {figures} |"


def fits(language: str) -> str:
    """The table of the largest batches by size of the GPU, and of the roofline's clips a second."""
    cards = " | ".join(f"{card} GB, {name}" for card, name in CARDS.items())
    lines = [FITS[language].format(cards=cards), "| --- " * (3 + len(CARDS)) + "|"]
    return "\n".join(lines + [fits_line(*each) for each in product(DECODERS, FORMS, SECONDS)])


def fits_line(model: str, form: str, seconds: int) -> str:
    """A line of that table: with and without gradient checkpointing, and the faster of both."""
    cells = []
    for card in CARDS:
        largest = {each: _largest(model, form, card, seconds, each) for each in (True, False)}
        fastest = [speed(model, form, card, batch, seconds, each) for each, batch in largest.items() if batch]
        cell = " / ".join(str(batch or "-") for batch in largest.values())
        cells.append(f"{cell}: {float(f'{max(fastest):.2g}'):g}/s" if fastest else cell)
    return f"| {model} | {form} | {seconds} s | {' | '.join(cells)} |"


def _largest(model: str, form: str, card: int, seconds: int, checkpointing: bool) -> int:
    fitting = bisect_right(
        BATCHES,
        (card - SPARE) * GB,
        key=lambda batch: planned(model, form, batch, seconds, checkpointing).total,
    )
    return BATCHES[fitting - 1] if fitting else 0


TABLES = {"needs": needs, "fits": fits}
# A table in a page, between two comments.
REGION = re.compile(r"(<!-- memory: (\w+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)


def refreshed(page: str, language: str) -> str:
    """A page with its tables as they are now."""
    return REGION.sub(lambda match: match[1] + TABLES[match[2]](language) + match[3], page)


def main(words: list[str]) -> int:
    """Print the tables, or write them into the pages."""
    if words not in ([], ["--write"]):
        sys.stderr.write("usage: python -m benchmarks.memory_table [--write]\n")
        return 2
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not words:
        print(f"{needs('en')}\n\n{fits('en')}")
    for page in PAGES if words else []:
        language = "zh" if ".zh." in page.name else "en"
        page.write_text(refreshed(page.read_text(encoding="utf-8"), language), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
