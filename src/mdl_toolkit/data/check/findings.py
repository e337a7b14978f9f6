"""What `check` knows of a CSV, added up: some 60 bytes for each row, and figures made of them at the end.

The figures are plain values, as they go into the JSON; their words are in `check.text`. They depend on the
rows alone, not on the order in which workers report.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.data.check.rows import FACTS, FLAGS, Facts, Inspected, digest, prompt_texts
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import Problems, RowProblem
from mdl_toolkit.model.lengths import audio_token_count

MOST_LINES = 1_000  # of a finding that are named
MOST_TEXTS = 1_000  # distinct prompts, and answers, that are kept: a million pairs to compare
LONGEST_TEXT = 2_000  # characters of these
MOST_CLASSES = 20  # distinct answers that are taken for classes ...
LEAST_ROWS = 3  # ... if each has so many rows on average
UNBALANCED = 10  # times as many rows of one class as of another
EDGES = (0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)  # seconds
# Of a row in a converted dataset beside recording and ids: five offsets, the word `flac`, scale and length.
ROW_BYTES = 5 * 4 + 4 + 4 + 8
ID_BYTES = 2 * 4  # of a position: id and label

Figures = dict[str, Any]
Numbers = NDArray[Any]


@dataclass
class _Texts:
    """Distinct texts in the order of the rows, of which the first ones are kept."""

    known: dict[int, str] = field(default_factory=dict)
    is_full: bool = False

    def see(self, number: int, text: str) -> None:
        if number not in self.known:
            if len(self.known) < MOST_TEXTS:
                self.known[number] = text[:LONGEST_TEXT]
            else:
                self.is_full = True


@dataclass
class Findings:
    """Collect all that is noted of one CSV.

    Attributes:
        path: the file.
        role: `training`, `evaluation` or `inference`.
        problems: rows that cannot be used.
        bad: their lines.
    """

    path: str
    role: str
    problems: Problems = field(default_factory=Problems)
    bad: "array[int]" = field(default_factory=lambda: array("q"))
    _facts: bytearray = field(default_factory=bytearray)
    _sources: Counter[tuple[str, str]] = field(default_factory=Counter)
    _answers: _Texts = field(default_factory=_Texts)
    _prompts: _Texts = field(default_factory=_Texts)

    def see(self, row: Row) -> None:
        """Note the words of a row; rows come in their order."""
        self._prompts.see(digest(*prompt_texts(row)), " | ".join(filter(None, prompt_texts(row))))
        if row.prediction is not None:
            self._answers.see(digest(row.prediction), row.prediction)

    def add(self, found: Inspected) -> None:
        """Note what came of some rows; they come in any order."""
        self._facts += found.facts.tobytes()
        self._sources.update(found.sources)
        for problem in found.problems:
            self.reject(problem)

    def reject(self, problem: RowProblem) -> None:
        """Note a row that cannot be used."""
        self.problems.add(problem)
        if not self.bad or self.bad[-1] != problem.line:
            self.bad.append(problem.line)

    @property
    def rows(self) -> int:
        """Return how many usable rows there are so far."""
        return len(self._facts) // FACTS.itemsize

    def facts(self) -> Facts:
        """Return the facts of all usable rows, in their order, `[rows]` of `FACTS`."""
        facts = np.frombuffer(self._facts, FACTS)
        return facts[np.argsort(facts["line"], kind="stable")]

    def figures(self, learnt: Facts | None, max_length: int | None) -> Figures:
        """Return all figures of this file.

        Args:
            learnt: the training rows, for a file of another role.
            max_length: tokens of a row above which it is warned of.
        """
        facts = self.facts()
        positions = audio_tokens(facts) + facts["text"]
        figures: Figures = {"path": self.path, "role": self.role, "rows": len(facts), "bad": self._bad()}
        figures |= self._amounts(facts, positions)
        found = [*_flagged(facts), *_too_long(facts, positions, max_length), *_repeated(facts)]
        if self.role != "inference":
            figures["answers"] = self._balance(facts)
            found += [*_contradictions(facts), *_of_answers(figures["answers"], len(facts))]
        if learnt is not None:
            found += _leaks(facts, learnt)
        return {**figures, "findings": [*found, *self._near_prompts(facts)]}

    def _amounts(self, facts: Facts, positions: Numbers) -> Figures:
        seconds = facts["samples"] / SAMPLE_RATE
        return {
            "seconds": float(seconds.sum()),
            **{name: self._counts(name) for name in ("rates", "channels", "formats")},
            "lengths": _histogram(seconds),
            "audio_tokens": _spread(positions - facts["text"]),
            "text": _spread(facts["text"]),
            "disk_bytes": int((facts["stored"] + ROW_BYTES + ID_BYTES * positions).sum()),
        }

    def _bad(self) -> Figures:
        lines = sorted(set(self.bad))
        first = [problem.to_json() for problem in self.problems.first]
        return {"rows": len(lines), "lines": lines, "problems": self.problems.count, "first": first}

    def _counts(self, name: str) -> dict[str, int]:
        counts = {value: count for (kind, value), count in self._sources.items() if kind == name}
        return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))

    def _balance(self, facts: Facts) -> Figures:
        """Count the distinct answers; and, of few, the rows that each has."""
        numbers, counts = np.unique(facts["answer"], return_counts=True)
        classes: list[tuple[str, int]] = []
        if len(numbers) <= MOST_CLASSES and len(facts) >= LEAST_ROWS * len(numbers):
            pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
            named = [(self._answers.known.get(number, "..."), count) for number, count in pairs]
            classes = sorted(named, key=lambda each: (-each[1], each[0]))
        return {"distinct": len(numbers), "classes": [[*each] for each in classes]}

    def _near_prompts(self, facts: Facts) -> list[Figures]:
        """Find distinct prompts that differ in one letter; the rows counted are those of the rarer ones."""
        numbers, places, counts = np.unique(facts["prompt"], return_index=True, return_counts=True)
        used = {number: place for place, number in enumerate(numbers.tolist())}
        known: dict[str, int] = {}  # white space around them is another finding
        for number, text in self._prompts.known.items():
            if number in used:
                known.setdefault(text.strip(), used[number])
        pairs: list[Figures] = [
            {"prompts": [*pair], "rows": [int(counts[known[text]]) for text in pair],
             "lines": [int(facts["line"][places[known[text]]]) for text in pair]}
            for pair in _one_letter_apart([*known])
        ]  # fmt: skip
        rows = sum(min(pair["rows"]) for pair in pairs)
        more = {"pairs": pairs[:MOST_LINES], "is_complete": not self._prompts.is_full}
        return [{"name": "near_prompts", "rows": rows, **more}] if pairs else []


# --- figures -------------------------------------------------------------------------------------------


def audio_tokens(facts: Facts) -> Numbers:
    """Count the audio tokens of every row, `[rows]`."""
    return np.fromiter(map(audio_token_count, facts["samples"].tolist()), np.int64, len(facts))


def _spread(values: Numbers) -> Figures:
    """Return median, 95 % (nearest rank) and maximum."""
    if not len(values):
        return {"median": 0, "p95": 0, "max": 0}
    ranks = np.percentile(values, [50, 95, 100], method="inverted_cdf")
    return dict(zip(("median", "p95", "max"), map(int, ranks), strict=True))


def _histogram(seconds: Numbers) -> Figures:
    """Count the rows between each two edges, and those beyond the last one."""
    counts = np.bincount(np.searchsorted(EDGES, seconds, side="right"), minlength=len(EDGES) + 1)
    spread = {"shortest": float(seconds.min()), "longest": float(seconds.max())} if len(seconds) else {}
    return {"below_seconds": [*EDGES, None], "rows": counts.tolist(), **spread}


def finding(name: str, lines: Numbers, details: Numbers | None = None) -> list[Figures]:
    """Return a finding with the lines of its rows, and perhaps a figure for each; nothing without rows."""
    if not len(lines):
        return []
    more = {} if details is None else {"details": details[:MOST_LINES].tolist()}
    return [{"name": name, "rows": len(lines), "lines": lines[:MOST_LINES].tolist(), **more}]


def _flagged(facts: Facts) -> list[Figures]:
    found = []
    for name, bit in FLAGS.items():
        rows = facts[facts["flags"] & bit > 0]
        shares = np.round(rows["full_scale"].astype(float), 4) if name == "clipped" else None
        found += finding(name, rows["line"], shares)
    return found


def _too_long(facts: Facts, positions: Numbers, max_length: int | None) -> list[Figures]:
    is_long = positions > (max_length or np.inf)
    return finding("too_long", facts["line"][is_long], positions[is_long])


def _mixed(facts: Facts, *names: str) -> Numbers:
    """Combine several digests, with odd multipliers, so that none cancels another."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    total = np.zeros(len(facts), np.uint64)
    for name in names:
        total = (total ^ facts[name]) * odd
    return total


