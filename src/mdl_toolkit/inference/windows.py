"""Answer long recordings in windows: where these begin and end, and how their answers are joined.

A window is a row of the same recording with another start and end, so that all engines, the journal and the
conversion know no more of windows than of rows. A recording is decoded twice, for its length and for its
windows.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from mdl_toolkit.audio.download_cache import Downloads
from mdl_toolkit.audio.segments import Segment
from mdl_toolkit.audio.urls import is_url
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.data.convert.plan import MEBIBYTE, URL_BYTES
from mdl_toolkit.data.manifest import Manifest
from mdl_toolkit.data.open_audio import Recordings
from mdl_toolkit.errors import AudioError, InputError, RowProblem, UsageError
from mdl_toolkit.evaluation.text_metrics import SPACELESS, are_mostly, normalized
from mdl_toolkit.model.constants import SAMPLE_RATE
from mdl_toolkit.model.lengths import MIN_SAMPLES
from mdl_toolkit.utils.console import progress
from mdl_toolkit.utils.files import parse_json, report_write_errors, write_text
from mdl_toolkit.utils.machine import default_workers
from mdl_toolkit.utils.signals import raise_if_interrupted
from mdl_toolkit.utils.worker_pool import work_through

# The value of --join for a row of each window.
LIST = "list"
# Words, or characters of languages without spaces, that somebody who speaks fast says in a second.
WORDS_PER_SECOND, CHARACTERS_PER_SECOND = 6, 12
# Below this, starting processes costs more than they save; so many recordings are given to one at once.
FEW_BYTES, MEASURED_TOGETHER = 16 * MEBIBYTE, 16
# Seconds between two times that lengths are written down.
KEPT_EVERY = 30
# What a pair of the same words counts in an alignment, and a word without its like.
MATCH, GAP = 2, -1


def check_windows(options: InferenceOptions) -> None:
    """Refuse options of windows that have no effect or no meaning.

    Raises:
        UsageError: naming them.
    """
    if options.window is None:
        for name in ("overlap", "join"):
            if getattr(options, name) != getattr(InferenceOptions, name):
                raise UsageError(
                    "{one} has no effect without {other}; give both, or neither",
                    one=f"--{name}",
                    other="--window",
                )
    elif 2 * options.overlap > options.window:
        raise UsageError(
            "--overlap {overlap:g}: give at most half of --window {window:g}",
            overlap=options.overlap,
            window=options.window,
        )
    elif options.choices is not None and options.join != LIST:
        raise UsageError("--choices: of windows, scores cannot be joined; give --join list")


# --- where windows begin and end -------------------------------------------------------------------------


def cut_rows(manifest: Manifest, options: InferenceOptions, lengths_file: Path, run: str) -> Manifest:
    """Return a manifest whose rows are cut where they are longer than a window, or refused if nobody knows.

    Args:
        manifest: the rows.
        options: the inference's, with a window and a download cache.
        lengths_file: keeps the recordings' lengths, which a run that goes on does not measure again.
        run: the name of this run to the download cache.

    Raises:
        InputError: the file cannot be written.
    """
    downloads = Downloads(Path(options.download_cache or ".").expanduser(), options.max_download_mb, run)
    recordings = Recordings(downloads, options.allow_truncated, options.max_audio_hours)
    window = options.window or math.inf
    long = [row for row in manifest.rows() if row.segment.length > window]
    workers = options.num_workers or default_workers()
    lengths = measure({row.audio: row.stamp for row in long}, recordings, lengths_file, workers)
    parts, refused = dict[int, list[Segment]](), dict[int, RowProblem]()
    for row in long:
        length = lengths[row.audio]
        if isinstance(length, AudioError):
            refused[row.line] = row.audio_problem(length)
        elif len(segments := windows(row.segment, length, window, options.overlap)) > 1:
            parts[row.line] = segments
    return replace(manifest, parts=parts, refused=refused)


def measure(
    stamps: Mapping[str, tuple[int, int]], recordings: Recordings, file: Path, workers: int
) -> dict[str, float | AudioError]:
    """Return the seconds of recordings, by decoding those that a file has no length of; keep them there.

    What lies at an address may be another recording the next time: its length is not kept.

    Args:
        stamps: size and time of change of each recording.
        recordings: opens them.
        file: JSON; may be missing.
        workers: the most processes that decode.

    Raises:
        InputError: the file cannot be written.
    """
    lengths = read_lengths(file, stamps)
    names = [audio for audio in stamps if audio not in lengths]
    size = sum(max(stamps[audio][0], URL_BYTES) for audio in names)
    workers = min(workers, len(names)) if size >= FEW_BYTES else 1
    # Rows of a Parquet file are read in their order by each process.
    step = max(1, min(MEASURED_TOGETHER, len(names) // workers))
    jobs = (names[start : start + step] for start in range(0, len(names), step))
    kept = time.monotonic()
    try:
        with (
            progress(len(names), "measuring recordings") as bar,
            closing(work_through(jobs, recordings.lengths, workers)) as measured,
        ):
            for audio, length in measured:
                lengths[audio] = length
                bar.advance()
                raise_if_interrupted()
                if time.monotonic() > kept + KEPT_EVERY:
                    write_lengths(file, stamps, lengths)
                    kept = time.monotonic()
    finally:
        write_lengths(file, stamps, lengths)
    return lengths


def read_lengths(file: Path, stamps: Mapping[str, tuple[int, int]]) -> dict[str, float | AudioError]:
    """Return what a file says of recordings that are still as they were when they were measured."""
    known: dict[str, list[float]] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(parse_json(file.read_text(encoding="utf-8")))
    return {audio: known[audio][2] for audio in stamps if known.get(audio, [])[:2] == [*stamps[audio]]}


def write_lengths(
    file: Path, stamps: Mapping[str, tuple[int, int]], lengths: Mapping[str, float | AudioError]
) -> None:
    """Write the lengths of recordings to a file, if there are any, with the stamps that they hold for.

    Raises:
        InputError: the file cannot be written.
    """
    measured = {
        audio: [*stamps[audio], length]
        for audio, length in lengths.items()
        if not is_url(audio) and not isinstance(length, AudioError)
    }
    if measured:
        with report_write_errors(str(file), InputError):
            write_text(file, json.dumps(measured))


def windows(segment: Segment, length: float, window: float, overlap: float) -> list[Segment]:
    """Cut a segment into windows that begin at equal distances; the last one takes what is left.

    What is left goes to the window before where it is too short for an audio token.

    Args:
        segment: what to cut.
        length: seconds of its recording.
        window: seconds of a window.
        overlap: seconds that neighbours share.
    """
    end = length if segment.end is None else segment.end
    step, shortest = window - overlap, MIN_SAMPLES / SAMPLE_RATE
    count = math.ceil((min(end, length) - segment.start - overlap - shortest) / step)
    starts = [segment.start + step * number for number in range(max(count, 1))]
    ends = [*(start + window for start in starts[:-1]), end]
    return [replace(segment, start=start, end=end) for start, end in zip(starts, ends, strict=True)]


# --- how their answers are joined ------------------------------------------------------------------------


def join_transcript(texts: Sequence[str], overlap: float) -> list[str]:
    """Return what was heard in neighbouring windows, with the words of their overlaps once.

    Args:
        texts: the transcript of every window.
        overlap: seconds that neighbours share.

    Returns:
        The share of each window; all of them one after the other are the transcript.
    """
    is_spaceless = are_mostly(SPACELESS, texts)
    most = math.ceil(overlap * (CHARACTERS_PER_SECOND if is_spaceless else WORDS_PER_SECOND))
    # What is neither letter nor digit goes with the character, or the word, before it.
    pattern = re.compile(r"^\W+|\w\W*" if is_spaceless else r"\S+\s*")
    units = [pattern.findall(text.strip()) for text in texts]
    shares = units[:1]
    for after in units[1:]:
        before = shares[-1]
        tail = max(len(before) - most, 0)
        kept, left_out = find_seam(before[tail:], after[:most])
        shares[-1] = before[: tail + kept]
        shares.append(after[left_out:])
    between = "" if is_spaceless else " "
    return [share and share + between for share in ("".join(units).rstrip() for units in shares)]


def find_seam(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """Find where one text goes over into the next by their best overlap alignment (as in sequence assembly).

    The end of the first text is aligned with the beginning of the second one by dynamic programming, words
    compared without case and punctuation. The seam is behind the middle one of the pairs that are the same:
    at the edges of a window words are cut. Without enough in common nothing overlaps.

    Args:
        before: words or characters at the end of a text.
        after: those at the beginning of the next one.

    Returns:
        How many of `before` to keep, and how many of `after` to leave out.
    """
    left, right = ([normalized(unit) or unit for unit in units] for units in (before, after))
    # The score of the best alignment of `right[:j]` with the end of `left[:i]`, and its pairs, by j.
    best: list[tuple[int, tuple[tuple[int, int], ...]]] = [(GAP * j, ()) for j in range(len(right) + 1)]
    for i, one in enumerate(left, 1):
        row: list[tuple[int, tuple[tuple[int, int], ...]]] = [(0, ())]
        for j, other in enumerate(right, 1):
            score, pairs = best[j - 1]
            met = (score + MATCH, (*pairs, (i, j))) if one == other else (score + GAP, pairs)
            skipped = [(score + GAP, pairs) for score, pairs in (best[j], row[j - 1])]
            row.append(max(met, *skipped, key=lambda each: each[0]))
        best = row
    score, pairs = max(best, key=lambda each: each[0])
    return pairs[len(pairs) // 2] if pairs else (len(before), 0)
