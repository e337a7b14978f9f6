"""Serving: our engine against vLLM, with small models of each kind that were trained on the phrases.

`make serving` runs it in an environment of its own with vLLM. It ends with an error unless all answers are
the same in float32, and in bfloat16 as many are right as with our own engine.
"""

import base64
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.serving_throughput import throughput
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.demo import PROMPT, lay_out_phrases, make_tiny_model
from mdl_toolkit.training.run import train

PORT = 8123
BF16 = "bfloat16"
TOWERS, DECODER = ("encoder", "projector", "decoder"), ("decoder",)
# vLLM's attention on a CPU takes heads of 32, not the demonstration's 24.
HEADS: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1}
OMNI = {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"}
BASES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "tied": {"tie_word_embeddings": True},
    "Qwen3": {"model_type": "qwen3", "head_dim": 32},
    "theta 1e4": {"rope_theta": 1e4},
    "Qwen2.5-Omni": {"model_type": "qwen2_5_omni_text", "rope_scaling": OMNI},
}


def main() -> int:
    """Train, compare, print the table, and return how many rows are not as they should be."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out_phrases(folder / "phrases", folder)
        adapters = {base: trained(folder, base, TOWERS) for base in BASES}
        decoder = trained(folder, "Qwen2", DECODER)
        merged = folder / "merged"
        command("merge", adapters["Qwen2"], "--output", merged)
        models = {"merged": merged, "adapter of the decoder": decoder}
        models |= {f"adapter of all, {base}": adapter for base, adapter in adapters.items()}
        rows = [compared(title, model) for title, model in models.items()]
        rows += [compared(f"{title}, {BF16}", model, "--bf16", "true") for title, model in models.items()]
        with served(folder / "Qwen2", all=adapters["Qwen2"], decoder=decoder) as address:
            rows.append(compared("adapter of the decoder, API", decoder, engine=address))
            rows.append(compared("adapter of all, API", adapters["Qwen2"], engine=address))
            rows.append(
                row_of("adapter of all, 8 kHz files in chats", adapters["Qwen2"], chatted(folder, address))
            )
        print_table(("model", "the same", "right, ours", "right, vLLM", "ours, s", "vLLM, s"), rows)
        seconds = [f"{who}, {of} s" for of in ("wall", "CPU") for who in ("ours", "vLLM")]
        print_table(("60 phrases, batch 16", *seconds), throughput(merged))
    failed = [row for row in rows if (row[1] < 60 and BF16 not in row[0]) or row[3] < row[2]]
    return len(failed)


def trained(folder: Path, base: str, targets: tuple[str, ...]) -> Path:
    """Train an adapter on a base, which is made first, and return its folder."""
    model, output = folder / base, folder / f"{base} {len(targets)}"
    if not model.exists():
        make_tiny_model(model, folder / "phrases", seed=42, **{**HEADS, **BASES[base]})
    settings: dict[str, Any] = {"lr": 2e-3, "num_epochs": 20, "save_steps": 0, "eval_steps": 0}
    train(
        TrainOptions(
            train_dataset=str(folder / "train.csv"), base_dir=str(folder / "phrases"), user_prompt=PROMPT,
            model_name=str(model), output=str(output), train_target=targets, merge_lora=False,
            gradient_checkpointing=False, **settings,
        )
    )  # fmt: skip
    return output / "final"


def compared(title: str, model: Path, *options: str, engine: str = "vllm") -> tuple[Any, ...]:
    """Answer with our engine and another, and return counts and seconds as a row of the table."""
    return row_of(title, model, answered(model, engine, *(options if engine == "vllm" else ())), *options)


def row_of(title: str, model: Path, other: tuple[tuple[str, ...], float], *options: str) -> tuple[Any, ...]:
    """Compare answers with those of our engine, and return counts and seconds as a row of the table."""
    ours, wanted = answered(model, "torch", *options), column(work_of(model) / "test.csv")
    same = sum(a == b for a, b in zip(ours[0], other[0], strict=True))
    right = [sum(a == b for a, b in zip(each, wanted, strict=True)) for each, _ in (ours, other)]
    return (title, same, *right, round(ours[1], 1), round(other[1], 1))


def work_of(model: Path) -> Path:
    """Return the folder in which everything is."""
    return model.parents[1] if model.name == "final" else model.parent


@cache
def answered(model: Path, engine: str, *options: str) -> tuple[tuple[str, ...], float]:
    """Answer the phrases with an engine, and return its answers and seconds."""
    work, begun = work_of(model), time.monotonic()
    command(
        "inference", work / "test.csv", "--base-dir", work / "phrases", "--model-name", model,
        "--output", work / "out.csv", "--engine", engine, *options,
    )  # fmt: skip
    return column(work / "out.csv"), time.monotonic() - begun


def chatted(work: Path, address: str) -> tuple[tuple[str, ...], float]:
    """Send the recordings as they are to a server's adapter `all`, and return its answers and seconds."""
    answers, begun = [], time.monotonic()
    with (work / "test.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            audio = base64.b64encode((work / "phrases" / row["audio"]).read_bytes()).decode()
            recording = {"type": "input_audio", "input_audio": {"data": audio, "format": "flac"}}
            content = [recording, {"type": "text", "text": PROMPT}]
            body = {"model": "all", "messages": [{"role": "user", "content": content}], "temperature": 0}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=600).raise_for_status()
            answers.append(answer.json()["choices"][0]["message"]["content"])
    return tuple(answers), time.monotonic() - begun


def print_table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table in Markdown."""
    titles = [*head]
    for cells in (titles, ["---"] * len(titles), *rows):
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def command(*words: object) -> None:
    """Run a command of the toolkit."""
    subprocess.run([sys.executable, "-m", "mdl_toolkit", *map(str, words)], check=True)


def column(file: Path) -> tuple[str, ...]:
    """Read the answers of a CSV."""
    with file.open(encoding="utf-8", newline="") as lines:
        return tuple(row["prediction"] for row in csv.DictReader(lines))


@contextmanager
def served(base: Path, **adapters: Path) -> Iterator[str]:
    """Run `serve --engine vllm` with adapters by name for the context, and give its address."""
    address, memory = f"http://127.0.0.1:{PORT}", {"VLLM_CPU_KVCACHE_SPACE": "1"}
    words = ["serve", base, "--engine", "vllm", "--bf16", "false", "--port", PORT, "--batch-size", 16]
    words += [word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")]
    # vLLM takes the place of this process.
    program = [sys.executable, "-m", "mdl_toolkit", *map(str, words)]
    server = subprocess.Popen(program, env={**os.environ, **memory})
    try:
        while server.poll() is None:
            with suppress(httpx.TransportError):
                httpx.get(f"{address}/v1/models", timeout=5)
                break
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
