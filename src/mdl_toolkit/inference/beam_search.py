"""Answer by beam search: transformers' own, over prompts of one length at a time."""

import warnings
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from mdl_toolkit.data.collate import collate_prompts
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.inference.generate import Question, SamplingParams, base_model, embed_prompts, end_ids


def beam_search(
    model: Any,
    tokenizer: ChatTokenizer,
    batch_size: int,
    num_beams: int,
    sampling: SamplingParams,
    questions: Iterable[Question],
) -> Iterator[tuple[int, list[str] | None]]:
    """Answer by transformers' beam search, over prompts of one length and limit of new tokens at a time.

    Nothing is padded, so that no answer depends on the others of its batch.
    """
    plain, ends = base_model(model), sorted(end_ids(model, tokenizer))
    failed: Tensor

    def watch(_: Tensor, scores: Tensor) -> Tensor:
        """Note of which beams a logit was NaN or infinite: then its log-probabilities are NaN."""
        failed.logical_or_(scores.isnan().any(-1))
        return scores

    for (_, limit), group in groupby(
        questions, lambda each: (len(each.sample.input_ids), each.max_new_tokens)
    ):
        settings = GenerationConfig(
            do_sample=False,
            num_beams=num_beams,
            repetition_penalty=sampling.repetition_penalty,
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            max_new_tokens=limit,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_id,
        )
        while batch := [*islice(group, batch_size)]:
            prompts = collate_prompts([each.sample for each in batch], tokenizer.pad_id)
            with torch.inference_mode(), warnings.catch_warnings():
                # Penalties look at the answer alone, as in greedy decoding.
                warnings.filterwarnings("ignore", message="Passing .* with `inputs_embeds`")
                embeddings = embed_prompts(plain, prompts)
                mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
                failed = torch.zeros(len(batch) * num_beams, dtype=torch.bool, device=embeddings.device)
                rows = plain.generate(
                    inputs_embeds=embeddings,
                    attention_mask=mask,
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([watch]),
                ).tolist()
            without = failed.view(len(batch), num_beams).any(1).tolist()
            for question, ids, is_lost in zip(batch, rows, without, strict=True):
                yield question.key, None if is_lost else [tokenizer.decode(ids)]
