"""Generate answers by continuous batching, each with its own limit of new tokens.

A prompt joins the batch when there is room and leaves it when its answer is complete, so that there is always
work for a whole batch. No answer depends on the others of its batch: greedy decoding takes the most likely
token at every step, and sampling draws from a random generator of the row's own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from mdl_toolkit.data.collate import PrecomputedSample, PromptBatch, collate_prompts
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.data.tokenization import IGNORE_INDEX, ChatTokenizer
from mdl_toolkit.i18n import Localized
from mdl_toolkit.model.decoding_batch import DecodingBatch

T = TypeVar("T")

# Prompts join when a quarter of the batch is free: admitting one costs about as much as a step for all.
JOINING = 4
# In place of a token, where a logit is NaN or infinite.
NOT_FINITE = -1

# The logit of a token that is not to be taken; the sum of many is finite.
LOWEST = -1e30


@dataclass(frozen=True)
class SamplingParams:
    """Choose the next token, greedily or by sampling.

    Attributes:
        temperature: 0 for greedy decoding; otherwise logits are divided by it before a token is drawn.
        top_p: draw among the fewest tokens whose probabilities add up to so much (nucleus sampling).
        seed: of the random numbers.
        repetition_penalty: divides the positive logits of tokens that the answer has, and multiplies others.
        no_repeat_ngram_size: tokens that would repeat a sequence of so many are not taken; 0 for none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    @cached_property
    def processors(self) -> LogitsProcessorList:
        """Return transformers' processors of logits that look at the answer so far, in its order."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            processors.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        return processors

    def process(self, logits: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits `[rows, vocabulary]` in the light of each row's tokens so far."""
        if not self.processors:
            return logits
        seen = [torch.tensor([ids], dtype=torch.long, device=logits.device) for ids in answers]
        plain = logits.float()
        rows = zip(seen, plain.unsqueeze(1), strict=True)
        processed = torch.cat([self.processors(ids, row) for ids, row in rows])
        # What is not to be taken is no failure of the model's.
        return processed.where(processed.isfinite() | ~plain.isfinite(), LOWEST)

    def generator(self, key: int) -> np.random.Generator:
        """Make the random generator of one question; its numbers do not depend on the batch."""
        return np.random.Generator(np.random.Philox(key=[self.seed, key]))

    def pick(self, logits: Tensor, generators: list[np.random.Generator]) -> list[int]:
        """Choose one token for each row of logits, `[rows, vocabulary]`, with that row's generator.

        Returns:
            The tokens; `NOT_FINITE` for a row of which a logit is NaN or infinite.
        """
        # Any of these makes the sum one. It is fetched with the tokens, so that nothing waits for it.
        is_finite = logits.sum(-1, dtype=torch.float32).isfinite()
        if not self.temperature:
            return [*map(int, logits.argmax(-1).where(is_finite, NOT_FINITE).tolist())]
        plain = logits.float()
        # So that none is infinite, however low the temperature.
        below = plain - plain.amax(-1, keepdim=True)
        temperature = max(self.temperature, torch.finfo(below.dtype).tiny)
        probabilities, tokens = (below / temperature).softmax(-1).sort(-1, descending=True)
        cumulated = probabilities.cumsum(-1)
        in_nucleus = cumulated - probabilities < self.top_p
        mass = torch.where(in_nucleus, cumulated, 0.0).amax(-1, keepdim=True)
        drawn = torch.tensor([[generator.random()] for generator in generators], device=logits.device)
        ranks = (cumulated <= drawn.to(cumulated.dtype) * mass).sum(-1, keepdim=True)
        chosen = tokens.gather(-1, ranks.clamp_(max=tokens.shape[-1] - 1)).flatten()
        return [*map(int, chosen.where(is_finite, NOT_FINITE).tolist())]


