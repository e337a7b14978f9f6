"""Run every command in two minutes, offline: tiny model, real recordings, convert, train, predict.

The model has MiDashengLM's architecture and about half a million random weights; the recordings are the 240
phrases in five languages of the folder `phrases`. The model really learns, and never from the test phrases.
"""

import csv
import json
import random
import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from mdl_toolkit.api import evaluate
from mdl_toolkit.audio.loading import SAMPLE_RATE, load
from mdl_toolkit.config.data import ConvertOptions, DemoOptions
from mdl_toolkit.config.evaluation import EvaluateOptions, ReportOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.options import AnyOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE, as_command
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.evaluation.render import as_text
from mdl_toolkit.inference.run import infer
from mdl_toolkit.reporting.report import report
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import remove_folder
from mdl_toolkit.utils.ownership import foreign_files, is_ours, refuse, seal, visible
from mdl_toolkit.utils.run_folder import REPORT
from mdl_toolkit.weights.loading import quiet_libraries

PROMPT = "Which language is spoken?"
# Every ninth row of each language of train.csv is held out to evaluate on.
EVAL_SHARE = 9
# A folder that holds this file, and nothing that is not in MADE, may be cleared.
MARK = ".mdl-toolkit-demo"
SETS = {name: f"{name}-dataset" for name in ("train", "eval")}
MADE = {
    MARK, REPORT, "model", "phrases", "train.csv", "eval.csv", "test.csv", "run", *SETS.values(),
    *(f"{name}.csv{end}" for name in ("before", "after") for end in ("", f".{SETTINGS_FILE}")),
}  # fmt: skip
VOCABULARY = 512
SPECIALS = {
    "turn_token": "<|im_start|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


Result = TypeVar("Result")


def run_demo(options: DemoOptions) -> tuple[float, float]:
    """Run the demonstration.

    Returns:
        Accuracy on the test phrases before and after training.

    Raises:
        InputError: the output folder holds something that is not an earlier demonstration's.
    """
    import torch

    folder = Path(options.output)
    present = visible(folder) if folder.is_dir() else [folder] if folder.exists() else []
    others = [path for path in present if path.name not in MADE or not (folder / MARK).exists()]
    # Of a killed demonstration not all is recorded: it is set aside.
    if is_ours(folder / MARK, options.COMMAND):
        others += foreign_files(folder, options.COMMAND)
    if others:
        refuse(folder, others[0], options.COMMAND)
    if folder.is_dir():
        remove_folder(folder, options.COMMAND)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    quiet_libraries()
    # The tiny model's threads would mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lay_out_phrases(folder / "phrases", folder)
        say("Making a tiny MiDashengLM with random weights; it knows nothing yet.")
        make_tiny_model(folder / "model", folder / "phrases", seed=options.seed)
        accuracies = _run_commands(folder, options.seed)
    finally:
        torch.set_num_threads(threads)
    seal(folder, options.COMMAND, is_whole=False)
    return accuracies


def _run_commands(folder: Path, seed: int) -> tuple[float, float]:
    """Run the commands as a user would, and return the accuracy before and after training."""
    model, test = str(folder / "model"), str(folder / "test.csv")
    before, after = str(folder / "before.csv"), str(folder / "after.csv")
    sets, run = {name: str(folder / dataset) for name, dataset in SETS.items()}, str(folder / "run")
    shared: dict[str, Any] = {"base_dir": str(folder / "phrases"), "user_prompt": PROMPT}

    def execute(command: Callable[[AnyOptions], Result], options: AnyOptions) -> Result:
        say("\n$ {command}", command=as_command(options))
        return command(options)

    for name, dataset in sets.items():
        source = str(folder / f"{name}.csv")
        execute(convert_dataset, ConvertOptions(input=source, output=dataset, model_name=model, **shared))
    execute(infer, InferenceOptions(input=test, output=before, model_name=model, **shared))
    training: dict[str, Any] = {"lr": 2e-3, "num_epochs": 20, "eval_steps": 100, "save_steps": 0}
    data: dict[str, Any] = {f"{name}_dataset": dataset for name, dataset in sets.items()}
    data |= {"output": run, "model_name": model, "gradient_checkpointing": False, "seed": seed}
    execute(train, TrainOptions(**data, **training))
    execute(infer, InferenceOptions(input=test, output=after, model_name=f"{run}/final", **shared))
    scoring: dict[str, Any] = {"reference": test, "compare": before}
    metrics = ("accuracy", "macro-f1")
    found = execute(evaluate, EvaluateOptions(input=after, metric=metrics, **scoring))
    accuracy = found.metrics[0]
    assert accuracy.comparison is not None
    accuracies = accuracy.comparison.other or 0.0, accuracy.value or 0.0
    say(
        "\n{table}\n\nAccuracy on the {rows} test phrases: {before:.0%} before, {after:.0%} after "
        "training (one of five languages by chance: 20%).",
        table=as_text(found),
        rows=len(found.rows),
        before=accuracies[0],
        after=accuracies[1],
    )
    execute(report, ReportOptions(input=run, predictions=after, output=str(folder / REPORT), **scoring))
    return accuracies


def lay_out_phrases(phrases: Path, folder: Path) -> None:
    """Copy recordings and CSVs to where a user would have them; hold rows of train.csv out as eval.csv.

    Args:
        phrases: the recordings' new folder.
        folder: of the CSVs.
    """
    with resources.as_file(resources.files("mdl_toolkit") / "phrases") as source:
        shutil.copytree(source, phrases)
    shutil.copyfile(phrases / "test.csv", folder / "test.csv")
    seen: dict[str, int] = {}
    kept: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for row in _rows(phrases / "train.csv"):
        seen[row["prediction"]] = seen.get(row["prediction"], 0) + 1
        (kept if seen[row["prediction"]] % EVAL_SHARE else held_out).append(row)
    _write_rows(folder / "train.csv", kept)
    _write_rows(folder / "eval.csv", held_out)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _column(path: Path, name: str) -> list[str]:
    return [row[name] for row in _rows(path)]


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


# --- the tiny model ------------------------------------------------------------------------------------


def make_tiny_model(folder: Path, phrases: Path, *, seed: int, **decoder: Any) -> None:
    """Write a random MiDashengLM with its own small vocabulary, in the published layout.

    Args:
        folder: the model's new folder.
        phrases: the recordings; BatchNorm's statistics are taken from the training ones.
        seed: of the weights.
        decoder: settings of its `text_config` that take the place of these.
    """
    import torch
    from transformers import Wav2Vec2FeatureExtractor

    from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel, MiDashengLMProcessor

    folder.mkdir(parents=True)
    tokenizer = _make_tokenizer(phrases)
    torch.manual_seed(seed)
    config = MiDashengLMConfig(
        architectures=["MiDashengLMModel"],
        audio_encoder_config={
            "embed_dim": 64, "depth": 3, "num_heads": 4, "patch_size": [64, 4], "patch_stride": [64, 4],
            "target_length": 1008,
        },
        audio_token_id=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        text_config={
            "model_type": "qwen2", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": False, **decoder,
        },
    )  # fmt: skip
    model = MiDashengLMModel(config)
    # Three times the usual standard deviation: the frozen random layers then have more to say (accuracy on
    # groups of phrases left out of train.csv 0.90 against 0.89, six runs each).
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_frozen = any(part in name for part in (".blocks.", "audio_projector.", ".layers."))
            if weight.ndim == 2 and is_frozen:
                weight.mul_(3.0)
    # With rows as short as the usual initialisation's, the frozen head could never sound sure of a word.
    torch.nn.init.normal_(model.decoder.lm_head.weight, std=0.1)
    _set_statistics(model, phrases, seed)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=SAMPLE_RATE, do_normalize=False, return_attention_mask=True
    )
    MiDashengLMProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def _make_tokenizer(phrases: Path) -> Any:
    """Learn a byte-level BPE of 512 entries from the transcripts, with Qwen2's own pre-tokenisation."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    texts = [*_column(phrases / "train.csv", "transcript"), "system user assistant", PROMPT]
    raw = Qwen2Tokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Two more special tokens are named below.
    size = VOCABULARY - len(SPECIALS) - 2
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    )
    learnt = json.loads(raw.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIALS,
    )


def _set_statistics(model: Any, phrases: Path, seed: int) -> None:
    """Give BatchNorm the mean and variance of the training recordings' log-mels, as pretraining would."""
    import torch

    from mdl_toolkit.model.mel import log_mel

    files = random.Random(seed).sample(_column(phrases / "train.csv", "audio"), 40)
    clips = [torch.from_numpy(load(phrases / file).samples) for file in files]
    config = model.config.audio_encoder_config
    mels = torch.cat([log_mel(clip[None], [len(clip)], config)[0] for clip in clips], dim=1)
    model.audio_encoder.init_bn.running_mean.copy_(mels.mean(dim=1))
    model.audio_encoder.init_bn.running_var.copy_(mels.var(dim=1))
