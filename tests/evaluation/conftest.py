"""Files to evaluate."""

import pytest

from tests.support.runs import write_csv
from tests.support.scoring import TEXTS


@pytest.fixture
def place(tmp_path):
    """Predictions and references of four texts, in different orders."""
    write_csv(tmp_path / "p.csv", [{"audio": a, "prediction": p, "speaker": s} for a, _, p, _, s in TEXTS])
    write_csv(
        tmp_path / "r.csv", [{"audio": a, "prediction": r, "language": x} for a, r, _, x, _ in TEXTS[::-1]]
    )
    return tmp_path
