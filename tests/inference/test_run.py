"""Inference: limits of new tokens, independence of the batch, and what is written."""

import codecs
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from openpyxl import Workbook
from safetensors.torch import load_file, save_file

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.yaml import read_settings
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, ModelError, RowsError
from mdl_toolkit.inference import engines
from mdl_toolkit.inference import generate as answering
from mdl_toolkit.inference import run as inference
from mdl_toolkit.inference.run import infer
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.training.run import train
from mdl_toolkit.weights.loading import load_for_inference
from tests.support.runs import copy_checkpoint, files_below, make_csv, make_rows, train_options, write_csv
from tests.support.waves import wave


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def options(source, model, output, **changes):
    return InferenceOptions(input=str(source), output=str(output), model_name=str(model), **changes)


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_answers_are_the_models_own_greedy_ones(golden, tmp_path):
    """The golden greedy ids are 16 tokens without an end; budgets of 16 must give exactly their text."""
    from tokenizers import Tokenizer

    numbers = np.load(golden / "alone_B-small.npz")
    tokenizer = Tokenizer.from_file(str(golden / "checkpoints/B-small/tokenizer.json"))
    file = tmp_path / "clip.flac"
    clip = wave(int(numbers["clip0_n"]), int(numbers["clip0_seed"]))
    soundfile.write(file, clip, 16_000, subtype="PCM_24")
    source = write_csv(tmp_path / "in.csv", [{"audio": str(file), "user_prompt": "Caption the audio."}])
    prompt = int((numbers["clip0_labels"] == -100).sum()) - 1  # the newline after the answer is no prompt
    expected = numbers["clip0_greedy"].tolist()
    assert not {483, 485} & set(expected)
    answers = infer(
        options(source, golden / "checkpoints/B-small", tmp_path / "out.csv", max_length=prompt + 16)
    )
    assert answers == [tokenizer.decode(expected, skip_special_tokens=True)]


def test_predictions_do_not_depend_on_the_batch(model, tmp_path):
    rows = make_rows(tmp_path / "audio", 9)
    source, backwards = write_csv(tmp_path / "a.csv", rows), write_csv(tmp_path / "b.csv", rows[::-1])
    one = infer(options(source, model, tmp_path / "1.csv", batch_size=1, max_length=80))
    assert len(set(one)) > 3
    assert infer(options(source, model, tmp_path / "4.csv", batch_size=4, max_length=80)) == one
    assert infer(options(backwards, model, tmp_path / "9.csv", batch_size=9, max_length=80)) == one[::-1]


def test_each_row_has_its_own_budget(model, tmp_path, monkeypatch):
    """Rows of very different prompts in one batch: each gets max_length minus its own prompt."""
    monkeypatch.setattr(answering, "end_ids", lambda *_: {511})
    kept, decode = [], ChatTokenizer.decode
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: kept.append(ids) or decode(self, ids))
    rows = make_rows(tmp_path / "audio", 3)
    rows[1]["user_prompt"] = "What is it? " * 5
    source = write_csv(tmp_path / "in.csv", rows)
    infer(options(source, model, tmp_path / "out.csv", max_length=120))
    alone = {}
    for row in rows:
        single = write_csv(tmp_path / "single.csv", [row])
        alone[row["audio"]] = infer(options(single, model, tmp_path / "single-out.csv", max_length=120))[0]
    together = [line[-1] for line in read(tmp_path / "out.csv")[1:]]
    assert together == [alone[row["audio"]] for row in rows]
    assert len({len(ids) for ids in kept[:3]}) == 3


def test_rows_too_long_are_all_reported_before_weights_are_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "load_for_inference", lambda *_, **__: pytest.fail("weights were loaded"))
    rows = make_rows(tmp_path / "audio", 3)
    rows[0]["user_prompt"] = rows[2]["user_prompt"] = "long " * 40
    source = write_csv(tmp_path / "in.csv", rows)
    with pytest.raises(RowsError) as caught:
        infer(options(source, model, tmp_path / "out.csv", max_length=60))
    assert [problem.line for problem in caught.value.problems] == [2, 4]
    assert "must be at least" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A-small", "audio", "in.csv"]


