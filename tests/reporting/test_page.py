"""The report in a real browser: what is shown, played, filtered, sorted, and that nothing leaves the page."""

import random
import re
import shutil

import pytest

from mdl_toolkit.evaluation.text_metrics import CHARACTER, WORD, edits
from tests.support.browser import lacking
from tests.support.pages import WORDS, answered, made, shown, texts, until
from tests.support.runs import make_rows, write_csv

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

HAS_LINE = "[...document.querySelectorAll('.row small')].some(text => text.textContent === 'line %d')"
ALERT = "<script>alert(1)</script>"


# --- what is shown -----------------------------------------------------------------------------------------


def test_the_worst_rows_come_first_each_with_a_player(labelled, opened):
    page = opened(labelled[1], height=4000)
    assert texts(page, ".row .mark")[:11] == ["✗ wrong"] * 10 + ["✓ right"]
    assert shown(page)[:3] == [2, 8, 14]  # of the wrong ones, those first that the model was surest of
    sources = page.evaluate("[...document.querySelectorAll('audio')].map(audio => audio.src)")
    assert len(sources) == page.locator(".row").count()
    assert all(source.startswith("data:audio/") for source in sources[:2])
    assert all(source.startswith("file:///") for source in sources[2:])


@pytest.mark.parametrize("number", [0, 5])  # in the page itself, and a file
def test_a_recording_plays(labelled, opened, number):
    page = opened(labelled[1], height=4000)
    seconds = page.evaluate(
        """number => new Promise((done, failed) => {
            const audio = document.querySelectorAll('audio')[number];
            audio.muted = true;
            audio.addEventListener('loadedmetadata', () => done(audio.duration));
            audio.addEventListener('error', () => failed(audio.error.message));
            audio.load(); audio.preload = 'auto';
        })""",
        number,
    )
    assert 0.3 < seconds < 20


def test_a_name_with_odd_characters_plays(tmp_path, opened):
    names = ["50% #1?.wav", "中文 & 'a'.wav", "a:b+c.wav", "javascript:alert(1).wav"]
    rows = make_rows(tmp_path / "a", len(names))
    for row, name in zip(rows, names, strict=True):
        shutil.copy(row["audio"], tmp_path / "a" / name)
    csv_file = answered(tmp_path, [{"audio": name, "prediction": "x"} for name in names])
    page = opened(made(csv_file, "--base-dir", str(tmp_path / "a")))
    assert texts(page, ".row audio + small") == names
    found = page.evaluate(
        """() => Promise.all([...document.querySelectorAll('audio')].map(audio => new Promise(done => {
            audio.addEventListener('loadedmetadata', () => done(audio.duration));
            audio.addEventListener('error', () => done(null));
            audio.preload = 'auto'; audio.load();
        })))"""
    )
    assert all(seconds for seconds in found)


def test_texts_are_shown_and_not_run(tmp_path, opened):
    odd = [
        ALERT,
        "</script><img src=x onerror=alert(2)>",
        "<!-- <b>bold</b>",
        "\"'&amp; {{values}} \u2028\0|",
    ]
    rows = [{"audio": text, "reference": text, "prediction": f"{text} x", "group": text} for text in odd]
    page = opened(made(answered(tmp_path, rows), "--group-by", "group"), height=3000)
    page.wait_for_timeout(100)
    shown_texts = [text.replace("\ufffd", "\0") for text in texts(page, ".row .reference .text")]
    assert sorted(shown_texts) == sorted(odd)
    assert page.locator("#list script, #list img, #list b, #groups b, .notes b").count() == 0


def test_an_address_is_linked_without_its_password(tmp_path, opened):
    rows = [{"audio": "https://me:secret@example.org/a%20b.wav?x=1", "prediction": "x"}]
    path = made(answered(tmp_path, rows))
    page = opened(path)
    assert page.get_attribute("audio", "src") == "https://example.org/a%20b.wav?x=1"
    assert "secret" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("reference", "prediction", "unit", "missed", "added"),
    [
        ("The cat sat, down.", "the bat sat down", WORD, ["cat"], ["bat"]),
        ("one two three", "one three four five", WORD, ["two"], ["four five"]),
        ("今天天气很好。", "今天气很好啊", CHARACTER, ["天"], ["啊"]),
        ("same", "", WORD, ["same"], []),
    ],
)
def test_differences_are_marked(tmp_path, opened, reference, prediction, unit, missed, added):
    rows = [{"reference": reference, "prediction": prediction}]
    page = opened(made(answered(tmp_path, rows), "--metric", "wer" if unit == WORD else "cer"))
    assert texts(page, "del") == missed
    assert texts(page, "ins") == added
    assert page.locator(".row .reference .text").text_content() == reference


