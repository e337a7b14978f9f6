"""`loss.png`: a picture of what log.jsonl holds, also of a resumed run, and never the end of a run."""

import json
import struct

import pytest
from matplotlib.figure import Figure

from mdl_toolkit.reporting.plots import plot
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import read_log
from tests.support.paths import MODEL
from tests.support.runs import files_below, make_csv, train_options

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    made, real = [], Figure.savefig

    def saving(self, *words, **more):
        made.append(self)
        return real(self, *words, **more)

    monkeypatch.setattr(Figure, "savefig", saving)
    return made


def write_log(folder, lines):
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def drawn(figure):
    """What each line shows, by its name in the legend."""
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_it_shows_what_the_log_holds(tmp_path, figures):
    csv, output = make_csv(tmp_path, 8), tmp_path / "run"
    options = train_options(
        csv, MODEL, output, num_epochs=4, eval_dataset=str(csv), eval_steps=3, warmup_steps=2
    )
    train(options)
    picture = (output / "loss.png").read_bytes()
    assert picture.startswith(PNG)
    assert struct.unpack(">II", picture[16:24]) == (1080, 600)
    lines = read_log(output / "log.jsonl")
    shown, steps = drawn(figures[0]), list(range(1, 9))
    assert shown["training loss, each step"] == (steps, [line["loss"] for line in lines if "loss" in line])
    assert shown["learning rate"][1] == [line["learning_rate"] for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert shown["evaluation loss"] == ([3, 6, 8], evaluations)
    titles = {axes.get_ylabel() for axes in figures[0].axes}
    assert titles == {"loss", "learning rate"}


def test_the_smoothed_loss_is_a_mean_of_what_was(tmp_path, figures):
    losses = [4.0, 2.0, 3.0, 1.0]
    write_log(tmp_path, [{"step": n, "loss": v, "learning_rate": 0.1} for n, v in enumerate(losses, 1)])
    plot(tmp_path)
    shown = drawn(figures[0])
    expected = []
    for last in range(4):
        weights = [0.9 ** (last - n) for n in range(last + 1)]
        expected.append(sum(w * v for w, v in zip(weights, losses)) / sum(weights))  # noqa: B905
    assert shown["training loss, smoothed"][1] == pytest.approx(expected)
    assert "evaluation loss" not in shown


def test_a_resumed_runs_picture_is_the_unbroken_runs(tmp_path):
    csv = make_csv(tmp_path, 8)
    settings = {"save_steps": 3, "num_epochs": 4}
    train(train_options(csv, MODEL, tmp_path / "whole", **settings))
    train(train_options(csv, MODEL, tmp_path / "run", **settings))
    (tmp_path / "run/loss.png").unlink()
    checkpoint = str(tmp_path / "run/checkpoint-3")
    train(train_options(csv, MODEL, tmp_path / "run", resume_from_checkpoint=checkpoint, **settings))
    assert (tmp_path / "run/loss.png").read_bytes() == (tmp_path / "whole/loss.png").read_bytes()


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), ImportError("no matplotlib")])
def test_a_picture_that_cannot_be_made_ends_nothing(tmp_path, monkeypatch, capsys, problem):
    def failing(self, file, **more):
        file.write_bytes(PNG)
        raise problem

    monkeypatch.setattr(Figure, "savefig", failing)
    output = tmp_path / "run"
    done = train(train_options(make_csv(tmp_path, 4), MODEL, output))
    assert done.final.is_dir()
    reason = getattr(problem, "strerror", None) or problem
    assert f"warning: loss.png cannot be drawn: {reason}\n" in capsys.readouterr().err
    assert {path.name for path in output.iterdir()} == {
        ".mdl-toolkit-files.json", "checkpoint-1", "final", "log.jsonl", "mdl-toolkit.json",
        "mdl-toolkit.yaml",
        "report.html",
    }  # fmt: skip


def test_an_earlier_picture_stays_until_there_is_a_new_one(tmp_path, monkeypatch, capsys):
    write_log(tmp_path, [{"step": 1, "loss": 2.0, "learning_rate": 0.1}])
    plot(tmp_path)
    before = (tmp_path / "loss.png").read_bytes()

    def failing(self, file, **more):
        file.write_bytes(PNG)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", failing)
        plot(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == before
    assert files_below(tmp_path) == {"log.jsonl", "loss.png"}
    assert "cannot be drawn" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [None, [], [{"step": 1, "eval_loss": 2.0}]])
def test_nothing_to_show_is_no_picture(tmp_path, capsys, lines):
    if lines is not None:
        write_log(tmp_path, lines)
    plot(tmp_path)
    assert not (tmp_path / "loss.png").exists()
    assert capsys.readouterr().err == ""
