"""Two runs that are to be the same but for rounding."""

import pytest
import torch

from mdl_toolkit.training.checkpoints import Checkpoint, checkpoints
from mdl_toolkit.utils.run_folder import read_log
from tests.support.runs import files_below

FIGURES = ("step", "loss", "grad_norm", "learning_rate", "rows", "eval_loss", "eval_tokens", "epoch")


def check_follows(output, one, tolerance=1e-4):
    """Losses and gradient norms of each step, evaluations, weights, and the files that are left."""
    for found, expected in zip(figures(output), figures(one), strict=True):
        assert found == pytest.approx(expected, rel=tolerance)
    adapters = [Checkpoint(checkpoints(run)[-1], {}).adapter() for run in (output, one)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.allclose(t, adapters[1][n], atol=tolerance, rtol=1e-4) for n, t in adapters[0].items())
    assert files_below(output) == files_below(one)


def figures(output):
    lines = read_log(output / "log.jsonl")
    return [{name: line[name] for name in FIGURES if name in line} for line in lines]
