"""The findings of `check` on one CSV: some 90 bytes a row, and figures made of these at the end.

The figures are plain values, as they go into the JSON; `check.text` puts them into words. They depend on the
rows alone, not on the order in which workers report.
"""

import dataclasses
import itertools
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.audio.loading import SAMPLE_RATE
from mdl_toolkit.data.check.copies import find_copies
from mdl_toolkit.data.check.rows import FACTS, FLAGS, Facts, Inspected, digest, prompt_texts
from mdl_toolkit.data.manifest import Manifest, Row
from mdl_toolkit.errors import Problems, RowProblem
from mdl_toolkit.model.constants import MEASURED_SECONDS
from mdl_toolkit.model.lengths import audio_token_count

# Lines that are named of a finding.
MOST_LINES = 1_000
# Distinct prompts, and answers, that are kept (a million pairs to compare), and characters of each.
MOST_TEXTS = 1_000
LONGEST_TEXT = 2_000
# Distinct answers that are taken for classes, if each has so many rows on average.
MOST_CLASSES = 20
LEAST_ROWS = 3
# Classes are unbalanced if one has so many times the rows of another.
UNBALANCED = 10
# Seconds that two segments must have in common to share sound: their times may be rounded.
LEAST_OVERLAP = 0.05
# Edges of the histogram of lengths, in seconds.
EDGES = (0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
# Bytes of a row in a converted dataset without recording and ids: offsets, the word `flac`, scale, length,
# checksum, line.
ROW_BYTES = 5 * 4 + 4 + 4 + 8 + 4 + 8
# Bytes of a token in a converted dataset: id and label.
TOKEN_BYTES = 2 * 4

Figures = dict[str, Any]
Numbers = NDArray[Any]


@dataclass
class Findings:
    """Hold all that is noted of one CSV.

    Attributes:
        path: the file.
        role: `training`, `evaluation` or `inference`.
        problems: of the rows that cannot be used.
        bad_lines: the lines of these rows; a line may come twice.
    """

    path: str
    role: str
    problems: Problems = field(default_factory=Problems)
    bad_lines: "array[int]" = field(default_factory=lambda: array("q"))
    _facts: bytearray = field(default_factory=bytearray)
    _sources: Counter[tuple[str, str]] = field(default_factory=Counter)
    # Distinct texts by digest, in the order of the rows; only the first ones are kept.
    _answers: dict[int, str] = field(default_factory=dict)
    _prompts: dict[int, str] = field(default_factory=dict)

    def readable_rows(self, manifest: Manifest) -> Iterator[Row]:
        """Yield the rows whose recordings are to be inspected; note their texts, and problems of others."""
        for item in manifest:
            if isinstance(item, RowProblem):
                self.reject(item)
                continue
            answer = None if self.role == "inference" else item.prediction
            row = dataclasses.replace(item, cells=(), prediction=answer)
            prompts = prompt_texts(row)
            if len(self._prompts) < MOST_TEXTS:
                self._prompts.setdefault(digest(*prompts), " | ".join(filter(None, prompts))[:LONGEST_TEXT])
            if answer is not None and len(self._answers) < MOST_TEXTS:
                self._answers.setdefault(digest(answer), answer[:LONGEST_TEXT])
            yield row

    def add(self, inspected: Inspected) -> None:
        """Add the facts and problems of inspected rows, which come in any order."""
        self._facts += inspected.facts.tobytes()
        self._sources.update(inspected.sources)
        for problem in inspected.problems:
            self.reject(problem)

    def reject(self, problem: RowProblem) -> None:
        """Note a row that cannot be used."""
        self.problems.add(problem)
        if not self.bad_lines or self.bad_lines[-1] != problem.line:
            self.bad_lines.append(problem.line)

    @property
    def rows(self) -> int:
        """Return how many usable rows there are so far."""
        return len(self._facts) // FACTS.itemsize

    def facts(self) -> Facts:
        """Return the facts of all usable rows in their order, `[rows]` of `FACTS`."""
        facts = np.frombuffer(self._facts, FACTS)
        return facts[np.argsort(facts["line"], kind="stable")]

    def figures(self, trained: Facts | None, max_length: int | None) -> Figures:
        """Return the amounts of this file and the findings on it.

        Args:
            trained: facts of the training rows, for a file of another role.
            max_length: tokens of a row beyond which there is a warning.
        """
        facts = self.facts()
        tokens = audio_tokens(facts) + facts["text"]
        bad_lines = sorted(set(self.bad_lines))
        first = [problem.to_json() for problem in self.problems.first]
        bad = {"rows": len(bad_lines), "lines": bad_lines, "problems": self.problems.count, "first": first}
        figures: Figures = {"path": self.path, "role": self.role, "rows": len(facts), "bad": bad}
        figures |= self._amounts(facts, tokens)
        findings: list[Figures] = []
        for name, bit in FLAGS.items():
            rows = facts[facts["flags"] & bit > 0]
            shares = np.round(rows["full_scale"].astype(float), 4) if name == "clipped" else None
            findings += finding(name, rows["line"], shares)
        is_long = tokens > (max_length or np.inf)
        findings += finding("too_long", facts["line"][is_long], tokens[is_long])
        long = facts[facts["samples"] > MEASURED_SECONDS * SAMPLE_RATE]
        findings += finding("long", long["line"], np.round(long["samples"] / SAMPLE_RATE, 1))
        findings += _repeated(facts)
        findings += finding("copy", *find_copies(facts))
        if self.role != "inference":
            figures["answers"], unbalanced = self._class_balance(facts)
            findings += unbalanced
            if not are_texts(facts):
                findings += self._near_answers(facts)
        if trained is not None:
            findings += _leaks(facts, trained)
        return {**figures, "findings": [*findings, *self._near_prompts(facts)]}

    def _amounts(self, facts: Facts, tokens: Numbers) -> Figures:
        """Return lengths, sources, tokens and size on disk of all rows together."""
        seconds = facts["samples"] / SAMPLE_RATE
        # Rows that last less than each edge (and not less than the one before), and those that last longer.
        rows = np.bincount(np.searchsorted(EDGES, seconds, side="right"), minlength=len(EDGES) + 1)
        lengths: Figures = {"below_seconds": [*EDGES, None], "rows": rows.tolist()}
        if len(seconds):
            lengths |= {"shortest": float(seconds.min()), "longest": float(seconds.max())}
        sources: dict[str, dict[str, int]] = {"rates": {}, "channels": {}, "formats": {}}
        for (name, value), count in sorted(self._sources.items(), key=lambda item: (-item[1], item[0])):
            sources[name][value] = count
        return {
            "seconds": float(seconds.sum()),
            **sources,
            "lengths": lengths,
            "audio_tokens": _spread(tokens - facts["text"]),
            "text": _spread(facts["text"]),
            "disk_bytes": int((facts["stored"] + ROW_BYTES + TOKEN_BYTES * tokens).sum()),
        }

    def _class_balance(self, facts: Facts) -> tuple[Figures, list[Figures]]:
        """Count the distinct answers and, if they are classes, the rows of each; find what is unbalanced."""
        digests, counts = np.unique(facts["answer"], return_counts=True)
        classes: list[tuple[str, int]] = []
        if len(digests) <= MOST_CLASSES and len(facts) >= LEAST_ROWS * len(digests):
            pairs = zip(digests.tolist(), counts.tolist(), strict=True)
            named = [(self._answers.get(number, "..."), count) for number, count in pairs]
            classes = sorted(named, key=lambda item: (-item[1], item[0]))
        answers = {"distinct": len(digests), "classes": [[*item] for item in classes]}
        if len(digests) == 1 and len(facts) > 1:
            return answers, [{"name": "identical_answers", "rows": len(facts)}]
        if classes and classes[0][1] >= UNBALANCED * classes[-1][1]:
            ends = [[*classes[0]], [*classes[-1]]]
            return answers, [{"name": "unbalanced", "rows": classes[0][1], "answers": ends}]
        return answers, []

    def _near_answers(self, facts: Facts) -> list[Figures]:
        """Find pairs of answers that differ in case, white space or full-width forms alone."""
        digests, first_rows, counts = np.unique(facts["answer"], return_index=True, return_counts=True)
        index_of = {number: index for index, number in enumerate(digests.tolist())}
        seen: dict[str, tuple[str, int]] = {}
        pairs: list[Figures] = []
        for number, text in self._answers.items():
            if number not in index_of:
                continue
            plain = "".join(unicodedata.normalize("NFKC", text).casefold().split())
            first, other = seen.setdefault(plain, (text, index_of[number]))
            # White space around answers is another finding.
            if first.strip() != text.strip():
                indices = [other, index_of[number]]
                lines = facts["line"][first_rows[indices]].tolist()
                pairs.append({"answers": [first, text], "rows": counts[indices].tolist(), "lines": lines})
        rows = sum(min(pair["rows"]) for pair in pairs)
        return [{"name": "near_answers", "rows": rows, "pairs": pairs}] if pairs else []

    def _near_prompts(self, facts: Facts) -> list[Figures]:
        """Find pairs of prompts that differ in one letter; their rows are those of the rarer ones."""
        from rapidfuzz.distance import Levenshtein

        digests, first_rows, counts = np.unique(facts["prompt"], return_index=True, return_counts=True)
        index_of = {number: index for index, number in enumerate(digests.tolist())}
        # White space around prompts is another finding.
        prompts: dict[str, int] = {}
        for number, text in self._prompts.items():
            if number in index_of:
                prompts.setdefault(text.strip(), index_of[number])
        pairs: list[Figures] = []
        for one, two in itertools.combinations(prompts, 2):
            if Levenshtein.distance(one, two, score_cutoff=1) != 1:
                continue
            (edit,) = Levenshtein.editops(one, two)
            removed = "" if edit.tag == "insert" else one[edit.src_pos]
            added = "" if edit.tag == "delete" else two[edit.dest_pos]
            # Numbered prompts are meant to differ.
            if not (removed + added).isdigit():
                indices = [prompts[one], prompts[two]]
                lines = facts["line"][first_rows[indices]].tolist()
                pairs.append({"prompts": [one, two], "rows": counts[indices].tolist(), "lines": lines})
        rows = sum(min(pair["rows"]) for pair in pairs)
        return [{"name": "near_prompts", "rows": rows, "pairs": pairs[:MOST_LINES]}] if pairs else []


def audio_tokens(facts: Facts) -> Numbers:
    """Return the number of audio tokens of every row, `[rows]`."""
    return np.fromiter(map(audio_token_count, facts["samples"].tolist()), np.int64, len(facts))


def _spread(values: Numbers) -> Figures:
    """Return median, 95th percentile (both by nearest rank) and maximum."""
    if not len(values):
        return {"median": 0, "p95": 0, "max": 0}
    ranks = np.percentile(values, [50, 95, 100], method="inverted_cdf")
    return dict(zip(("median", "p95", "max"), map(int, ranks), strict=True))


def finding(name: str, lines: Numbers, details: Numbers | None = None) -> list[Figures]:
    """Return a finding with the lines of its rows, and perhaps a figure for each; nothing without rows."""
    if not len(lines):
        return []
    more = {} if details is None else {"details": details[:MOST_LINES].tolist()}
    return [{"name": name, "rows": len(lines), "lines": lines[:MOST_LINES].tolist(), **more}]


def _mixed(facts: Facts, *names: str) -> Numbers:
    """Combine several digests into one: with odd multipliers, so that none cancels another."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    total = np.zeros(len(facts), np.uint64)
    for name in names:
        total = (total ^ facts[name]) * odd
    return total


def _repeated(facts: Facts) -> list[Figures]:
    """Find rows whose recording an earlier row has too: with the same, or another, prompt or answer."""
    rows = np.arange(len(facts))
    # For every row the first one that has the same.
    firsts: list[Numbers] = []
    for names in (("clip", "prompt", "answer"), ("clip", "prompt"), ("clip",)):
        _, indices, inverse = np.unique(_mixed(facts, *names), return_index=True, return_inverse=True)
        firsts.append(indices[inverse])
    same_row, same_prompt, same_clip = firsts
    lines, is_duplicate = facts["line"], same_row < rows
    has_other_prompt = (same_clip < rows) & (same_prompt == rows)
    has_other_answer = facts["answer"] != facts["answer"][same_prompt]
    return [
        *finding("duplicate", lines[is_duplicate], lines[same_row[is_duplicate]]),
        *finding("other_prompt", lines[has_other_prompt], lines[same_clip[has_other_prompt]]),
        *finding("contradiction", lines[has_other_answer], lines[same_prompt[has_other_answer]]),
    ]


def _leaks(facts: Facts, trained: Facts) -> list[Figures]:
    """Find rows whose recording is also trained on, with the same texts or others, or whose answer alone is.

    The latter tells something of texts; of classes, an answer that is not trained on does.
    """
    clip_line, same_line = (
        _line_of(_mixed(facts, *names), _mixed(trained, *names), trained["line"])
        for names in (("clip",), ("clip", "prompt", "answer"))
    )
    answer_line = _line_of(facts["answer"], trained["answer"], trained["line"])
    are_transcripts = are_texts(trained)
    overlap_line, recording_line = _shared_recordings(facts, trained)
    overlaps = (overlap_line > 0) & (clip_line == 0)
    shares = (recording_line > 0) & (overlap_line == 0) & (clip_line == 0)
    is_leak, has_other_text = same_line > 0, (clip_line > 0) & (same_line == 0)
    has_same_answer = (answer_line > 0) & (clip_line == 0) & are_transcripts
    lines = facts["line"]
    return [
        *finding("leak", lines[is_leak], same_line[is_leak]),
        *finding("leak_other_text", lines[has_other_text], clip_line[has_other_text]),
        *finding("leak_overlap", lines[overlaps], overlap_line[overlaps]),
        *finding("same_recording", lines[shares], recording_line[shares]),
        *finding("same_text", lines[has_same_answer], answer_line[has_same_answer]),
        *finding("unseen_answer", lines[(answer_line == 0) & (not are_transcripts)]),
        *finding("leak_copy", *find_copies(facts, trained)),
    ]


def are_texts(facts: Facts) -> bool:
    """Tell whether answers are texts rather than classes: more than half of them are different."""
    return 2 * len(np.unique(facts["answer"])) > len(facts)


def _shared_recordings(facts: Facts, trained: Facts) -> tuple[Numbers, Numbers]:
    """Return for every row a training row with some of the same sound, and one of the same recording.

    Returns:
        Their lines, 0 where there is none, each `[rows]`.
    """
    overlap_line, recording_line = np.zeros((2, len(facts)), np.int64)
    indices: dict[int, list[int]] = {}
    for index in np.flatnonzero(np.isin(trained["recording"], facts["recording"])).tolist():
        indices.setdefault(int(trained["recording"][index]), []).append(index)
    by_recording = {recording: trained[theirs] for recording, theirs in indices.items()}
    for row, recording in enumerate(facts["recording"].tolist()):
        if recording not in by_recording:
            continue
        theirs, one = by_recording[recording], facts[row]
        recording_line[row] = theirs["line"][0]
        together = np.minimum(theirs["end"], one["end"]) - np.maximum(theirs["start"], one["start"])
        can_hear = (one["channel"] == 0) | (theirs["channel"] == 0) | (theirs["channel"] == one["channel"])
        if (shared := theirs["line"][(together > LEAST_OVERLAP) & can_hear]).size:
            overlap_line[row] = shared[0]
    return overlap_line, recording_line


def _line_of(keys: Numbers, trained_keys: Numbers, lines: Numbers) -> Numbers:
    """Return for every key the line of the first training row that has it, 0 where none has, `[keys]`."""
    values, first_rows = np.unique(trained_keys, return_index=True)
    if not len(values):
        return np.zeros(len(keys), np.int64)
    indices = np.searchsorted(values, keys).clip(max=len(values) - 1)
    return np.where(values[indices] == keys, lines[first_rows][indices], 0)
