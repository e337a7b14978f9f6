"""Rows whose logits are NaN: told with a reason, and no other row is worse for them."""

import re

import pytest
from safetensors.torch import load_file, save_file

from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, ModelError, RowsError
from mdl_toolkit.inference import engines
from mdl_toolkit.inference.journal import AnswerJournal
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.run import train
from mdl_toolkit.weights import loading
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.inferences import infer_options, table
from tests.support.runs import copy_checkpoint, make_rows, train_options, write_csv

# What a model is lost at that `poisoned` has changed, and the rows that have it.
MARK, LOST = "#", (2, 4, 5)
ENGINES = {
    "greedy": {},
    "sampling": {"temperature": 0.5, "top_p": 0.5},
    "beams": {"num_beams": 2},
    "choices": {},
}


@pytest.fixture
def sound(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


@pytest.fixture
def poisoned(sound, tmp_path, monkeypatch):
    """A model of which one token's embedding is NaN, and which is loaded all the same."""
    monkeypatch.setattr(loading, "check_numbers", lambda *_: None)
    folder = tmp_path / "poisoned"
    sound.rename(folder)
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][ChatTokenizer(read_tokenizer_files(folder)).id_of(MARK)] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows_with(place, lost, count=8):
    rows = make_rows(place / "audio", count)
    for number in lost:
        rows[number]["user_prompt"] += f" {MARK}{MARK}{MARK}"
    return write_csv(place / "rows.csv", rows)


@pytest.fixture
def settings(tmp_path):
    """Options that let rows wait for the place of others."""
    (tmp_path / "choices.txt").write_text("rain\na dog that barks\n", encoding="utf-8")

    def settings(engine):
        chosen = {"choices": str(tmp_path / "choices.txt")} if engine == "choices" else {}
        return {"batch_size": 4, "max_length": 100, **ENGINES[engine], **chosen}

    return settings


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_without_numbers_is_told_and_the_others_are_answered(
    golden, poisoned, tmp_path, settings, engine
):
    source, changes = rows_with(tmp_path, LOST), settings(engine)
    expected = infer(infer_options(source, golden / "checkpoints/A-small", tmp_path / "sound.csv", **changes))
    with pytest.raises(RowsError) as caught:
        infer(infer_options(source, poisoned, tmp_path / "out.csv", **changes))
    assert [problem.line for problem in caught.value.problems] == [number + 2 for number in LOST]
    assert not (tmp_path / "out.csv").exists()
    with pytest.raises(InputError):
        infer(infer_options(source, poisoned, tmp_path / "out.csv", on_error="keep", **changes))
    found = table(tmp_path / "out.csv")
    # A row that draws the mark itself would be lost, too.
    assert all(expected[number] and MARK not in expected[number] for number in {*range(8)} - {*LOST})
    for number, row in enumerate(found):
        is_lost = number in LOST
        assert row["prediction"] == ("" if is_lost else expected[number])
        assert row["error"].startswith("the model gave NaN or infinite logits; take an earlier") == is_lost


def test_the_same_command_does_not_try_such_rows_again(poisoned, tmp_path, settings, monkeypatch):
    options = infer_options(
        rows_with(tmp_path, LOST), poisoned, tmp_path / "out.csv", **settings("greedy"), bf16=True
    )
    with pytest.raises(RowsError, match="in bfloat16; compute in float32: --bf16 false") as first:
        infer(options)
    monkeypatch.setattr(engines, "load_for_inference", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(RowsError) as second:
        infer(options)
    assert str(second.value) == str(first.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_without_numbers_is_noticed_at_the_first_batch(
    poisoned, tmp_path, settings, engine, capsys, monkeypatch
):
    source, lost = rows_with(tmp_path, range(8)), r"none of the first 4 rows has an answer: .*--bf16 false"
    changes, add, added = {**settings(engine), "bf16": True}, AnswerJournal.add, []
    monkeypatch.setattr(AnswerJournal, "add", lambda *given: added.append(given[1:]) or add(*given))
    with pytest.raises(ModelError, match=lost):
        infer(infer_options(source, poisoned, tmp_path / "out.csv", **changes))
    assert [cells for _, cells in added] == [None] * 4
    assert "answered" not in capsys.readouterr().err
    with pytest.raises(InputError):
        infer(infer_options(source, poisoned, tmp_path / "out.csv", on_error="keep", **changes))
    assert re.search(f"warning: {lost}", capsys.readouterr().err)
    assert all(row["error"] and not row["prediction"] for row in table(tmp_path / "out.csv"))


def test_an_evaluation_that_meets_such_rows_names_the_first_and_goes_on(poisoned, tmp_path, capsys):
    asked = rows_with(tmp_path, (1, 3), 5).rename(tmp_path / "asked.csv")
    options = train_options(
        rows_with(tmp_path, ()), poisoned, tmp_path / "run", eval_dataset=str(asked), eval_metric="accuracy",
        merge_lora=False, bf16=True, eval_samples=5,
    )  # fmt: skip
    train(options)
    said = capsys.readouterr().err
    assert re.search(r"evaluation: 2 rows have no answer, .*\(line 3 first\): .*--bf16 false", said)
    assert re.search(r"the evaluation loss after step \d+ is nan: .*--bf16 false", said)
