"""Answers from the store of rows against transformers' own `generate`, one row at a time."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GenerationConfig

from mdl_toolkit.data.collate import collate_prompts
from mdl_toolkit.inference.generate import Answerer, Question, SamplingParams, admit, embed_prompts
from mdl_toolkit.model.decoding_batch import GROWTH, DecodingBatch
from mdl_toolkit.model.kernels import matmul
from mdl_toolkit.model.kernels.matmul import PrepackedLinear, prepack
from tests.support.questions import load_checkpoint as load
from tests.support.questions import questions

GREEDY = SamplingParams()
CHECKPOINTS = ["A-small", "B-small", "B-small-tied"]


def generated(model, question, **settings):
    """What transformers answers to the row alone, an end token included."""
    prompts = collate_prompts([question.sample], 0)
    ids = model.generate(
        inputs_embeds=embed_prompts(model, prompts), attention_mask=torch.ones(1, prompts.lengths[0]),
        generation_config=GenerationConfig(max_new_tokens=question.max_new_tokens, **settings),
    )  # fmt: skip
    return ids[0].tolist()


def ids_of(model, tokenizer, asked, batch_size, sampling=GREEDY, ends=()):
    """The ids that an answerer comes to, by key."""
    echo = SimpleNamespace(
        decode=lambda ids: tuple(ids), end_id=-1, pad_id=tokenizer.pad_id
    )  # text would hide differences
    answerer = Answerer(model, echo, batch_size, sampling)
    answerer.ends = {*ends}
    return {key: list(ids) for key, ids in answerer.answers(asked)}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_row_is_answered_as_if_alone(golden, name, batch_size):
    model, tokenizer = load(golden, name)
    asked = [*questions(model, 11)]
    expected = {q.key: generated(model, q, do_sample=False) for q in asked}
    assert ids_of(model, tokenizer, asked, batch_size) == expected
    assert ids_of(model, tokenizer, asked[::-1], batch_size) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_answers_of_one_token_make_room_for_the_next_ones(golden, batch_size):
    model, tokenizer = load(golden, "A-small")
    asked = [replace(q, max_new_tokens=1) for q in questions(model, 9)]
    expected = {q.key: generated(model, q, do_sample=False) for q in asked}
    assert ids_of(model, tokenizer, asked, batch_size) == expected


def test_attention_may_lay_its_output_out_as_on_a_gpu(golden, monkeypatch):
    model, tokenizer = load(golden, "A-small")
    asked = [*questions(model, 5)]
    expected = ids_of(model, tokenizer, asked, 3)
    attend = functional.scaled_dot_product_attention

    def as_on_a_gpu(*tensors, **settings):
        """Positions before heads in memory, as the memory-efficient kernel leaves them."""
        return attend(*tensors, **settings).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", as_on_a_gpu)
    assert ids_of(model, tokenizer, asked, 3) == expected


@pytest.mark.parametrize("full", [(), ("embed_tokens",), ("k_proj", "norm")], ids=str)
def test_rows_join_one_another_under_autocast(golden, full):
    model, tokenizer = load(golden, "A-small")
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():  # what is trained stays in float32
        if any(part in name for part in full):
            parameter.data = parameter.data.float()
    asked = [*questions(model, 9)]
    with torch.autocast("cpu", torch.bfloat16):
        found = ids_of(model, tokenizer, asked, 4)
    assert {key: len(ids) for key, ids in found.items()} == {q.key: q.max_new_tokens for q in asked}


def test_rows_end_at_an_end_token(golden):
    model, tokenizer = load(golden, "A-small")
    asked = [*questions(model, 9)]
    free = {q.key: generated(model, q, do_sample=False) for q in asked}
    ends = {free[key][len(free[key]) // 2] for key in (0, 3, 6)}
    cut = {
        key: ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
        for key, ids in free.items()
    }
    assert ids_of(model, tokenizer, asked, 4, ends=ends) == cut
    assert len({len(ids) for ids in cut.values()}) > 3


def test_the_store_grows_and_stays_no_larger_than_needed(golden, monkeypatch):
    model, tokenizer = load(golden, "B-small")
    long = [*questions(model, 5, longest=20)]
    asked = [Question(q.key, q.sample, 2 * GROWTH + 9 * q.key) for q in long]
    answerer = Answerer(model, tokenizer, 3)
    answerer.ends = set()
    capacities = []

    def noted(make):
        def made(*args, **settings):
            new = make(*args, **settings)
            # Keys and values: two, rows, heads, tokens, size of a head.
            if new.ndim == 5:
                capacities.append(new.shape[3])
            return new

        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", noted(torch.Tensor.new_zeros))
        patch.setattr(functional, "pad", noted(functional.pad))
        assert len([*answerer.answers(asked)]) == len(asked)
    most = max(capacities)
    assert min(capacities) < most
    longest = max(len(q.sample.input_ids) + q.max_new_tokens for q in asked)
    assert longest <= most + 1 <= longest + GROWTH + longest // 2
    expected = {q.key: generated(model, q, do_sample=False) for q in asked}
    assert ids_of(model, tokenizer, asked, 3) == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_prompts_begin_with_is_computed_once(golden, name):
    model, tokenizer = load(golden, name)
    system, other, counts = np.arange(10, 40), np.arange(10, 22), []
    asked = [
        Question(q.key, replace(q.sample, input_ids=np.concatenate([start, [41], q.sample.input_ids])), 12)
        for q, start in zip(questions(model, 6), (system, system, other, system, other, other), strict=True)
    ]
    positions = [len(q.sample.input_ids) for q in asked]
    apart = {}
    for q in asked:
        apart |= ids_of(model, tokenizer, [q], 1)
    q_proj = model.decoder.model.layers[0].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    assert ids_of(model, tokenizer, asked, 6) == apart
    # 30 words of the system prompts once, 12 of them also for the others; 41 follows each of both
    assert counts[0] == sum(positions) - 2 * 31 - 13 - 13 - 12
    prompts, rows = collate_prompts([q.sample for q in asked], 0), DecodingBatch(model.decoder)
    logits = rows.admit(embed_prompts(model, prompts), prompts.lengths, 6, 50)
    assert counts[-1] == sum(positions)
    shared = admit(DecodingBatch(model.decoder), model, prompts, 6, 50)
    assert (logits - shared).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`")
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 0.7, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_penalties_are_those_of_transformers(golden, penalties, batch_size):
    model, tokenizer = load(golden, "A-small")
    asked = [replace(q, max_new_tokens=24) for q in questions(model, 6)]
    expected = {q.key: generated(model, q, do_sample=False, **penalties) for q in asked}
    assert ids_of(model, tokenizer, asked, batch_size, SamplingParams(**penalties)) == expected
    # Little repeats itself by chance, so that what pulls it there is compared too.
    if penalties.get("repetition_penalty", 1) < 1:
        assert expected != {q.key: generated(model, q, do_sample=False) for q in asked}


# --- drawing -------------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_the_batch(golden):
    model, tokenizer = load(golden, "A-small")
    asked, sampling = [*questions(model, 8)], SamplingParams(temperature=1.3, top_p=0.9, seed=5)
    alone = ids_of(model, tokenizer, asked, 1, sampling)
    assert ids_of(model, tokenizer, asked[::-1], 5, sampling) == alone
    assert ids_of(model, tokenizer, asked, 5, SamplingParams(1.3, 0.9, 6)) != alone
    assert ids_of(model, tokenizer, asked, 5) != alone


@pytest.mark.parametrize("top_p", [1.0, 0.7, 1e-9])
def test_draws_follow_the_probabilities(top_p):
    """Frequencies of 20,000 draws against probabilities worked out by a plain loop."""
    logits = torch.tensor([2.0, 0.5, 1.5, -1.0, 0.0])
    chances = (logits / 0.8).softmax(-1).tolist()
    kept, mass = {}, 0.0
    for token in sorted(range(5), key=lambda i: -chances[i]):
        if mass < top_p:
            kept[token] = chances[token]
        mass += chances[token]
    sampling = SamplingParams(0.8, top_p, 3)
    sources = [sampling.generator(key) for key in range(20_000)]
    drawn = sampling.pick(logits.expand(20_000, -1), sources)
    for token in range(5):
        share = kept.get(token, 0.0) / sum(kept.values())
        assert drawn.count(token) / 20_000 == pytest.approx(share, abs=0.015)
        assert bool(drawn.count(token)) == bool(share)


# --- weights laid out once ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_laid_out_once_give_the_same_answers(golden, name):
    model, tokenizer = load(golden, name)
    asked = [*questions(model, 7)]
    prompts = collate_prompts([q.sample for q in asked], 0)
    plain = DecodingBatch(model.decoder).admit(embed_prompts(model, prompts), prompts.lengths, 7, 0)
    expected = ids_of(model, tokenizer, asked, 3)
    prepack(model)
    assert any(isinstance(module, PrepackedLinear) for module in model.modules())
    fast = DecodingBatch(model.decoder).admit(embed_prompts(model, prompts), prompts.lengths, 7, 0)
    assert (fast - plain).abs().max() < 1e-4
    assert ids_of(model, tokenizer, asked, 3) == expected


def test_where_the_operations_are_not_there_layers_stay_as_they_are(golden, monkeypatch):
    model, _ = load(golden, "A-small")
    monkeypatch.setattr(matmul, "PrepackedLinear", lambda _: torch.ops.mkldnn.no_such_operation)
    prepack(model)
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())


def test_the_shared_matrix_of_tied_embeddings_still_looks_words_up(golden):
    model, _ = load(golden, "B-small-tied")
    before = model.get_input_embeddings().weight.clone()
    prepack(model)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert isinstance(model.get_output_embeddings(), PrepackedLinear)
