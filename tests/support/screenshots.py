"""The pictures in docs/images: the report that the demonstration ends with, in a headless Chromium.

`make screenshots` writes them anew. For the Chinese ones the system needs a font with Chinese characters, as
in Debian's fonts-noto-cjk.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from mdl_toolkit.config.data import DemoOptions
from mdl_toolkit.demo import run_demo
from tests.support.browser import chromium
from tests.support.paths import DOCS

IMAGES = DOCS / "images"
COLOURS = 200  # of a picture's palette: half of the bytes, and no difference to be seen
SHOTS: dict[str, dict[str, Any]] = {
    "report-wide": {"size": (1200, 1000), "locale": "en-US", "scheme": "light", "top": "body"},
    "report-dark": {"size": (1200, 900), "locale": "zh-CN", "scheme": "dark", "top": "#confusion"},
    "report-narrow": {"size": (400, 900), "locale": "zh-CN", "scheme": "light", "top": "#predictions"},
}


def main() -> None:
    """Run the demonstration and take the pictures."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        os.chdir(folder)  # so that the page names files as a user would
        run_demo(DemoOptions(output="demo"))
        for name, shot in SHOTS.items():
            _take(browser, Path(folder, "demo/report.html"), IMAGES / f"{name}.png", shot)


def _take(browser: Any, page: Path, target: Path, shot: dict[str, Any]) -> None:
    width, height = shot["size"]
    context = browser.new_context(
        viewport={"width": width, "height": height}, locale=shot["locale"], color_scheme=shot["scheme"]
    )
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.evaluate("top => document.querySelector(top).scrollIntoView()", shot["top"])
    tab.wait_for_timeout(300)
    tab.screenshot(path=target)
    context.close()
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(COLOURS).save(target, optimize=True)


if __name__ == "__main__":
    main()
