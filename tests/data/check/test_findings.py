"""Every kind of spoilt copy found and named by its row, nothing found on the clean phrases."""

import numpy as np
import pytest
import soundfile

from mdl_toolkit.audio.loading import load
from mdl_toolkit.data.check.findings import Findings
from mdl_toolkit.data.check.rows import FACTS, Inspected, looks_mangled
from tests.support.checks import COMMENTED, UNUSABLE, bad_lines, found_in
from tests.support.runs import write_csv
from tests.support.spoilt import phrases

# --- what is found ---------------------------------------------------------------------------------------


def test_nothing_is_found_on_the_clean_phrases(run, tmp_path):
    tables = []
    for name in ("train", "test"):
        tables.append(write_csv(tmp_path / f"{name}.csv", phrases(f"{name}.csv")))
    done = run(*tables, "--json")
    assert (done.status, done.err) == (0, "".join(map(COMMENTED.format, tables)))
    for file, rows in zip(done.figures["files"], (180, 60), strict=True):
        assert (file["findings"], file["bad"]["rows"], file["rows"]) == ([], 0, rows)


def test_every_kind_of_spoilt_copy_is_found_and_named_by_its_row(run, spoilt):
    train, held = spoilt
    done = run(train.path, held.path, "--json")
    ours, theirs = done.figures["files"]
    expected = {kind: lines for kind, lines in train.lines.items() if kind not in (*UNUSABLE, "wide")}
    assert found_in(ours) == {**expected, "unbalanced": []}
    assert found_in(theirs) == {**held.lines, "unbalanced": []}
    assert ours["bad"]["lines"] == sorted(line for kind in UNUSABLE for line in train.lines[kind])
    assert ours["rows"] == len(train.rows) - 4
    assert theirs["bad"]["rows"] == 0
    assert done.status == 1
    said = "".join(map(COMMENTED.format, (train.path, held.path)))
    assert done.err == f"{said}error: {train.path}: 4 rows cannot be used\n"


def test_details_lead_to_the_other_row(run, spoilt):
    train, held = spoilt
    ours, theirs = (
        {each["name"]: each.get("details") for each in file["findings"]}
        for file in run(train.path, held.path, "--json").figures["files"]
    )
    assert (ours["duplicate"], ours["contradiction"], ours["other_prompt"]) == ([5], [6], [7])
    assert (theirs["leak"], theirs["leak_other_text"]) == ([8], [9])
    samples, _ = soundfile.read(train.rows[train.lines["clipped"][0] - 2]["audio"], dtype="int16")
    assert ours["clipped"] == [pytest.approx(np.mean(np.abs(samples.astype(int)) >= 32767), abs=1e-4)]


def test_sources_are_those_of_the_files(run, spoilt):
    train, _ = spoilt
    usable = [row for number, row in enumerate(train.rows) if number + 2 not in bad_lines(train)]
    infos = [soundfile.info(row["audio"]) for row in usable]
    file = run(train.path, "--json").figures["files"][0]
    for name, of in (("rates", "samplerate"), ("channels", "channels"), ("formats", "format")):
        values = [str(getattr(info, of)) for info in infos]
        assert file[name] == {value: values.count(value) for value in set(values)}
    assert file["rates"]["96000"] == file["channels"]["2"] == 1
    seconds = [len(load(row["audio"]).samples) / 16_000 for row in usable]
    assert file["seconds"] == pytest.approx(sum(seconds))
    below = 0.0
    for edge, rows in zip(file["lengths"]["below_seconds"], file["lengths"]["rows"], strict=True):
        assert rows == sum(below <= length < (edge or np.inf) for length in seconds)
        below = edge or below


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("0012", True), ("1.0", True), ("+5", True), ("1e3", True), ("1,000", True), (".5", True),
        ("3/4", True), ("2024-01-05", True), ("12345678901234567", True), (" 007", True), ("12", False),
        ("0", False), ("3.14", False), ("-5", False), ("0.5", False), ("nan", False), ("three", False),
        ("", False), ("1.2.3", False), ("12 cats", False),
    ],
)  # fmt: skip
def test_numbers_that_a_spreadsheet_would_rewrite(answer, expected):
    assert looks_mangled(answer) is expected