@pytest.mark.parametrize(("metric", "unit"), [("wer", WORD), ("cer", CHARACTER)])
def test_as_much_is_marked_as_evaluate_counts(tmp_path, opened, metric, unit):
    """What is not marked is alike on both sides, and what is marked are the edits."""
    draw = random.Random(3)
    units = WORDS if unit == WORD else [*"天地玄黄宇宙洪荒，。Größe"]
    joint = " " if unit == WORD else ""
    rows = []
    for _ in range(40):
        left = [draw.choice(units) for _ in range(draw.randint(1, 12))]
        right = [draw.choice(units) if draw.random() < 0.3 else each for each in left if draw.random() < 0.8]
        rows.append({"reference": joint.join(left), "prediction": joint.join(right)})
    page = opened(made(answered(tmp_path, rows), "--metric", metric), height=9000)
    found = page.evaluate(
        """() => [...document.querySelectorAll('.row')].map(row => ['reference', 'prediction'].map(side =>
            [...row.querySelector(`.${side} .text`).childNodes].map(
                node => [node.nodeName === 'SPAN' ? '' : node.textContent, node.nodeType === 1])))"""
    )
    lines = [line - 2 for line in shown(page)]
    assert sorted(lines) == list(range(40))
    expected = edits([r["reference"] for r in rows], [r["prediction"] for r in rows], unit)
    for line, sides in zip(lines, found, strict=True):
        alike = [joint.join(text for text, marked in side if not marked) for side in sides]
        assert edits(alike[:1], alike[1:], unit)[0, 0] == 0
        marked = [joint.join(text for text, marked in side if marked) for side in sides]
        missed, added = edits(marked, ["", ""], unit)[:, 1].tolist()
        assert max(missed, added) <= expected[line, 0] <= missed + added


