"""The tables of GPU memory: the pages have them as the planner says."""

import json
import math

import pytest
import torch
from benchmarks import memory_table

from tests.support.paths import GOLDEN

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the plan depends on the GPU's free memory")


LINES = {
    "needs": [("7B", "bfloat16", 30), ("7B", "4bit", 10), ("0.6B", "bfloat16", 5)],
    "fits": [("7B", "bfloat16", 30), ("0.6B", "4bit", 5)],
}


def test_the_tables_in_the_pages_are_the_planners():
    """Whole tables take a minute: these lines stand for them."""
    for page in memory_table.PAGES:
        tables = {match[2]: match[0] for match in memory_table.REGION.finditer(page.read_text("utf-8"))}
        assert [*tables] == (["fits"] if page.name.startswith("README") else ["needs", "fits"])
        for name, table in tables.items():
            for line in LINES[name]:
                assert getattr(memory_table, f"{name}_line")(*line) in table.splitlines(), (
                    "run: python -m benchmarks.memory_table --write"
                )


def test_a_plan_holds_the_published_weights_of_the_7b():
    """Adapters of rank 32 and their optimizer's states are 1.1 GB, and a clip of 5 s needs little."""
    shapes = json.loads((GOLDEN / "tensors_7b.json").read_text(encoding="utf-8"))
    weights = 2 * sum(math.prod(shape) for shape, *_ in shapes.values()) / 1e9
    assert weights + 1.1 < memory_table.planned("7B", "bfloat16", 1, 5).total / 1e9 < weights + 2


def test_the_roofline_is_that_of_the_published_matrices():
    """Long clips are bound by products, one short clip by the memory that the weights are read from."""
    shapes = json.loads((GOLDEN / "tensors_7b.json").read_text(encoding="utf-8"))
    numbers = {
        part: sum(
            math.prod(shape)
            for name, (shape, *_) in shapes.items()
            if name.startswith(part) and len(shape) == 2
        )
        for part in ("audio_encoder.blocks.", "decoder.model.layers.")
    }
    encoder, decoder = numbers.values()
    operations = 4 * (decoder * (150 + 48) + encoder * 750)
    products, speed = 989e12 / operations, memory_table.speed
    # Beside products, their results are moved: a third of the time.
    assert 0.5 * products < speed("7B", "bfloat16", 80, 16, 30, False) < 0.7 * products
    assert 0.35 * products < speed("7B", "bfloat16", 80, 16, 30, True) < 0.5 * products
    read = 2 * 2 * (encoder + decoder) / 1555e9
    assert 0.7 / read < speed("7B", "bfloat16", 40, 1, 5, False) < 1 / read