@pytest.mark.parametrize(
    ("answer", "prompt", "is_found"),
    [
        ("=cmd|' /C calc'!A0", "What?", True), ("yes", "=1+1", True), (" =1", "What?", True),
        ("@SUM(A1)", "What?", True), ("-2+3+cmd|' /C calc'!A0", "What?", True), ("+HYPERLINK(1)", "", True),
        ("-5", "+3", False), ("- one, two", "a = b", False), ("@anna hello", "What?", False),
    ],
)  # fmt: skip
def test_formulas_are_named_and_kept_by_write_fixed(run, tmp_path, answer, prompt, is_found):
    rows = [{**row, "user_prompt": "What?", "prediction": "b"} for row in phrases("train.csv")[:3]]
    rows[1] |= {"user_prompt": prompt, "prediction": answer}
    source = write_csv(tmp_path / "x.csv", rows)
    file = run(source, "--json", "--write-fixed", str(tmp_path / "y.csv")).figures["files"][0]
    found = {each["name"]: each["lines"] for each in file["findings"]}
    assert ("formula" in found) is is_found
    assert found.get("formula", [3]) == [3]
    assert (tmp_path / "y.csv").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("prompts", "pairs"),
    [
        (["Say it.", "Say it"], 1), (["Question 1", "Question 2"], 0), (["Question 1", "Question 12"], 0),
        (["What?", "Who?"], 0), (["colour", "color", "colours"], 2), (["什么语言？", "什麽语言？"], 1),
    ],
)  # fmt: skip
def test_prompts_one_letter_apart(run, tmp_path, prompts, pairs):
    clips = phrases("train.csv")
    rows = [{**clip, "user_prompt": prompt} for clip, prompt in zip(clips, prompts, strict=False)]
    file = run(write_csv(tmp_path / "x.csv", rows), "--json").figures["files"][0]
    assert sum(len(each.get("pairs", [])) for each in file["findings"]) == pairs


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        (["yes"] * 9, "identical_answers"),
        (["yes"] * 30 + ["no"] * 3, "unbalanced"),
        (["a", "b", "c"] * 3, None),
    ],
)
def test_answers_that_teach_little(run, tmp_path, answers, name):
    rows = [{**row, "prediction": a} for row, a in zip(phrases("train.csv"), answers, strict=False)]
    file = run(write_csv(tmp_path / "x.csv", rows), "--json").figures["files"][0]
    assert [each["name"] for each in file["findings"]] == [name] * (name is not None)
    assert file["answers"]["distinct"] == len(set(answers))
    assert dict(file["answers"]["classes"]) == {each: answers.count(each) for each in answers}


@pytest.mark.parametrize(
    "answer", ["1月2日", "2-Jan", "Jan-26", "#NAME?", "####", "TRUE", "FALSE", "1.23E+11"]
)
def test_answers_that_excel_has_destroyed(run, tmp_path, answer):
    rows = [
        {**row, "prediction": text} for row, text in zip(phrases("train.csv"), [answer, "x"], strict=False)
    ]
    found = found_in(run(write_csv(tmp_path / "x.csv", rows), "--json").figures["files"][0])
    assert found == {"excel_answer": [2]}


@pytest.mark.parametrize("answer", ["true", "True", "Jan", "1e3 Hz", "#1", "2-January", "March 2"])
def test_answers_that_it_has_not(run, tmp_path, answer):
    rows = [
        {**row, "prediction": text} for row, text in zip(phrases("train.csv"), [answer, "x"], strict=False)
    ]
    assert found_in(run(write_csv(tmp_path / "x.csv", rows), "--json").figures["files"][0]) == {}


def test_classes_that_are_spelt_in_two_ways_and_those_that_training_never_shows(run, tmp_path):
    clips, answers = phrases("train.csv"), ["Yes", "no", "ＮＯ", "yes"] * 2 + ["no"] * 4
    rows = [{**clip, "prediction": text} for clip, text in zip(clips, answers, strict=False)]
    train = write_csv(tmp_path / "train.csv", rows)
    pairs = zip(phrases("test.csv"), ["yes", "maybe", "No"], strict=False)
    held = write_csv(tmp_path / "eval.csv", [{**clip, "prediction": text} for clip, text in pairs])
    done = run(train, held, "--json")
    ours, theirs = done.figures["files"]
    (near,) = (each for each in ours["findings"] if each["name"] == "near_answers")
    assert [pair["answers"] for pair in near["pairs"]] == [["no", "ＮＯ"], ["Yes", "yes"]]
    assert [pair["lines"] for pair in near["pairs"]] == [[3, 4], [2, 5]]
    assert near["rows"] == 4
    assert found_in(theirs) == {"unseen_answer": [3, 4]}
    assert "'Yes' (2 from line 2), 'yes' (2 from line 5)" in run(train).out