def test_rows_beyond_the_positions_that_a_model_knows_are_warned_of(model, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = 8
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert len(infer(options(make_csv(tmp_path, 2), model, tmp_path / "out.csv", max_new_tokens=2))) == 2
    said = capsys.readouterr().err
    assert f"tokens, and {model} has learnt no more than 8 positions" in said
    assert "or use --window" in said


def test_a_budget_of_one_token_is_enough(model, tmp_path):
    source = make_csv(tmp_path, 1)
    with pytest.raises(RowsError) as caught:
        infer(options(source, model, tmp_path / "out.csv", max_length=10))
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert len(infer(options(source, model, tmp_path / "out.csv", max_length=least))) == 1
    with pytest.raises(RowsError):
        infer(options(source, model, tmp_path / "out.csv", max_length=least - 1))


def test_the_output_keeps_every_column_byte_for_byte(model, tmp_path):
    rows = make_rows(tmp_path / "audio", 2)
    rows = [
        {"id": "0012", "prediction": "old", **{k: row[k] for k in ("audio", "user_prompt")}, "note": note}
        for row, note in zip(rows, ['says "a, b"\nand more', " NA "], strict=True)
    ]
    source = write_csv(tmp_path / "in.csv", rows)
    answers = infer(options(source, model, tmp_path / "out.csv"))
    written = read(tmp_path / "out.csv")
    assert written[0] == ["id", "prediction", "audio", "user_prompt", "note"]
    assert [[*line[:1], *line[2:]] for line in written[1:]] == [
        [row["id"], row["audio"], row["user_prompt"], row["note"]] for row in rows
    ]
    assert [line[1] for line in written[1:]] == answers


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_line_ends_come_out_as_they_came_in(model, tmp_path, bom, end):
    (row,) = make_rows(tmp_path / "audio", 1)
    note = '"a\rb","c\nd\r\n","no"'
    text = f"audio,one,two,three,,{end}{row['audio']},{note},,{end},,,,,{end}"
    (tmp_path / "in.csv").write_bytes(bom + text.encode())
    (answer,) = infer(options(tmp_path / "in.csv", model, tmp_path / "out.csv"))
    expected = io.StringIO(newline="")
    csv.writer(expected).writerow([answer])
    cells = [row["audio"], note.replace('"no"', "no"), expected.getvalue().removesuffix("\r\n")]
    line = ",".join(cells) + end
    written = (tmp_path / "out.csv").read_bytes()
    assert written == bom + f"audio,one,two,three,prediction{end}{line}".encode()


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_another_encoding_comes_out_as_utf_8_with_a_byte_order_mark(model, tmp_path, encoding):
    (row,) = make_rows(tmp_path / "audio", 1)
    note = "这段录音里有一只狗在叫，远处传来雷声，还有人在说话。"
    text = f"sep=;\naudio;note\n{row['audio']};{note}\n"
    (tmp_path / "in.csv").write_bytes(text.encode(encoding))
    infer(options(tmp_path / "in.csv", model, tmp_path / "out.csv"))
    written = (tmp_path / "out.csv").read_bytes()
    assert written.startswith(codecs.BOM_UTF8 + f"audio,note,prediction\n{row['audio']},{note},".encode())


def test_a_workbook_is_never_replaced_by_a_csv(model, tmp_path):
    (row,) = make_rows(tmp_path / "audio", 1)
    book = Workbook()
    for cells in (["audio", "id"], [row["audio"], 7]):
        book.active.append(cells)
    book.save(tmp_path / "in.xlsx")
    before = (tmp_path / "in.xlsx").read_bytes()
    with pytest.raises(InputError, match="inside the input"):
        infer(options(tmp_path / "in.xlsx", model, tmp_path / "in.xlsx"))
    assert (tmp_path / "in.xlsx").read_bytes() == before
    (answer,) = infer(options(tmp_path / "in.xlsx", model, tmp_path / "out.csv"))
    assert read(tmp_path / "out.csv") == [["\ufeffaudio", "id", "prediction"], [row["audio"], "7", answer]]


def test_the_prediction_column_is_appended_when_there_is_none(model, tmp_path):
    row = make_rows(tmp_path / "audio", 1)[0]
    source = write_csv(tmp_path / "in.csv", [{"audio": row["audio"], "x": "1"}])
    infer(options(source, model, tmp_path / "out.csv"))
    assert read(tmp_path / "out.csv")[0] == ["audio", "x", "prediction"]


def test_the_output_may_be_the_input(model, tmp_path):
    source = make_csv(tmp_path, 2)
    answers = infer(options(source, model, source))
    assert [line[-1] for line in read(source)[1:]] == answers
    assert files_below(tmp_path) >= {"train.csv", "train.csv.mdl-toolkit.yaml"}


def test_settings_are_written_beside_the_output_and_can_be_given_back(model, tmp_path):
    settings = options(
        make_csv(tmp_path, 1), model, tmp_path / "out.csv", user_prompt="x: 'y'", max_length=99
    )
    infer(settings)
    assert (
        InferenceOptions(**read_settings(tmp_path / "out.csv.mdl-toolkit.yaml", InferenceOptions)) == settings
    )


def test_no_rows_give_the_header_alone(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("audio,id\n")
    assert infer(options(source, "no/model-is-needed", tmp_path / "out.csv")) == []
    assert read(tmp_path / "out.csv") == [["audio", "id", "prediction"]]


def test_bad_recordings_are_all_reported_and_nothing_is_left(model, tmp_path):
    rows = make_rows(tmp_path / "audio", 3)
    for number in (0, 2):
        (tmp_path / f"bad{number}.wav").write_text("this is text")
        rows[number]["audio"] = str(tmp_path / f"bad{number}.wav")
    source = write_csv(tmp_path / "in.csv", rows)
    before = files_below(tmp_path)
    with pytest.raises(RowsError) as caught:
        infer(options(source, model, tmp_path / "out.csv"))
    assert [problem.line for problem in caught.value.problems] == [2, 4]
    assert files_below(tmp_path) == before


def test_an_output_that_is_a_folder_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="a folder is there"):
        infer(options(make_csv(tmp_path, 1), model, tmp_path))


def test_adapter_and_merged_folder_answer_alike(model, tmp_path):
    source = make_csv(tmp_path, 6)
    outputs = {}
    for merge in (True, False):
        run = tmp_path / f"run-{merge}"
        final = train(train_options(source, model, run, num_epochs=30, merge_lora=merge)).final
        outputs[merge] = infer(options(source, final, tmp_path / f"{merge}.csv", max_length=90))
    assert outputs[True] == outputs[False]
    expected = [line[2] for line in read(source)[1:]]
    assert sum(a == b for a, b in zip(outputs[True], expected, strict=True)) >= 4  # it learnt them by heart
    assert outputs[True] != infer(options(source, model, tmp_path / "base.csv", max_length=90))


def test_an_adapter_whose_base_is_gone(model, tmp_path, monkeypatch):
    source = make_csv(tmp_path, 2)
    final = train(train_options(source, model, tmp_path / "run", merge_lora=False)).final
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="A-small: not a folder here") as caught:
        infer(options(source, final, tmp_path / "out.csv"))
    assert f"mdl-toolkit merge {final} --model-name FOLDER" in str(caught.value)


