"""Tables for the terminal."""

from mdl_toolkit.config.evaluation import EvaluateOptions
from mdl_toolkit.evaluation.evaluate import evaluate
from mdl_toolkit.evaluation.render import align_columns, as_text
from mdl_toolkit.utils.console import width_of
from tests.support.runs import write_csv


def evaluated(folder, references, predictions, **options):
    """Evaluate a file with these rows."""
    pairs = zip(references, predictions, strict=True)
    rows = [{"reference": reference, "prediction": prediction} for reference, prediction in pairs]
    path = str(write_csv(folder / "p.csv", rows))
    return evaluate(EvaluateOptions(input=path, **options))


def test_columns_stand_below_each_other_in_chinese_too(tmp_path, monkeypatch):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    references, predictions = ["狗在叫", "rain"] * 2, ["狗在叫", "rain", "\x1b[31m红", "rain"]
    shown = as_text(evaluated(tmp_path, references, predictions, bootstrap=20)).split("\n\n")
    assert shown[0].startswith("4 行")
    table = shown[1].splitlines()
    assert table[0] == "混淆矩阵（行：参考答案，列：模型回答）"
    assert table[1].split() == ["rain", "狗在叫", "(其他)"]
    assert len({width_of(line) for line in table[1:]}) == 1


def test_of_many_groups_the_largest_are_shown_in_their_order(tmp_path):
    """Of 45 speakers the last one has two rows, all others one."""
    rows = [{"reference": "a", "prediction": "a", "speaker": f"s{number}"} for number in [*range(1, 46), 45]]
    path = str(write_csv(tmp_path / "p.csv", rows))
    found = evaluate(EvaluateOptions(input=path, group_by=("speaker",), metric=("wer",), bootstrap=0))
    lines = as_text(found).split("\n\n")[1].splitlines()
    assert [line.split()[:3] for line in lines[1:41]] == [
        *([f"s{number}", "1", "0.00%"] for number in range(1, 40)),
        ["s45", "2", "0.00%"],
    ]
    assert lines[41:] == ["... and 5 smaller groups"]


def test_what_would_disturb_a_terminal_is_a_dot():
    shown = align_columns([["a\n\x1b[2J", "x" * 60], ["狗", "1"]])
    assert "\x1b" not in shown
    assert [width_of(line) for line in shown.splitlines()] == [6 + 2 + 40] * 2
    assert shown.splitlines()[0].endswith("x…")
