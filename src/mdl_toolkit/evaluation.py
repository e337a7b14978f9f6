"""Predictions against references: metric functions and a table. No model, no files."""

from collections import Counter
from collections.abc import Sequence


def accuracy(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of predictions that are the reference to the letter, white space around them aside.

    Raises:
        ValueError: there is not one prediction for each reference.
    """
    pairs = list(zip(references, predictions, strict=True))
    return sum(r.strip() == p.strip() for r, p in pairs) / max(len(pairs), 1)


def confusion_table(references: Sequence[str], predictions: Sequence[str], other: str = "?") -> str:
    """How often each reference (row) was answered with each label (column), as aligned text.

    Predictions that are no reference's label are counted under `other`.
    """
    labels = sorted(set(references))
    counts = Counter(zip(references, (p if p in labels else other for p in predictions), strict=True))
    columns = [*labels, other] if any(p == other for _, p in counts) else labels
    width = max(map(len, [*columns, *labels])) + 1
    lines = ["".join(name.rjust(width) for name in ["", *columns])]
    for label in labels:
        cells = [str(counts[label, column] or "·") for column in columns]
        lines.append(label.rjust(width) + "".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)
