"""The tables of GPU memory: the pages have them as the planner says."""

import json
import math

import pytest
import torch
from benchmarks import memory_table

from tests.support.paths import GOLDEN

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the plan depends on the GPU's free memory")


@pytest.mark.slow
def test_the_tables_in_the_pages_are_the_planners():
    for page in memory_table.PAGES:
        text = page.read_text(encoding="utf-8")
        language = "zh" if ".zh." in page.name else "en"
        names = [match[2] for match in memory_table.REGION.finditer(text)]
        assert names == (["fits"] if page.name.startswith("README") else ["needs", "fits"])
        assert text == memory_table.refreshed(text, language), (
            "run: python -m benchmarks.memory_table --write"
        )


@pytest.mark.parametrize(
    ("model", "form", "seconds"), [("7B", "bfloat16", 30), ("7B", "4bit", 10), ("0.6B", "bfloat16", 5)]
)
def test_a_line_of_the_table_is_the_planners(model, form, seconds):
    figures = [memory_table.planned(model, form, batch, seconds) for batch in memory_table.SHOWN]
    line = f"| {model} | {form} | {seconds} s | " + " | ".join(f"{each:.1f} GB" for each in figures) + " |\n"
    for page in memory_table.PAGES:
        assert (line in page.read_text(encoding="utf-8")) is (page.parent.name == "docs")


def test_a_plan_holds_the_published_weights_of_the_7b():
    """Adapters of rank 32 and their optimizer's states are 1.1 GB, and a clip of 5 s needs little."""
    shapes = json.loads((GOLDEN / "tensors_7b.json").read_text(encoding="utf-8"))
    weights = 2 * sum(math.prod(shape) for shape, *_ in shapes.values()) / 1e9
    assert weights + 1.1 < memory_table.planned("7B", "bfloat16", 1, 5) < weights + 2
