"""The page to try a model, in a headless Chromium with a microphone that plays a file."""

import re
from pathlib import Path

import pytest

from mdl_toolkit import demo
from tests.support.browser import chromium, lacking
from tests.support.pages import texts, until
from tests.support.recordings import save
from tests.support.server import needs_server
from tests.support.serving import Served, text_of
from tests.support.spoilt import phrases

pytestmark = [needs_server, pytest.mark.skipif(lacking() is not None, reason=str(lacking()))]

SPEECH = phrases("test.csv")[0]["audio"]


@pytest.fixture(scope="module")
def browser(place):
    import soundfile

    samples, rate = soundfile.read(SPEECH, dtype="int16")
    soundfile.write(place / "microphone.wav", samples, rate, subtype="PCM_16")
    words = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    with chromium(*words, f"--use-file-for-fake-audio-capture={place / 'microphone.wav'}") as found:
        yield found


@pytest.fixture
def opened(browser):
    """Open the page; at the end nothing was requested elsewhere, and nothing went wrong."""
    contexts, requests, said = [], [], []

    def opener(url, locale="en-US"):
        contexts.append(browser.new_context(locale=locale, permissions=["microphone"]))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page

    yield opener
    for context in contexts:
        context.close()
    assert [text for text in said if "with a status of 40" not in text] == []
    assert all(re.match(r"http://127\.0\.0\.1:|blob:|data:", url) for url in requests)


def ready(page):
    until(page, "document.querySelectorAll('#left option').length > 0")
    return page


def answered(page, count):
    """Ask, and return the answers and what is said of them."""
    page.click("#ask")
    until(page, f"document.querySelectorAll('article').length === {count}")
    until(page, "!document.getElementById('ask').disabled")
    return texts(page, "article p"), texts(page, "article small")


def test_a_file_is_answered_by_base_and_tuned_side_by_side(served, place, opened):
    page = ready(opened(served.url))
    assert page.input_value("#user") == demo.PROMPT
    assert page.input_value("#system") == "Listen well."
    assert (page.input_value("#left"), page.input_value("#right")) == (str(place / "model"), "tuned")
    page.set_input_files("#file", SPEECH)
    assert page.text_content("#source").endswith(".flac")
    page.fill("#most", "12")
    found, said = answered(page, 2)
    content = Path(SPEECH).read_bytes()
    wanted = [
        text_of(served.ask(content, demo.PROMPT, "Listen well.", model=model, max_tokens=12))
        for model in (str(place / "model"), "tuned")
    ]
    assert found == wanted
    assert wanted[0] != wanted[1]
    assert texts(page, "article h2") == [str(place / "model"), "tuned"]
    assert all(re.fullmatch(r"\d+\.\d s, \d+ tokens(, cut at the limit)?", each) for each in said)


def test_the_microphone_is_recorded_and_answered(served, opened):
    page = ready(opened(served.url))
    page.click("#record")
    until(page, "document.getElementById('record').getAttribute('aria-pressed') === 'true'")
    assert page.text_content("#record") == "Stop"
    page.wait_for_timeout(1500)
    page.click("#record")
    until(page, "document.getElementById('source').textContent !== ''")
    assert re.fullmatch(r"recorded, [1-9]\.\d s", page.text_content("#source"))
    assert page.text_content("#record") == "Record"
    page.select_option("#right", "")
    page.fill("#most", "5")
    (found,), (said,) = answered(page, 1)
    assert found
    assert "5 tokens, cut at the limit" in said


def test_a_file_can_be_dropped(served, opened):
    page = ready(opened(served.url))
    page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["no recording"], "letter.txt"));
            const event = new DragEvent("drop", { bubbles: true, dataTransfer: data });
            document.getElementById("drop").dispatchEvent(event);
        }"""
    )
    assert page.text_content("#source") == "letter.txt"


def test_what_the_server_refuses_is_shown(served, place, opened):
    page = ready(opened(served.url))
    page.click("#ask")
    until(page, "document.getElementById('problem').textContent !== ''")
    assert page.text_content("#problem") == "record something or choose a file first"
    save(place, b"<b>no recording</b>", "letter.wav")
    page.set_input_files("#file", str(place / "letter.wav"))
    assert page.text_content("#problem") == ""
    page.select_option("#right", "")
    page.click("#ask")
    until(page, "document.querySelector('article small')?.textContent.startsWith('the recording')")
    # What the file holds is text in the page.
    assert "<b>" in page.text_content("article small")
    assert page.locator("article b").count() == 0


def test_it_speaks_chinese(served, opened):
    page = ready(opened(served.url, "zh-CN"))
    assert page.text_content("#ask") == "提问"
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.click("#ask")
    until(page, "document.getElementById('problem').textContent === '请先录音或选择文件'")
    page.click("#language")
    assert page.text_content("#ask") == "Ask"


def test_a_token_is_asked_for(place, opened):
    server = Served(str(place / "model"), "--token", "s3cret")
    try:
        page = opened(server.url)
        until(page, "!document.getElementById('login').hidden")
        page.fill("#token", "s3cret")
        page.click("#login button")
        ready(page)
        until(page, "document.getElementById('login').hidden")
        page.set_input_files("#file", SPEECH)
        page.fill("#most", "2")
        (found,), _ = answered(page, 1)
        assert found
    finally:
        server.close()