def _first(keys: Numbers) -> Numbers:
    """Find for every row the first one with the same key, `[rows]`."""
    _, places, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found: Numbers = places[inverse]
    return found


def _repeated(facts: Facts) -> list[Figures]:
    """Find rows whose recording an earlier row has too: with the same texts, or under another prompt."""
    rows = np.arange(len(facts))
    same, asked, heard = (
        _first(_mixed(facts, *names))
        for names in (("clip", "prompt", "answer"), ("clip", "prompt"), ("clip",))
    )
    again, elsewhere = same < rows, (heard < rows) & (asked == rows)
    return [
        *finding("duplicate", facts["line"][again], facts["line"][same[again]]),
        *finding("other_prompt", facts["line"][elsewhere], facts["line"][heard[elsewhere]]),
    ]


def _contradictions(facts: Facts) -> list[Figures]:
    """Find rows with the recording and the prompt of an earlier row, and another answer."""
    first = _first(_mixed(facts, "clip", "prompt"))
    other = facts["answer"] != facts["answer"][first]
    return finding("contradiction", facts["line"][other], facts["line"][first[other]])


def _of_answers(answers: Figures, rows: int) -> list[Figures]:
    counts = [count for _, count in answers["classes"]]
    if answers["distinct"] == 1 and rows > 1:
        return [{"name": "identical_answers", "rows": rows}]
    if counts and max(counts) >= UNBALANCED * min(counts):
        return [{"name": "unbalanced", "rows": max(counts)}]
    return []


