"""Kaldi's data folders: the rows of a CSV that says the same, and where they are wrong."""

from pathlib import Path

import pytest
from datasets import load_from_disk

from mdl_toolkit.config.data import CheckOptions, ConversionOptions, SplitOptions
from mdl_toolkit.data.check.run import check
from mdl_toolkit.data.manifest import read_manifest
from mdl_toolkit.data.split import split_dataset
from mdl_toolkit.errors import InputError
from mdl_toolkit.evaluation.csv_table import read_table
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.run import train
from tests.support.inferences import infer_options, table
from tests.support.paths import MODEL
from tests.support.runs import convert, history, make_rows, train_options, write_csv


@pytest.fixture
def rows(tmp_path):
    return make_rows(tmp_path / "audio", 5)


@pytest.fixture
def folder(tmp_path, rows):
    """A data folder that says what the rows do; names are in another order in each list."""
    folder = tmp_path / "data"
    folder.mkdir()
    lists(folder, "wav.scp", [f"u{number} {row['audio']}" for number, row in enumerate(rows)])
    lists(folder, "text", [f"u{number}\t{row['prediction']} " for number, row in enumerate(rows)][::-1])
    lists(folder, "utt2spk", [f"u{number} s{number % 2}" for number in range(len(rows))])
    return folder


def lists(folder, name, lines):
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read(path, **changes):
    return [*read_manifest(path, ConversionOptions(**changes), needs_prediction=True).rows()]


@pytest.mark.parametrize("name", ["", "wav.scp"])
def test_the_dataset_is_that_of_the_csv(tmp_path, rows, folder, capsys, name):
    plain = [{"audio": row["audio"], "prediction": row["prediction"]} for row in rows]
    made = [
        convert(source, MODEL, tmp_path / output)
        for output, source in (("one", write_csv(tmp_path / "a.csv", plain)), ("two", folder / name))
    ]
    one, two = (load_from_disk(str(each)) for each in made)
    assert one.remove_columns("line").to_list() == two.remove_columns("line").to_list()
    assert two["line"] == [1, 2, 3, 4, 5]
    assert (
        f"{folder / 'wav.scp'}: taken for a list of Kaldi's, with those beside it\n"
        in capsys.readouterr().err
    )


def test_segments_have_times_and_channels(tmp_path, rows, folder):
    lists(
        folder,
        "segments",
        ["u1 u0 0.25 0.5", "u2 u2 0.1 -1", "u0 u2 0 0.2 0", "", "u3 u1 0.1 -1.00 1", "u4 u1 0.1 0.2"],
    )
    found = [
        (
            row.line,
            Path(row.audio).name,
            row.segment.start,
            row.segment.end,
            row.segment.channel,
            row.prediction,
        )
        for row in read(folder)
    ]
    files, answers = [Path(row["audio"]).name for row in rows], [row["prediction"] for row in rows]
    assert found == [
        (1, files[0], 0.25, 0.5, None, answers[1]),
        (2, files[2], 0.1, None, None, answers[2]),
        (3, files[2], 0.0, 0.2, 1, answers[0]),
        (5, files[1], 0.1, None, 2, answers[3]),
        (6, files[1], 0.1, 0.2, None, answers[4]),
    ]


def test_a_training_is_that_of_the_csv(tmp_path, rows, folder):
    plain = [{"audio": row["audio"], "prediction": row["prediction"]} for row in rows]
    for name, data in (("one", write_csv(tmp_path / "a.csv", plain)), ("two", folder)):
        train(train_options(data, MODEL, tmp_path / name, merge_lora=False, eval_dataset=str(data)))
    assert history(tmp_path / "one") == history(tmp_path / "two")


def test_answers_are_a_csv_and_no_list_is_written_over(tmp_path, rows, folder):
    infer(infer_options(folder, MODEL, tmp_path / "out.csv"))
    assert [(row["audio"], row["speaker"]) for row in table(tmp_path / "out.csv")] == [
        (row["audio"], f"s{number % 2}") for number, row in enumerate(rows)
    ]
    before = (folder / "text").read_bytes()
    with pytest.raises(InputError, match=r"--output .*text: it is, holds"):
        infer(infer_options(folder / "wav.scp", MODEL, folder / "text"))
    with pytest.raises(InputError, match=r"--write-fixed .*text: it is, holds"):
        check(
            CheckOptions(
                input=(str(folder / "wav.scp"),), model_name=str(MODEL), write_fixed=str(folder / "text")
            )
        )
    assert (folder / "text").read_bytes() == before


def test_speakers_are_groups_of_a_split_and_texts_references(tmp_path, folder, rows):
    files = split_dataset(
        SplitOptions(input=str(folder), output=str(tmp_path / "parts"), eval=0.4, group_by=("speaker",))
    )
    sides = [{row["speaker"] for row in table(file)} for file in files.values()]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {"s0", "s1"}
    assert read_table(folder).column("prediction") == [row["prediction"] for row in rows]


def test_commands_are_refused_and_never_run(tmp_path, folder):
    ran = tmp_path / "ran"
    lists(folder, "wav.scp", [f"u0 touch {ran} |", f"u1 cat {tmp_path}/a.wav|", "u2 a.ark:17"])
    with pytest.raises(InputError) as refused:
        convert(folder, MODEL, tmp_path / "out")
    said = refused.value.message.en
    assert said.count("a command, which is never run") == 2
    assert "line 3, column audio" in said
    assert "a part of an archive" in said
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("wav.scp", "u0 a.wav", r"wav\.scp: line 6: 'u0' is there a second time"),
        ("text", "u0 again", r"text: line 6: 'u0' is there a second time"),
        ("segments", "u0 u9 0 1", r"segments: line 1: 'u9' is not in wav\.scp"),
        ("segments", "u0 u1 0", r"segments: line 1: expected an utterance, a recording"),
        ("segments", "u0 u1 0 1 left", r"segments: line 1: expected an utterance, a recording"),
        ("segments", "u0", r"segments: line 1: expected an utterance, a recording"),
        ("segments", "u0 u1 0 later", "line 1, column end 'later': no time"),
        ("segments", "u8 u1 0 1", r"line 1, column prediction.*empty"),
        ("text", "u1", "line 2, column prediction.*empty"),
        ("text", "u1 \udcff", "line 2, column prediction.*not UTF-8"),
        ("text", None, "the column 'prediction' is missing"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, folder, name, line, said):
    path = folder / name
    if line is None:
        path.unlink()
    else:
        lines = path.read_text().splitlines() if path.exists() else []
        lines = lines if line.startswith("u0") else [each for each in lines if each[:2] != line[:2]]
        text = "".join(f"{each}\n" for each in [*lines, line])
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=said):
        convert(folder, MODEL, tmp_path / "out")


def test_a_list_that_changes_meanwhile_is_noticed(folder):
    manifest = read_manifest(folder, ConversionOptions(), needs_prediction=True)
    with (folder / "text").open("a") as text:
        text.write("u9 more\n")
    with pytest.raises(InputError, match="was changed while it was being read"):
        list(manifest)
