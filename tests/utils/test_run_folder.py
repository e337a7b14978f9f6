"""A run's log: figures by name, line by line; what is cut off is passed over, what was changed is told."""

import json
import re

import pytest

from mdl_toolkit.cli.main import run
from mdl_toolkit.errors import InputError
from mdl_toolkit.training import run as training
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import LOG, read_log
from tests.support.paths import MODEL
from tests.support.runs import make_csv, train_options

GOOD = {"step": 1, "loss": 2.5, "learning_rate": 0.0, "epoch": 0.5}
WRONG = [
    ({**GOOD, "loss": None}, "line.loss: expected a number, not null"),
    ({**GOOD, "loss": "2.5"}, "line.loss: expected a number, not '2.5'"),
    ({**GOOD, "eval_loss": [1]}, "line.eval_loss: expected a number, not [1]"),
    ({**GOOD, "epoch": {}}, "line.epoch: expected a number, not {}"),
    ({**GOOD, "step": True}, "line.step: expected a number, not true"),
    ({**GOOD, "step": 1.5}, "step: expected a whole number"),
    ({**GOOD, "step": -1}, "step: expected a whole number"),
    ({"loss": 2.5}, "step is missing"),
    ([1], "line: expected an object, not [1]"),
    (None, "line: expected an object, not null"),
    (5, "line: expected an object, not 5"),
]


def test_lines_that_are_cut_off_are_passed_over(tmp_path):
    more = {**GOOD, "step": 2, "loss": float("nan")}
    lines = [json.dumps(GOOD), json.dumps(more)[:20], "[" * 100_000, json.dumps(more), json.dumps(GOOD)[:9]]
    (tmp_path / LOG).write_text("\n".join(lines))
    assert str(read_log(tmp_path / LOG)) == str([GOOD, more])


@pytest.mark.parametrize(("line", "reason"), WRONG)
def test_a_line_that_was_changed_is_told_by_its_number(tmp_path, line, reason):
    (tmp_path / LOG).write_text(f"{json.dumps(GOOD)}\n{json.dumps(line)}\n")
    with pytest.raises(InputError, match=re.escape(f"{LOG}, line 2: {reason}")):
        read_log(tmp_path / LOG)


def test_a_run_that_goes_on_and_a_report_refuse_it_at_the_start(tmp_path, monkeypatch, capsys):
    options = train_options(
        make_csv(tmp_path, 8),
        MODEL,
        tmp_path / "run",
        save_steps=1,
        resume_from_checkpoint=True,
        verify=False,
    )
    train(options)
    log = tmp_path / "run" / LOG
    first, *others = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps({**json.loads(first), "loss": None}), *others, ""]))
    before = log.read_bytes()
    # Loading weights is an error: what is refused must be refused before.
    monkeypatch.setattr(training, "load_model", None)
    with pytest.raises(InputError, match=r"log\.jsonl, line 1: line\.loss: expected a number, not null"):
        train(options)
    assert log.read_bytes() == before
    capsys.readouterr()
    assert run(["report", str(tmp_path / "run")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {log}, line 1: line.loss: expected a number, not null")
