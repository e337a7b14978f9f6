"""Generate answers in batches, each row with its own budget of new tokens and up to its own end.

A row joins the others when there is room and leaves when its answer is complete, so that there is always
work for a whole batch. What a row is answered does not depend on the others: greedily it is the most likely
token at every step, and each row draws from random numbers of its own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdl_toolkit.data.collate import PrecomputedSample, PromptBatch, collate_prompts
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.data.tokenization import IGNORE_INDEX, ChatTokenizer
from mdl_toolkit.model.decoding_batch import DecodingBatch

# Rows join when a quarter of the places is free: taking one in costs about as much as a step for all.
JOINING = 4


@dataclass(frozen=True)
class Question:
    """Hold a row to answer.

    Attributes:
        key: by which its answer is told from others.
        sample: prompt and recording.
        budget: most new tokens, at least one.
    """

    key: int
    sample: Sample | PrecomputedSample
    budget: int


@dataclass(frozen=True)
class SamplingParams:
    """Choose the next token, greedily or by sampling.

    Attributes:
        temperature: 0 takes the most likely one; otherwise logits are divided by it and one is drawn.
        top_p: draw among the fewest tokens whose probabilities add up to so much.
        seed: of what is drawn.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def source(self, key: int) -> np.random.Generator:
        """Return the random numbers of one row, the same whatever the batch."""
        return np.random.Generator(np.random.Philox(key=[self.seed, key]))

    def pick(self, logits: Tensor, sources: list[np.random.Generator]) -> list[int]:
        """Choose one token for each row of logits, `[rows, vocabulary]`."""
        if not self.temperature:
            return [*map(int, logits.argmax(-1).tolist())]
        chances, tokens = (logits.float() / self.temperature).softmax(-1).sort(-1, descending=True)
        ends = chances.cumsum(-1)
        mass = torch.where(ends - chances < self.top_p, ends, 0.0).amax(-1, keepdim=True)
        drawn = torch.tensor([[source.random()] for source in sources], device=logits.device)
        places = (ends <= drawn.to(ends.dtype) * mass).sum(-1, keepdim=True)
        return [*map(int, tokens.gather(-1, places.clamp_(max=tokens.shape[-1] - 1)).flatten().tolist())]


@dataclass
class _Answer:
    """Hold an answer under way."""

    key: int
    budget: int
    source: np.random.Generator
    ids: list[int]


class Answerer:
    """Answer questions with a model, as many rows at once as the batch size.

    Attributes:
        ends: tokens that end an answer.
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
            batch_size: most rows at once.
            sampling: how tokens are chosen.
        """
        self._model = base_model(model)
        self._tokenizer, self._sampling, self._places = tokenizer, sampling, batch_size
        self.ends = end_ids(model, tokenizer)
        self._rows = DecodingBatch(self._model.decoder)
        self._running: list[_Answer] = []

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[int, str]]:
        """Yield the key and the answer of each question, as they become complete.

        They are taken as there is room; neighbours of like length are computed with the least padding.
        """
        waiting, joining = iter(questions), max(1, self._places // JOINING)
        while True:
            free = self._places - len(self._running)
            if not self._running or free >= joining:
                yield from self._finished(self._admit([*islice(waiting, free)]))
            if not self._running:
                return
            last = torch.tensor([answer.ids[-1] for answer in self._running], device=self._model.device)
            yield from self._finished(self._rows.step(last))

    def _admit(self, questions: list[Question]) -> Tensor | None:
        if not questions:
            return None
        prompts = collate_prompts([question.sample for question in questions], self._tokenizer.pad_id)
        need = max(n + question.budget for n, question in zip(prompts.lengths, questions, strict=True))
        logits = admit(self._rows, self._model, prompts, self._places, need)
        self._running += [_Answer(q.key, q.budget, self._sampling.source(q.key), []) for q in questions]
        return logits

    def _finished(self, logits: Tensor | None) -> Iterator[tuple[int, str]]:
        """Add a token to those rows, the last ones, that have logits; let go what is complete."""
        if logits is None:
            return
        mine = self._running[-len(logits) :]
        tokens = self._sampling.pick(logits, [answer.source for answer in mine])
        for answer, token in zip(mine, tokens, strict=True):
            answer.ids.append(token)
        done = [
            place
            for place, answer in enumerate(self._running)
            if answer.ids[-1] in self.ends or len(answer.ids) == answer.budget
        ]
        if done:
            complete = [self._running[place] for place in done]
            self._running = [self._running[place] for place in self._rows.release(done)]
            yield from ((answer.key, self._text(answer)) for answer in complete)

    def _text(self, answer: _Answer) -> str:
        ends_itself = answer.ids[-1] in self.ends
        return self._tokenizer.decode(answer.ids[:-1] if ends_itself else answer.ids)


def base_model(model: Any) -> Any:
    """Return the MiDashengLM itself, its layers with the adapters that they have."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.inference_mode()
def embed_prompts(model: Any, prompts: PromptBatch) -> Tensor:
    """Return prompts with their recordings' features, `[rows, longest, hidden_size]`, padded right."""
    there = {name: value.to(model.device) for name, value in prompts.tensors.items()}
    embeddings: Tensor = model.fuse(
        there["input_ids"], there.get("input_values"), there["audio_length"], there.get("audio_features")
    )
    return embeddings


def admit(rows: DecodingBatch, model: Any, prompts: PromptBatch, places: int, need: int) -> Tensor:
    """Admit prompts with recordings to a batch; a prefix that all share is computed once."""
    words = model.shareable(prompts.tensors["input_ids"].to(model.device))
    return rows.admit(embed_prompts(model, prompts), prompts.lengths, places, need, words)


def end_ids(model: Any, tokenizer: ChatTokenizer) -> set[int]:
    """Return the tokens that end an answer: the model's own, and the one that closes a turn."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends] if ends is not None else []
    return {*listed, tokenizer.end_id}


def prompt_of(sample: Sample) -> Sample:
    """Return a row without its answer, if it has one."""
    answered = np.flatnonzero(sample.labels != IGNORE_INDEX)
    end = int(answered[0]) if len(answered) else len(sample.labels)
    return replace(sample, input_ids=sample.input_ids[:end], labels=sample.labels[:end])