def pick_each(
    logits: Tensor,
    samplings: Sequence[SamplingParams],
    generators: Sequence[np.random.Generator],
    answers: Sequence[Sequence[int]],
) -> list[int]:
    """Choose one token for each row of logits, `[rows, vocabulary]`, each by its own settings and answer."""
    tokens = [0] * len(samplings)
    for sampling in {*samplings}:
        rows = [row for row, own in enumerate(samplings) if own == sampling]
        part = logits if len(rows) == len(tokens) else logits[rows]
        part = sampling.process(part, [answers[row] for row in rows])
        for row, token in zip(rows, sampling.pick(part, [generators[row] for row in rows]), strict=True):
            tokens[row] = token
    return tokens


@dataclass(frozen=True)
class Question:
    """Hold a prompt to answer.

    Attributes:
        key: identifies its answer.
        sample: prompt and recording.
        max_new_tokens: the most tokens of an answer, at least one.
        sampling: how its tokens are chosen; None as the answerer chooses them.
    """

    key: int
    sample: Sample | PrecomputedSample
    max_new_tokens: int
    sampling: SamplingParams | None = None


@dataclass
class _PartialAnswer:
    """Hold an answer that is being generated."""

    key: int
    max_new_tokens: int
    sampling: SamplingParams
    generator: np.random.Generator
    ids: list[int]


