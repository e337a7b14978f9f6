"""Answer the test phrases with our engine and with vLLM, in turns: seconds without those of the start.

Each engine has a process of its own with the same merged model, which answers all phrases whenever it is told
to, on one thread: several that wait for each other would count as work where others use the machine too.
Every round's recordings are a millionth louder than the last one's, so that nothing is remembered.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mdl_toolkit.audio.loading import load
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.demo import PROMPT
from mdl_toolkit.inference.generate import Answerer, Question
from mdl_toolkit.inference.vllm_engine import VllmAnswerer
from mdl_toolkit.model.kernels.matmul import prepack
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.weights.loading import load_for_inference
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files

BATCH, ROUNDS, MOST_TOKENS = 16, 5, 32
ENGINES = ("torch", "vllm")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def throughput(model: Path) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for each dtype: seconds of wall time and of processors, ours and vLLM's."""
    for bf16 in ("false", "true"):
        words = [sys.executable, "-m", "benchmarks.serving_throughput", str(model), bf16]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        pipes["env"] = {**os.environ, **ONE_THREAD}
        engines = [subprocess.Popen([*words, name], **pipes) for name in ENGINES]
        # Seconds of each round, `[rounds, engines, 2]`; the first round is not counted.
        rounds = [[_told(each) for each in engines] for _ in range(ROUNDS + 1)][1:]
        for each in engines:
            each.communicate()
        medians = [statistics.median(each[n][k] for each in rounds) for k in (0, 1) for n in (0, 1)]
        yield ("bfloat16" if bf16 == "true" else "float32", *(f"{each:.2f}" for each in medians))


def _told(engine: "subprocess.Popen[str]") -> tuple[float, float]:
    """Tell a process to answer, and return its seconds of wall time and of processors."""
    assert engine.stdin is not None
    assert engine.stdout is not None
    engine.stdin.write("\n")
    engine.stdin.flush()
    wall, processors = map(float, engine.stdout.readline().split())
    return wall, processors


def answer_when_told(model: Path, options: InferenceOptions) -> None:
    """Answer all phrases for each line of the standard input, and write how long it took."""
    # Nothing else may write to where the figures go.
    figures = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tokenizer = ChatTokenizer(read_tokenizer_files(model))
    questions = _questions(options, tokenizer)
    answers = _engine(model, options, tokenizer, questions)
    for turn, _ in enumerate(sys.stdin):
        louder = [
            replace(each, sample=replace(each.sample, waveform=each.sample.waveform * (1 + 1e-6 * turn)))
            for each in questions
        ]
        wall, processors = time.perf_counter(), time.process_time()
        assert len(dict(answers(louder))) == len(questions)
        print(time.perf_counter() - wall, time.process_time() - processors, file=figures, flush=True)


def _engine(
    model: Path, options: InferenceOptions, tokenizer: ChatTokenizer, questions: list[Question]
) -> Callable[[Iterable[Question]], Iterator[tuple[int, Any]]]:
    if options.engine == "vllm":
        longest = max(len(each.sample.input_ids) for each in questions) + MOST_TOKENS
        return VllmAnswerer(options, model, None, tokenizer, longest).answers
    loaded = load_for_inference(model, None, bf16=options.bf16)
    prepack(loaded)
    return Answerer(loaded, tokenizer, BATCH).answers


def _questions(options: InferenceOptions, tokenizer: ChatTokenizer) -> list[Question]:
    """Read the phrases, the longest first, as `inference` asks them."""
    found = []
    for row in read_manifest(options.input, options, needs_prediction=False).rows():
        samples = load(Path(row.audio)).samples
        tokens = tokenizer.encode_row(row, audio_token_count(len(samples)), with_answer=False)
        sample = Sample(tokens.input_ids, tokens.labels, samples)
        found.append(Question(row.line, sample, MOST_TOKENS))
    return sorted(found, key=lambda each: -len(each.sample.input_ids))


if __name__ == "__main__":
    folder, bf16, engine = sys.argv[1:]
    place = Path(folder).parent
    answer_when_told(
        Path(folder),
        InferenceOptions(
            input=str(place / "test.csv"), base_dir=str(place / "phrases"), output=str(place / "out.csv"),
            model_name=folder, user_prompt=PROMPT, engine=engine, bf16=bf16 == "true", batch_size=BATCH,
        ),
    )  # fmt: skip
