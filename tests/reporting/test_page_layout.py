"""The report in a real browser: languages, colours, widths, paper, and ten thousand rows."""

import csv
import random

import pytest

from tests.support.browser import lacking
from tests.support.pages import WORDS, answered, made, shown, until
from tests.support.spoilt import make_spoilt

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

HAS_LINE = "[...document.querySelectorAll('.row small')].some(text => text.textContent === 'line %d')"
ALERT = "<script>alert(1)</script>"


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
