"""The facts that `check` notes of each row, in a worker process: as many bytes for every row."""

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.audio.flac import pack_audio
from mdl_toolkit.audio.loading import SAMPLE_RATE, Clip
from mdl_toolkit.audio.urls import is_url
from mdl_toolkit.data.check.copies import fingerprint
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.data.open_audio import Recordings
from mdl_toolkit.data.tokenization import IGNORE_INDEX, ChatTokenizer
from mdl_toolkit.errors import RowProblem, naming_row
from mdl_toolkit.i18n import Localized
from mdl_toolkit.model.lengths import audio_token_count

# Samples of 20 ms, over which loudness is measured.
FRAME = SAMPLE_RATE // 50
# -50 dBFS, root mean square: the noise of a quiet room with a close microphone.
AUDIBLE = 10 ** (-50 / 20)
# A clip is nearly empty if a smaller share of its frames is audible.
LEAST_AUDIBLE = 0.05
# What a spreadsheet takes for a number or a day, and may write as another text.
NUMBER = re.compile(r"[+-]?(\d[\d,]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
DAY = re.compile(r"\d{1,4}[-/]\d{1,2}([-/]\d{1,4})?")
# What Excel has made of another text: a day, an error, a truth value, a long number.
MONTH = "(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
EXCEL = re.compile(
    rf"\d{{1,2}}月\d{{1,2}}日|\d{{1,2}}-{MONTH}(-\d\d)?|{MONTH}-\d\d|TRUE|FALSE|-?\d(\.\d+)?E[+-]\d\d+"
    r"|#(NAME\?|VALUE!|REF!|DIV/0!|NUM!|NULL!|N/A)|#{3,}"
)
# What other models' prompts have in the recording's place; here it is put there anyway.
AUDIO_MARK = re.compile(r"<\|?/?(audio|sound|speech|wav)[\w ]*\|?>", re.IGNORECASE)
# Below this share of samples at full scale nobody hears that a recording is clipped.
LEAST_CLIPPED = 0.001
# What it runs; a number with a sign, a list item or a name with @ before it is not meant.
FORMULA = re.compile(r"\s*(=|[@+-].*[(|!])")
# Digits that a spreadsheet keeps of a number.
DIGITS = 15

# One row. Three digests stand for the stored recording, the prompts and the answer; `text` counts what is no
# audio, in tokens or, without a tokenizer, in characters; `stored` is bytes of the recording; `recording` is
# a digest of its path or address, and the row has `start` to `end` (seconds) of `channel`, 0 for all; `shape`
# is the fingerprint that copies share.
FACTS = np.dtype(
    [
        ("line", "<i8"), ("clip", "<u8"), ("prompt", "<u8"), ("answer", "<u8"), ("samples", "<i8"),
        ("text", "<i4"), ("supervised", "<i4"), ("stored", "<i4"), ("full_scale", "<f4"), ("flags", "<u2"),
        ("recording", "<u8"), ("start", "<f8"), ("end", "<f8"), ("channel", "<u2"), ("shape", "<u8"),
    ]
)  # fmt: skip
Facts = NDArray[Any]

# Bits of `flags`.
FLAGS = {
    name: 1 << bit
    for bit, name in enumerate(
        (
            "silent", "nearly_empty", "clipped", "padded", "truncated", "empty_answer", "number_answer",
            "space_answer", "space_prompt", "cancelled", "no_length", "formula", "excel_answer",
            "mark_prompt",
        )
    )
}  # fmt: skip


@dataclass
class Inspected:
    """Hold the facts and problems of some rows.

    Attributes:
        facts: of the usable ones, `[rows]` of `FACTS`.
        problems: of the others.
        sources: how often each rate (Hz), number of channels and format came.
    """

    facts: Facts
    problems: list[RowProblem] = field(default_factory=list)
    sources: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Return how many rows there are, usable or not."""
        return len(self.facts) + len({problem.line for problem in self.problems})


@dataclass(frozen=True)
class Inspection:
    """Inspect rows in a worker process.

    Attributes:
        recordings: opens them.
        tokenizer: the model's tokenizer and template; None counts characters.
        with_answer: for training; otherwise prompts alone.
        limit: tokens that leave a row unusable; None is no limit.
        rows_per_step: rows of a report.
    """

    recordings: Recordings
    tokenizer: ChatTokenizer | None
    with_answer: bool
    limit: int | None
    rows_per_step: int

    def __call__(self, rows: list[Row]) -> Iterator[Inspected]:
        """Decode and encode the rows, and yield their facts and problems."""
        clips = self.recordings.clips(rows)
        while group := list(itertools.islice(clips, self.rows_per_step)):
            facts, inspected = [], Inspected(np.zeros(0, FACTS))
            for row, clip in group:
                with naming_row(row.line, row.shown):
                    noted = clip if isinstance(clip, RowProblem) else self._facts(row, clip)
                if isinstance(noted, RowProblem):
                    inspected.problems.append(noted)
                elif isinstance(clip, Clip):
                    facts.append(noted)
                    inspected.sources["rates", str(clip.source_rate)] += 1
                    inspected.sources["channels", str(clip.channels)] += 1
                    inspected.sources["formats", clip.format] += 1
            inspected.facts = np.array(facts, FACTS)
            yield inspected

    def _facts(self, row: Row, clip: Clip) -> tuple[Any, ...] | RowProblem:
        """Return the facts of one row in the order of `FACTS`, or its problem."""
        audio = audio_token_count(len(clip.samples))
        if self.tokenizer is None:
            supervised = len(row.prediction or "") if self.with_answer else 0
            text = len("".join(prompt_texts(row))) + supervised
        else:
            tokens = self.tokenizer.encode_row(row, audio, with_answer=self.with_answer)
            text = len(tokens.input_ids) - audio
            supervised = int(np.count_nonzero(tokens.labels != IGNORE_INDEX))
        if self.limit is not None and audio + text >= self.limit:
            return RowProblem(row.line, "audio", row.shown, too_long(audio + text, self.limit))
        packed = pack_audio(clip.stored, clip.stored_rate, len(clip.samples))
        clip_digest = digest(packed.data, str(packed.scale), str(packed.length))
        digests = clip_digest, digest(*prompt_texts(row)), digest(row.prediction or "")
        counts = packed.length, text, supervised, len(packed.data)
        source = row.audio if is_url(row.audio) else os.path.realpath(row.audio)
        start, channel = row.segment.start, row.segment.channel or 0
        part = digest(source), start, start + clip.source_seconds, channel
        flags = _flags(row, clip)
        shape = 0 if flags & (FLAGS["silent"] | FLAGS["nearly_empty"]) else fingerprint(clip.samples)
        return (row.line, *digests, *counts, clip.full_scale, flags, *part, shape)


def too_long(length: int, limit: int) -> Localized:
    """Return the message for a row whose prompt leaves no tokens for an answer."""
    return Localized(
        "the prompt alone takes {length} tokens; --max-length {limit} must be at least {least}",
        length=length,
        limit=limit,
        least=length + 1,
    )


def prompt_texts(row: Row) -> tuple[str, str]:
    """Return system and user prompt, empty where there is none."""
    return row.system_prompt or "", row.user_prompt or ""


def digest(*parts: str | bytes) -> int:
    """Return a 64-bit digest: among a million, two are alike by chance once in 10^7 times."""
    blake = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        blake.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(blake.digest(), "little")


def _flags(row: Row, clip: Clip) -> int:
    """Return the bits of `FLAGS` that hold for a row."""
    answer = row.prediction
    # Whole frames only; loudness is the mean square of one.
    frames = clip.samples[: len(clip.samples) // FRAME * FRAME].reshape(-1, FRAME)
    is_audible = np.mean(np.square(frames), axis=1) >= AUDIBLE**2
    holds = {
        "silent": clip.silent,
        "nearly_empty": not clip.silent and np.mean(is_audible) < LEAST_AUDIBLE,
        "clipped": clip.clipped and clip.full_scale >= LEAST_CLIPPED,
        "padded": clip.padded,
        "truncated": clip.truncated is not None,
        "empty_answer": answer == "",
        "number_answer": answer is not None and looks_mangled(answer) and not EXCEL.fullmatch(answer.strip()),
        "excel_answer": answer is not None and EXCEL.fullmatch(answer.strip()) is not None,
        "mark_prompt": any(map(AUDIO_MARK.search, prompt_texts(row))),
        "space_answer": answer is not None and answer != answer.strip(),
        "cancelled": clip.cancelled,
        "no_length": not clip.has_length,
        "formula": any(map(FORMULA.match, (answer or "", *prompt_texts(row)))),
        "space_prompt": any(prompt != prompt.strip() for prompt in prompt_texts(row)),
    }
    return sum(FLAGS[name] for name, is_set in holds.items() if is_set)


def looks_mangled(answer: str) -> bool:
    """Tell whether a spreadsheet would rewrite an answer: 0012, 1.0, +5, 1e3, 1,000, 3/4."""
    text = answer.strip()
    if DAY.fullmatch(text):
        return True
    return bool(NUMBER.fullmatch(text)) and f"{float(text.replace(',', '')):.{DIGITS}g}" != text
