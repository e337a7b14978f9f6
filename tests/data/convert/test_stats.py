"""What a conversion counts: added up in any order, kept as JSON, told in both languages."""

import itertools
import json
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit import __version__
from mdl_toolkit.audio.loading import Clip
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.convert.stats import ConversionStats, say_summary, warn_of_clips
from mdl_toolkit.data.dataset import Record
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import MOST_ROWS_SHOWN, Problems, RowProblem
from mdl_toolkit.i18n import Verbatim
from mdl_toolkit.weights.tokenizer_files import TokenizerFiles

FILES = TokenizerFiles("{}", "{{ x }}", ())
OPTIONS = ConvertOptions(model_name="m", input="rows.csv", output="out", system_prompt="Kurz.")

# Samples, positions and audio tokens of a clip, and what is out of the ordinary with it.
CLIPS = st.lists(
    st.tuples(
        st.integers(3200, 500_000), st.integers(10, 60), st.integers(1, 9), st.booleans(), st.booleans(),
        st.booleans(), st.booleans(), st.booleans(),
    ),
    max_size=80,
)  # fmt: skip


def row(line: int) -> Row:
    return Row(line, f"/{line}.wav", f"{line}.wav", None, None, "x", ())


def clip_of(samples: int, **changes: Any) -> Clip:
    plain = {"padded": False, "silent": False, "clipped": False, "full_scale": 0.0, "truncated": None}
    zeros = np.zeros(samples, np.float32)
    return Clip("WAV", zeros, 16_000, samples / 16_000, 16_000, 1, **{**plain, **changes})


def stats_of(first_line: int, clips: list[tuple[Any, ...]]) -> ConversionStats:
    """As a worker does it for a shard."""
    stats = ConversionStats(bytes=10 * len(clips))
    for line, clip in enumerate(clips, start=first_line):
        samples, positions, tokens, padded, silent, clipped, cut, bad = clip
        if bad:
            stats.problems.add(RowProblem(line, "audio", f"{line}.wav", Verbatim("bad", "坏")))
            continue
        reason = Verbatim("cut off", "不完整") if cut else None
        loaded = clip_of(samples, padded=padded, silent=silent, clipped=clipped, truncated=reason)
        stats.add(row(line), loaded, positions, tokens)
    return stats


def merged(tallies: list[ConversionStats]) -> ConversionStats:
    def merge(total: ConversionStats, other: ConversionStats) -> ConversionStats:
        total.merge(other)
        return total

    return reduce(merge, tallies, ConversionStats())


# --- adding up -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(clips=CLIPS, cut=st.lists(st.integers(0, 80), max_size=4), seed=st.randoms(use_true_random=False))
def test_parts_in_any_order_make_the_whole(clips, cut, seed):
    ends = sorted({0, len(clips), *(end for end in cut if end < len(clips))})
    parts = [stats_of(start + 2, clips[start:end]) for start, end in itertools.pairwise(ends)]
    whole = stats_of(2, clips)
    shuffled = seed.sample(parts, len(parts))
    grouped = [merged(shuffled[:2]), merged(shuffled[2:])]
    assert merged(parts) == merged(shuffled) == merged(grouped) == whole


@settings(max_examples=40, deadline=None)
@given(clips=CLIPS)
def test_counts_are_those_of_the_clips(clips):
    stats = stats_of(2, clips)
    good = [clip for clip in clips if not clip[-1]]
    lengths = [clip[0] for clip in good]
    assert (stats.rows, stats.samples) == (len(good), sum(lengths))
    assert (stats.shortest, stats.longest) == (min(lengths, default=0), max(lengths, default=0))
    assert stats.audio_tokens == sum(clip[2] for clip in good)
    counts = (stats.padded, stats.silent, stats.clipped, stats.truncated.count)
    assert counts == tuple(sum(clip[place] for clip in good) for place in (3, 4, 5, 6))
    assert stats.problems.count == len(clips) - len(good)
    bad = [line for line, clip in enumerate(clips, start=2) if clip[-1]]
    assert [each.line for each in stats.problems.first] == bad[:MOST_ROWS_SHOWN]


@settings(max_examples=40, deadline=None)
@given(clips=CLIPS)
def test_json_brings_it_back(clips):
    stats = stats_of(2, clips)
    assert ConversionStats.from_json(json.loads(json.dumps(stats.to_json()))) == stats


def test_json_does_not_grow_with_the_rows():
    clip = (3200, 20, 1, True, False, False, True, False)
    few, many = (len(json.dumps(stats_of(2, [clip] * count).to_json())) for count in (100, 2_000))
    assert many < few + 100