def test_two_models_stand_side_by_side_with_intervals_and_p(tmp_path, opened):
    rows = [{"reference": "ab"[n % 2], "prediction": "a", "who": "xy"[n // 20]} for n in range(40)]
    other = write_csv(tmp_path / "other.csv", [{**row, "prediction": row["reference"]} for row in rows])
    words = ["--compare", str(other), "--group-by", "who", "--metric", "accuracy"]
    page = opened(made(answered(tmp_path, rows), *words))
    (card,) = texts(page, "#figures .card")
    assert re.search(
        r"other: 100\.00%; difference -50\.00%95 % interval of the difference: -\d\d\.\d\d% to -\d", card
    )
    assert card.endswith("p = 0.0020")
    assert texts(page, "#groups th")[2:5] == ["accuracy", "other model", "difference"]
    line = texts(page, "#groups tbody tr:first-child td")
    assert line[:2] == ["who: x", "20"]
    assert re.fullmatch(r"50\.00% \(\d\d\.\d\d% to \d\d\.\d\d%\)", line[2])
    assert re.fullmatch(r"-50\.00% \(-\d\d\.\d\d% to -\d\d\.\d\d%\), p (= 0\.\d+|< 0\.001)", line[4])


# --- filters, order, confusion -----------------------------------------------------------------------------


def test_filters_filter(labelled, opened):
    page = opened(labelled[1], height=9000)
    assert page.locator("#count").text_content() == "60 of 60 rows"
    page.select_option("#by-state", label="wrong")
    assert page.locator("#count").text_content() == "10 of 60 rows"
    assert set(texts(page, ".row .mark")) == {"✗ wrong"}
    page.select_option("#by-expected", label="Spanish")
    assert set(texts(page, ".row .reference .text")) == {"Spanish"}
    page.click("#reset")
    assert page.locator("#count").text_content() == "60 of 60 rows"
    page.select_option("#by-given", label="French")
    assert set(texts(page, ".row .prediction .text")) == {"French"}
    page.click("#reset")
    page.select_option("#by-group0", index=1)
    group = page.locator("#by-group0 option:checked").text_content()
    assert all(text.endswith(f": {group}") for text in texts(page, ".row .first small:last-child"))


def test_a_search_looks_into_texts_and_names(labelled, opened):
    page = opened(labelled[1], height=9000)
    page.fill("#search", "RUSS")
    until(page, "document.querySelector('#count').textContent !== '60 of 60 rows'")
    for row in page.locator(".row").all():
        assert "russ" in row.text_content().lower()
    assert page.locator(".row").count() >= 12
    page.fill("#search", "nothing like it")
    until(page, "document.querySelector('#count').textContent === '0 of 60 rows'")
    assert page.locator(".row").count() == 0


def test_rows_can_be_sorted(tmp_path, opened):
    rows = [
        {"reference": "a b c", "prediction": "a b c", "score": "-2"},
        {"reference": "a b c d e", "prediction": "x y", "score": ""},
        {"reference": "a", "prediction": "b", "score": "-1"},
    ]
    page = opened(made(answered(tmp_path, rows), "--metric", "wer"))
    orders = {}
    for name in page.locator("#by-sort option").evaluate_all("all => all.map(each => each.value)"):
        page.select_option("#by-sort", name)
        orders[name] = shown(page)
    assert orders == {
        "worst": [4, 3, 2], "errorsDown": [3, 4, 2], "lengthDown": [3, 2, 4], "lengthUp": [4, 2, 3],
        "scoreDown": [4, 2, 3], "scoreUp": [2, 4, 3], "line": [2, 3, 4],
    }  # fmt: skip


def test_a_click_in_the_confusion_matrix_filters(labelled, opened):
    page = opened(labelled[1], height=9000)
    cells = page.locator("#confusion td button")
    assert sum(int(text) for text in cells.all_text_contents()) == 60
    cell = page.locator("#confusion button[data-expected='4'][data-given='0']")
    count = int(cell.text_content())
    cell.click()
    assert page.locator("#count").text_content() == f"{count} of 60 rows"
    assert set(texts(page, ".row .reference .text")) == {"Spanish"}
    assert set(texts(page, ".row .prediction .text")) == {"English"}
    assert page.locator("#by-expected option:checked").text_content() == "Spanish"
    assert page.locator("#confusion button[aria-pressed=true]").count() == 1
    page.locator("#confusion button[aria-pressed=true]").click()
    assert page.locator("#count").text_content() == "60 of 60 rows"


def test_the_keyboard_is_enough(labelled, opened):
    page = opened(labelled[1], height=3000)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#confusion') !== null"):
            break
    page.keyboard.press("Enter")
    assert page.locator("#count").text_content() != "60 of 60 rows"
    page.focus(".chart svg >> nth=0")
    page.keyboard.press("ArrowRight")
    assert page.locator(".chart figcaption >> nth=0").text_content() == "Loss · step 1"


# --- curves, settings --------------------------------------------------------------------------------------


def test_curves_show_their_values(labelled, opened):
    page = opened(labelled[1])
    assert texts(page, ".chart figcaption") == ["Loss", "Learning rate", "Metrics on the evaluation data"]
    box = page.locator(".chart svg >> nth=0").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 11, box["y"] + 80)
    values = texts(page, ".chart >> nth=0 >> output")
    assert values[0] == "0.5"  # 4 / 8
    assert values[2] == "0.625"  # 5 / 8
    lines = page.locator(".chart >> nth=0 >> path").count()
    page.locator(".chart >> nth=0 >> .legend button >> nth=0").click()
    assert page.locator(".chart >> nth=0 >> path").count() == lines - 1


def test_settings_say_what_was_changed(labelled, opened):
    page = opened(labelled[1])
    page.click("#settings summary")
    changed = page.locator("#settings tr.changed td:first-child").all_text_contents()
    assert {"--lr", "--lora-rank", "--gradient-checkpointing"} <= set(changed)
    assert "--seed" not in changed
    line = page.locator("#settings tr", has_text="--lora-rank").all_text_contents()[0]
    assert line.startswith("--lora-rank4Rank of the LoRA")