class Answerer:
    """Answer questions with a model, as many at once as the batch size.

    Attributes:
        ends: tokens that end an answer.
        listener: called with the key and each new token of a question, if there is one.
        cancelled: keys of questions whose answers nobody waits for any more: they end with the next token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: ChatTokenizer,
        batch_size: int,
        sampling: SamplingParams = SamplingParams(),
    ) -> None:
        """Prepare a model for answering.

        Args:
            model: a MiDashengLM in evaluation mode, with or without adapters.
            tokenizer: its tokenizer.
            batch_size: the most questions at once.
            sampling: how tokens are chosen.
        """
        self._model = base_model(model)
        self._tokenizer, self._sampling, self._batch_size = tokenizer, sampling, batch_size
        self.ends = end_ids(model, tokenizer)
        self.listener: Callable[[int, int], None] | None = None
        self.cancelled: set[int] = set()
        self._batch = DecodingBatch(self._model.decoder)
        self._running: list[_PartialAnswer] = []

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the model is computed in."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    def check_device(self) -> None:
        """Compute something, which raises an error where the model's device does not answer any more."""
        torch.zeros(1, device=self._model.device).add(1).item()

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[int, str | None]]:
        """Yield the key and the answer of each question, as they become complete; None without finite logits.

        Questions are taken as there is room; neighbours of like length are computed with the least padding.
        """
        waiting, fewest_free = iter(questions), max(1, self._batch_size // JOINING)
        while True:
            free = self._batch_size - len(self._running)
            if (not self._running or free >= fewest_free) and (joining := [*islice(waiting, free)]):
                prompts = collate_prompts([each.sample for each in joining], self._tokenizer.pad_id)
                longest = max(n + q.max_new_tokens for n, q in zip(prompts.lengths, joining, strict=True))
                logits = admit(self._batch, self._model, prompts, self._batch_size, longest)
                for q in joining:
                    sampling = q.sampling or self._sampling
                    generator = sampling.generator(q.key)
                    self._running.append(_PartialAnswer(q.key, q.max_new_tokens, sampling, generator, []))
                yield from self._advance(logits)
                # Answers of one token have left already.
                continue
            if not self._running:
                return
            last = torch.tensor([answer.ids[-1] for answer in self._running])
            yield from self._advance(self._batch.step(last.to(self._model.device, non_blocking=True)))

    def _advance(self, logits: Tensor) -> Iterator[tuple[int, str | None]]:
        """Add a token to as many of the last answers as have logits; release and yield complete ones."""
        advanced = self._running[-len(logits) :]
        samplings, generators = [each.sampling for each in advanced], [each.generator for each in advanced]
        tokens = pick_each(logits, samplings, generators, [each.ids for each in advanced])
        for answer, token in zip(advanced, tokens, strict=True):
            answer.ids.append(token)
            if self.listener is not None and token != NOT_FINITE:
                self.listener(answer.key, token)
        complete = {
            slot: answer
            for slot, answer in enumerate(self._running)
            if answer.ids[-1] in {*self.ends, NOT_FINITE}
            or len(answer.ids) == answer.max_new_tokens
            or answer.key in self.cancelled
        }
        if complete:
            self._running = [self._running[slot] for slot in self._batch.release([*complete])]
        for answer in complete.values():
            *ids, last = answer.ids
            is_finite = last != NOT_FINITE
            text = self._tokenizer.decode(ids if last in self.ends else answer.ids) if is_finite else None
            yield answer.key, text


def ask(
    engine: Callable[[Iterable[Question]], Iterator[tuple[int, T | None]]],
    alone: Callable[[Iterable[Question]], Iterator[tuple[int, T | None]]],
    questions: Iterable[Question],
) -> Iterator[tuple[int, T | None]]:
    """Answer questions, and once more alone those without finite logits.

    A row may take the states of a shared prefix from another row, in which attention lets NaN of later tokens
    get into earlier ones.

    Args:
        engine: answers many at once, with None where logits are not finite.
        alone: answers one.
        questions: each with a key of its own.
    """
    asked: dict[int, Question] = {}

    def noted() -> Iterator[Question]:
        for question in questions:
            asked[question.key] = question
            yield question

    for key, answer in engine(noted()):
        question = asked.pop(key)
        yield from [(key, answer)] if answer is not None else alone([question])


def not_finite(dtype: torch.dtype) -> Localized:
    """Say why a row has no answer: a logit was NaN or infinite, computed in a dtype."""
    if dtype == torch.bfloat16:
        return Localized(
            "the model gave NaN or infinite logits in bfloat16; compute in float32: --bf16 false"
        )
    return Localized("the model gave NaN or infinite logits; take an earlier checkpoint or another model")


def base_model(model: Any) -> Any:
    """Return the MiDashengLM inside a PEFT model, with the adapters in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.inference_mode()
def embed_prompts(model: Any, prompts: PromptBatch) -> Tensor:
    """Embed prompts with their recordings' features, `[prompts, longest, hidden_size]`, padded right."""
    # The lengths are numbers for the host.
    inputs = {
        name: value if name == "audio_length" else value.to(model.device)
        for name, value in prompts.tensors.items()
    }
    embeddings: Tensor = model.fuse(
        inputs["input_ids"], inputs.get("input_values"), inputs["audio_length"], inputs.get("audio_features")
    )
    return embeddings


def admit(batch: DecodingBatch, model: Any, prompts: PromptBatch, batch_size: int, longest: int) -> Tensor:
    """Admit prompts with recordings to a batch, and compute a prefix that they share once.

    Args:
        batch: where they are decoded.
        model: a MiDashengLM without a wrapper around it.
        prompts: padded on the right.
        batch_size: the most sequences that the batch will hold at once.
        longest: the most tokens that one of them will ever have, its answer included.

    Returns:
        Logits for each prompt's next token, `[prompts, vocabulary]`.
    """
    prefix_ids = model.prefix_ids(prompts.tensors["input_ids"])
    return batch.admit(embed_prompts(model, prompts), prompts.lengths, batch_size, longest, prefix_ids)


def end_ids(model: Any, tokenizer: ChatTokenizer) -> set[int]:
    """Return the tokens that end an answer: those of the model's settings, and the end of a chat turn."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends] if ends is not None else []), tokenizer.end_id}


def prompt_of(sample: Sample) -> Sample:
    """Return a sample without its answer, if it has one."""
    answered = np.flatnonzero(sample.labels != IGNORE_INDEX)
    end = int(answered[0]) if len(answered) else len(sample.labels)
    return replace(sample, input_ids=sample.input_ids[:end], labels=sample.labels[:end])
