"""A result answers the same through transformers alone, as the README shows it, and through `inference`."""

import pytest
import torch

from mdl_toolkit import demo
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.inference.run import infer
from mdl_toolkit.training.run import train
from tests.support.readme import snippet_answers

PROMPT = {"user_prompt": demo.PROMPT}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The demonstration's model, recordings and training, two of its epochs long, on one thread as there."""
    folder = tmp_path_factory.mktemp("readme")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    demo.lay_out_phrases(folder / "phrases", folder)
    demo.make_tiny_model(folder / "model", folder / "phrases", seed=1)
    yield folder
    torch.set_num_threads(threads)


def answers_of(model, place):
    return infer(
        InferenceOptions(
            input=str(place / "test.csv"), output=str(place / "answers.csv"), model_name=str(model),
            base_dir=str(place / "phrases"), max_new_tokens=16, batch_size=7, **PROMPT,
        )
    )  # fmt: skip


def shorter(code: str) -> str:
    assert "max_new_tokens=64" in code
    return code.replace("max_new_tokens=64", "max_new_tokens=16")


def test_a_model_that_knows_nothing_answers_the_same(place):
    """Its answers are all different and hang by every bit that it hears."""
    answers = answers_of(place / "model", place)
    assert len(answers) == len({*answers}) == 60
    assert snippet_answers(place / "model", place, shorter) == answers


def test_a_merged_result_answers_the_same(place):
    train(
        TrainOptions(
            train_dataset=str(place / "train.csv"), output=str(place / "run"),
            model_name=str(place / "model"), base_dir=str(place / "phrases"), gradient_checkpointing=False,
            lr=2e-3, num_epochs=2, save_steps=0, seed=1, **PROMPT,
        )
    )  # fmt: skip
    answers = answers_of(place / "run/final", place)
    assert snippet_answers(place / "run/final", place, shorter) == answers
    assert len(answers) == 60
    assert len({*answers}) > 3