@pytest.mark.parametrize(
    "values",
    [
        {},
        [],
        None,
        *(
            {**ConversionStats().to_json(), **other}
            for other in (
                {"more": 1},
                {"positions": {"x": 1}},
                {"positions": None},
                {"truncated": {"count": 1}},
            )
        ),
    ],
)
def test_other_values_are_refused(values):
    with pytest.raises((TypeError, ValueError, KeyError, AttributeError)):
        ConversionStats.from_json(values)


# --- the record ------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200))
def test_percentiles_are_numpy_s(lengths):
    stats = ConversionStats()
    for line, length in enumerate(lengths):
        stats.add(row(line), clip_of(3200), length, 1)
    record = stats.record(FILES, OPTIONS)
    expected = np.percentile(lengths, [50, 95, 100], method="inverted_cdf").tolist()
    assert [record.median_tokens, record.p95_tokens, record.most_tokens] == expected
    assert record.text_tokens + record.audio_tokens == sum(lengths)


def test_the_record():
    clips = [
        (16_000, 30, 5, False, False, True, False, False),
        (3_200, 12, 1, True, True, False, True, False),
    ]
    assert stats_of(2, clips).record(FILES, OPTIONS) == Record(
        tokenizer=FILES.tokenizer_fingerprint, chat_template=FILES.template_fingerprint,
        system_prompt="Kurz.", user_prompt=None, rows=2, seconds=1.2, shortest_seconds=0.2,
        longest_seconds=1.0, text_tokens=36, audio_tokens=6, median_tokens=12, p95_tokens=30,
        most_tokens=30, padded=1, silent=1, clipped=1, truncated=1, bytes=20, toolkit=__version__,
    )  # fmt: skip


# --- what is said ----------------------------------------------------------------------------------------

RECORD = Record(
    "t", "c", None, None, rows=12_345, seconds=7_200.0, shortest_seconds=0.2, longest_seconds=30.5,
    text_tokens=1_000_000, audio_tokens=234_567, median_tokens=90, p95_tokens=1_200, most_tokens=1_300,
    padded=1, silent=2, clipped=1_003, bytes=115_200_000,
)  # fmt: skip
SUMMARY = {
    "en": (
        "out: 12,345 rows, 2.00 hours, 1,234,567 tokens\n"
        "  tokens per row: median 90, 95 % up to 1,200, longest 1,300\n"
        "  clips: 0.20 s to 30.50 s; padded 1, silent 2, clipped 1,003\n"
        "  on disk: 115.2 MB, 0.50 times the audio as 16-bit PCM\n"
    ),
    "zh_CN": (
        "out：12,345 行，2.00 小时，1,234,567 个词元\n"
        "  每行词元数：中位数 90，95% 不超过 1,200，最长 1,300\n"
        "  音频：最短 0.20 秒，最长 30.50 秒；补零 1，静音 2，削波 1,003\n"
        "  磁盘占用：115.2 MB，为 16 位 PCM 的 0.50 倍\n"
    ),
}


@pytest.mark.parametrize("language", SUMMARY)
def test_the_summary(monkeypatch, capsys, language):
    monkeypatch.setenv("LANGUAGE", language)
    say_summary(Path("out"), RECORD)
    captured = capsys.readouterr()
    assert captured.err == SUMMARY[language]
    assert captured.out == ""


WARNINGS = {
    "en": (
        "warning: line 3: a.wav: cut off\n"
        "warning: 70 more recordings were cut off\n"
        "warning: 4 clips are shorter than 0.2 s and were padded to one audio token\n"
        "warning: 5 clips are silent\n"
        "warning: 6 clips are clipped (recorded too loud)\n"
    ),
    "zh_CN": (
        "警告：第 3 行：a.wav：不完整\n"
        "警告：另有 70 个音频不完整\n"
        "警告：4 个音频短于 0.2 秒，已补零至一个音频词元\n"
        "警告：5 个音频是静音\n"
        "警告：6 个音频削波（录音过载）\n"
    ),
}


@pytest.mark.parametrize("language", WARNINGS)
def test_the_warnings(monkeypatch, capsys, language):
    monkeypatch.setenv("LANGUAGE", language)
    problem = RowProblem(3, "audio", "a.wav", Verbatim("cut off", "不完整"))
    warn_of_clips(ConversionStats(padded=4, silent=5, clipped=6, truncated=Problems([problem], 71)))
    assert capsys.readouterr().err == WARNINGS[language]


def test_nothing_to_warn_of(capsys):
    warn_of_clips(ConversionStats(rows=9))
    assert capsys.readouterr().err == ""


def test_a_cut_off_address_shows_no_password():
    one = replace(row(3), audio_text="https://me:secret@host/a.wav")
    stats = ConversionStats()
    stats.add(one, clip_of(3200, truncated=Verbatim("cut off", "不完整")), 10, 1)
    assert stats.truncated.first[0].value == "https://host/a.wav"