def test_bf16_base_is_answered_in_float32_on_a_cpu(model, tmp_path):
    MiDashengLMModel.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    loaded = load_for_inference(model, None)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert len(infer(options(make_csv(tmp_path, 2), model, tmp_path / "out.csv"))) == 2


def test_an_adapter_that_cannot_be_used_is_named(model, tmp_path):
    source = make_csv(tmp_path, 2)
    final = train(train_options(source, model, tmp_path / "run", merge_lora=False)).final
    state = load_file(final / "adapter_model.safetensors")
    save_file(
        {name: tensor[:1].clone() for name, tensor in state.items()}, final / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match=r"r / rank_pattern: expected 1, as .* has it, not 4") as caught:
        infer(options(source, final, tmp_path / "out.csv"))
    assert len(str(caught.value)) < 600
    (final / "adapter_model.safetensors").unlink()
    torch.save(state, final / "adapter_model.bin")  # a pickle: never read
    with pytest.raises(ModelError, match=r"no weights \(adapter_model\.safetensors\)"):
        infer(options(source, final, tmp_path / "a/b/out.csv"))
    assert not (tmp_path / "a").exists()


def test_a_recording_is_answered_alone_and_never_replaced(model, tmp_path):
    (row,) = make_rows(tmp_path / "audio", 1)
    (answer,) = infer(options(row["audio"], model, tmp_path / "out.csv", base_dir="/nowhere"))
    assert read(tmp_path / "out.csv") == [["audio", "prediction"], [row["audio"], answer]]
    before = Path(row["audio"]).read_bytes()
    with pytest.raises(InputError, match="lies inside the input"):
        infer(options(row["audio"], model, row["audio"]))
    assert Path(row["audio"]).read_bytes() == before


def test_weights_that_are_cut_are_named_before_recordings_are_converted(model, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "convert_rows", lambda *_, **__: pytest.fail("recordings were converted"))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: no whole safetensors file"):
        infer(options(make_csv(tmp_path, 2), model, tmp_path / "out.csv"))
