"""One shard, in a worker process: rows to clips and tokens, and these to a file."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdl_toolkit.audio.flac import pack_audio
from mdl_toolkit.data.convert.plan import Shard
from mdl_toolkit.data.convert.stats import ConversionStats
from mdl_toolkit.data.dataset_writer import ShardWriter
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.data.open_audio import Recordings
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import MOST_ROWS_SHOWN, Problems, RowProblem, naming_row
from mdl_toolkit.model.lengths import audio_token_count


@dataclass(frozen=True)
class ShardJob:
    """Hold a shard to convert.

    Attributes:
        shard: its number and fingerprint.
        rows: its rows.
        file: the file to write.
    """

    shard: Shard
    rows: list[Row]
    file: Path


@dataclass(frozen=True)
class ShardProgress:
    """Report that `rows` more rows are done, with `samples` samples of audio."""

    rows: int
    samples: int


@dataclass(frozen=True)
class ShardResult:
    """Report that a shard is done: its file holds the rows that can be used."""

    shard: Shard
    file: Path
    stats: ConversionStats


@dataclass(frozen=True)
class ShardConverter:
    """Convert shards in a worker process.

    Attributes:
        tokenizer: the model's tokenizer and template.
        recordings: opens them.
        with_answer: for training; otherwise prompts alone, and no labels.
        keeps_going: report all rows that cannot be used, and not only the first ones.
        rows_per_step: rows between two reports of progress.
    """

    tokenizer: ChatTokenizer
    recordings: Recordings
    with_answer: bool
    keeps_going: bool
    rows_per_step: int

    def __call__(self, job: ShardJob) -> Iterator[ShardProgress | ShardResult]:
        """Convert the shard, and report."""
        stats = ConversionStats(problems=Problems(most=None if self.keeps_going else MOST_ROWS_SHOWN))
        writer = ShardWriter(job.file)
        clips = self.recordings.clips(job.rows)
        while group := list(itertools.islice(clips, self.rows_per_step)):
            samples = 0
            for row, clip in group:
                if isinstance(clip, RowProblem):
                    stats.problems.add(clip)
                    continue
                with naming_row(row.line, row.shown):
                    samples += len(clip.samples)
                    count = audio_token_count(len(clip.samples))
                    tokens = self.tokenizer.encode_row(row, count, with_answer=self.with_answer)
                    packed = pack_audio(clip.stored, clip.stored_rate, len(clip.samples))
                    writer.append(row.line, tokens, packed)
                    stats.add(row, clip, len(tokens.input_ids), count)
            yield ShardProgress(len(group), samples)
        stats.bytes, stats.crc32 = writer.close()
        yield ShardResult(job.shard, job.file, stats)