def test_an_imbalance_names_the_answers(run, tmp_path):
    rows = [{**row, "prediction": "yes"} for row in phrases("train.csv")[:33]]
    for row in rows[:3]:
        row["prediction"] = "no"
    table = write_csv(tmp_path / "x.csv", rows)
    (found,) = run(table, "--json").figures["files"][0]["findings"]
    assert found["answers"] == [["yes", 30], ["no", 3]]
    assert "\n    'yes' x 30, 'no' x 3\n" in run(table).out


@pytest.mark.parametrize(
    ("prompt", "is_mark"),
    [
        ("<audio> What?", True), ("<|AUDIO|>What?", True), ("<|audio_bos|><|AUDIO|><|audio_eos|>", True),
        ("</speech>", True), ("<Audio 1>", True), ("the audio: what?", False), ("a < b > c", False),
    ],
)  # fmt: skip
def test_marks_of_recordings_in_prompts(run, tmp_path, prompt, is_mark):
    table = write_csv(tmp_path / "x.csv", [{**phrases("train.csv")[0], "user_prompt": prompt}])
    assert ("mark_prompt" in found_in(run(table, "--json").figures["files"][0])) is is_mark


def test_copies_at_another_level_are_named_within_a_file_and_across(run, tmp_path):
    clean, other = phrases("train.csv")[:4], phrases("test.csv")[:2]
    samples, rate = soundfile.read(clean[1]["audio"], dtype="float32")
    soundfile.write(tmp_path / "quiet.wav", samples * 0.3, rate, subtype="PCM_16")
    copy = {**clean[1], "audio": str(tmp_path / "quiet.wav")}
    train = write_csv(tmp_path / "train.csv", [*clean, copy])
    ours, theirs = run(train, write_csv(tmp_path / "e.csv", [*other, copy]), "--json").figures["files"]
    (found,) = (each for each in ours["findings"] if each["name"] == "copy")
    assert (found["lines"], found["details"]) == ([6], [3])
    assert found_in(theirs)["leak"] == [4]
    assert "leak_copy" in found_in(theirs)
    _, theirs = run(
        write_csv(tmp_path / "t.csv", clean), write_csv(tmp_path / "e.csv", [*other, copy]), "--json"
    ).figures["files"]
    assert found_in(theirs)["leak_copy"] == [4]


def test_a_few_samples_at_full_scale_are_no_finding(run, tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 160_000)
    samples[5_000:5_010] = 1.0
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="PCM_16")
    table = write_csv(tmp_path / "x.csv", [{"audio": str(tmp_path / "a.wav"), "prediction": "x"}])
    assert found_in(run(table, "--json").figures["files"][0]) == {}


@pytest.mark.parametrize(
    ("level", "expected"), [(-45, {}), (-55, {"nearly_empty": [2]}), (-95, {"silent": [2]})]
)
def test_how_faint_a_recording_may_be(run, tmp_path, level, expected):
    tone = np.sqrt(2) * 10 ** (level / 20) * np.sin(np.arange(32_000) * 0.3)
    soundfile.write(tmp_path / "tone.wav", tone, 16_000, subtype="FLOAT")
    table = write_csv(tmp_path / "t.csv", [{"audio": str(tmp_path / "tone.wav"), "prediction": "x"}])
    assert found_in(run(table, "--json").figures["files"][0]) == expected


def test_the_order_in_which_workers_report_does_not_matter():
    random = np.random.default_rng(0)
    facts = np.zeros(60, FACTS)
    facts["line"], facts["samples"] = np.arange(2, 62), random.integers(3_200, 99_999, 60)
    for name in ("clip", "prompt", "answer"):
        facts[name] = random.integers(0, 4, 60)
    figures = []
    for order in (slice(None), slice(None, None, -1)):
        found = Findings("x.csv", "evaluation")
        for part in np.split(facts, 6)[order]:
            found.add(Inspected(part))
        figures.append(found.figures(facts[:20], None))
    assert figures[0] == figures[1]
    seen: dict[tuple[int, ...], int] = {}
    words = [tuple(row) for row in facts[["clip", "prompt", "answer"]].tolist()]
    again = [(line, seen[w]) for line, w in enumerate(words, 2) if seen.setdefault(w, line) != line]
    named = {each["name"]: each for each in figures[0]["findings"]}
    assert [*zip(named["duplicate"]["lines"], named["duplicate"]["details"], strict=True)] == again
    assert named["leak"]["lines"] == [line for line, w in enumerate(words, 2) if w in words[:20]]
    heard = {clip for clip, *_ in words[:20]}
    others = [n for n, w in enumerate(words, 2) if w[0] in heard and w not in words[:20]]
    assert named["leak_other_text"]["lines"] == others
