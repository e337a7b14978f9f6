"""Batches to answers: greedy, each row with its own budget of new tokens; and answers to a score."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from mdl_toolkit.batching import Collator
from mdl_toolkit.dataset import Sample
from mdl_toolkit.legacy import AnyDataset
from mdl_toolkit.metrics import Metric
from mdl_toolkit.tokens import IGNORE_INDEX, Encoder

ROOM = 16  # new tokens that an answer may have beyond twice its reference's


@torch.no_grad()
def answer(model: Any, encoder: Encoder, batch: dict[str, Any], budgets: list[int]) -> list[str]:
    """Answer one batch greedily.

    Args:
        model: as `load_for_inference` gives it.
        encoder: the model's tokenizer.
        batch: `input_ids`, `attention_mask`, `input_values`, `audio_length`, as the collator gives them.
        budgets: most new tokens of each row.
    """
    ends = _end_ids(model, encoder)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max(budgets), eos_token_id=sorted(ends), pad_token_id=encoder.pad_id
    )
    on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
    rows = model.generate(**on_device, generation_config=settings).tolist()
    return [encoder.decode(_cut(ids, ends, most)) for ids, most in zip(rows, budgets, strict=True)]


def _end_ids(model: Any, encoder: Encoder) -> set[int]:
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends] if ends is not None else []
    return {*listed, encoder.end_id}


def _cut(ids: list[int], ends: set[int], most: int) -> list[int]:
    """The answer itself: up to its end token, and no longer than its budget."""
    kept = ids[:most]
    return kept[: next((place for place, token in enumerate(kept) if token in ends), len(kept))]


# --- scores --------------------------------------------------------------------------------------------


@dataclass
class Questions:
    """Rows of a dataset whose answers are compared with their references.

    Attributes:
        dataset: the rows, with labels.
        rows: which of them, `[rows]`.
        batch_size: how many at once.
        encoder: the model's tokenizer.
        metric: what is counted.
    """

    dataset: AnyDataset
    rows: np.ndarray
    batch_size: int
    encoder: Encoder
    metric: Metric

    @staticmethod
    def drawn(dataset: AnyDataset, count: int, seed: int) -> np.ndarray:
        """At most so many rows, always the same ones, the longest first."""
        rows = np.random.default_rng(seed).permutation(len(dataset))[:count]
        return rows[np.argsort(-dataset.positions[rows], kind="stable")]

    def count(self, model: Any, is_stopped: Callable[[], bool]) -> tuple[float, float]:
        """Numerator and denominator of the metric over all rows, or over those before a stop."""
        numerator = denominator = 0.0
        for references, predictions in self._answers(model):
            for pair in zip(references, predictions, strict=True):
                part = self.metric.count(*pair)
                numerator, denominator = numerator + part[0], denominator + part[1]
            if is_stopped():
                break
        return numerator, denominator

    def _answers(self, model: Any) -> Iterator[tuple[list[str], list[str]]]:
        collate = Collator(self.encoder.pad_id)
        for start in range(0, len(self.rows), self.batch_size):
            samples = [self.dataset[int(row)] for row in self.rows[start : start + self.batch_size]]
            references = [sample.labels[sample.labels != IGNORE_INDEX] for sample in samples]
            batch: dict[str, Any] = {**collate([_question(sample) for sample in samples])}
            del batch["labels"]
            budgets = [2 * len(reference) + ROOM for reference in references]
            texts = [self.encoder.decode(reference.tolist()) for reference in references]
            yield texts, answer(model, self.encoder, batch, budgets)


def _question(sample: Sample) -> Sample:
    """A training row without its answer."""
    end = int(np.flatnonzero(sample.labels != IGNORE_INDEX)[0])
    return replace(sample, input_ids=sample.input_ids[:end], labels=sample.labels[:end])
