"""Find Chinese texts in which a space is missing."""

import re

BESIDE = re.compile(r"(?:[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9][\u4e00-\u9fff])")


def wrong_in(text: str) -> list[str]:
    """Return each spot where a Chinese character touches a Latin letter or digit, and its surroundings."""
    return [text[max(0, found.start() - 10) : found.end() + 10] for found in BESIDE.finditer(text)]