def _leaks(facts: Facts, learnt: Facts) -> list[Figures]:
    """Find rows whose recording is also trained on, with the same texts or others; or whose answer alone is.

    The last says something where answers are texts, not classes: where more than half of those to be learnt
    are different.
    """
    heard, same = (
        _line_in(_mixed(facts, *names), _mixed(learnt, *names), learnt["line"])
        for names in (("clip",), ("clip", "prompt", "answer"))
    )
    other = (heard > 0) & (same == 0)
    said = _line_in(facts["answer"], learnt["answer"], learnt["line"])
    are_texts = 2 * len(np.unique(learnt["answer"])) > len(learnt)
    read = (said > 0) & (heard == 0) & are_texts
    return [
        *finding("leak", facts["line"][same > 0], same[same > 0]),
        *finding("leak_other_text", facts["line"][other], heard[other]),
        *finding("same_text", facts["line"][read], said[read]),
    ]


def _line_in(keys: Numbers, known: Numbers, lines: Numbers) -> Numbers:
    """Return for every key the line of the first row that has it, 0 where none has."""
    values, first = np.unique(known, return_index=True)
    if not len(values):
        return np.zeros(len(keys), np.int64)
    places = np.searchsorted(values, keys).clip(max=len(values) - 1)
    return np.where(values[places] == keys, lines[first][places], 0)


def _one_letter_apart(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Find pairs of texts that differ in one character which is no digit, as numbered prompts do."""
    from rapidfuzz.distance import Levenshtein

    found = []
    for place, two in enumerate(texts):
        for one in texts[:place]:
            if abs(len(one) - len(two)) > 1 or Levenshtein.distance(one, two, score_cutoff=1) != 1:
                continue
            (edit,) = Levenshtein.editops(one, two)
            letters = ("" if edit.tag == "insert" else one[edit.src_pos]) + (
                "" if edit.tag == "delete" else two[edit.dest_pos]
            )
            if not letters.isdigit():
                found.append((one, two))
    return found
