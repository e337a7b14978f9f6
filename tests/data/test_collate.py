"""Samples to batches, and batches to parts."""

import numpy as np
import pytest
import torch

from mdl_toolkit.data.collate import Collator, items_of, pin_batch, split
from mdl_toolkit.data.dataset import Sample

LENGTHS = [(12, 9_000), (5, 16_000), (9, 3_200), (12, 4_000), (7, 33_000)]  # positions, samples


@pytest.fixture
def samples() -> list[Sample]:
    random = np.random.default_rng(0)
    made = []
    for positions, samples in LENGTHS:
        ids = random.integers(0, 400, positions).astype(np.int32)
        labels = np.where(np.arange(positions) < positions - 3, -100, ids).astype(np.int32)
        made.append(Sample(ids, labels, random.normal(0, 0.1, samples).astype(np.float32)))
    return made


def test_a_batch_that_cannot_be_pinned_stays_as_it_is(samples, monkeypatch):
    """A lack of pinned memory is none of the GPU's, which fewer rows at once would help."""

    def fail(_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", fail)
    batch = Collator(7)(samples)
    assert pin_batch(batch) is batch


def test_text_is_padded_on_the_left_and_audio_on_the_right(samples):
    batch = Collator(7)(samples)
    for row, sample in enumerate(samples):
        width, length = len(sample.input_ids), len(sample.waveform)
        assert batch["input_ids"][row, -width:].tolist() == sample.input_ids.tolist()
        assert set(batch["input_ids"][row, :-width].tolist()) <= {7}
        assert batch["attention_mask"][row].tolist() == [0] * (12 - width) + [1] * width
        assert batch["labels"][row].tolist() == [-100] * (12 - width) + sample.labels.tolist()
        assert torch.equal(batch["input_values"][row, :length], torch.from_numpy(sample.waveform))
        assert not batch["input_values"][row, length:].any()
    assert batch["audio_length"].tolist() == [samples for _, samples in LENGTHS]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
def test_parts_are_what_the_collator_makes_of_their_rows(samples, most):
    parts = list(split(Collator(7)(samples), most))
    wanted = [Collator(7)(samples[start : start + most]) for start in range(0, len(samples), most)]
    assert len(parts) == len(wanted)
    for part, expected in zip(parts, wanted, strict=True):
        for name, tensor in items_of(part):
            assert torch.equal(tensor, dict(items_of(expected))[name]), name
