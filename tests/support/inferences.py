"""Inferences that tests run, and ways to stop them."""

import csv

import pytest

from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.inference.generate import Answerer
from mdl_toolkit.inference.run import infer


def infer_options(source, model, output, **changes):
    settings = {"batch_size": 4, "max_length": 90, "num_workers": 1}
    return InferenceOptions(
        input=str(source), output=str(output), model_name=str(model), **{**settings, **changes}
    )


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stop_after(monkeypatch, count, problem=KeyboardInterrupt, kind=Answerer):
    """Let the engine fail when it has given so many answers; what it was asked is kept."""
    asked, answers = [], kind.answers

    def some(self, questions):
        def noted():
            for question in questions:
                asked.append(question.key)
                yield question

        for number, answer in enumerate(answers(self, noted())):
            if number == count:
                raise problem
            yield answer

    monkeypatch.setattr(kind, "answers", some)
    return asked


def stopped(monkeypatch, count, options, kind=Answerer):
    with monkeypatch.context() as context:
        stop_after(context, count, kind=kind)
        with pytest.raises(KeyboardInterrupt):
            infer(options)
