"""Addresses of recordings: tell them from paths, and show them without passwords."""

import re


def is_url(audio: str) -> bool:
    """Tell whether `Row.audio` is an address to fetch, rather than a path."""
    return audio.lower().startswith(("http://", "https://"))


def without_credentials(text: str) -> str:
    """Return an address or path as messages may show it: without the `user:password@` of an address."""
    return re.sub(r"(?i)^(https?://)[^/?#]*@", r"\1", text)
