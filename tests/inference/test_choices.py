"""Choices: read from a file, scored as by a pass over each, and told in columns."""

from dataclasses import replace

import pytest
import torch

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.data.collate import collate_prompts
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import InputError, RowsError
from mdl_toolkit.inference.generate import Question, embed_prompts
from mdl_toolkit.inference.run import infer
from mdl_toolkit.model.decoding_batch import DecodingBatch
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.inferences import infer_options as options
from tests.support.inferences import table
from tests.support.questions import load_checkpoint as load
from tests.support.questions import questions, scored_slowly
from tests.support.runs import copy_checkpoint, make_csv


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


@pytest.mark.parametrize("name", ["A-small", "B-small", "B-small-tied"])
def test_choices_are_scored_as_by_a_pass_over_each(golden, name):
    model, _ = load(golden, name)
    asked = [*questions(model, 3)]
    choices = [[5], [5, 6], [5, 6, 7, 8], [9, 9, 9], [400, 3]]
    prompts = collate_prompts([q.sample for q in asked], 0)
    rows = DecodingBatch(model.decoder)
    with torch.inference_mode():
        logits = rows.admit(embed_prompts(model, prompts), prompts.lengths, 3, 0)
        scores = rows.score(logits, choices)
        again = rows.score(logits, choices)
    assert torch.equal(scores, again)
    for number, question in enumerate(asked):
        for place, choice in enumerate(choices):
            assert scores[number, place].item() == pytest.approx(
                scored_slowly(model, question, choice), abs=2e-4
            )


@pytest.mark.parametrize("by_length", [False, True])
def test_choices_are_those_a_plain_loop_finds_best(model, tmp_path, by_length):
    texts = ["rain", "a dog that barks and barks", "click", "狗在叫"]
    (tmp_path / "choices.txt").write_text("\n".join([*texts, "", " "]), encoding="utf-8-sig")
    source = make_csv(tmp_path, 5)
    changes = {"choices": str(tmp_path / "choices.txt"), "top_k": 3, "normalize_scores": by_length}
    found = infer(options(source, model, tmp_path / "out.csv", **changes))
    rows = table(tmp_path / "out.csv")
    assert [row["prediction"] for row in rows] == found
    assert list(rows[0])[-6:] == ["prediction", "score", "prediction_2", "score_2", "prediction_3", "score_3"]
    convert_dataset(ConvertOptions(input=str(source), output=str(tmp_path / "d"), model_name=str(model)))
    dataset, tokenizer = ConvertedDataset(tmp_path / "d"), ChatTokenizer(read_tokenizer_files(model))
    loaded = load_model(model, dtype=torch.float32, device=torch.device("cpu")).eval()
    for number, row in enumerate(rows):
        sample = dataset[number]
        prompt = int((sample.labels == -100).sum()) - 1  # the newline after the answer is no prompt
        bare = replace(sample, input_ids=sample.input_ids[:prompt], labels=sample.labels[:prompt])
        scores = {}
        for text in texts:
            ids = tokenizer.answer_ids(text)
            total = scored_slowly(loaded, Question(0, bare, 1), ids)
            scores[text] = total / len(ids) if by_length else total
        best = sorted(scores, key=lambda text: -scores[text])[:3]
        assert [row["prediction"], row["prediction_2"], row["prediction_3"]] == best
        assert float(row["score"]) == pytest.approx(scores[best[0]], abs=2e-3)
    again = infer(options(source, model, tmp_path / "one.csv", **{**changes, "batch_size": 1}))
    assert again == found


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no such file"), ("one\n", "at least two"), ("a\nb\n a \n", "twice"), (b"\xff\xfe\xff", "UTF-8")],
)
def test_choices_that_cannot_be_used(model, tmp_path, text, words):
    file = tmp_path / "choices.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        infer(options(make_csv(tmp_path, 1), model, tmp_path / "out.csv", choices=str(file)))


def test_choices_too_long_for_a_row_s_room(model, tmp_path):
    """Not the prompt is too long, but it with the longest choice; what is asked for is the least."""
    choices = tmp_path / "choices.txt"
    choices.write_text("rain\na dog that barks\nclick\n")
    given = {"choices": str(choices)}
    source = make_csv(tmp_path, 1)
    with pytest.raises(RowsError, match="prompt alone") as caught:
        infer(options(source, model, tmp_path / "out.csv", max_length=5))
    alone = int(str(caught.value).rsplit(" ", 1)[1]) - 1
    with pytest.raises(RowsError, match="and the longest choice 'a dog that barks' [0-9]+ more; ") as caught:
        infer(options(source, model, tmp_path / "out.csv", max_length=alone + 1, **given))
    assert f"the prompt takes {alone} tokens and" in str(caught.value)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert least > alone + 3
    assert len(infer(options(source, model, tmp_path / "out.csv", max_length=least, **given))) == 1
    with pytest.raises(RowsError, match=f"--max-length {least - 1} must"):
        infer(options(source, model, tmp_path / "out.csv", max_length=least - 1, **given))
    with pytest.raises(InputError, match=f"--max-new-tokens 2: .* takes {least - alone} tokens"):
        infer(options(source, model, tmp_path / "out.csv", max_new_tokens=2, **given))
    assert len(infer(options(source, model, tmp_path / "o.csv", max_new_tokens=least - alone, **given))) == 1


@pytest.mark.parametrize("place", ["output", "report"])
def test_the_choices_are_not_written_over(model, tmp_path, place):
    file = tmp_path / "choices.txt"
    file.write_text("rain\nwind\n", encoding="utf-8")
    settings = options(make_csv(tmp_path, 1), model, tmp_path / "out.csv", choices=str(file))
    with pytest.raises(InputError, match=f"--{place} "):
        infer(replace(settings, **{place: str(file)}))
    assert file.read_text(encoding="utf-8") == "rain\nwind\n"


def test_choices_need_room_for_the_longest(model, tmp_path):
    (tmp_path / "choices.txt").write_text("rain\n" + "a very long answer " * 5 + "\n", encoding="utf-8")
    with pytest.raises(RowsError, match="must be at least") as caught:
        infer(
            options(make_csv(tmp_path, 1), model, tmp_path / "o.csv", choices=str(tmp_path / "choices.txt"))
        )
    least = int(str(caught.value).rsplit(" ", 1)[1])
    settings = options(
        tmp_path / "train.csv", model, tmp_path / "o.csv", choices=str(tmp_path / "choices.txt")
    )
    assert len(infer(replace(settings, max_length=least))) == 1
    with pytest.raises(RowsError):
        infer(replace(settings, max_length=least - 1))
