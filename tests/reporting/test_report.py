"""The report as a file: what is in it, where it links to, which command makes it; in a browser elsewhere."""

import base64
import io
import json
import os
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import numpy as np
import pytest
import soundfile
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from mdl_toolkit.cli.main import run
from mdl_toolkit.config.evaluation import ReportOptions
from mdl_toolkit.config.inference import InferenceOptions
from mdl_toolkit.inference.run import infer
from mdl_toolkit.reporting import report as report_room
from mdl_toolkit.reporting.audio_links import audio_values
from mdl_toolkit.reporting.plots import draw_confusion, fonts_for
from mdl_toolkit.reporting.report import report
from mdl_toolkit.reporting.run_section import MOST_POINTS, run_values
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.run_folder import read_log
from tests.support.paths import MODEL
from tests.support.recordings import sound
from tests.support.runs import files_below, make_csv, make_rows, train_options, write_csv

PNG = b"\x89PNG\r\n\x1a\n"


def values_of(page):
    """What is in the page's block of JSON."""
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="values">(.*?)</script>', text, re.DOTALL)
    assert "<" not in found
    return json.loads(found)


def cells(column):
    return [column["values"][code] for code in column["codes"]] if isinstance(column, dict) else column


def links(values):
    audio = values["rows"]["audio"]
    return [audio["folder"] + name for name in audio["names"]]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with evaluations."""
    place = tmp_path_factory.mktemp("trained")
    csv = make_csv(place, 8)
    options = train_options(
        csv, MODEL, place / "run", num_epochs=4, eval_dataset=str(csv), eval_steps=3, eval_metric="wer",
        user_prompt="<b>What?</b>",
    )  # fmt: skip
    train(options)
    return place


# --- a run ---------------------------------------------------------------------------------------------


def test_a_training_leaves_its_report(trained):
    values = values_of(trained / "run/report.html")
    lines = read_log(trained / "run/log.jsonl")
    run_part = values["run"]
    assert run_part["curves"]["loss"]["y"] == pytest.approx(
        [x["loss"] for x in lines if "loss" in x], rel=1e-5
    )
    assert run_part["curves"]["loss"]["x"] == list(range(1, 9))
    assert run_part["curves"]["eval_loss"]["x"] == run_part["curves"]["metrics"]["wer"]["x"] == [3, 6, 8]
    assert [line["step"] for line in run_part["evaluations"]] == [3, 6, 8]
    settings = {each["name"]: each for each in run_part["settings"]}
    assert (settings["--lr"]["value"], settings["--lr"]["is_changed"]) == ("0.01", True)
    assert not settings["--seed"]["is_changed"]
    assert settings["--user-prompt"]["value"] == "<b>What?</b>"
    figures = {part["title"]["en"]: part["figures"] for part in run_part["data"]}
    assert [each["value"] for each in figures["training"] if each["title"]["en"] == "rows"] == [8]
    assert len(figures["evaluation"]) == 6
    assert values["rows"] is values["evaluation"] is None
    (best,) = [each["best"] for each in run_part["outcome"] if each["title"]["en"] == "evaluation loss"]
    assert best["value"] == pytest.approx(min(x["eval_loss"] for x in lines if "eval_loss" in x))


def test_a_page_that_cannot_be_made_ends_no_training(tmp_path, monkeypatch, capsys):
    def failing(*words):
        raise RuntimeError("no luck")

    monkeypatch.setattr(report_room, "run_values", failing)
    done = train(train_options(make_csv(tmp_path, 4), MODEL, tmp_path / "run"))
    assert done.final.is_dir()
    assert "warning: report.html cannot be written: no luck" in capsys.readouterr().err
    assert not (tmp_path / "run/report.html").exists()


def test_the_report_of_a_run_can_be_made_again(trained, tmp_path, capsys):
    first = values_of(trained / "run/report.html")
    assert run(["report", str(trained / "run"), "--output", str(tmp_path / "again.html")]) == 0
    again = values_of(tmp_path / "again.html")
    assert {**again, "made": None} == {**first, "made": None}
    assert capsys.readouterr().err == f"report: {tmp_path / 'again.html'}\n"


def test_a_long_run_is_thinned_out_and_what_is_no_number_left_out(tmp_path):
    count = 3 * MOST_POINTS + 5
    lines = [{"step": n, "loss": float(n), "learning_rate": 0.1, "epoch": 1.0} for n in range(1, count + 1)]
    lines[-1]["loss"] = float("nan")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = run_values(tmp_path)["curves"]
    assert MOST_POINTS / 2 < len(curves["loss"]["x"]) <= MOST_POINTS
    assert curves["loss"]["x"][-1] == count - 1
    mean = sum(range(1, count)) / (count - 1)
    assert sum(curves["loss"]["y"]) / len(curves["loss"]["y"]) == pytest.approx(mean, rel=1e-3)


def test_settings_of_another_version_and_a_missing_record_leave_their_parts_out(tmp_path):
    (tmp_path / "mdl-toolkit.yaml").write_text("an_option_that_went: 1\n")
    values = run_values(tmp_path)
    assert values == {
        "settings": [], "base": None, "prompts": [], "data": [], "curves": None, "evaluations": [],
        "outcome": [],
    }  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["mdl-toolkit.yaml", "mdl-toolkit.json", "log.jsonl"])
def test_a_file_of_a_run_that_is_a_fifo_is_refused(tmp_path, capsys, name):
    for each in {"mdl-toolkit.yaml", "log.jsonl"} - {name}:
        (tmp_path / each).touch()
    os.mkfifo(tmp_path / name)
    assert run(["report", str(tmp_path)]) == 1
    assert f"{name}: a FIFO" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    assert run(["report", str(tmp_path / "x")]) == 1
    assert "neither log.jsonl nor mdl-toolkit.yaml is in it" in capsys.readouterr().err
    assert run(["report", str(tmp_path / "y.csv")]) == 1
    assert run(["report", str(tmp_path / "y.csv"), "--predictions", "z.csv"]) == 2
    assert "--predictions" in capsys.readouterr().err
    assert run(["report", str(tmp_path / "x"), "--reference", "z.csv"]) == 2
    assert "--reference" in capsys.readouterr().err
    assert files_below(tmp_path) == set()


# --- predictions -----------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    rows = make_rows(tmp_path / "audio", 4)
    answers = ["rain", "A dog barked", "music and engine noise", "猫在叫"]
    table = [
        {"audio": row["audio"], "reference": row["prediction"], "prediction": answer, "score": str(-number)}
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    write_csv(tmp_path / "p.csv", table)
    return tmp_path


def test_rows_come_worst_first_with_what_evaluate_found(place, capsys):
    assert run(["report", str(place / "p.csv"), "--metric", "wer"]) == 0
    page = place / "p.report.html"
    values = values_of(page)
    rows = values["rows"]
    assert rows["line"] == [5, 3, 2, 4]  # all wrong; a third wrong; right, with the higher score; right
    assert rows["state"] == [0, 0, 1, 1]
    assert rows["errors"][:2] == [1, 1]
    assert cells(rows["prediction"])[0] == "猫在叫"
    assert rows["score"][0] == -3
    (figure,) = values["evaluation"]["figures"]
    assert figure["value"] == pytest.approx(2 / (1 + 3 + 4 + 1))
    assert [(page.parent / unquote(link)).is_file() for link in links(values)] == [True] * 4
    assert links(values)[0].startswith("audio/clip-0-3")


def test_nothing_in_the_page_points_elsewhere(place):
    report(ReportOptions(input=str(place / "p.csv")))
    tags = Tags()
    tags.feed((place / "p.report.html").read_text(encoding="utf-8"))
    assert not [
        attributes for _, attributes in tags.seen if {"src", "href", "style", "onclick"} & {*attributes}
    ]
    (policy,) = [a["content"] for _, a in tags.seen if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; media-src file: data: http: https:; script-src 'sha256-")
    assert "unsafe" not in policy


def test_a_formula_is_text_in_the_page(tmp_path):
    """It is in the values alone, which the page shows as text; in a browser elsewhere."""
    formula = "=cmd|' /C calc'!A0"
    row = {"audio": formula, "reference": formula, "prediction": formula, "group": formula}
    page = report(ReportOptions(input=str(write_csv(tmp_path / "p.csv", [row])), base_dir=str(tmp_path)))
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    assert not [
        attributes for _, attributes in tags.seen if "href" in attributes or "calc" in str(attributes)
    ]
    assert links(values_of(page)) == ["%3Dcmd%7C%27%20/C%20calc%27%21A0"]


def test_without_references_the_answers_are_shown_as_they_are(place, capsys):
    rows = [
        {"audio": "a.wav", "prediction": "x", "error": ""},
        {"audio": "", "prediction": "", "error": "too long"},
    ]
    write_csv(place / "q.csv", rows)
    page = report(ReportOptions(input=str(place / "q.csv")))
    values = values_of(page)
    assert (values["evaluation"], values["rows"]["state"], values["rows"]["reference"]) == (None, None, None)
    assert values["rows"]["line"] == [2, 3]
    assert cells(values["rows"]["error"]) == ["", "too long"]
    said = capsys.readouterr().err
    assert "no references" in said
    assert "1 of 2 recordings is not there" in said


def test_a_run_and_its_predictions_in_one_page_with_pictures(trained, place, capsys):
    words = ["--predictions", str(place / "p.csv"), "--metric", "accuracy", "--png", str(place / "png")]
    assert run(["report", str(trained / "run"), "--output", str(place / "both.html"), *words]) == 0
    values = values_of(place / "both.html")
    assert values["run"]["curves"]
    assert values["rows"]["state"].count(1) == 2
    assert values["rows"]["labels"] == values["evaluation"]["confusion"]["labels"]
    assert files_below(place / "png") == {"loss.png", "confusion.png"}
    for name in ("loss.png", "confusion.png"):
        assert (place / "png" / name).read_bytes().startswith(PNG)
    width, _ = struct.unpack(">II", (place / "png/loss.png").read_bytes()[16:24])
    assert width > 1080  # the metric stands beside the losses


def test_the_page_has_intervals_and_p_of_a_comparison_also_by_group(tmp_path, capsys):
    rows = [{"reference": "ab"[n % 2], "prediction": "a", "seconds": f"{n / 4}"} for n in range(40)]
    write_csv(tmp_path / "p.csv", rows)
    write_csv(tmp_path / "q.csv", [{**row, "prediction": row["reference"]} for row in rows])
    words = ["--compare", str(tmp_path / "q.csv"), "--group-by", "length", "--metric", "accuracy"]
    assert run(["report", str(tmp_path / "p.csv"), *words]) == 0
    values = values_of(tmp_path / "p.report.html")
    (figure,) = values["evaluation"]["figures"]
    assert (figure["value"], figure["other"], figure["difference"]) == (0.5, 1, -0.5)
    assert -1 <= figure["difference_low"] < -0.5 < figure["difference_high"] < 0
    assert 0 < figure["p_value"] < 0.01
    groups = values["evaluation"]["groups"]
    assert len(groups) == 4
    for group in groups:
        (figure,) = group["figures"]
        assert figure["low"] < figure["value"] < figure["high"]
        assert figure["other"] == 1
        assert figure["difference_low"] <= figure["difference"] <= figure["difference_high"]
    assert values["rows"]["groups"][0]["names"] == [group["name"] for group in groups]
    assert "has an accuracy of 50.00%" in values["evaluation"]["notes"][0]["en"]


def test_a_confusion_picture_of_labels_in_any_script(tmp_path):
    draw_confusion(["", "狗", "$x$"], [[1, 0, 0, 0], [0, 2, 1, 0], [0, 0, 3, 9]], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


def test_a_picture_says_which_characters_no_font_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: [])
    draw_confusion(["狗", "猫", "b"], [[1, 0, 0, 0], [0, 2, 1, 0], [0, 0, 3, 0]], tmp_path / "c.png")
    assert (
        "warning: no installed font has 狗 猫: the picture shows boxes; install one"
        in capsys.readouterr().err
    )


def test_a_picture_finds_the_font_that_has_its_characters(tmp_path, monkeypatch, capsys):
    """A capital only in STIX, of the fonts that come with matplotlib; the first file is no font at all."""
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    letters = {
        font: {*FT2Font(str(folder / font)).get_charmap()} for font in ("DejaVuSans.ttf", "STIXGeneral.ttf")
    }
    only = chr(
        min(code for code in letters["STIXGeneral.ttf"] - letters["DejaVuSans.ttf"] if chr(code).isalpha())
    )
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    there = [str(tmp_path / "bad.ttf"), str(folder / "STIXGeneral.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: there)
    assert fonts_for(f"abc {only}") == ["DejaVu Sans", "STIXGeneral"]
    assert fonts_for("abc é") == ["DejaVu Sans"]
    # Neither markup nor the length of a label spoils the picture.
    draw_confusion(["$\\x$", only * 1000], [[1, 0, 0], [0, 2, 0]], tmp_path / "c.png")
    assert capsys.readouterr().err == ""
    width, height = struct.unpack(">II", (tmp_path / "c.png").read_bytes()[16:24])
    assert (width, height) == (2 * 50 + 288, 2 * 50 + 288)


def test_evaluate_writes_the_page_too(place, capsys):
    page = place / "page.html"
    words = ["evaluate", str(place / "p.csv"), "--metric", "wer", "--report", str(page)]
    assert run([*words, "--embed-audio", "1"]) == 0
    rows = values_of(page)["rows"]
    (address,) = rows["audio"]["embedded"].values()
    assert [*rows["audio"]["embedded"]] == ["0"]
    assert re.match(r"data:audio/(mpeg|flac);base64,", address)
    assert run([*words[:-1], str(place / "p.csv")]) == 1
    assert "--report" in capsys.readouterr().err
    assert (place / "p.csv").read_text(encoding="utf-8").startswith("audio,")


@pytest.mark.parametrize("embedded", [False, True])
def test_an_embedded_recording_is_the_recording(tmp_path, embedded, monkeypatch):
    """Also where libsndfile makes no MP3."""
    if embedded:
        monkeypatch.setattr(soundfile, "available_formats", dict)
    (row,) = make_rows(tmp_path, 1)
    found = audio_values([row], None, tmp_path / "p.html", 1)["embedded"][0]
    kind, content = found.split(";base64,")
    assert kind == ("data:audio/flac" if embedded else "data:audio/mpeg")
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    expected, _ = soundfile.read(row["audio"])
    assert rate == 16_000
    assert len(samples) == pytest.approx(len(expected), abs=3000)


def test_relative_paths_start_where_the_inference_said(trained, tmp_path, monkeypatch):
    """What `inference` wrote beside its output tells where recordings are, whoever makes the page."""
    make_rows(tmp_path / "far/audio", 2)
    rows = [
        {"audio": f"audio/clip-0-{n}.wav", "user_prompt": "What?", "prediction": "rain"} for n in range(2)
    ]
    write_csv(tmp_path / "in.csv", rows)
    options = InferenceOptions(
        input=str(tmp_path / "in.csv"), output=str(tmp_path / "out/p.csv"),
        model_name=str(trained / "run/final"), base_dir=str(tmp_path / "far"),
        report=str(tmp_path / "pages/p.html"),
    )  # fmt: skip
    infer(options)
    values = values_of(tmp_path / "pages/p.html")
    assert cells(values["rows"]["reference"]) == ["rain", "rain"]  # of the input, whose column was replaced
    assert all((tmp_path / "pages" / unquote(link)).is_file() for link in links(values))
    page = report(ReportOptions(input=str(tmp_path / "out/p.csv")))
    assert all((page.parent / unquote(link)).is_file() for link in links(values_of(page)))


def test_an_inference_without_references_or_of_a_folder_makes_its_page(trained, tmp_path):
    make_rows(tmp_path / "audio", 2)
    options = InferenceOptions(
        input=str(tmp_path / "audio"), output=str(tmp_path / "p.csv"), model_name=str(trained / "run/final"),
        user_prompt="What?", report=str(tmp_path / "p.html"),
    )  # fmt: skip
    infer(options)
    values = values_of(tmp_path / "p.html")
    assert values["rows"]["state"] is None
    assert all((tmp_path / unquote(link)).is_file() for link in links(values))


def test_no_rows_make_no_page(trained, tmp_path):
    write_csv(tmp_path / "in.csv", [{"audio": "a.wav"}])
    (tmp_path / "in.csv").write_text("audio\n", encoding="utf-8")
    options = InferenceOptions(
        input=str(tmp_path / "in.csv"), output=str(tmp_path / "p.csv"), model_name=str(trained / "run/final"),
        report=str(tmp_path / "p.html"),
    )  # fmt: skip
    assert infer(options) == []
    assert (tmp_path / "p.csv").read_text(encoding="utf-8") == "audio,prediction\n"
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("there", ["input", "output", "folder"])
def test_a_page_in_the_place_of_something_else_is_refused_before_any_work(tmp_path, capsys, there):
    csv = make_csv(tmp_path, 2)
    place = {"input": csv, "output": tmp_path / "p.csv", "folder": tmp_path}[there]
    words = ["inference", str(csv), "--output", str(tmp_path / "p.csv"), "--model-name", str(MODEL)]
    assert run([*words, "--report", str(place)]) == 1
    said = {
        "input": f"inside the input {csv};",
        "output": f"inside --output {place};",
        "folder": "a folder is",
    }
    error = capsys.readouterr().err
    assert error.startswith(f"error: --report {place}: ")
    assert said[there] in error
    assert not (tmp_path / "p.csv").exists()


def test_segments_are_played_alone(tmp_path, monkeypatch):
    """Links name the seconds; what is embedded is the segment, of one channel if that is named."""
    monkeypatch.setattr(soundfile, "available_formats", dict)
    samples = np.stack([sound(3.0, 16_000, 1), sound(3.0, 16_000, 2)], 1)
    soundfile.write(tmp_path / "call.wav", samples, 16_000)
    samples, _ = soundfile.read(tmp_path / "call.wav")
    times = [("1.5", "2.25", "left"), ("1", "", ""), ("", "2", "2"), ("", "", ""), ("2", "9", "")]
    rows = [{"audio": "call.wav", "start": start, "end": end, "channel": side} for start, end, side in times]
    rows.append({"audio": "https://example.org/x.wav", "start": "1234.567"})
    found = audio_values(rows, str(tmp_path), tmp_path / "p.html", 5)
    assert [found["folder"] + name for name in found["names"]] == [
        "call.wav#t=1.5,2.25", "call.wav#t=1.0", "call.wav#t=0.0,2.0", "call.wav", "call.wav#t=2.0,9.0",
        "https://example.org/x.wav#t=1234.567",
    ]  # fmt: skip
    expected = [samples[24_000:36_000, 0], samples[16_000:].mean(1), samples[:32_000, 1], samples.mean(1)]
    assert found["embedded"].keys() == {0, 1, 2, 3}
    for row, part in enumerate(expected):
        content = base64.b64decode(found["embedded"][row].partition(";base64,")[2])
        assert np.abs(soundfile.read(io.BytesIO(content))[0] - part).max() < 1e-4


def test_addresses_and_odd_names(tmp_path):
    names = [
        "https://u:p@example.org/a b.wav",
        "HTTP://example.org/x",
        "",
        "a/50%#?.wav",
        "a:b.wav",
        str(Path.home()),
        "~nobody.wav",
    ]
    found = audio_values([{"audio": name} for name in names], str(tmp_path), tmp_path / "sub/p.html")
    shown = [found["folder"] + name if name else "" for name in found["names"]]
    assert shown[:5] == [
        "https://example.org/a b.wav", "HTTP://example.org/x", "", "../a/50%25%23%3F.wav", "../a%3Ab.wav"
    ]  # fmt: skip
    assert (tmp_path / "sub" / unquote(shown[5])).resolve() == Path.home().resolve()
    assert shown[6] == "../~nobody.wav"
