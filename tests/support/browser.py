"""A headless Chromium of the system for tests and screenshots, driven by playwright; or why there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def lacking() -> str | None:
    """What is missing for tests in a browser, or None."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return None if _program() else "no Chromium is installed (make setup installs it where apt and root are)"


def _program() -> str | None:
    return next((found for found in map(shutil.which, NAMES) if found), None)


@contextmanager
def chromium(*words: str) -> Iterator[Any]:
    """The browser, started with further words."""
    from playwright.sync_api import sync_playwright

    # A sandbox cannot be had by root, nor in most containers; only our own pages are opened.
    with sync_playwright() as play:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = play.chromium.launch(executable_path=_program(), args=[*sandbox, *words])
        try:
            yield browser
        finally:
            browser.close()
