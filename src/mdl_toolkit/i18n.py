"""Chinese or English: which one the user reads, and a text that exists in both.

Nothing here knows what the texts are about.
"""

import os
from dataclasses import dataclass


def is_chinese() -> bool:
    """Tell whether messages should be in Chinese.

    The order is gettext's: LANGUAGE, LC_ALL, LC_MESSAGES, LANG; the first one that is set decides.
    """
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(name, "")
        if value:
            return value.lower().startswith("zh")
    return False


@dataclass(frozen=True)
class Text:
    """One sentence in both languages; `str()` gives the user's."""

    en: str
    zh: str

    def __str__(self) -> str:
        return self.zh if is_chinese() else self.en
