"""Answer with vLLM in this process: a whole model, or an adapter beside its base.

The plugin (`serving/vllm_plugin.py`) makes vLLM compute what the toolkit computes. Questions are added as
there is room, so that no answer waits for the slowest of its batch.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import ModelError
from mdl_toolkit.inference.generate import Question
from mdl_toolkit.model.constants import SAMPLE_RATE
from mdl_toolkit.utils.machine import describe_oom
from mdl_toolkit.weights.loading import choose_dtype, say_loading
from mdl_toolkit.weights.vllm_lora import read_vllm_lora

# vLLM computes at least so many tokens of prompts at once, whatever the machine.
FEWEST_BATCHED = 2048
# Its own words to the terminal are not for users; one process, which ends with this one.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # GiB, on a CPU; it would take nine tenths of the memory.
    "VLLM_CPU_KVCACHE_SPACE": "2",
}


@contextmanager
def quiet_vllm() -> Iterator[None]:
    """Silence what vLLM and its libraries say of themselves while they are loaded in the context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def load_engine(
    options: InferenceOptions, folder: Path, most_tokens: int, settings: Mapping[str, Any]
) -> Any:
    """Load a whole model into an engine of vLLM.

    Args:
        options: the inference's.
        folder: the model's.
        most_tokens: of a row, its answer included.
        settings: of the engine, beside those that the options give.

    Raises:
        ModelError: vLLM cannot load the model.
    """
    say_loading(folder)
    os.environ |= {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    # A recording must fit.
    room = {"max_num_batched_tokens": most_tokens} if most_tokens > FEWEST_BATCHED else {}
    with quiet_vllm():
        from vllm import LLM

        try:
            return LLM(
                model=str(folder),
                dtype=str(choose_dtype(options.bf16)).removeprefix("torch."),
                max_model_len=most_tokens,
                max_num_seqs=options.batch_size,
                limit_mm_per_prompt={"audio": 1},
                # No recording comes twice.
                mm_processor_cache_gb=0,
                # On a CPU, compiling takes longer than most runs.
                enforce_eager=not torch.cuda.is_available(),
                trust_remote_code=False,
                use_tqdm_on_load=False,
                **room,
                **settings,
            ).llm_engine
        # It raises a dozen kinds of errors; each means that it cannot serve the model here.
        except Exception as problem:
            if describe_oom(problem) is not None:
                raise
            reason = " ".join(str(problem).split())
            raise ModelError(
                "{folder}: vLLM cannot load it: {reason}", folder=folder, reason=reason
            ) from problem


class VllmAnswerer:
    """Answer questions with vLLM, as many at once as the batch size."""

    def __init__(
        self,
        options: InferenceOptions,
        folder: Path,
        base: Path | None,
        tokenizer: ChatTokenizer,
        most_tokens: int,
    ) -> None:
        """Load the model.

        Args:
            options: the inference's.
            folder: that of the model or adapter.
            base: that of an adapter's base.
            tokenizer: the model's.
            most_tokens: of a row, its answer included.

        Raises:
            ModelError: vLLM cannot load the model, or cannot apply the adapter.
        """
        settings: dict[str, Any] = {}
        if base is not None:
            lora = read_vllm_lora(folder, base)
            settings = {
                "enable_lora": True,
                "max_lora_rank": lora.rank,
                "enable_tower_connector_lora": lora.in_towers,
            }
        self._engine = load_engine(options, base or folder, most_tokens, settings)
        with quiet_vllm():
            from vllm import SamplingParams
            from vllm.lora.request import LoRARequest
        self._params, self._tokenizer, self._options = SamplingParams, tokenizer, options
        self._lora = None if base is None else LoRARequest("adapter", 1, str(folder))
        self._audio = tokenizer.id_of(dict(tokenizer.files.specials)["audio_token"])

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[int, list[str]]]:
        """Yield each question's key and its answer, as they become complete."""
        waiting, engine = iter(questions), self._engine
        while True:
            # One batch is prepared while another one is answered.
            room = 2 * self._options.batch_size - engine.get_num_unfinished_requests()
            for question in islice(waiting, room):
                prompt, settings = self._prompt(question), self._settings(question)
                engine.add_request(str(question.key), prompt, settings, lora_request=self._lora)
            if not engine.has_unfinished_requests():
                return
            for output in engine.step():
                if output.finished:
                    answer = output.outputs[0]
                    has_end = answer.finish_reason == "stop"
                    ids = [*answer.token_ids]
                    yield int(output.request_id), [self._tokenizer.decode(ids[:-1] if has_end else ids)]

    def _prompt(self, question: Question) -> dict[str, Any]:
        """Return the ids, in which one audio token stands for the recording, and the recording."""
        assert isinstance(question.sample, Sample)
        runs = groupby(question.sample.input_ids.tolist())
        ids = [token for token, run in runs for _ in ([token] if token == self._audio else run)]
        recording = {"audio": (question.sample.waveform, SAMPLE_RATE)}
        return {"prompt_token_ids": ids, "multi_modal_data": recording}

    def _settings(self, question: Question) -> Any:
        return self._params(
            max_tokens=question.max_new_tokens,
            temperature=self._options.temperature,
            top_p=self._options.top_p,
            # Of the row's own, so that the batch does not matter.
            seed=self._options.seed + question.key,
            stop_token_ids=[self._tokenizer.end_id],
            detokenize=False,
        )
