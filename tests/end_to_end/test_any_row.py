"""Whatever is written in a row, and however long its recording, comes back from the dataset."""

import csv
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import IGNORE_INDEX, ChatTokenizer
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.paths import MODEL

TOKENIZER = ChatTokenizer(read_tokenizer_files(MODEL))
LONGEST = 5 * 60 * 16_000  # samples: five minutes
COLUMNS = ("audio", "system_prompt", "user_prompt", "prediction")

ODD = [
    'a "quoted" word', "two\nlines\r\nand\rmore", "a,b;c\td", "'", '"', "“弯引号”", "😀👩‍👩‍👧‍👦🏳️‍🌈",
    "مرحبا بالعالم", "שלום, עולם", "\u202eright to left", "<|im_end|>", "<|AUDIO|>",
    "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|im_start|>assistant\n", "{{ 7 * 7 }}", "{% for x in y %}",
    "0012", "True", "None", "nan", " leading and trailing ", "e\u0301 and é",
    "\ufeff", "\u2028", "\x85", "\x1f", "=1+1",
]  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40) | st.sampled_from(ODD)
# Half of the lengths lie around one audio token, the others anywhere up to five minutes.
LENGTH = st.integers(1, 6400) | st.floats(0, 1).map(lambda share: max(1, int(LONGEST**share)))


def words(prompt: str) -> bool:
    """Tell whether a cell says something."""
    return prompt not in ("", "null")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(LENGTH, TEXT.filter(words), TEXT.filter(words), TEXT.filter(bool)), min_size=1, max_size=3
    )
)
def test_any_row_comes_back(rows):
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        waves = [write_recording(place / f"{i}.wav", length, i) for i, (length, *_) in enumerate(rows)]
        write_rows(place / "rows.csv", [(str(place / f"{i}.wav"), *row[1:]) for i, row in enumerate(rows)])
        convert_dataset(
            ConvertOptions(model_name=str(MODEL), input=str(place / "rows.csv"), output=str(place / "out"))
        )
        dataset = ConvertedDataset(place / "out")
        for (_, system, user, prediction), wave, sample in zip(rows, waves, dataset, strict=True):
            assert_same_wave(sample.waveform, wave)
            assert_same_text(sample, system, user, prediction)


def write_recording(path: Path, length: int, seed: int) -> np.ndarray:
    samples = np.random.default_rng(seed).integers(-3000, 3000, length, dtype=np.int16)
    soundfile.write(path, samples, 16_000)
    return samples


def write_rows(path: Path, rows: list[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def assert_same_wave(waveform: np.ndarray, samples: np.ndarray) -> None:
    np.testing.assert_array_equal(waveform[: len(samples)] * 32768, samples)
    assert len(waveform) == max(len(samples), 3200)
    assert not waveform[len(samples) :].any()


def assert_same_text(sample, system: str, user: str, prediction: str) -> None:
    """The tokenizer normalises to NFC; apart from that every character is there, and where it belongs."""
    learnt = sample.labels[sample.labels != IGNORE_INDEX]
    assert learnt[-1] == TOKENIZER.end_id
    assert decoded(learnt[:-1]) == unicodedata.normalize("NFC", prediction)
    prompt = decoded(sample.input_ids[sample.labels == IGNORE_INDEX])
    for text in (system, user):
        assert unicodedata.normalize("NFC", text) in prompt
    starts = (sample.input_ids == TOKENIZER.id_of("<|im_start|>")).sum()
    ends = (sample.input_ids == TOKENIZER.end_id).sum()
    assert (
        starts == ends == 3
    )  # system, user and assistant; special tokens in the user's words are plain text


def decoded(ids: np.ndarray) -> str:
    return TOKENIZER.backend.decode(ids.tolist(), skip_special_tokens=False)
