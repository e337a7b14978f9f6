"""A browser that notices every request, and a report to look at."""

import json
from contextlib import contextmanager

import pytest

from mdl_toolkit.config.yaml import to_yaml
from tests.support.browser import chromium
from tests.support.pages import answered, made
from tests.support.runs import train_options
from tests.support.spoilt import phrases


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
