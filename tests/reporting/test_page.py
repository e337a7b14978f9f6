"""The report in a real browser: what is shown, played, filtered, sorted, and that nothing leaves the page."""

import csv
import json
import random
import re
import shutil
from contextlib import contextmanager

import pytest

from mdl_toolkit.cli.main import run
from mdl_toolkit.config.yaml import to_yaml
from mdl_toolkit.evaluation.text_metrics import CHARACTER, WORD, edits
from tests.support.browser import chromium, lacking
from tests.support.runs import make_rows, train_options, write_csv
from tests.support.spoilt import make_spoilt, phrases

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

HAS_LINE = "[...document.querySelectorAll('.row small')].some(text => text.textContent === 'line %d')"
ALERT = "<script>alert(1)</script>"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "looked",
    "at",
    "rain",
    "while",
    "nobody",
    "was",
    "there",
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser):
    """Open a page; at the end nothing was requested but the file and recordings, and nothing went wrong."""
    with _opener(browser) as opener:
        yield opener


@contextmanager
def _opener(browser):
    contexts, requests, said = [], [], []

    def opener(path, width=1200, height=900, locale="en-US", scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, locale=locale, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield opener
    for context in contexts:
        context.close()
    assert [text for text in said if not text.endswith("net::ERR_FILE_NOT_FOUND")] == []
    assert all(url.startswith(("file:", "data:")) for url in requests)


def made(path, *words):
    """The report of some file or folder."""
    assert run(["report", str(path), "--output", str(path.parent / "report.html"), *words]) == 0
    return path.parent / "report.html"


def answered(folder, rows):
    return write_csv(folder / "answers.csv", rows)


def texts(page, selector):
    return page.locator(selector).all_text_contents()


def shown(page):
    """Lines of the rows in the page, in their order."""
    return [int(text.split()[-1]) for text in texts(page, ".row .first small:nth-of-type(1)")]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """60 phrases, ten of them answered wrongly, with scores; a run's folder beside them."""
    place = tmp_path_factory.mktemp("labelled")
    rows = phrases("test.csv")
    names = sorted({row["prediction"] for row in rows})
    table = []
    for number, row in enumerate(rows):
        right = row["prediction"]
        given = names[(names.index(right) + 1) % len(names)] if number % 6 == 0 else right
        table.append(
            {"audio": row["audio"], "reference": right, "prediction": given, "score": f"{-number / 10:.1f}"}
        )
    output = place / "run"
    output.mkdir()
    (output / "mdl-toolkit.yaml").write_text(to_yaml(train_options(place, place, output)), encoding="utf-8")
    log = [{"step": n, "loss": 4 / n, "learning_rate": 0.01 / n, "epoch": n / 4} for n in range(1, 9)]
    log += [
        {"step": n, "eval_loss": 5 / n, "eval_tokens": 9, "eval_accuracy": n / 10, "epoch": 1} for n in (4, 8)
    ]
    (output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return place, made(
        output, "--predictions", str(answered(place, table)), "--embed-audio", "2", "--group-by", "length"
    )


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


# --- languages, colours, widths ----------------------------------------------------------------------------


def test_both_languages(labelled, opened):
    page = opened(labelled[1], locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("h1").text_content() == "报告 run"
    assert page.locator("#count").text_content() == "共 60 行，显示 60 行"
    page.click("#settings summary")
    assert "LoRA 的秩" in page.locator("#settings").text_content()
    page.select_option("#by-state", label="错误")
    page.click("#language")
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").text_content() == "Report run"
    assert page.locator("#count").text_content() == "10 of 60 rows"  # what was chosen stays
    left = page.evaluate("[...document.body.innerText.matchAll(/[\u4e00-\u9fff]+/g)].map(found => found[0])")
    assert left == ["中文"]


def brightness(page):
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(","))) / 765


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(labelled, opened, scheme):
    page = opened(labelled[1], scheme=scheme)
    assert (brightness(page) > 0.8) == (scheme == "light")
    page.click("#theme")
    assert (brightness(page) > 0.8) == (scheme == "dark")
    page.click("#theme")
    assert (brightness(page) > 0.8) == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(labelled, opened, scheme):
    """At least 4.5 to 1, as WCAG AA asks."""
    page = opened(labelled[1], height=4000, scheme=scheme)
    ratios = page.evaluate(
        """selectors => selectors.map(selector => {
            const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const light = colour => {
                canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
                    v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const element = document.querySelector(selector);
            const ground = [];
            for (let at = element; at; at = at.parentElement)
                ground.push(getComputedStyle(at).backgroundColor);
            const below = ground.reverse().map(light).at(-1);  // each is painted over the one before
            const ink = light(getComputedStyle(element).color);
            return (Math.max(below, ink) + 0.05) / (Math.min(below, ink) + 0.05);
        })""",
        ["h1", "#name", "#count", ".card span", ".row small", ".row .wrong", "del", "ins", ".legend button",
         "td button.right", "td button:not(.right)"],
    )  # fmt: skip
    assert all(ratio >= 4.5 for ratio in ratios), ratios


@pytest.mark.parametrize("width", [400, 760, 1200, 2000])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_no_width_makes_the_page_scroll_sideways(labelled, opened, width, locale):
    page = opened(labelled[1], width=width, height=3000, locale=locale)
    page.click("#settings summary")
    page.click("#evaluations summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    (text,) = page.locator(".row .reference >> nth=0").all()
    other = page.locator(".row .prediction >> nth=0")
    is_beside = abs(text.bounding_box()["y"] - other.bounding_box()["y"]) < 1
    assert is_beside == (width > 760)


def test_a_long_word_does_not_widen_the_page(tmp_path, opened):
    rows = [{"audio": "b" * 900, "reference": "a" * 3000, "prediction": "e" * 3000}]
    page = opened(made(answered(tmp_path, rows)), width=400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_it_prints(labelled, opened, tmp_path):
    page = opened(labelled[1])
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".row").count() == 60
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator(".row").count() < 60
    assert page.pdf().startswith(b"%PDF")


# --- many rows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """10,000 rows whose texts have different lengths."""
    draw, place = random.Random(5), tmp_path_factory.mktemp("many")
    path = place / "answers.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "reference", "prediction"])
        for number in range(10_000):
            words = [draw.choice(WORDS) for _ in range(draw.randint(1, 20))]
            given = [each if draw.random() < 0.9 else draw.choice(WORDS) for each in words]
            writer.writerow([f"recordings/clip-{number:05}.flac", " ".join(words), " ".join(given)])
    return made(path, "--bootstrap", "0")


def until(page, condition):
    """Wait for a condition in JavaScript; playwright's own wait needs `eval`, which the page forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"never: {condition}")


def rows_there(page):
    return page.locator(".row").count()


def test_ten_thousand_rows_open_and_filter_at_once(many, opened):
    """Bounds are loose, since machines differ and are shared; what was measured stands in the docs."""
    assert many.stat().st_size < 2_000_000
    page = opened(many)
    until(page, "performance.getEntriesByName('first-contentful-paint').length > 0")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    page.evaluate("document.querySelector('#list').scrollIntoView()")
    page.wait_for_timeout(100)
    assert 0 < rows_there(page) < 100
    timed = """([selector, value, kind]) => {
        const field = document.querySelector(selector), began = performance.now();
        field.value = value;
        field.dispatchEvent(new Event(kind));
        document.body.getBoundingClientRect();
        return performance.now() - began;
    }"""
    times = {
        name: page.evaluate(timed, ["#by-" + name, value, "change"])
        for name, value in (("state", "0"), ("sort", "lengthDown"))
    }
    page.click("#reset")
    times["search"] = page.evaluate(
        """() => new Promise(done => {
            const began = performance.now();
            new MutationObserver(() => done(performance.now() - began)).observe(
                document.querySelector('#count'), {childList: true});
            document.querySelector('#search').value = 'cat sat';
            document.querySelector('#search').dispatchEvent(new Event('input'));
        })"""
    )
    times |= {"paint": paint / 3, "loaded": loaded / 5}
    assert max(times.values()) < 1000, times


def test_scrolling_shows_every_row_once_and_keeps_few(many, opened):
    page = opened(many)
    page.select_option("#by-sort", "line")
    page.evaluate("document.querySelector('#list').scrollIntoView()")
    seen, most = set(), 0
    for _ in range(60):
        page.mouse.wheel(0, 700)
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        lines = shown(page)
        assert lines == list(range(lines[0], lines[0] + len(lines)))
        seen.update(lines)
        most = max(most, len(lines))
    assert seen == set(range(min(seen), max(seen) + 1))
    assert len(seen) > 300
    assert most < 100
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, "[...document.querySelectorAll('.row small')].some(s => s.textContent === 'line 10001')")
    assert rows_there(page) < 100
    page.evaluate("scrollTo(0, 0)")
    until(page, "[...document.querySelectorAll('.row small')].some(s => s.textContent === 'line 2')")


def test_scrolling_does_not_stutter(many, opened):
    page = opened(many)
    page.evaluate("document.querySelector('#list').scrollIntoView()")
    gaps = page.evaluate(
        """() => new Promise(done => {
            const gaps = []; let last = performance.now(), left = 60;
            const step = () => {
                const now = performance.now();
                gaps.push(now - last); last = now;
                scrollBy(0, 400);
                if (left--) requestAnimationFrame(step); else done(gaps);
            };
            requestAnimationFrame(step);
        })"""
    )
    gaps = sorted(gaps)
    assert gaps[30] < 150, gaps


def test_a_recording_goes_on_playing_when_its_row_leaves_the_window(labelled, opened):
    page = opened(labelled[1], height=500)
    page.evaluate("document.querySelector('#list').scrollIntoView()")
    page.wait_for_selector("audio")
    page.evaluate(
        """() => { window.first = document.querySelector('audio'); first.muted = true; first.loop = true;
                   return first.play(); }"""
    )
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, "document.querySelector('.row.away') !== null")
    assert page.evaluate("!first.paused && first.isConnected")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("document.querySelector('#list').scrollIntoView()")
    until(page, "document.querySelector('.row.away') === null")
    assert page.evaluate("!first.paused && first.isConnected")


# --- spoilt copies -----------------------------------------------------------------------------------------


def test_a_report_on_spoilt_recordings(tmp_path, opened, capsys):
    """What cannot be embedded is linked and told; what a browser cannot play says so in its row."""
    train, _ = make_spoilt(tmp_path, rows=2)
    rows = [{**row, "reference": row["prediction"]} for row in train.rows]
    page = opened(
        made(answered(tmp_path, rows), "--embed-audio", str(len(rows)), "--metric", "accuracy"), height=9000
    )
    said = capsys.readouterr().err
    assert "2 recordings are linked, not embedded" in said  # a text file, and none at all
    assert "1 of " in said
    sources = page.evaluate("[...document.querySelectorAll('audio')].map(audio => audio.src)")
    assert len(sources) == len(rows)
    assert sum(source.startswith("data:") for source in sources) == len(rows) - 2
    page.evaluate(
        "document.querySelectorAll('audio').forEach(audio => { audio.preload = 'auto'; audio.load(); })"
    )
    until(
        page,
        """() => [...document.querySelectorAll('.row small')].filter(
            name => name.textContent.endsWith('cannot be played here')).length === 2""",
    )
